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

from engine.bundle import Bundle
from engine.deadline import Budget
from engine.history import EMPTY_HISTORY, History
from engine.item_list import largest
from engine.pipeline import (
    Event,
    Filters,
    RecommendationPipeline,
    Visitor,
    check_settings,
    history_weights,
    query_vector,
    score_temperature,
)
from engine.trace import VisitorKind
from ranking.context import ContextTable, Encoded
from ranking.transitions import FLOOR
from retrieval.fold_in import fold_in
from retrieval.sources import Candidates
from retrieval.transitions import Transitions, item_transitions

MakeBundle = Callable[..., Path]
ALL_SOURCES = ("sequence", "embedding", "neighbours", "popular", "fresh")
SETTINGS: dict[str, Any] = {
    "num_candidates": 1000,
    "num_ranked": 500,
    "default_limit": 10,
    "sources": [{"source": "embedding", "quota": 0.7}, {"source": "popular", "quota": 0.3}],
    "event_weights": {"purchase": 3, "view": 0.5},
    "half_life_events": 3.0,
    "num_neighbours": 200,
    "popular_window_days": 30,
}


@pytest.fixture(scope="module")
def pipeline(bundle_path: Path) -> RecommendationPipeline:
    return RecommendationPipeline(Bundle.load(bundle_path))


@pytest.fixture(scope="module")
def plain(make_bundle: MakeBundle) -> RecommendationPipeline:
    """No rules but drop_seen, so that a loop can say what the answer must be."""
    return RecommendationPipeline(Bundle.load(make_bundle(policy=[{"rule": "drop_seen"}])))


def visitor_of(*rows: int, user_row: int = 0) -> Visitor:
    items = np.array(rows, np.int32)
    return Visitor(History(items, np.zeros(len(items), np.uint8), np.zeros(len(items), np.int64)), user_row)


def without(pipeline: RecommendationPipeline, **parts: Any) -> RecommendationPipeline:
    """The same pipeline over a bundle with other parts."""
    return RecommendationPipeline(dataclasses.replace(pipeline.bundle, **parts))


def ranker_scores(bundle: Bundle, history: list[int]) -> np.ndarray:
    state = bundle.item_vectors[history].mean(axis=0)
    return bundle.item_vectors @ state


def expected_candidates(
    pipeline: RecommendationPipeline,
    history: list[int],
    allowed: list[int],
    limit: int,
    without_sources: tuple[str, ...] = (),
) -> dict[int, str]:
    """What retrieval has to find, by plain loops: row -> source, best first."""
    bundle = pipeline.bundle
    catalog, clock = bundle.catalog, bundle.manifest["data"]["clock"]
    lists: dict[str, list[int]] = {name: [] for name in ALL_SOURCES}
    if history:
        query = fold_in(bundle.item_vectors, bundle.item_degrees, np.array(history, np.int32))
        scores = ranker_scores(bundle, history)
        near = dict.fromkeys(range(1, 41), 0.0)
        for item in set(history):
            for row, weight in ((item + 1, 0.5), (item - 1, 0.25), (item + 3, 0.125)):
                if row in near:
                    near[row] += weight
        lists["sequence"] = sorted(allowed, key=lambda row: -scores[row])
        lists["embedding"] = sorted(allowed, key=lambda row: -float(bundle.item_vectors[row] @ query))
        lists["neighbours"] = sorted([row for row in allowed if near[row]], key=lambda row: -near[row])
    recent, popularity, available = bundle.recent_popularity, catalog.popularity, catalog.available_from
    lists["popular"] = sorted(allowed, key=lambda row: (-recent[row], -popularity[row]))
    dated = [row for row in allowed if 0 < available[row] <= clock]
    lists["fresh"] = sorted(dated, key=lambda row: -available[row])

    quotas = {entry["source"]: entry["quota"] for entry in bundle.manifest["pipeline"]["sources"]}
    quotas = {name: quota for name, quota in quotas.items() if name not in without_sources}
    given: dict[str, list[int]] = {name: [] for name in quotas}
    taken: set[int] = set()
    for share in (lambda name: round(quotas[name] * limit), lambda name: limit):
        for name in quotas:
            for row in lists[name]:
                if row not in taken and len(given[name]) < share(name) and len(taken) < limit:
                    given[name].append(row)
                    taken.add(row)
    places = [
        ((place + 1) / quotas[name], number, row, name)
        for number, name in enumerate(quotas)
        for place, row in enumerate(given[name])
    ]
    return {row: name for _, _, row, name in sorted(places)}


# Worked-out answers


