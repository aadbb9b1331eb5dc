"""Policies at work on a catalog, and random requests that must never get a wrong slate."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.reranking_latency import FULL_POLICY, NOW_MS, simulated_funnel, simulated_shop
from benchmarks.reranking_soundness import check
from reranking.filters import InStock
from reranking.items import Request
from reranking.policy import parse_policies, policies_from_config, single_policy
from reranking.reranker import NO_PURCHASES, Funnel, Purchases, Reranker

SHOP = simulated_shop(400)
REQUEST = Request(now_ms=NOW_MS)


def funnel(rows, reserve=(), **others) -> Funnel:
    return Funnel(
        rows=np.array(rows, np.int32),
        scores=np.arange(len(rows), 0, -1).astype(np.float32),
        reserve_rows=np.array(reserve, np.int32),
        reserve_scores=np.arange(len(reserve), 0, -1).astype(np.float32),
        **others,
    )


def reranker(*rules) -> Reranker:
    return Reranker(single_policy(list(rules)), SHOP)


def slate(rules, found, limit=3):
    policies = reranker(*rules)
    return policies.slate(policies.policy(), found, limit, REQUEST)


def everything() -> np.ndarray:
    return np.ones(SHOP.num_items + 1, bool)


def test_positions_are_those_of_the_funnel():
    result = slate([{"rule": "deny", "item_id": ["item-6", "item-8"]}], funnel([5, 6, 7], [7, 8, 9, 10]), 9)
    assert result.rows.tolist() == [5, 7, 9, 10]
    assert result.order.tolist() == [0, 2, 5, 6]  # of 5 6 7, 7 8 9 10


def test_a_pinned_item_that_was_not_found_is_shown_where_the_request_allows_it():
    pin = {"rule": "pin", "item_id": "item-77", "place": 2}
    result = slate([pin], funnel([5, 6, 7], eligible=everything()))
    assert (result.rows.tolist(), result.order.tolist()) == ([5, 77, 6], [0, -1, 1])
    not_allowed = everything()
    not_allowed[77] = False
    for found in (funnel([5, 6, 7]), funnel([5, 6, 7], eligible=not_allowed)):
        result = slate([pin], found)
        assert (result.rows.tolist(), result.relaxed) == ([5, 6, 7], ["pin@2"])


@pytest.mark.parametrize("eligible", [None, everything()])
def test_a_pinned_item_of_the_reserve(eligible):
    pin = {"rule": "pin", "item_id": "item-77", "place": 1}
    result = slate([pin], funnel([5, 6], [8, 77, 9], eligible=eligible), 9)
    assert result.rows.tolist() == [77, 5, 6, 8, 9]
    ranked = slate([pin], funnel([5, 77, 6], eligible=eligible), 9)
    assert (ranked.rows.tolist(), ranked.order.tolist()) == ([77, 5, 6], [1, 0, 2])
    both = slate([pin], funnel([5, 77, 6], [6, 5, 77], eligible=eligible), 9)
    assert (both.rows.tolist(), both.order.tolist()) == ([77, 5, 6], [1, 0, 2])


def test_the_hard_filters_by_themselves():
    policies = reranker({"rule": "in_stock"}, {"rule": "drop_seen"})
    ((name, allowed),) = policies.filters(policies.policy(), REQUEST)
    assert name == "in_stock"
    assert allowed[1:].tolist() == [stock != 0 for stock in SHOP.stock[1:].tolist()]


def test_seen_items_are_given_by_row():
    seen = np.zeros(SHOP.num_items + 1, bool)
    seen[[5, 9]] = True
    found = funnel([5, 6], [9, 8], seen=seen)
    assert slate([{"rule": "drop_seen"}], found, 2).rows.tolist() == [6, 8]


def test_nothing_found_is_nothing_shown():
    assert slate([{"rule": "drop_seen"}], funnel([])).rows.tolist() == []
    assert slate([{"rule": "mmr", "relevance_weight": 0.5}], funnel([], [3, 4])).rows.tolist() == [3, 4]


def test_policies_and_overrides_by_request():
    text = FULL_POLICY + "    overrides:\n      mmr.relevance_weight: {min: 0, max: 1}\n"
    policies = Reranker(parse_policies(text), SHOP)
    found = simulated_funnel(SHOP, np.random.default_rng(0), 200, 100)
    plain = policies.slate(policies.policy(), found, 20, REQUEST)
    varied = policies.slate(policies.policy("home", {"mmr.relevance_weight": 0.2}), found, 20, REQUEST)
    assert plain.rows.tolist() != varied.rows.tolist()
    again = policies.slate(policies.policy(None, {}), found, 20, REQUEST)
    assert again.rows.tolist() == plain.rows.tolist()


def test_without_explain_nothing_is_worked_out_for_it(monkeypatch):
    def fail(*_):
        raise AssertionError("worked out")

    monkeypatch.setattr("reranking.rerank._reasons", fail)
    assert slate([{"rule": "drop_seen"}], funnel([5, 6, 7])).reasons is None


def test_random_requests_get_no_wrong_slate():
    result = check(150, seed=1)
    assert result["faults"] == []
    # The requests are hard ones: rules yield, reserves are needed, slates are short.
    assert result["with a rule that yielded"] > 20
    assert result["with items of the reserve"] > 20
    assert result["short"] > 10


def test_the_check_of_random_requests_finds_faults(monkeypatch):
    monkeypatch.setattr(InStock, "allows", lambda rule, items: np.ones(len(items), bool))
    assert any("forbidden" in fault for fault in check(60, seed=1)["faults"])
    monkeypatch.undo()
    original = Reranker.slate

    def shortened(self, *arguments, **options):
        result = original(self, *arguments, **options)
        return replace(result, rows=result.rows[:-1], order=result.order[:-1])

    monkeypatch.setattr(Reranker, "slate", shortened)
    assert any("are eligible" in fault for fault in check(20, seed=1)["faults"])


@pytest.mark.parametrize("now", [None, NOW_MS])
def test_filters_over_the_whole_catalog_are_those_over_a_list(now):
    rules = [
        {"rule": "in_stock", "min_stock": 3},
        {"rule": "available"},
        {"rule": "deny", "brand": ["brand-1", "brand-2"]},
        {"rule": "price_range", "min_price": 5, "max_price": 40},
        {"rule": "bought_within", "days": 20},
        {"rule": "region"},
        {"rule": "min_age"},
        {"rule": "drop_seen"},
    ]
    policies = reranker(*rules)
    random = np.random.default_rng(0)
    every = np.arange(1, SHOP.num_items + 1, dtype=np.int32)
    bought = Purchases(random.choice(every, 30), NOW_MS - random.integers(0, 60, 30) * 86_400_000)
    for context in ({}, {"region": "DE"}, {"region": "FR", "age": "30"}):
        request = Request(now_ms=now, context=context)
        found = dict(policies.filters(policies.policy(), request, bought))
        assert len(found) == 7
        for rule, (name, mask) in zip(rules, found.items(), strict=False):
            alone = reranker(rule)
            shown = alone.slate(alone.policy(), funnel(every, purchases=bought), 500, request).rows
            assert np.flatnonzero(mask[1:]).tolist() == sorted(shown - 1), name
        assert any(not mask.all() for mask in found.values())


@pytest.mark.parametrize("now", [None, NOW_MS])
def test_what_is_kept_of_filters_is_what_they_say(now):
    """Moments are asked for in any order, each twice: also those just before and at a change."""
    policies = reranker(
        {"rule": "in_stock", "min_stock": 3},
        {"rule": "available"},
        {"rule": "bought_within", "days": 20},
        {"rule": "region"},
        {"rule": "min_age"},
    )
    policy = policies.policy()
    random = np.random.default_rng(0)
    changes = np.concatenate([SHOP.available_from[1:], SHOP.available_until[1:]])
    bought = Purchases(np.array([5, 8], np.int32), np.array([NOW_MS - 1, 0]))
    asked = []
    for _ in range(40):
        moment = now and int(random.choice([NOW_MS, *(random.choice(changes, 3) - random.integers(0, 2, 3))]))
        context = [{}, {"region": "DE"}, {"region": "FR", "age": "30"}, {"age": "old"}][random.integers(4)]
        request = Request(now_ms=moment, context=context)
        asked.append((request, [NO_PURCHASES, bought][random.integers(2)]))
    for request, purchases in [*asked, *asked[::-1]]:
        expected = np.ones(SHOP.num_items + 1, bool)
        expected[0] = False
        for _, mask in policies.filters(policy, request, purchases):
            expected &= mask
        found = policies.allowed(policy, request, purchases)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(("rule", "key"), [("region", "region"), ("min_age", "age")])
def test_what_the_catalog_does_not_tell_apart_is_worked_out_once(rule, key):
    policies = reranker({"rule": rule})
    masks = {
        id(policies.allowed(policies.policy(), Request(now_ms=NOW_MS, context={key: value})))
        for value in map(str, range(18, 80))
    }
    assert len(masks) == 1


def test_policies_of_equal_filters_share_what_is_kept():
    rules = [{"rule": "in_stock"}, {"rule": "available"}]
    both = Reranker(
        policies_from_config({"policies": {name: {"rules": rules} for name in "ab"}, "default": "a"}), SHOP
    )
    assert both.allowed(both.policy("a"), REQUEST) is both.allowed(both.policy("b"), REQUEST)


def test_what_is_kept_of_filters_is_nobodys_to_change():
    policies = reranker({"rule": "in_stock"})
    allowed = policies.allowed(policies.policy(), REQUEST)
    assert policies.allowed(policies.policy(), REQUEST) is allowed  # nothing is worked out again
    with pytest.raises(ValueError, match="read-only"):
        allowed[1] = False


def test_the_reserve_comes_in_the_order_of_its_scores():
    found = funnel([5, 6], [7, 8, 9])
    found = replace(found, reserve_scores=np.array([1, 3, 3], np.float32))
    result = slate([], found, 5)
    assert result.rows.tolist() == [5, 6, 8, 9, 7]
    assert result.order.tolist() == [0, 1, 3, 4, 2]
