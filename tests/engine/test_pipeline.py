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
from engine.history import EMPTY_HISTORY, History
from engine.pipeline import (
    Event,
    Filters,
    RecommendationPipeline,
    Visitor,
    check_settings,
    largest,
    query_vector,
)
from engine.trace import VisitorKind
from retrieval.fold_in import fold_in

MakeBundle = Callable[..., Path]


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


# Worked-out answers


def test_known_user_from_end_to_end(plain: RecommendationPipeline) -> None:
    bundle = plain.bundle
    unseen = [row for row in range(1, 41) if row not in (2, 3, 5)]
    query = fold_in(bundle.item_vectors, bundle.item_degrees, np.array([2, 3, 5], np.int32))
    by_query = sorted(unseen, key=lambda row: -float(bundle.item_vectors[row] @ query))
    scores = ranker_scores(bundle, [2, 3, 5])  # "loyal" did 2, 3, 3, 5
    expected = sorted(by_query[:20], key=lambda row: -scores[row])[:10]

    items, trace = plain.recommend(plain.resolve_visitor("loyal"), 10)
    assert items.rows.tolist() == expected
    np.testing.assert_allclose(items.scores, scores[expected], rtol=1e-5)
    assert set(items.sources) == {"embedding"}
    assert trace.visitor_kind is VisitorKind.KNOWN_USER
    assert trace.bundle_version == bundle.version
    assert (trace.degraded_stages, trace.relaxed_rules, trace.num_unknown_history_items) == ([], [], 0)
    assert [(timing.stage, timing.num_in, timing.num_out) for timing in trace.timings] == [
        ("filtering", 40, 40),
        ("retrieval", 40, 20),
        ("ranking", 20, 10),
        ("reranking", 10, 10),
    ]
    assert trace.total_us >= sum(timing.duration_us for timing in trace.timings) - 4


def test_evaluation_asks_with_rows(plain: RecommendationPipeline) -> None:
    by_id, _ = plain.recommend(plain.resolve_visitor("loyal"), 10)
    by_row, _ = plain.recommend(visitor_of(2, 3, 3, 5, user_row=1), 10)
    assert by_row.rows.tolist() == by_id.rows.tolist()


def test_history_only(plain: RecommendationPipeline) -> None:
    bundle = plain.bundle
    query = fold_in(bundle.item_vectors, bundle.item_degrees, np.array([7, 9], np.int32))
    unseen = [row for row in range(1, 41) if row not in (7, 9)]
    by_query = sorted(unseen, key=lambda row: -float(bundle.item_vectors[row] @ query))
    scores = ranker_scores(bundle, [9, 7])
    expected = sorted(by_query[:20], key=lambda row: -scores[row])[:5]

    events = [Event("item-8"), Event("ü/ö?=&"), Event("no such item")]
    visitor = plain.resolve_visitor("stranger", events)
    items, trace = plain.recommend(visitor, 5)
    assert visitor.history.items.tolist() == [9, 7]
    assert items.rows.tolist() == expected
    assert trace.visitor_kind is VisitorKind.HISTORY_ONLY
    assert trace.num_unknown_history_items == 1


@pytest.mark.parametrize("user_id", ["", "stranger"])
def test_anonymous_gets_popular_and_fresh_in_turns(plain: RecommendationPipeline, user_id: str) -> None:
    catalog = plain.bundle.catalog
    popular = sorted(range(1, 41), key=lambda row: -catalog.popularity[row])
    fresh = sorted(range(1, 41), key=lambda row: -catalog.available_from[row])
    unranked = without(plain, scorer=None)
    items, trace = unranked.recommend(plain.resolve_visitor(user_id, [Event("no such item")]), 4)
    assert items.rows.tolist() == [popular[0], fresh[0], popular[1], fresh[1]]
    assert items.sources.tolist() == ["popular", "fresh", "popular", "fresh"]
    assert trace.visitor_kind is VisitorKind.ANONYMOUS
    assert trace.degraded_stages == []
    assert "ranking" not in [timing.stage for timing in trace.timings]
    assert trace.unknown_user == bool(user_id)


def test_anonymous_candidates_are_ranked_from_the_start_token(plain: RecommendationPipeline) -> None:
    scores = plain.bundle.item_vectors.sum(axis=1)  # the toy's start token looks along (1, 1, ...)
    items, trace = plain.recommend(Visitor(EMPTY_HISTORY), 4)
    found = plain._find(None, np.arange(41) > 0, plain.num_candidates).rows
    assert items.rows.tolist() == sorted(found.tolist(), key=lambda row: -scores[row])[:4]
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


@pytest.mark.parametrize(
    ("name", "value"), [("num_candidates", 10_001), ("num_ranked", 0), ("default_limit", 501)]
)
def test_settings_out_of_range(name: str, value: int) -> None:
    settings = {"num_candidates": 1000, "num_ranked": 500, "default_limit": 10} | {name: value}
    with pytest.raises(ValueError, match=rf"pipeline.{name} is {value}; expected 1 to"):
        check_settings(settings, [])


def test_a_known_user_without_anything_known(plain: RecommendationPipeline) -> None:
    visitor = plain.resolve_visitor("new")
    items, trace = plain.recommend(visitor, 4)
    assert trace.visitor_kind is VisitorKind.KNOWN_USER
    assert set(items.sources) == {"popular", "fresh"}


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
    assert set(cold.sources) <= {"popular", "fresh"}

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
    broken=st.sampled_from(["", "index", "scorer", "rules"]),
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
        pipeline = without(pipeline, scorer=SimpleNamespace(history_length=6))
    elif broken == "rules":
        pipeline = without(pipeline)
        pipeline.groups = {"brand": np.zeros(0, np.int32)}
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

    def __init__(self, answer: Callable[[int], np.ndarray] | None) -> None:
        self.answer = answer

    def score(self, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
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
    healthy = without(plain, scorer=None)
    visitor = plain.resolve_visitor("loyal")
    items, trace = broken.recommend(visitor, 10)
    assert trace.degraded_stages == ["ranking"]
    assert items.rows.tolist() == healthy.recommend(visitor, 10).items.rows.tolist()
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
    assert trace.degraded_stages == ["retrieval"]
    assert len(items) == 10
    assert set(items.sources) <= {"popular", "fresh"}


def test_a_query_vector_that_is_not_finite(plain: RecommendationPipeline) -> None:
    vectors = np.full_like(plain.bundle.item_vectors, np.nan)
    items, trace = without(plain, item_vectors=vectors).recommend(plain.resolve_visitor("loyal"), 10)
    assert trace.degraded_stages == ["retrieval"]
    assert len(items) == 10


def test_failing_rules(plain: RecommendationPipeline) -> None:
    class FailingRule:
        name = "failing"

        def apply(self, *arguments: object) -> None:
            raise RuntimeError("no")

    broken = without(plain)
    broken.rules = [FailingRule()]  # type: ignore[list-item]
    items, trace = broken.recommend(plain.resolve_visitor("loyal"), 10)
    assert trace.degraded_stages == ["reranking"]
    assert items.rows.tolist() == plain.recommend(plain.resolve_visitor("loyal"), 10).items.rows.tolist()


def test_a_spent_deadline_skips_the_stages(pipeline: RecommendationPipeline) -> None:
    items, trace = pipeline.recommend(pipeline.resolve_visitor("loyal"), 10, deadline=0.0)
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