def test_known_user_from_end_to_end(plain: RecommendationPipeline) -> None:
    bundle = plain.bundle
    unseen = [row for row in range(1, 41) if row not in (2, 3, 5)]
    candidates = expected_candidates(plain, [2, 3, 5], unseen, 20)
    scores = ranker_scores(bundle, [2, 3, 5])  # "loyal" did 2, 3, 3, 5
    expected = sorted(candidates, key=lambda row: -scores[row])[:10]

    items, trace = plain.recommend(plain.resolve_visitor("loyal"), 10)
    assert items.rows.tolist() == expected
    np.testing.assert_allclose(items.scores, scores[expected], rtol=1e-5)
    assert items.sources.tolist() == [candidates[row] for row in expected]
    assert set(candidates.values()) == {"sequence", "embedding", "neighbours", "popular", "fresh"}
    assert trace.visitor_kind is VisitorKind.KNOWN_USER
    assert trace.bundle_version == bundle.version
    assert (trace.degraded_stages, trace.relaxed_rules, trace.num_unknown_history_items) == ([], [], 0)
    assert [(timing.stage, timing.num_in, timing.num_out) for timing in trace.timings] == [
        ("filtering", 40, 40),
        ("retrieval.sequence", 40, 20),
        # The first source has filled the list, so these are asked for their shares.
        ("retrieval.embedding", 40, 6),
        ("retrieval.neighbours", 40, 2),
        ("retrieval.popular", 40, 2),
        ("retrieval.fresh", 40, 2),
        ("retrieval", 40, 20),
        ("ranking", 20, 10),
        ("reranking", 10, 10),
    ]
    whole_stages = [timing.duration_us for timing in trace.timings if "." not in timing.stage]
    assert trace.total_us >= sum(whole_stages) - 4


@pytest.mark.parametrize("quota", [0.0, 0.2])
def test_what_has_often_come_next_is_found_and_stands_higher(make_bundle: MakeBundle, quota: float) -> None:
    sources = [{"source": "sequence", "quota": 1 - quota}, {"source": "transitions", "quota": quota}]
    path = make_bundle(policy=[{"rule": "drop_seen"}], sources=sources, transition_weight=0.5)
    pipeline = RecommendationPipeline(Bundle.load(path))
    history = [2, 3, 9, 5]
    likely = dict.fromkeys(range(1, 41), 0.0)  # toy_neighbours: by the n-th last event
    for place, item in enumerate(reversed(history), start=1):
        for row, weight in ((item + 1, 0.5), (item - 1, 0.25), (item + 3, 0.125)):
            if row in likely:
                likely[row] += weight / place / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    unseen = [row for row in likely if row not in history]
    ranker = ranker_scores(pipeline.bundle, history)
    expected = {row: ranker[row] + 0.5 * np.log1p(likely[row] / FLOOR) for row in unseen}
    by_ranker = sorted(unseen, key=lambda row: -ranker[row])
    by_likely = sorted([row for row in unseen if likely[row]], key=lambda row: -likely[row])
    share = round(20 * (1 - quota))
    found = set(by_ranker[:share])
    found |= set([row for row in by_likely if row not in found][: 20 - share])
    found |= set([row for row in by_ranker if row not in found][: 20 - len(found)])

    visitor = visitor_of(*history)
    items, trace = pipeline.recommend(visitor, 10)
    assert trace.degraded_stages == []
    assert items.rows.tolist() == sorted(found, key=lambda row: -expected[row])[:10]
    np.testing.assert_allclose(items.scores, [expected[row] for row in items.rows.tolist()], rtol=1e-4)
    explanation = pipeline.recommend(visitor, 10, explain=True)[1].arrangement.explanation
    for row in items.rows.tolist():
        gained = explanation.items[row].transition_score
        assert gained == pytest.approx(expected[row] - ranker[row], rel=1e-4)
    asked = np.array(unseen, np.int32)
    ranked, _ = pipeline.rank(visitor, asked)
    assert ranked.rows.tolist() == sorted(unseen, key=lambda row: -expected[row])
    # Without the table, and without a weight, the ranker stands alone.
    for other in (
        without(pipeline, transitions=None),
        without(pipeline, manifest=_with_settings(pipeline.bundle, transition_weight=None)),
    ):
        assert other.rank(visitor, asked)[0].rows.tolist() == by_ranker
        reasons = other.recommend(visitor, 10, explain=True)[1].arrangement.explanation.items
        assert {one.transition_score for one in reasons.values()} == {0.0}
    unranked = without(pipeline, scorer=None, ranker_index=None)
    reasons = unranked.recommend(visitor, 10, explain=True)[1].arrangement.explanation.items
    assert {one.transition_score for one in reasons.values()} == {None}
    # A temperature divides all of it, and orders nothing anew.
    cooler = without(pipeline, manifest=_with_settings(pipeline.bundle, score_temperature=4.0))
    again, trace = cooler.recommend(visitor, 10, explain=True)
    assert again.rows.tolist() == items.rows.tolist()
    np.testing.assert_allclose(again.scores, items.scores / 4, rtol=1e-5)
    for row in items.rows.tolist():
        gained = trace.arrangement.explanation.items[row].transition_score
        assert gained == pytest.approx((expected[row] - ranker[row]) / 4, rel=1e-4)


