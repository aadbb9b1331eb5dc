import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.item_index import ItemIndex
from retrieval.sources import (
    Candidates,
    CandidateSource,
    EmbeddingSource,
    FreshSource,
    Gathering,
    Merged,
    NeighbourSource,
    PopularSource,
    Query,
    SequenceSource,
    TransitionSource,
    _first_allowed,
    merge,
    turns,
)
from retrieval.sparse import SparseRows

VECTORS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
DEGREES = np.array([0, 4, 1, 1], np.float32)
INDEX = ItemIndex.build(VECTORS)
NEIGHBOURS = SparseRows.from_entries(
    np.array([1, 1, 2, 2, 3]), np.array([2, 3, 1, 3, 1]), np.array([0.5, 0.25, 1, 0.5, 2]), 4, 4
)
NEXT = (np.array([1, 3], np.int32), np.array([0.25, 0.5], np.float32))
POPULARITY = np.array([99, 5, 0, 7, 5], np.int64)
AVAILABLE_FROM = np.array([99, 0, 300, 100, 300], np.int64)


def found(source: str, *rows: int) -> Candidates:
    """Candidates whose scores say where they come from: the row plus a half for source b."""
    return Candidates(np.array(rows, np.int32), np.array(rows, np.float32) + (source == "b") / 2, source)


def asked(*items: int, weights: list[float] | None = None, state=(0, 1), now: int = 1000) -> Query:
    """A query of a history of equal weights, whose state is given and counted."""
    counts = np.ones(len(items), np.float32) if weights is None else np.array(weights, np.float32)
    return Query(np.array(items, np.int32), counts, lambda: np.array(state, np.float32), now, lambda: NEXT)


def test_embedding():
    source = EmbeddingSource(INDEX, VECTORS, DEGREES)
    candidates = source.find(asked(1, 2), None, 2)
    # fold-in: (1, 0) / sqrt(2 * 4) + (0, 1) / sqrt(2 * 1)
    assert candidates.source == "embedding"
    assert candidates.rows.tolist() == [3, 2]
    np.testing.assert_allclose(candidates.scores, [8**-0.5 + 2**-0.5, 2**-0.5], rtol=1e-6)
    # An event that counts 9 times the other turns the vector around: 1.8 and .2 at a mean of 1.
    weighted = source.find(asked(1, 2, weights=[9, 1]), None, 3)
    assert weighted.rows.tolist() == [3, 1, 2]
    np.testing.assert_allclose(weighted.scores[1:], [1.8 * 8**-0.5, 0.2 * 2**-0.5], rtol=1e-6)


def test_embedding_asks_for_allowed_items_only():
    allowed = np.array([False, False, True, False])
    assert EmbeddingSource(INDEX, VECTORS, DEGREES).find(asked(1, 2), allowed, 5).rows.tolist() == [2]


def test_sequence_searches_with_the_state():
    candidates = SequenceSource(INDEX).find(asked(1, state=(2, 1)), None, 2)
    assert candidates.source == "sequence"
    assert candidates.rows.tolist() == [3, 1]
    assert candidates.scores.tolist() == [3, 2]


def test_neighbours():
    source = NeighbourSource(NEIGHBOURS)
    candidates = source.find(asked(1, 2), None, 5)
    assert candidates.source == "neighbours"
    assert candidates.rows.tolist() == [1, 3, 2]  # 1; .25 + .5; .5
    assert candidates.scores.tolist() == [1, 0.75, 0.5]
    assert source.find(asked(1, 2), np.array([True, False, True, True]), 1).rows.tolist() == [3]
    # Weights 3 and 1 are 1.5 and .5 at a mean of 1; a repeat counts once, with the larger weight.
    weighted = source.find(asked(1, 2, 1, weights=[2, 1, 3]), None, 5)
    assert dict(zip(weighted.rows.tolist(), weighted.scores.tolist(), strict=True)) == {
        1: 0.5,
        2: 0.75,
        3: 0.625,
    }


def test_transitions():
    candidates = TransitionSource().find(asked(2), None, 5)
    assert candidates.source == "transitions"
    assert (candidates.rows.tolist(), candidates.scores.tolist()) == ([3, 1], [0.5, 0.25])
    assert TransitionSource().find(asked(2), np.array([True, True, True, False]), 5).rows.tolist() == [1]
    assert TransitionSource().find(asked(2), None, 1).rows.tolist() == [3]


@pytest.mark.parametrize(
    "source", [EmbeddingSource(INDEX, VECTORS, DEGREES), SequenceSource(INDEX), NeighbourSource(NEIGHBOURS)]
)
def test_without_a_history_nothing_is_found(source):
    candidates = source.find(asked(), None, 5)
    assert candidates.rows.shape == candidates.scores.shape == (0,)
    assert (candidates.rows.dtype, candidates.scores.dtype) == (np.int32, np.float32)


