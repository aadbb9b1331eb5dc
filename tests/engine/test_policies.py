"""Policies through the pipeline: hard filters on every path, the reserve, reasons, overrides, the clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reranking_soundness import check_pipeline
from engine.bundle import Bundle
from engine.catalog import Catalog
from engine.deadline import Budget
from engine.history import EMPTY_HISTORY, EVENT_CODE, History
from engine.pipeline import Filters, RecommendationPipeline, Visitor
from engine.policies import check_policies, item_facts
from engine.policy_files import PolicyFiles
from ranking.context import ContextTable
from reranking.policy import Policies, PolicyError, policies_from_config, single_policy

MakeBundle = Callable[..., Path]
ANYBODY = Visitor(EMPTY_HISTORY)
SECRET = {"rule": "deny", "seller_id": "s1"}  # rows 2, 4, 6, ...


@pytest.fixture(scope="module")
def bundle(make_bundle: MakeBundle) -> Bundle:
    return Bundle.load(make_bundle(num_candidates=25))


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> RecommendationPipeline:
    return RecommendationPipeline(bundle)


def policies(*rules: dict[str, Any]) -> Policies:
    return single_policy(list(rules))


def visitor_of(*rows: int, event_type: str = "view", times: tuple[int, ...] = ()) -> Visitor:
    codes = np.full(len(rows), EVENT_CODE[event_type], np.uint8)
    return Visitor(History(np.array(rows, np.int32), codes, np.array(times or [0] * len(rows), np.int64)))


# What rules know of a bundle's items


def test_item_facts(bundle: Bundle) -> None:
    catalog = bundle.catalog
    facts = item_facts(catalog, bundle.item_vectors, bundle.content_vectors)
    assert set(facts.groups) == {"category", "category/0", "category/1", "brand", "seller_id"}
    assert facts.groups["category/0"].tolist() == catalog.codes("category", 0).tolist()
    assert facts.available_until is None  # nobody in the toy's catalog has one
    assert facts.stock is not None
    assert facts.stock[[1, 2, 10]].tolist() == [0, -1, 1]  # every ninth item says how many are left
    assert facts.having["attribute"]["age:18"].tolist() == [9]
    assert facts.having["category"]["all"].tolist() == [r for r in range(1, 41) if (r - 1) % 7]
    assert facts.row_of["0042"] == 5
    for name in ("prices", "margins", "available_from", "popularity", "vectors", "content_vectors"):
        assert getattr(facts, name) is not None
    for field in ("brand", "seller_id"):
        codes = facts.groups[field]
        names = [catalog.names[field][code] for code in codes[1:]]
        expected = [
            f"s{n % 2}" if field == "seller_id" else "" if n % 4 == 0 else f"brand {n % 6}" for n in range(40)
        ]
        assert names == expected


def test_a_catalog_that_knows_nothing_but_ids() -> None:
    import polars as pl

    catalog = Catalog(pl.DataFrame({"item_id": ["a", "b"]}))
    facts = item_facts(catalog, np.zeros((3, 4), np.float32))
    assert [
        name for name in ("vectors", "prices", "margins", "stock") if getattr(facts, name) is not None
    ] == []
    assert facts.groups["category/0"].tolist() == [0, 0, 0]
    config = {
        "policies": {"one": {"rules": [{"rule": "cap", "field": "category", "level": 0, "max_items": 2}]}}
    }
    check_policies(config, catalog)
    warnings = policies_from_config(config).warnings(facts)
    assert warnings == [
        "policy 'one': cap:category/0 reads category/0, which the catalog lacks: "
        "an item without the group is not capped"
    ]
    with pytest.raises(PolicyError, match="item_id is 'c'; expected one of the catalog's 2"):
        check_policies({"policies": {"one": {"rules": [{"rule": "deny", "item_id": "c"}]}}}, catalog)


# Hard filters


def broken_pipeline(pipeline: RecommendationPipeline, broken: str) -> RecommendationPipeline:
    class Broken:
        name = "broken"

        def find(self, *asked: object) -> None:
            raise RuntimeError("broken on purpose")

    if broken == "ranking":
        scorer = SimpleNamespace(history_length=6, context=ContextTable(), heads=())
        return RecommendationPipeline(dataclasses.replace(pipeline.bundle, scorer=scorer))  # type: ignore[arg-type]
    other = pipeline.with_policies(pipeline.reranker.policies)
    if broken == "sources":
        other.sources = [Broken() for _ in other.sources]  # type: ignore[misc]
    elif broken == "reranking":
        other._rerank = Broken().find  # type: ignore[method-assign,assignment]
    return other


@pytest.mark.parametrize("broken", ["", "ranking", "sources", "reranking", "deadline"])
@pytest.mark.parametrize("limit", [1, 10, 20, 500])
def test_what_a_policy_forbids_is_shown_on_no_path(
    pipeline: RecommendationPipeline, broken: str, limit: int
) -> None:
    rules = [SECRET, {"rule": "price_range", "max_price": 30.0}, {"rule": "drop_seen"}]
    allowed = {row for row in range(1, 41, 2) if (row - 1) % 6 and row - 1 <= 30}
    served = broken_pipeline(pipeline, broken).with_policies(policies(*rules))
    items, trace = served.recommend(
        visitor_of(1, 3, 5), limit, budget=Budget(0.0) if broken == "deadline" else None
    )
    assert bool(trace.degraded_stages) == bool(broken)
    assert set(items.rows.tolist()) <= allowed
    assert len(items) == len(set(items.rows.tolist())) == min(limit, len(allowed))
    assert [t.num_out for t in trace.timings if t.stage == "filtering"] == [len(allowed)]


def test_similar_items_obey_the_filters_too(pipeline: RecommendationPipeline) -> None:
    served = pipeline.with_policies(
        policies_from_config(
            {"default": "a", "policies": {"a": {"rules": [SECRET]}, "b": {"rules": [{"rule": "available"}]}}}
        )
    )
    assert served.similar(3, 500).items.rows.size == 19
    assert not (served.similar(3, 500).items.rows % 2 == 0).any()
    now = 20_000
    shown = served.similar(3, 500, policy=served.policy("b"), now=now).items.rows
    since = pipeline.bundle.catalog.available_from
    assert sorted(shown.tolist()) == [row for row in range(1, 41) if since[row] <= now and row != 3]


def test_context_decides_what_may_be_shown(pipeline: RecommendationPipeline) -> None:
    served = pipeline.with_policies(policies({"rule": "region"}, {"rule": "min_age"}))
    germans = {number + 1 for number in range(40) if number % 10 == 4}

    def shown(**context: str) -> set[int]:
        return set(served.recommend(ANYBODY, 500, context=context).items.rows.tolist())

    everybody = set(range(1, 41)) - germans - {9}
    assert shown() == shown(region="FR", age="17") == everybody
    assert shown(region="DE") == everybody | germans
    assert shown(age="18") == everybody | {9}
    assert served.policy().context_keys == {"region", "age"}


def test_the_clock_decides_what_is_on_sale(pipeline: RecommendationPipeline) -> None:
    served = pipeline.with_policies(policies({"rule": "available"}))
    since = pipeline.bundle.catalog.available_from
    for now, clock in ((None, 30_000), (5_000, 5_000)):
        items, trace = served.recommend(ANYBODY, 500, now=now)
        assert sorted(items.rows.tolist()) == [row for row in range(1, 41) if since[row] <= clock]
        assert trace.arrangement is not None
        assert trace.arrangement.now_ms == clock


def test_without_real_times_there_is_no_clock(bundle: Bundle) -> None:
    data = bundle.manifest["data"] | {"time": "order", "clock": 0}
    timeless = dataclasses.replace(bundle, manifest=bundle.manifest | {"data": data})
    served = RecommendationPipeline(timeless, policies({"rule": "available"}))
    items, trace = served.recommend(ANYBODY, 500, now=5_000)
    assert len(items) == 40
    assert trace.arrangement is not None
    assert trace.arrangement.now_ms is None


def test_what_was_bought_lately_is_left_out(pipeline: RecommendationPipeline) -> None:
    day = 86_400_000
    served = pipeline.with_policies(policies({"rule": "bought_within", "days": 2}))
    bought = visitor_of(4, 5, 6, 5, event_type="purchase", times=(day, 2 * day, 0, 9 * day))
    shown = set(served.recommend(bought, 500, now=10 * day).items.rows.tolist())
    assert shown == set(range(1, 41)) - {5, 6}  # 6 at an unknown time
    viewed = visitor_of(4, 5, times=(9 * day, 9 * day))
    assert len(served.recommend(viewed, 500, now=10 * day).items) == 40


def test_random_requests_to_the_whole_pipeline(bundle: Bundle) -> None:
    found = check_pipeline(bundle, 250)
    assert found["faults"] == []
    assert found["short"] > 5
    assert found["with a rule that yielded"] > 20
    assert found["with a failing stage"] > 50


# The reserve


@settings(max_examples=60, deadline=None)
@given(
    max_items=st.integers(1, 4),
    field=st.sampled_from(["brand", "seller_id", "category"]),
    limit=st.sampled_from([1, 5, 10, 20]),
    history=st.lists(st.integers(1, 40), max_size=6),
)
def test_the_reserve_fills_up_before_a_cap_yields(
    pipeline: RecommendationPipeline, max_items: int, field: str, limit: int, history: list[int]
) -> None:
    """Ranking keeps 10 of 25 candidates; a cap takes from the other 15 as long as these can keep it."""
    served = pipeline.with_policies(policies({"rule": "cap", "field": field, "max_items": max_items}))
    items, trace = served.recommend(visitor_of(*history), limit)
    plain, _ = pipeline.with_policies(policies()).recommend(visitor_of(*history), 25)
    codes = pipeline.bundle.catalog.codes(field)
    group_of = codes[plain.rows].tolist()  # of all 25, best first
    num_kept = max(10, limit)
    ungrouped = group_of.count(0)
    most = ungrouped + sum(min(group_of.count(group), max_items) for group in set(group_of) - {0})
    assert len(items) == limit
    assert bool(trace.relaxed_rules) == (most < limit)
    if most >= limit:
        shown = codes[items.rows]
        assert max(np.bincount(shown[shown > 0]), default=0) <= max_items
        # Greedily from the ranked ones, then from the rest by the ranker's scores.
        expected: list[int] = []
        for row in plain.rows.tolist():
            taken = [codes[one] for one in expected].count(codes[row])
            if len(expected) < limit and (not codes[row] or taken < max_items):
                expected.append(row)
        assert items.rows.tolist() == expected
    assert num_kept <= 25


def test_a_pin_that_nobody_found(pipeline: RecommendationPipeline) -> None:
    plain, _ = pipeline.with_policies(policies()).recommend(visitor_of(2, 3), 25)
    absent = next(row for row in range(1, 41) if row not in plain.rows)
    ids = pipeline.bundle.catalog.ids
    in_reserve = int(plain.rows[24])
    served = pipeline.with_policies(
        policies(
            {"rule": "pin", "item_id": ids[absent], "place": 2},
            {"rule": "pin", "item_id": ids[in_reserve], "place": 4},
        )
    )
    items, trace = served.recommend(visitor_of(2, 3), 5, explain=True)
    assert items.rows.tolist() == [plain.rows[0], absent, plain.rows[1], in_reserve, plain.rows[2]]
    assert (items.sources[1], items.scores[1]) == ("pin", 0)
    assert items.sources[3] == plain.sources[24]
    assert items.scores[3] == pytest.approx(plain.scores[24])
    assert trace.arrangement is not None
    assert trace.arrangement.explanation is not None
    assert trace.arrangement.explanation.items[absent].retrieval_place is None
    forbidden, trace = served.recommend(visitor_of(2, 3), 5, excluded=np.array([absent], np.int32))
    assert absent not in forbidden.rows
    assert trace.relaxed_rules == ["pin@2"]


# Choosing a policy


def test_named_policies_and_bounded_overrides(pipeline: RecommendationPipeline) -> None:
    config = {
        "default": "home",
        "policies": {
            "home": {
                "rules": [{"rule": "mmr", "relevance_weight": 1.0}],
                "overrides": {"mmr.relevance_weight": {"min": 0, "max": 1}},
            },
            "cheap": {"rules": [{"rule": "price_range", "max_price": 10}]},
        },
    }
    served = pipeline.with_policies(policies_from_config(config))
    plain, _ = served.recommend(visitor_of(2), 10)
    varied, trace = served.recommend(
        visitor_of(2), 10, policy=served.policy("", {"mmr.relevance_weight": 0.0})
    )
    assert plain.rows.tolist() != varied.rows.tolist()
    assert trace.arrangement is not None
    assert trace.arrangement.policy == "home"
    cheap, _ = served.recommend(visitor_of(2), 40, policy=served.policy("cheap"))
    assert max(pipeline.bundle.catalog.prices[cheap.rows]) <= 10
    with pytest.raises(
        PolicyError, match=r"policy is 'hom'; expected one of home, cheap \(did you mean 'home'"
    ):
        served.policy("hom")
    with pytest.raises(PolicyError, match=r"override mmr\.relevance_weight is 2; expected 0 to 1"):
        served.policy("home", {"mmr.relevance_weight": 2})
    with pytest.raises(PolicyError, match="override 'x'; expected none"):
        served.policy("cheap", {"x": 2})


def test_an_overridden_filter_is_as_hard(pipeline: RecommendationPipeline) -> None:
    config = {
        "policies": {
            "one": {
                "rules": [{"rule": "price_range", "max_price": 10}],
                "overrides": {"price_range.max_price": {"min": 1, "max": 20}},
            }
        }
    }
    served = pipeline.with_policies(policies_from_config(config))
    prices = pipeline.bundle.catalog.prices
    for asked in (1.0, 7.0, 20.0):
        policy = served.policy("", {"price_range.max_price": asked})
        shown = served.recommend(ANYBODY, 500, policy=policy).items.rows
        assert sorted(shown.tolist()) == [row for row in range(1, 41) if prices[row] <= asked]


def test_other_policies_make_another_pipeline(pipeline: RecommendationPipeline) -> None:
    before = pipeline.recommend(visitor_of(2), 10).items.rows.tolist()
    policy = pipeline.policy()
    other = pipeline.with_policies(policies(SECRET))
    assert pipeline.recommend(visitor_of(2), 10).items.rows.tolist() == before
    assert pipeline.policy() is policy
    assert other.reranker.facts is pipeline.reranker.facts
    with pytest.raises(PolicyError, match="brand is 'x'"):
        pipeline.with_policies(policies({"rule": "deny", "brand": "x"}))


def test_the_seed_decides_what_is_explored(pipeline: RecommendationPipeline) -> None:
    explore = {"rule": "explore", "places": [1, 2], "fewer_events_than": 100}
    served = pipeline.with_policies(policies(explore))
    slates = [served.recommend(visitor_of(2), 10, seed=seed).items.rows.tolist() for seed in (1, 1, 2, 3, 4)]
    assert slates[0] == slates[1]
    assert len({tuple(slate) for slate in slates}) > 2


def test_seen_is_a_matter_of_the_policy(make_bundle: MakeBundle) -> None:
    everything = visitor_of(*range(1, 41))
    for repeats, rules, relaxed in (
        (False, [{"rule": "drop_seen"}], ["drop_seen"]),
        (True, [{"rule": "drop_seen"}], []),
        (False, [], []),
    ):
        served = RecommendationPipeline(Bundle.load(make_bundle(repeats=repeats, policy=rules)))
        items, trace = served.recommend(everything, 10)
        assert (len(items), trace.relaxed_rules) == (10, relaxed)


# Reasons


FULL = [
    SECRET,
    {"rule": "freshness", "weight": 0.3, "half_life_days": 0.0001},
    {"rule": "mmr", "relevance_weight": 0.7},
    {"rule": "cap", "field": "brand", "max_items": 2},
    {"rule": "exposure", "field": "brand", "strength": 0.5},
    {"rule": "drop_seen"},
    {"rule": "pin", "item_id": "0042", "place": 3},
]


@settings(max_examples=30, deadline=None)
@given(history=st.lists(st.integers(1, 40), max_size=8), limit=st.sampled_from([1, 4, 10]))
def test_reasons_lead_from_the_ranking_to_the_slate(
    pipeline: RecommendationPipeline, history: list[int], limit: int
) -> None:
    served = pipeline.with_policies(policies(*FULL))
    silent, _ = served.recommend(visitor_of(*history), limit, seed=3)
    items, trace = served.recommend(visitor_of(*history), limit, seed=3, explain=True)
    assert items.rows.tolist() == silent.rows.tolist()
    assert trace.arrangement is not None
    explanation = trace.arrangement.explanation
    assert explanation is not None
    for place, row in enumerate(items.rows.tolist(), start=1):
        reasons = explanation.items[row]
        way = [reasons.ranking_place, *(move.to_place for move in reasons.moves)]
        assert way[-1] == place or (reasons.ranking_place is None and way[-1] == place)
        for move, before in zip(reasons.moves, way, strict=False):
            if before is not None:
                assert move.from_place == before
        assert 0 <= reasons.relevance <= 1
        assert reasons.ranking_score is None or reasons.ranking_score == pytest.approx(
            float(items.scores[place - 1])
        )
    assert set(explanation.displaced) == set(explanation.items) - set(items.rows.tolist())
    assert [one.rule for one in explanation.filters] == ["request", "deny:seller_id=s1"]
    assert [(one.num_in, one.num_out) for one in explanation.filters] == [(40, 40), (40, 20)]
    assert [effect.rule for effect in explanation.effects] == [
        "freshness",
        "mmr",
        "cap:brand",
        "exposure:brand",
        "drop_seen",
        "pin@3",
    ]


def test_the_funnel_of_the_filters(pipeline: RecommendationPipeline) -> None:
    served = pipeline.with_policies(policies(SECRET, {"rule": "price_range", "max_price": 30.0}))
    _, trace = served.recommend(
        ANYBODY, 5, filters=Filters(min_price=3), excluded=np.array([12], np.int32), explain=True
    )
    assert trace.arrangement is not None
    assert trace.arrangement.explanation is not None
    numbers = [n for n in range(40) if n % 6 and n >= 3 and n + 1 != 12]
    odd = [n for n in numbers if n % 2 == 0]
    cheap = [n for n in odd if n <= 30]
    assert [(one.num_in, one.num_out) for one in trace.arrangement.explanation.filters] == [
        (40, len(numbers)),
        (len(numbers), len(odd)),
        (len(odd), len(cheap)),
    ]


def test_nothing_is_explained_unasked(
    pipeline: RecommendationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("reasons were worked out")

    monkeypatch.setattr("reranking.rerank._reasons", fail)
    monkeypatch.setattr("engine.pipeline.Filtered", fail)
    _, trace = pipeline.recommend(visitor_of(2), 10)
    assert trace.degraded_stages == []
    assert trace.arrangement is not None
    assert trace.arrangement.explanation is None


def test_measured_exposure_has_names(pipeline: RecommendationPipeline) -> None:
    served = pipeline.with_policies(policies({"rule": "exposure", "merit": "items"}))
    items, trace = served.recommend(visitor_of(2), 10)
    assert trace.arrangement is not None
    attention = 1 / np.log2(np.arange(2, 12))
    for one in trace.arrangement.exposure:
        rows = [place for place, row in enumerate(items.rows) if f"s{(row - 1) % 2}" == one.group]
        assert one.given == pytest.approx(attention[rows].sum() / attention.sum())
    assert {one.group for one in trace.arrangement.exposure} == {"s0", "s1"}
    assert sum(one.due for one in trace.arrangement.exposure) == pytest.approx(1)


def test_stage_scores_are_those_of_the_stages(pipeline: RecommendationPipeline) -> None:
    served = pipeline.with_policies(policies())
    _, trace = served.recommend(visitor_of(2, 3), 3, explain=True)
    query = served.query(visitor_of(2, 3))
    allowed = np.arange(41) > 0
    found = {source.name: source.find(query, allowed, 25) for source in served.sources}
    assert trace.arrangement is not None
    assert trace.arrangement.explanation is not None
    for row, reasons in trace.arrangement.explanation.items.items():
        part = found[reasons.source]
        assert reasons.retrieval_score == pytest.approx(float(part.scores[part.rows == row][0]))


# Files of policies

HOME = "policies:\n  home:\n    extends: shop\n    rules: [{rule: drop_seen}]\n"
SHOP = "default: home\npolicies:\n  shop:\n    rules: [{rule: in_stock}]\n"


def test_a_directory_is_one_set_of_policies(tmp_path: Path) -> None:
    (tmp_path / "home.yaml").write_text(HOME)
    (tmp_path / "shop.yml").write_text(SHOP)
    (tmp_path / "notes.txt").write_text("no policy")
    (tmp_path / ".hidden.yaml").write_text("no: policy")
    files = PolicyFiles(tmp_path)
    loaded = files.load()
    assert list(loaded.by_name) == ["home", "shop"]
    assert [rule.name for rule in loaded[None].rules] == ["in_stock", "drop_seen"]
    for text, message in (
        (HOME, "other.yaml: policy 'home' stands in another file too; expected once"),
        ("default: shop", "shop.yml: default is 'home', and another file says 'shop'"),
        ("policies: 3", "other.yaml: policies is 3; expected a mapping"),
        ("x: 3", "other.yaml: the file has the key 'x'"),
        ("policies:\n  a:\n    rules: [{rule: x}]\n", f"{tmp_path}: policy 'a': rules[0]: rule is 'x'"),
    ):
        (tmp_path / "other.yaml").write_text(text)
        with pytest.raises(PolicyError) as caught:
            files.load()
        assert message in str(caught.value)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(PolicyError, match="holds no policies"):
        files.load()


def test_changes_are_noticed(tmp_path: Path) -> None:
    file = tmp_path / "home.yaml"
    file.write_text(SHOP)
    files = PolicyFiles(tmp_path)
    assert files.changed()  # never loaded
    with pytest.raises(PolicyError):  # default home is not there
        files.load()
    assert not files.changed()
    (tmp_path / "more.yaml").write_text(HOME)
    assert files.changed()
    files.load()
    assert not files.changed()
    (tmp_path / "more.yaml").unlink()
    assert files.changed()
    missing = PolicyFiles(tmp_path / "none.yaml")
    with pytest.raises(OSError, match=r"none\.yaml"):
        missing.load()
    assert missing.changed()  # what cannot be read is looked for again
    (tmp_path / "none.yaml").write_text(SHOP)
    assert missing.changed()