def test_the_temperature_grows_with_the_weights_of_heads(pipeline: RecommendationPipeline) -> None:
    """As scores, which are sums over heads, do."""
    weights = np.array([[1, 3]], np.float32)
    assert score_temperature(pipeline.bundle, weights) == 1
    bundle = without(pipeline, manifest=_with_settings(pipeline.bundle, score_temperature=2.0)).bundle
    assert score_temperature(bundle, None) == 2
    assert score_temperature(bundle, weights) == 8


def _with_settings(bundle: Bundle, **settings: Any) -> dict[str, Any]:
    return bundle.manifest | {"pipeline": bundle.manifest["pipeline"] | settings}


def test_evaluation_asks_with_rows(plain: RecommendationPipeline) -> None:
    by_id, _ = plain.recommend(plain.resolve_visitor("loyal"), 10)
    by_row, _ = plain.recommend(visitor_of(2, 3, 3, 5, user_row=1), 10)
    assert by_row.rows.tolist() == by_id.rows.tolist()


def test_history_only(plain: RecommendationPipeline) -> None:
    bundle = plain.bundle
    unseen = [row for row in range(1, 41) if row not in (7, 9)]
    scores = ranker_scores(bundle, [9, 7])
    candidates = expected_candidates(plain, [9, 7], unseen, 20)
    expected = sorted(candidates, key=lambda row: -scores[row])[:5]

    events = [Event("item-8"), Event("ü/ö?=&"), Event("no such item")]
    visitor = plain.resolve_visitor("stranger", events)
    items, trace = plain.recommend(visitor, 5)
    assert visitor.history.items.tolist() == [9, 7]
    assert items.rows.tolist() == expected
    assert trace.visitor_kind is VisitorKind.HISTORY_ONLY
    assert trace.num_unknown_history_items == 1


@pytest.mark.parametrize("user_id", ["", "stranger"])
def test_anonymous_gets_popular_and_fresh_in_turns(plain: RecommendationPipeline, user_id: str) -> None:
    catalog, recent = plain.bundle.catalog, plain.bundle.recent_popularity
    popular = sorted(range(1, 41), key=lambda row: (-recent[row], -catalog.popularity[row]))
    # Row 30 went on sale at 29,000, row 31 at 30,000 would be next but has no age (30 divides by 3).
    fresh = [30, 29, 27]
    unranked = without(plain, scorer=None)
    items, trace = unranked.recommend(plain.resolve_visitor(user_id, [Event("no such item")]), 4)
    expected = [row for pair in zip(popular, fresh, strict=False) for row in pair]
    assert len(set(expected)) == 6
    assert items.rows.tolist() == expected[:4]
    assert items.rows.tolist() == list(expected_candidates(plain, [], list(range(1, 41)), 20))[:4]
    assert items.sources.tolist() == ["popular", "fresh", "popular", "fresh"]
    assert trace.visitor_kind is VisitorKind.ANONYMOUS
    assert trace.degraded_stages == []
    assert trace.unknown_user == bool(user_id)


def test_anonymous_candidates_are_ranked_from_the_start_token(plain: RecommendationPipeline) -> None:
    scores = plain.bundle.item_vectors.sum(axis=1)  # the toy's start token looks along (1, 1, ...)
    items, trace = plain.recommend(Visitor(EMPTY_HISTORY), 4)
    found = expected_candidates(plain, [], list(range(1, 41)), 20)
    assert items.rows.tolist() == sorted(found, key=lambda row: -scores[row])[:4]
    assert set(items.sources) <= {"popular", "fresh"}
    assert trace.degraded_stages == []


def test_what_was_taken_out_of_the_cart_is_not_searched_for(plain: RecommendationPipeline) -> None:
    removed = plain.resolve_visitor("", [Event("item-9", "remove_from_cart")])
    assert query_vector(plain.bundle, removed) is None
    kept = plain.resolve_visitor("", [Event("item-9", "cart"), Event("item-8", "remove_from_cart")])
    np.testing.assert_array_equal(
        query_vector(plain.bundle, kept),
        query_vector(plain.bundle, plain.resolve_visitor("", [Event("item-9")])),
    )
    in_cart = plain.resolve_visitor("", [Event("item-9", "cart")])
    np.testing.assert_array_equal(plain.query(kept).state(), plain.query(in_cart).state())