def test_popular():
    recent = np.array([99, 1, 0, 2, 1], np.int64)
    source = PopularSource(recent, POPULARITY)
    candidates = source.find(asked(), None, 10)
    assert candidates.rows.tolist() == [3, 1, 4, 2]  # recent 2, 1, 1, 0; equal counts by row
    assert candidates.scores.tolist() == [2, 1, 1, 0]
    assert candidates.source == "popular"
    assert source.find(asked(), np.array([True, True, True, False, True]), 2).rows.tolist() == [1, 4]
    # What is as popular of late goes by what it ever was: 7, 5, 5, 0.
    long_ago = PopularSource(np.zeros(5, np.int64), POPULARITY)
    assert long_ago.find(asked(), None, 10).rows.tolist() == [3, 1, 4, 2]


@given(
    order=st.permutations(range(1, 60)),
    allowed=st.lists(st.booleans(), min_size=60, max_size=60),
    limit=st.integers(1, 70),
)
def test_the_first_of_an_order_that_are_allowed(order, allowed, limit):
    mask = np.array(allowed)
    expected = [row for row in order if allowed[row]][:limit]
    found = _first_allowed(np.array(order, np.int32), mask, limit)
    assert (found.tolist(), found.dtype) == (expected, np.int32)


def test_fresh():
    source = FreshSource(AVAILABLE_FROM)
    candidates = source.find(asked(), None, 10)
    assert candidates.rows.tolist() == [2, 4, 3]  # item 1's age is unknown
    assert candidates.scores.tolist() == [300, 300, 100]
    assert candidates.source == "fresh"
    assert source.find(asked(), np.array([True, True, False, True, True]), 1).rows.tolist() == [4]


@pytest.mark.parametrize(
    ("now", "expected"), [(0, []), (99, []), (100, [3]), (299, [3]), (300, [2, 4, 3]), (10**15, [2, 4, 3])]
)
def test_nothing_of_the_future_is_fresh(now, expected):
    assert FreshSource(AVAILABLE_FROM).find(asked(now=now), None, 10).rows.tolist() == expected


def test_no_item_has_an_age():
    assert len(FreshSource(np.zeros(4, np.int64)).find(asked(), None, 5).rows) == 0


