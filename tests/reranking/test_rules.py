import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranking.rules import MMR, Cap, DropSeen, RankedItems, rules_from_config


def ranked(scores, *, vectors=None, brand=None, seen=None) -> RankedItems:
    n = len(scores)
    zeros = np.zeros(n, np.int32)
    return RankedItems(
        rows=np.arange(1, n + 1, dtype=np.int32),
        scores=np.array(scores, np.float32),
        vectors=np.zeros((n, 2), np.float32) if vectors is None else np.array(vectors, np.float32),
        groups={
            "category": zeros,
            "seller_id": zeros,
            "brand": zeros if brand is None else np.array(brand, np.int32),
        },
        seen=np.zeros(n, bool) if seen is None else np.array(seen, bool),
    )


def apply(rule, items, limit, order=None):
    order = np.arange(len(items.rows)) if order is None else np.array(order, np.int64)
    result, relaxed = rule.apply(items, order, limit)
    assert result.dtype == np.int64
    return result.tolist(), relaxed


# --- DropSeen


@pytest.mark.parametrize(
    ("limit", "expected", "relaxed"),
    [
        (1, [1, 3], False),
        (2, [1, 3], False),
        (3, [1, 3, 0], True),
        (9, [1, 3, 0, 2], True),
    ],
)
def test_drop_seen_worked_out(limit, expected, relaxed):
    items = ranked([4, 3, 2, 1], seen=[1, 0, 1, 0])
    assert apply(DropSeen(), items, limit) == (expected, relaxed)


def test_drop_seen_short_of_items_but_not_of_seen_ones():
    assert apply(DropSeen(), ranked([2, 1]), 5) == ([0, 1], False)


def test_drop_seen_keeps_the_order_it_gets():
    items = ranked([4, 3, 2, 1], seen=[1, 0, 1, 0])
    assert apply(DropSeen(), items, 3, order=[3, 2, 1, 0]) == ([3, 1, 2], True)


# --- Cap


def test_cap_worked_out():
    items = ranked([6, 5, 4, 3, 2, 1], brand=[7, 7, 7, 8, 0, 0])
    assert apply(Cap("brand", 1), items, 3) == ([0, 3, 4, 5, 1, 2], False)
    assert apply(Cap("brand", 2), items, 3) == ([0, 1, 3, 4, 5, 2], False)
    assert apply(Cap("brand", 1), items, 5) == ([0, 3, 4, 5, 1, 2], True)  # four fit; the fifth place yields


def test_cap_never_caps_a_missing_group():
    assert apply(Cap("brand", 1), ranked([3, 2, 1], brand=[0, 0, 0]), 3) == ([0, 1, 2], False)


def test_cap_is_not_relaxed_by_a_short_list():
    assert apply(Cap("brand", 1), ranked([2, 1], brand=[1, 2]), 5) == ([0, 1], False)


# --- MMR


def test_mmr_worked_out():
    # Item 1 is item 0 again; item 2 is at right angles to both. Relevance: 1, 0.9, 0.
    items = ranked([20, 19, 10], vectors=[[2, 0], [3, 0], [0, 1]])
    # w = 0.5: item 1 is worth 0.45 - 0.5 = -0.05, item 2 is worth 0 - 0 = 0.
    assert apply(MMR(0.5), items, 2) == ([0, 2, 1], False)
    # w = 0.6: item 1 is worth 0.54 - 0.4 = 0.14, item 2 still 0.
    assert apply(MMR(0.6), items, 2) == ([0, 1, 2], False)
    assert apply(MMR(0), items, 3) == ([0, 2, 1], False)
    assert apply(MMR(1), items, 3) == ([0, 1, 2], False)


def test_mmr_rewards_the_opposite():
    items = ranked([3, 3, 3], vectors=[[1, 0], [0, 1], [-1, 0]])
    assert apply(MMR(0.5), items, 2) == ([0, 2, 1], False)


def test_mmr_leaves_the_rest_in_their_old_order():
    items = ranked([5, 4, 3, 2, 1])
    assert apply(MMR(1.0), items, 2, order=[4, 2, 3, 0, 1]) == ([0, 1, 4, 2, 3], False)


def test_mmr_equal_scores_and_zero_vectors_change_nothing():
    assert apply(MMR(0.5), ranked([1, 1, 1]), 3, order=[2, 0, 1]) == ([2, 0, 1], False)


def test_mmr_of_one_and_of_none():
    items = ranked([1.0])
    assert apply(MMR(0.5), items, 5) == ([0], False)
    assert apply(MMR(0.5), items, 5, order=[]) == ([], False)


def test_mmr_far_apart_scores_do_not_overflow():
    assert apply(MMR(0.5), ranked([3e38, 0, -3e38]), 3) == ([0, 1, 2], False)


# --- Each rule against an obviously right loop


@st.composite
def cases(draw):
    n = draw(st.integers(0, 12))

    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    number = st.integers(-2, 2)
    items = ranked(
        sorted(column(st.integers(-5, 5)), reverse=True),
        vectors=np.reshape(column(st.tuples(number, number)), (n, 2)),
        brand=column(st.integers(0, 3)),
        seen=column(st.booleans()),
    )
    order = draw(st.permutations(range(n)))
    return items, order[: draw(st.integers(0, n))], draw(st.integers(1, 15))


@given(case=cases())
def test_drop_seen_agrees_with_a_loop(case):
    items, order, limit = case
    expected = [i for i in order if not items.seen[i]]
    filling = []
    for i in order:
        if items.seen[i] and len(expected) + len(filling) < limit:
            filling.append(i)
    assert apply(DropSeen(), items, limit, order) == (expected + filling, bool(filling))