@pytest.mark.parametrize(
    ("name", "value"), [("num_candidates", 10_001), ("num_ranked", 0), ("default_limit", 501)]
)
def test_settings_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"pipeline.{name} is {value}; expected 1 to"):
        check_settings(SETTINGS | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sources": [{"source": "embeding", "quota": 1}]},
            r"sources\[0\].source is 'embeding'; .*'embedding'",
        ),
        ({"sources": [{"source": "fresh", "qouta": 1}]}, r"has the key 'qouta'; .*did you mean 'quota'"),
        ({"sources": [{"source": "fresh"}]}, r"sources\[0\] has no quota"),
        ({"sources": ["fresh"]}, r"sources\[0\] is 'fresh'; expected a mapping"),
        ({"sources": [{"source": "fresh", "quota": 0.5}]}, "sum to 0.5; expected 1"),
        ({"sources": []}, "sum to 0; expected 1"),
        ({"sources": [{"source": "fresh", "quota": -1}]}, "quota is -1; expected a number from 0 to 1"),
        ({"sources": [{"source": "fresh", "quota": True}]}, "quota is True; expected a number from 0 to 1"),
        ({"sources": [{"source": "fresh", "quota": 0.5}] * 2}, r"sources\[1\].* for the second time"),
        ({"event_weights": {"purchas": 3}}, "names 'purchas'; .*did you mean 'purchase'"),
        (
            {"event_weights": {"purchase": -1}},
            "event_weights.purchase is -1; expected a number of at least 0",
        ),
        ({"half_life_events": 0}, "half_life_events is 0; expected a number above 0, or null"),
        ({"score_temperature": 0}, "score_temperature is 0; expected a number above 0, or null"),
        ({"transition_weight": -1}, "transition_weight is -1; expected a number from 0 to 10, or null"),
        ({"graph_weight": 11}, "graph_weight is 11; expected a number from 0 to 10, or null"),
        ({"half_life_days": float("nan")}, "half_life_days is nan"),
        ({"popular_window_days": -3}, "popular_window_days is -3"),
    ],
)
def test_wrong_settings_of_the_sources(changes: dict[str, Any], message: str) -> None:
    check_settings(SETTINGS)
    with pytest.raises(ValueError, match=message):
        check_settings(SETTINGS | changes)


def test_a_known_user_without_anything_known(plain: RecommendationPipeline) -> None:
    visitor = plain.resolve_visitor("new")
    items, trace = plain.recommend(visitor, 10)
    assert trace.visitor_kind is VisitorKind.KNOWN_USER
    assert set(items.sources) <= {"popular", "fresh"}
    assert items.rows.tolist() == plain.recommend(Visitor(EMPTY_HISTORY), 10).items.rows.tolist()


def test_without_ranker_retrieval_order_stays(make_bundle: MakeBundle) -> None:
    pipeline = RecommendationPipeline(Bundle.load(make_bundle(ranker="none", policy=[])))
    bundle = pipeline.bundle
    items, trace = pipeline.recommend(pipeline.resolve_visitor("reader"), 40)
    products = bundle.item_vectors @ fold_in(
        bundle.item_vectors, bundle.item_degrees, np.array([4, 6], np.int32)
    )
    # No policy: nothing is dropped, and everything comes back.
    assert items.rows.tolist() == (np.argsort(-products[1:], kind="stable") + 1).tolist()
    assert trace.degraded_stages == []


def test_repeats_mean_that_nothing_is_seen(make_bundle: MakeBundle) -> None:
    pipeline = RecommendationPipeline(Bundle.load(make_bundle(repeats=True, policy=[{"rule": "drop_seen"}])))
    items, trace = pipeline.recommend(visitor_of(*range(1, 41)), 10)
    assert len(items) == 10
    assert trace.relaxed_rules == []


def test_who_returns_finds_what_the_history_holds(make_bundle: MakeBundle) -> None:
    """As a source, and in the scores: 40 nodes of a ring of which nothing near was touched."""
    sources = [{"source": "popular", "quota": 0.9}, {"source": "transitions", "quota": 0.1}]
    path = make_bundle(repeats=True, policy=[], sources=sources, transition_weight=1.0)
    plain = RecommendationPipeline(Bundle.load(path))
    assert plain.bundle.transitions is not None
    nothing = item_transitions(np.zeros(0, np.int32), np.zeros(0, np.int32), 40, k=1)
    rows = {}
    for rate in (0.0, 0.3):
        pipeline = without(plain, transitions=Transitions(nothing, rate))
        explained = pipeline.recommend(visitor_of(30, 31, 31, 32), 10, explain=True)[1].arrangement
        rows[rate] = {row: one.transition_score for row, one in explained.explanation.items.items()}
    assert not any(rows[0.0].values())
    gained = {row: score for row, score in rows[0.3].items() if score}
    whole = 2**-0.5 + 3**-0.5 + 4**-0.5
    assert gained == pytest.approx(
        {
            31: np.log1p(0.3 * (2**-0.5 + 3**-0.5) / whole / FLOOR),
            30: np.log1p(0.3 * 4**-0.5 / whole / FLOOR),
        }
    )


def test_seen_items_fill_up_last(plain: RecommendationPipeline) -> None:
    items, trace = plain.recommend(visitor_of(*range(1, 38)), 10)
    assert sorted(items.rows[:3].tolist()) == [38, 39, 40]
    assert len(items) == 10
    assert trace.relaxed_rules == ["drop_seen"]


def test_the_history_is_merged_by_time(pipeline: RecommendationPipeline) -> None:
    # "loyal" holds 2, 3, 3, 5 at 100, 200, 300, 400.
    events = [Event("item-9"), Event("item-10", "cart", 200), Event("item-11", "view", 50), Event("item-12")]
    visitor = pipeline.resolve_visitor("loyal", events)
    assert visitor.history.items.tolist() == [12, 2, 3, 11, 3, 5, 10, 13]
    assert visitor.history.timestamps.tolist() == [50, 100, 200, 200, 300, 400, 0, 0]
    assert visitor.history.event_types.tolist() == [1, 1, 1, 4, 1, 1, 0, 0]
    assert (visitor.user_row, visitor.num_unknown_items) == (1, 0)


