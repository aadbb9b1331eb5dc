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
    PopularSource,
    interleave,
    merge,
)

INDEX = ItemIndex.build(np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32))
POPULARITY = np.array([99, 5, 0, 7, 5], np.int64)
AVAILABLE_FROM = np.array([99, 0, 300, 100, 300], np.int64)


def found(source: str, *rows: int) -> Candidates:
    """Candidates whose scores say where they come from: the row plus a half for source b."""
    return Candidates(np.array(rows, np.int32), np.array(rows, np.float32) + (source == "b") / 2, source)


def test_embedding():
    candidates = EmbeddingSource(INDEX).find(np.array([2, 1], np.float32), None, 2)
    assert candidates.source == "embedding"
    assert candidates.rows.tolist() == [3, 1]
    assert candidates.scores.tolist() == [3, 2]


def test_embedding_asks_for_allowed_items_only():
    allowed = np.array([False, False, True, False])
    assert EmbeddingSource(INDEX).find(np.array([2, 1], np.float32), allowed, 5).rows.tolist() == [2]


def test_embedding_without_a_query_finds_nothing():
    candidates = EmbeddingSource(INDEX).find(None, None, 5)
    assert candidates.rows.shape == candidates.scores.shape == (0,)
    assert (candidates.rows.dtype, candidates.scores.dtype) == (np.int32, np.float32)


def test_popular():
    source = PopularSource(POPULARITY)
    candidates = source.find(None, None, 10)
    assert candidates.rows.tolist() == [3, 1, 4, 2]  # 7, 5, 5, 0; equal counts by row
    assert candidates.scores.tolist() == [7, 5, 5, 0]
    assert candidates.source == "popular"
    assert source.find(None, np.array([True, True, True, False, True]), 2).rows.tolist() == [1, 4]


def test_fresh():
    source = FreshSource(AVAILABLE_FROM)
    candidates = source.find(None, None, 10)
    assert candidates.rows.tolist() == [2, 4, 3]  # item 1's age is unknown
    assert candidates.scores.tolist() == [300, 300, 100]
    assert candidates.source == "fresh"
    assert source.find(None, np.array([True, True, False, True, True]), 1).rows.tolist() == [4]


def test_no_item_has_an_age():
    assert len(FreshSource(np.zeros(4, np.int64)).find(None, None, 5).rows) == 0


SOURCES: list[CandidateSource] = [
    EmbeddingSource(INDEX),
    PopularSource(POPULARITY[:4]),
    FreshSource(AVAILABLE_FROM[:4]),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_source_keeps_the_contract(source):
    query = np.array([1, 1], np.float32)
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
    for source in (PopularSource(nothing), FreshSource(nothing)):
        assert len(source.find(None, None, 5).rows) == 0


def test_merge_worked_out():
    merged = merge([found("a", 4, 2), found("b", 2, 7, 4, 1), found("c", 9)], limit=4)
    assert merged.rows.tolist() == [4, 2, 7, 1]
    assert merged.scores.tolist() == [4, 2, 7.5, 1.5]  # items 4 and 2 keep what the first part gave them
    assert merged.source_of.tolist() == [0, 0, 1, 1]
    assert [array.dtype for array in merged] == [np.int32, np.float32, np.int16]


def test_merge_of_nothing():
    for parts in ([], [found("a")], [found("a"), found("b")]):
        rows, scores, source_of = merge(parts, 5)
        assert (len(rows), len(scores), len(source_of)) == (0, 0, 0)
        assert [rows.dtype, scores.dtype, source_of.dtype] == [np.int32, np.float32, np.int16]


def test_interleave_worked_out():
    merged = interleave(found("a", 1, 2, 3), found("b", 8, 9), limit=10)
    assert merged.rows.tolist() == [1, 8, 2, 9, 3]
    assert merged.source_of.tolist() == [0, 1, 0, 1, 0]
    merged = interleave(found("a", 1, 2, 3), found("b", 1, 4), limit=10)
    assert merged.rows.tolist() == [1, 2, 4, 3]  # b's first turn would have been item 1 again
    assert merged.scores.tolist() == [1, 2, 4.5, 3]
    assert interleave(found("a", 1), found("b", 2, 3, 4), limit=3).rows.tolist() == [1, 2, 3]
    assert interleave(found("a"), found("b", 2, 3), limit=3).rows.tolist() == [2, 3]
    assert interleave(found("a"), found("b"), limit=3).rows.tolist() == []


def test_limit_of_0_is_refused():
    for combine in (lambda: merge([found("a", 1)], 0), lambda: interleave(found("a", 1), found("b"), 0)):
        with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
            combine()


rows_lists = st.lists(st.integers(1, 12), max_size=8)


@given(parts=st.lists(rows_lists, max_size=4), limit=st.integers(1, 20))
def test_merge_agrees_with_a_loop(parts, limit):
    taken: dict[int, int] = {}
    for place, part in enumerate(parts):
        for row in part:
            taken.setdefault(row, place)
    merged = merge([found("a", *part) for part in parts], limit)
    assert merged.rows.tolist() == list(taken)[:limit]
    assert merged.source_of.tolist() == list(taken.values())[:limit]


@given(a=rows_lists, b=rows_lists, limit=st.integers(1, 20))
def test_interleave_agrees_with_a_loop(a, b, limit):
    taken: dict[int, int] = {}
    for turn in range(8):
        for place, part in enumerate((a, b)):
            if turn < len(part):
                taken.setdefault(part[turn], place)
    merged = interleave(found("a", *a), found("b", *b), limit)
    assert merged.rows.tolist() == list(taken)[:limit]
    assert merged.source_of.tolist() == list(taken.values())[:limit]