@given(case=cases(), max_items=st.integers(1, 4))
def test_cap_agrees_with_a_loop(case, max_items):
    items, order, limit = case
    within, overflow, count = [], [], {}
    for i in order:
        brand = int(items.groups["brand"][i])
        count[brand] = count.get(brand, 0) + 1
        (within if brand == 0 or count[brand] <= max_items else overflow).append(i)
    expected = within + overflow
    relaxed = any(i in overflow for i in expected[:limit])
    assert apply(Cap("brand", max_items), items, limit, order) == (expected, relaxed)


def cosine(a, b) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return float(np.dot(a, b)) / lengths if lengths else 0.0


@given(case=cases(), weight=st.sampled_from([0, 0.25, 0.5, 0.8, 1]))
@settings(deadline=None)
def test_mmr_agrees_with_a_loop(case, weight):
    """Each choice must be worth, to within rounding, the most that a plain loop can find."""
    items, order, limit = case
    result, relaxed = apply(MMR(weight), items, limit, order)
    assert not relaxed
    assert sorted(result) == sorted(order)
    scores = [float(items.scores[i]) for i in order]
    chosen = result[:limit]
    for step, pick in enumerate(chosen):

        def worth(i, before=chosen[:step]):
            spread = max(scores) - min(scores)
            relevance = (float(items.scores[i]) - min(scores)) / spread if spread else 0.0
            likeness = max((cosine(items.vectors[i], items.vectors[j]) for j in before), default=0.0)
            return weight * relevance - (1 - weight) * likeness

        assert worth(pick) >= max(worth(i) for i in order if i not in chosen[:step]) - 1e-5
    assert result[limit:] == [i for i in order if i not in chosen]


@given(case=cases(), weight=st.sampled_from([0, 0.5, 1]))
@settings(deadline=None)
def test_mmr_gives_equal_values_to_the_earlier_item(case, weight):
    """With vectors along the axes every cosine is 0, 1 or -1, so the loop's answer is the only one."""
    items, order, limit = case
    items.vectors[:, 1] = np.where(items.vectors[:, 0] != 0, 0, items.vectors[:, 1])
    scores = [float(items.scores[i]) for i in order]
    spread = (max(scores) - min(scores) if scores else 0) or 1
    chosen: list[int] = []
    while len(chosen) < min(limit, len(order)):
        best, best_worth = -1, -math.inf
        for i in order:
            likeness = max((cosine(items.vectors[i], items.vectors[j]) for j in chosen), default=0.0)
            worth = weight * (float(items.scores[i]) - min(scores)) / spread - (1 - weight) * likeness
            if i not in chosen and worth > best_worth:
                best, best_worth = i, worth
        chosen.append(best)
    assert apply(MMR(weight), items, limit, order)[0][:limit] == chosen


# --- What the rules are given


def test_ranked_items_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="seen has 1 entries; expected 2, one an item"):
        ranked([2, 1], seen=[0])
    with pytest.raises(ValueError, match="brand has 3 entries; expected 2"):
        ranked([2, 1], brand=[1, 2, 3])


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="scores holds NaN or infinity"):
        ranked([1, math.nan])


# --- rules_from_config


def test_rules_from_config():
    rules = rules_from_config(
        [
            {"rule": "drop_seen"},
            {"rule": "mmr", "relevance_weight": 0.8},
            {"rule": "cap", "field": "category", "max_items": 3},
        ]
    )
    assert rules == [DropSeen(), MMR(0.8), Cap("category", 3)]
    assert [rule.name for rule in rules] == ["drop_seen", "mmr", "cap:category"]
    assert rules_from_config([]) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rule": "cpa"}, "rule is 'cpa'; expected one of drop_seen, cap, mmr (did you mean 'cap'?)"),
        ({"rule": "zzz"}, "rule is 'zzz'; expected one of drop_seen, cap, mmr"),
        ({"field": "brand"}, "expected a mapping with the key 'rule'"),
        ("cap", "rules[0] is 'cap'; expected a mapping"),
        ({"rule": "drop_seen", "hard": True}, "drop_seen has no setting 'hard'; expected no settings"),
        ({"rule": "mmr"}, "mmr needs the setting 'relevance_weight'"),
        (
            {"rule": "mmr", "weight": 0.5},
            "mmr has no setting 'weight'; expected relevance_weight",
        ),
        (
            {"rule": "cap", "field": "brand", "max_item": 3},
            "cap has no setting 'max_item'; expected one of field, max_items (did you mean 'max_items'?)",
        ),
        (
            {"rule": "cap", "field": "brands", "max_items": 3},
            "field is 'brands'; expected one of category, brand, seller_id (did you mean 'brand'?)",
        ),
        ({"rule": "cap", "field": "brand", "max_items": 0}, "max_items is 0; expected a whole number of at"),
        ({"rule": "cap", "field": "brand", "max_items": 1.5}, "max_items is 1.5; expected a whole number"),
        ({"rule": "cap", "field": "brand", "max_items": True}, "max_items is True; expected a whole number"),
        ({"rule": "mmr", "relevance_weight": 1.1}, "relevance_weight is 1.1; expected a number from 0 to 1"),
        ({"rule": "mmr", "relevance_weight": math.nan}, "relevance_weight is nan; expected a number"),
        ({"rule": "mmr", "relevance_weight": "0.5"}, "relevance_weight is '0.5'; expected a number"),
    ],
)
def test_a_wrong_policy_says_what_is_wrong(entry, message):
    with pytest.raises(ValueError, match=r"^rules\[0\]") as error:
        rules_from_config([entry])
    assert message in str(error.value)


def test_the_place_of_the_wrong_rule_is_named():
    with pytest.raises(ValueError, match=r"^rules\[1\]: rule is \['cap'\]"):
        rules_from_config([{"rule": "drop_seen"}, {"rule": ["cap"]}])