def test_query_vector(pipeline: RecommendationPipeline) -> None:
    bundle = pipeline.bundle
    stored = query_vector(bundle, pipeline.resolve_visitor("loyal"))
    only_unknown_items = query_vector(bundle, pipeline.resolve_visitor("loyal", [Event("?")]))
    np.testing.assert_array_equal(only_unknown_items, stored)
    with_news = query_vector(bundle, pipeline.resolve_visitor("loyal", [Event("item-9")]))
    folded = fold_in(bundle.item_vectors, bundle.item_degrees, np.array([2, 3, 3, 5, 10], np.int32))
    np.testing.assert_array_equal(with_news, folded)
    assert query_vector(bundle, Visitor(EMPTY_HISTORY)) is None
    assert query_vector(bundle, visitor_of(12)) is None  # an item that training never saw


def test_similar(pipeline: RecommendationPipeline) -> None:
    vectors = pipeline.bundle.item_vectors.astype(np.float64)
    with np.errstate(invalid="ignore"):
        cosines = vectors @ vectors[3] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[3])
    cosines[[0, 3]] = -np.inf
    cosines[12] = 0
    expected = np.argsort(-cosines)[:39]
    items, trace = pipeline.similar(3, 500)
    assert items.rows.tolist() == expected.tolist()
    np.testing.assert_allclose(items.scores, cosines[expected], atol=1e-6)
    assert trace.visitor_kind is VisitorKind.UNSPECIFIED

    cold, _ = pipeline.similar(12, 40)
    assert len(cold) == 39
    assert 12 not in cold.rows
    assert set(cold.sources) <= {"popular", "fresh", "catalog"}

    filtered, _ = pipeline.similar(
        3, 5, filters=Filters(brands=["brand 1"]), excluded=np.array([8], np.int32)
    )
    assert len(filtered) == 5
    assert all(pipeline.bundle.catalog.matching(brands=["brand 1"])[filtered.rows])
    assert 8 not in filtered.rows
    with pytest.raises(ValueError, match="item_row is 41; expected 1 to 40"):
        pipeline.similar(41, 5)


def test_rank(pipeline: RecommendationPipeline) -> None:
    candidates = np.array([9, 2, 30, 4], np.int32)
    scores = ranker_scores(pipeline.bundle, [2, 3, 5])
    items, trace = pipeline.rank(pipeline.resolve_visitor("loyal"), candidates)
    assert items.rows.tolist() == sorted(candidates.tolist(), key=lambda row: -scores[row])
    assert set(items.sources) == {"caller"}
    assert [timing.stage for timing in trace.timings] == ["ranking"]

    scores = pipeline.bundle.item_vectors.sum(axis=1)  # the toy's start token looks along (1, 1, ...)
    anonymous, _ = pipeline.rank(Visitor(EMPTY_HISTORY), candidates)
    assert anonymous.rows.tolist() == sorted(candidates.tolist(), key=lambda row: -scores[row])
    nothing, _ = pipeline.rank(Visitor(EMPTY_HISTORY), np.zeros(0, np.int32))
    assert len(nothing) == 0

    without_ranker = without(pipeline, scorer=None)
    loyal = pipeline.resolve_visitor("loyal")
    products = pipeline.bundle.item_vectors @ query_vector(pipeline.bundle, loyal)
    by_query, _ = without_ranker.rank(loyal, candidates)
    assert by_query.rows.tolist() == sorted(candidates.tolist(), key=lambda row: -products[row])
    popularity = pipeline.bundle.catalog.popularity
    by_popularity, _ = without_ranker.rank(Visitor(EMPTY_HISTORY), candidates)
    assert by_popularity.rows.tolist() == sorted(candidates.tolist(), key=lambda row: -popularity[row])


def test_largest() -> None:
    scores = np.array([1, 3, 2, 3, 2, 2], np.float32)
    for k, expected in {
        1: [1],
        2: [1, 3],
        4: [1, 3, 2, 4],
        6: [1, 3, 2, 4, 5, 0],
        9: [1, 3, 2, 4, 5, 0],
    }.items():
        assert largest(scores, k).tolist() == expected
    assert largest(np.zeros(0, np.float32), 3).tolist() == []


# Properties

conditions = st.fixed_dictionaries(
    {},
    optional={
        "categories": st.lists(st.sampled_from(["all", "c0", "c1", "none such"]), max_size=2),
        "brands": st.lists(st.sampled_from(["brand 1", "brand 2", "brand 5"]), max_size=2),
        "seller_ids": st.lists(st.sampled_from(["s0", "s1"]), max_size=2),
        "min_price": st.sampled_from([0.0, 10.0, 39.0, 1000.0]),
        "max_price": st.sampled_from([0.0, 10.0, 39.0]),
    },
)
rows = st.lists(st.integers(1, 40), max_size=45)