SOURCES: list[CandidateSource] = [
    EmbeddingSource(INDEX, VECTORS, DEGREES),
    SequenceSource(INDEX),
    NeighbourSource(NEIGHBOURS),
    PopularSource(POPULARITY[:4], POPULARITY[:4]),
    FreshSource(AVAILABLE_FROM[:4]),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_keeps_the_contract(source):
    query = asked(1, 2)
    for allowed in (None, np.array([True, False, True, True]), np.zeros(4, bool)):
        for limit in (1, 2, 50):
            candidates = source.find(query, allowed, limit)
            assert candidates.source == source.name
            assert (candidates.rows.dtype, candidates.scores.dtype) == (np.int32, np.float32)
            assert len(candidates.rows) == len(candidates.scores) <= limit
            assert len(set(candidates.rows.tolist())) == len(candidates.rows)
            assert 0 not in candidates.rows
            assert allowed is None or allowed[candidates.rows].all()
    with pytest.raises(ValueError, match="is 0; expected at least 1"):
        source.find(query, None, 0)


def test_empty_catalog():
    nothing = np.zeros(1, np.int64)
    for source in (PopularSource(nothing, nothing), FreshSource(nothing)):
        assert len(source.find(asked(), None, 5).rows) == 0


def test_merge_worked_out():
    # Of 8: a 4, b 2, c 2. Item 2 counts for a; b goes on to 7 and 4's place is taken too, so 5.
    parts = [found("a", 4, 2, 1, 6, 8), found("b", 2, 7, 4, 5, 3), found("c", 9, 7, 10)]
    merged = in_turns(parts, [0.5, 0.25, 0.25], limit=8)
    # Places: a at 2, 4, 6, 8; b and c at 4 and 8.
    assert merged.rows.tolist() == [4, 2, 7, 9, 1, 6, 5, 10]
    assert merged.scores.tolist() == [4, 2, 7.5, 9, 1, 6, 5.5, 10]
    assert merged.source_of.tolist() == [0, 0, 1, 2, 0, 0, 1, 2]
    assert [array.dtype for array in merged] == [np.int32, np.float32, np.int16]


def test_what_a_source_cannot_fill_goes_to_the_others_in_order():
    parts = [found("a", 1), found("b", 2, 3, 4, 5), found("c", 6, 7, 8, 9)]
    merged = in_turns(parts, [0.5, 0.25, 0.25], limit=8)
    assert set(merged.rows.tolist()) == {1, 2, 3, 4, 5, 6, 7, 8}  # a 1 of 4, b 2 + 2, c 2 + 1
    assert in_turns(parts, [0.5, 0.25, 0.25], limit=20).rows.tolist() == [1, 2, 6, 3, 7, 4, 8, 5, 9]
    # A quota of 0 only fills up, behind what the others gave.
    assert in_turns(parts, [1, 0, 0], limit=3).rows.tolist() == [1, 2, 3]


def test_equal_quotas_take_turns():
    merged = in_turns([found("a", 1, 2, 3), found("b", 8, 9)], [0.5, 0.5], limit=10)
    assert merged.rows.tolist() == [1, 8, 2, 9, 3]
    merged = in_turns([found("a", 1, 2, 3), found("b", 1, 4)], [0.05, 0.05], limit=4)
    assert merged.rows.tolist() == [1, 4, 2, 3]
    assert merged.scores.tolist() == [1, 4.5, 2, 3]


def test_merge_of_nothing():
    for parts in ([], [found("a")], [found("a"), found("b")]):
        rows, scores, source_of = in_turns(parts, [1 / len(parts) for _ in parts], 5)
        assert (len(rows), len(scores), len(source_of)) == (0, 0, 0)
        assert [rows.dtype, scores.dtype, source_of.dtype] == [np.int32, np.float32, np.int16]


def test_limit_of_0_is_refused():
    with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
        merge([found("a", 1)], [1.0], 0)


def in_turns(parts, quotas, limit) -> Merged:
    """What is gathered, in the order of `turns`."""
    merged = merge(parts, quotas, limit)
    order = turns(merged.source_of, quotas)
    return Merged(*(array[order] for array in merged))


rows_lists = st.lists(st.integers(1, 12), max_size=8, unique=True)


@given(
    parts=st.lists(rows_lists, max_size=4),
    weights=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    limit=st.integers(1, 20),
)
def test_merge_agrees_with_a_loop(parts, weights, limit):
    quotas = [weight / max(sum(weights[: len(parts)]), 1) for weight in weights[: len(parts)]]
    bounds = [round(sum(quotas[:n]) * limit) for n in range(len(parts) + 1)]
    given_by: list[list[int]] = [[] for _ in parts]
    taken: set[int] = set()
    for turn in range(2):
        for place, part in enumerate(parts):
            share = limit if turn else bounds[place + 1] - bounds[place]
            for row in part:
                if row not in taken and len(given_by[place]) < share and len(taken) < limit:
                    given_by[place].append(row)
                    taken.add(row)
    expected = sorted(
        ((n + 1) / max(quotas[place], 1e-9), place, n, row)
        for place, rows in enumerate(given_by)
        for n, row in enumerate(rows)
    )
    merged = in_turns([found("a", *part) for part in parts], quotas, limit)
    assert merged.rows.tolist() == [row for *_, row in expected]
    assert merged.source_of.tolist() == [place for _, place, _, _ in expected]
    assert len(merged.rows) == min(limit, len({row for part in parts for row in part}))


@given(
    found_by=st.lists(st.permutations(range(1, 13)), max_size=4),
    can_find=st.lists(st.integers(0, 12), min_size=4, max_size=4),
    weights=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    allowed=st.sets(st.integers(1, 12)),
    limit=st.integers(1, 20),
)
def test_sources_that_are_asked_for_what_is_left(found_by, can_find, weights, allowed, limit):
    quotas = [weight / max(sum(weights[: len(found_by)]), 1) for weight in weights[: len(found_by)]]
    gathering = Gathering(quotas, limit, np.isin(np.arange(13), list(allowed)))
    parts = []
    for order, most in zip(found_by, can_find, strict=False):
        rows = [row for row in order if gathering.left[row]][: min(most, gathering.wanted)]
        parts.append(found("a", *rows))
        gathering.add(parts[-1])
    merged = gathering.merged()
    expected = merge(parts, quotas, limit)
    assert [array.tolist() for array in merged] == [array.tolist() for array in expected]
    assert set(merged.rows.tolist()) <= allowed
    assert len(set(merged.rows.tolist())) == len(merged.rows) <= limit
    assert set(np.flatnonzero(gathering.left).tolist()) == allowed - set(merged.rows.tolist())


def test_who_has_found_enough_leaves_the_others_their_shares():
    gathering = Gathering([0.5, 0.25, 0.25], 8, np.ones(13, np.bool_))
    assert gathering.wanted == 8
    gathering.add(found("a", 1, 2, 3, 4, 5))
    assert gathering.wanted == 8
    gathering.add(found("b", 12, 11, 10, 9, 8, 7, 6, 5))
    assert gathering.wanted == 2


def test_turns_of_items_without_a_quota():
    source_of = np.array([0, 0, 0, 1, 1, 3, 2, 3], np.int16)
    order = turns(source_of, [0.5, 0.5])
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 7]
    assert turns(source_of[order], [0.5, 0.5]).tolist() == list(range(8))  # in their turns they stay
    assert turns(source_of[:0], [0.5]).tolist() == []