@settings(max_examples=150, deadline=None)
@given(
    conditions=conditions,
    excluded=rows,
    history=rows,
    user_row=st.integers(0, 5),
    limit=st.sampled_from([1, 3, 10, 40, 500]),
    broken=st.sampled_from(["", "index", "scorer", "rules", "popular", "neighbours"]),
)
def test_whatever_is_asked_nothing_forbidden_and_nothing_missing(
    pipeline: RecommendationPipeline,
    conditions: dict[str, Any],
    excluded: list[int],
    history: list[int],
    user_row: int,
    limit: int,
    broken: str,
) -> None:
    catalog = pipeline.bundle.catalog
    if broken == "index":
        pipeline = without(pipeline, index=SimpleNamespace())
    elif broken == "scorer":
        pipeline = without(
            pipeline, scorer=SimpleNamespace(history_length=6, context=ContextTable(), heads=())
        )
    elif broken in ("popular", "neighbours"):
        pipeline = without(pipeline)
        pipeline.sources = [FailingSource(s.name) if s.name == broken else s for s in pipeline.sources]
    elif broken == "rules":
        pipeline = without(pipeline)
        pipeline.reranker.slate = fail  # type: ignore[method-assign]
    visitor = visitor_of(*history, user_row=user_row)
    ask: dict[str, Any] = {"filters": Filters(**conditions), "excluded": np.array(excluded, np.int32)}
    items, trace = pipeline.recommend(visitor, limit, **ask)

    eligible = set(np.flatnonzero(catalog.matching(**conditions)).tolist()) - set(excluded)
    found = items.rows.tolist()
    assert set(found) <= eligible
    assert len(found) == len(set(found)) == min(limit, len(eligible))
    unseen = eligible - set(history)
    if len(unseen) >= limit:
        assert set(found) <= unseen
    else:
        assert unseen <= set(found)
        if broken != "rules":
            assert set(found[: len(unseen)]) == unseen
    assert np.isfinite(items.scores).all()
    assert len(items.sources) == len(found)

    again, _ = pipeline.recommend(visitor, limit, **ask)
    assert again.rows.tolist() == found
    assert again.scores.tolist() == items.scores.tolist()
    if not broken:
        assert trace.degraded_stages == []


# What goes wrong


class FailingScorer:
    history_length = 6
    context = ContextTable()
    heads = ()

    def __init__(self, answer: Callable[[int], np.ndarray] | None) -> None:
        self.answer = answer

    def user_states(self, history: np.ndarray, context: Encoded, head_weights: None) -> np.ndarray:
        return np.ones((1, 8), np.float32)

    def score_states(self, states: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        if self.answer is None:
            raise RuntimeError("out of memory")
        return self.answer(candidates.shape[1])[np.newaxis]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        lambda count: np.full(count, np.nan, np.float32),
        lambda count: np.arange(count, dtype=np.float32) / np.float32(0.0) if count else np.zeros(0),
        lambda count: np.zeros(count + 1, np.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered in divide")
def test_a_failing_ranker(
    plain: RecommendationPipeline,
    answer: Callable[[int], np.ndarray] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = without(plain, scorer=FailingScorer(answer))
    visitor = plain.resolve_visitor("loyal")
    items, trace = broken.recommend(visitor, 10)
    assert trace.degraded_stages == ["ranking"]
    # What retrieval found, in its order; this scorer's state looks along (1, 1, ...).
    query = broken.query(visitor)
    unseen = np.isin(np.arange(41), [0, 2, 3, 5], invert=True)
    found = broken._find(query, unseen, 20, trace).in_turns(broken.quotas)
    assert items.rows.tolist() == found.rows[:10].tolist()
    assert "ranking failed" in caplog.text

    ranked, trace = broken.rank(visitor, np.array([4, 9], np.int32))
    popularity = plain.bundle.catalog.popularity
    assert ranked.rows.tolist() == sorted([4, 9], key=lambda row: -popularity[row])
    assert trace.degraded_stages == ["ranking"]


def test_a_failing_index(plain: RecommendationPipeline) -> None:
    class FailingIndex:
        def search(self, *arguments: object) -> None:
            raise RuntimeError("index is gone")

    items, trace = without(plain, index=FailingIndex()).recommend(plain.resolve_visitor("loyal"), 10)
    assert trace.degraded_stages == ["retrieval.embedding"]
    assert len(items) == 10
    candidates = expected_candidates(
        plain, [2, 3, 5], [r for r in range(1, 41) if r not in (2, 3, 5)], 20, ("embedding",)
    )
    scores = ranker_scores(plain.bundle, [2, 3, 5])
    assert items.rows.tolist() == sorted(candidates, key=lambda row: -scores[row])[:10]


class FailingSource:
    def __init__(self, name: str) -> None:
        self.name = name

    def find(self, *arguments: object) -> Any:
        raise RuntimeError("gone")


@pytest.mark.parametrize("history", [[2, 3, 5], []])
@pytest.mark.parametrize("name", ALL_SOURCES)
def test_each_source_fails_alone(
    plain: RecommendationPipeline, name: str, history: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    broken = without(plain)
    broken.sources = [FailingSource(name) if source.name == name else source for source in broken.sources]
    items, trace = broken.recommend(visitor_of(*history), 10)
    assert trace.degraded_stages == [f"retrieval.{name}"]
    assert f"retrieval.{name} failed" in caplog.text
    assert len(items) == len(set(items.rows.tolist())) == 10
    assert not set(items.rows.tolist()) & set(history)
    assert name not in items.sources
    if name != "popular":
        allowed = [row for row in range(1, 41) if row not in history]
        expected = expected_candidates(plain, history, allowed, 20, (name,))
        scores = ranker_scores(plain.bundle, history or [0])
        if history:
            assert items.rows.tolist() == sorted(expected, key=lambda row: -scores[row])[:10]


@pytest.mark.parametrize("rows", [[1, 1000], ["a"], [[1, 2]]])
def test_a_source_that_gives_what_is_no_item_leaves_what_is_popular(
    plain: RecommendationPipeline, rows: list[Any]
) -> None:
    broken = without(plain)
    wrong = Candidates(np.array(rows), np.ones(len(rows), np.float32), "embedding")
    stranger = SimpleNamespace(name="embedding", find=lambda *_: wrong)
    broken.sources = [stranger if source.name == "embedding" else source for source in broken.sources]
    items, trace = broken.recommend(visitor_of(2, 3, 5), 10)
    assert trace.degraded_stages == ["retrieval"]
    assert len(set(items.rows.tolist())) == 10
    assert set(items.sources) == {"popular"}


def test_when_all_sources_fail_there_is_still_the_catalog(plain: RecommendationPipeline) -> None:
    broken = without(plain, scorer=None)
    broken.sources = [FailingSource(name) for name in ALL_SOURCES]
    items, trace = broken.recommend(Visitor(EMPTY_HISTORY), 10)
    assert trace.degraded_stages == [f"retrieval.{name}" for name in ALL_SOURCES]
    assert items.rows.tolist() == list(range(1, 11))
    assert set(items.sources) == {"catalog"}


def test_a_failing_state_costs_the_sequence_source_and_the_ranking(plain: RecommendationPipeline) -> None:
    items, trace = without(
        plain, scorer=SimpleNamespace(history_length=6, context=ContextTable(), heads=())
    ).recommend(visitor_of(2, 3, 5), 10)
    assert trace.degraded_stages == ["retrieval.sequence", "ranking"]
    assert len(items) == 10


def test_the_state_is_worked_out_once(plain: RecommendationPipeline) -> None:
    scorer, calls = plain.bundle.scorer, []
    assert scorer is not None

    def user_states(history: np.ndarray, context: Encoded, head_weights: None) -> np.ndarray:
        calls.append(history)
        return scorer.user_states(history, context)

    counting = SimpleNamespace(
        history_length=6,
        context=scorer.context,
        heads=(),
        user_states=user_states,
        score_states=scorer.score_states,
        num_items=40,
    )
    pipeline = without(plain, scorer=counting)
    answer = pipeline.recommend(visitor_of(2, 3, 5), 10)
    assert len(calls) == 1
    assert answer.items.rows.tolist() == plain.recommend(visitor_of(2, 3, 5), 10).items.rows.tolist()


def test_nothing_of_the_future_is_fresh(plain: RecommendationPipeline) -> None:
    times = plain.bundle.catalog.available_from

    def fresh(now: int | None) -> set[int]:
        items, _ = without(plain, scorer=None).recommend(Visitor(EMPTY_HISTORY), 40, now=now)
        return {row for row, source in zip(items.rows, items.sources, strict=True) if source == "fresh"}

    assert max(times[list(fresh(None))]) == 29_000  # the bundle's clock stands at 30,000
    assert max(times[list(fresh(2_000))]) == 2_000  # at the very moment it is on sale
    assert max(times[list(fresh(36_999))]) == 35_000
    assert fresh(999) == set()


def test_without_popular_in_the_recipe_it_still_fills_up(make_bundle: MakeBundle) -> None:
    sources = [{"source": "embedding", "quota": 1.0}]
    pipeline = RecommendationPipeline(Bundle.load(make_bundle(sources=sources)))
    items, trace = pipeline.recommend(Visitor(EMPTY_HISTORY), 10)
    assert set(items.sources) == {"popular"}
    assert trace.degraded_stages == []


def test_how_much_the_events_of_a_history_count(make_bundle: MakeBundle) -> None:
    weights = {"purchase": 4.0, "view": 1.0, "click": 0.0}
    bundle = Bundle.load(make_bundle(event_weights=weights, half_life_events=2.0, half_life_days=1.0))
    events = [
        Event("item-7", "purchase", 86_400_000),
        Event("item-8", "click", 86_400_000),
        Event("item-9", "remove_from_cart", 2 * 86_400_000),
        Event("item-10", "view", 2 * 86_400_000),
        Event("item-11", "cart"),
    ]
    visitor = RecommendationPipeline(bundle).resolve_visitor("", events)
    # 3, 2, 1 and 0 wanted events behind them, and one day behind the newest for the first two; the last has
    # no time: it is as new as the newest.
    expected = [4 * 2**-1.5 * 2**-1, 0, 2**-0.5, 1]
    np.testing.assert_allclose(history_weights(bundle, visitor.history), expected, rtol=1e-6)
    vector = query_vector(bundle, visitor)
    rows, shares = np.array([8, 11, 12]), np.array([4 * 2**-2.5, 2**-0.5, 1])
    shares = shares / shares.mean() / np.sqrt(3 * np.maximum(bundle.item_degrees[rows], 1))
    # Item 12 was never trained on and has no vector in the toy.
    np.testing.assert_allclose(vector, shares @ bundle.item_vectors[rows], rtol=1e-5)

    unordered = {"data": bundle.manifest["data"] | {"time": "none"}}
    bundle = dataclasses.replace(bundle, manifest=bundle.manifest | unordered)
    np.testing.assert_allclose(history_weights(bundle, visitor.history), [4, 0, 1, 1])


def test_resolving_the_visitor_is_part_of_the_time(plain: RecommendationPipeline) -> None:
    visitor = plain.resolve_visitor("loyal")
    assert visitor.resolving_s > 0
    _, trace = plain.recommend(dataclasses.replace(visitor, resolving_s=5.0), 10)
    assert trace.total_us >= 5_000_000


def test_a_query_vector_that_is_not_finite(plain: RecommendationPipeline) -> None:
    vectors = np.full_like(plain.bundle.item_vectors, np.nan)
    items, trace = without(plain, item_vectors=vectors).recommend(plain.resolve_visitor("loyal"), 10)
    assert trace.degraded_stages == ["retrieval.embedding"]
    assert len(items) == 10


def fail(*arguments: object, **keywords: object) -> Any:
    raise RuntimeError("no")


def test_failing_rules(plain: RecommendationPipeline) -> None:
    broken = without(plain)
    broken.reranker.slate = fail  # type: ignore[method-assign]
    items, trace = broken.recommend(plain.resolve_visitor("loyal"), 10)
    assert trace.degraded_stages == ["reranking"]
    assert items.rows.tolist() == plain.recommend(plain.resolve_visitor("loyal"), 10).items.rows.tolist()


def test_a_spent_deadline_skips_the_stages(pipeline: RecommendationPipeline) -> None:
    items, trace = pipeline.recommend(pipeline.resolve_visitor("loyal"), 10, budget=Budget(0.0))
    assert trace.degraded_stages == ["retrieval", "ranking", "reranking"]
    assert len(items) == 10


def test_a_failing_filter_is_no_slate(pipeline: RecommendationPipeline) -> None:
    """Hard conditions have no second best: better no answer than a forbidden item."""
    with pytest.raises(TypeError):
        pipeline.recommend(pipeline.resolve_visitor("loyal"), 10, filters=Filters(min_price="x"))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1])
def test_limits(pipeline: RecommendationPipeline, limit: int) -> None:
    for ask in (
        lambda: pipeline.recommend(Visitor(EMPTY_HISTORY), limit),
        lambda: pipeline.similar(1, limit),
    ):
        with pytest.raises(ValueError, match=f"limit is {limit}; expected at least 1"):
            ask()


def test_filters_that_match_nothing(pipeline: RecommendationPipeline) -> None:
    items, trace = pipeline.recommend(pipeline.resolve_visitor("loyal"), 10, filters=Filters(brands=["none"]))
    assert len(items) == 0
    assert trace.degraded_stages == []


@pytest.mark.parametrize("num_items", [0, 1])
@pytest.mark.parametrize("user_id", ["", "user with spaces 🎉", "new"])
def test_tiny_catalogs(make_bundle: MakeBundle, num_items: int, user_id: str) -> None:
    ranker = "ordered" if num_items else "none"
    pipeline = RecommendationPipeline(Bundle.load(make_bundle(num_items=num_items, ranker=ranker)))
    visitor = pipeline.resolve_visitor(user_id, [Event("with space"), Event("?")])
    items, trace = pipeline.recommend(visitor, 10)
    assert items.rows.tolist() == [1][:num_items]
    assert trace.degraded_stages == []
    if num_items:
        assert len(pipeline.similar(1, 10).items) == 0
        assert pipeline.rank(visitor, np.array([1], np.int32)).items.rows.tolist() == [1]


def test_a_very_long_history(pipeline: RecommendationPipeline) -> None:
    events = [Event(f"item-{number % 60}") for number in range(100_000)]  # items 7 to 39 exist
    visitor = pipeline.resolve_visitor("loyal", events)
    items, trace = pipeline.recommend(visitor, 10)
    assert len(visitor.history) + trace.num_unknown_history_items == 100_004
    assert len(items) == 10
    assert trace.degraded_stages == []
    assert trace.relaxed_rules[-1:] == ["drop_seen"]
