import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.item_index import ItemIndex

# Row 1 points right, row 2 up, row 3 right and up, row 4 is all zeros.
VECTORS = np.array([[9, 9], [1, 0], [0, 1], [1, 1], [0, 0]], np.float32)


@pytest.fixture
def index() -> ItemIndex:
    return ItemIndex.build(VECTORS)


def test_worked_out_answer(index):
    rows, scores = index.search(np.array([[2, 1], [-1, 0]], np.float32), k=4)
    # 2x + y: 2, 1, 3, 0.  -x: -1, 0, -1, 0, and equal scores stand by row.
    assert rows.tolist() == [[3, 1, 2, 4], [2, 4, 1, 3]]
    assert scores.tolist() == [[3, 2, 1, 0], [0, 0, -1, -1]]
    assert rows.dtype == np.int32
    assert scores.dtype == np.float32
    assert (index.num_items, index.dim) == (4, 2)


def test_row_0_is_never_found(index):
    rows, _ = index.search(np.ones((1, 2), np.float32), k=100)
    assert sorted(rows[0].tolist()) == [1, 2, 3, 4]


def test_allowed(index):
    query = np.array([[2, 1]], np.float32)
    rows, _ = index.search(query, 2, np.array([True, True, True, False, True]))
    assert rows.tolist() == [[1, 2]]
    rows, _ = index.search(query, 4, np.array([True, False, True, False, False]))
    assert rows.tolist() == [[2]]
    rows, scores = index.search(query, 4, np.array([True, False, False, False, False]))
    assert rows.shape == scores.shape == (1, 0)


def test_scores_of_every_item(index):
    scores = index.scores(np.array([[2, 1], [-1, 0]], np.float32))
    assert scores.dtype == np.float32
    assert scores.tolist() == [[-np.inf, 2, 1, 3, 0], [-np.inf, -1, 0, -1, 0]]


def test_scores_in_several_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((12, 3)).astype(np.float32)
    queries = rng.standard_normal((2, 3)).astype(np.float32)
    monkeypatch.setattr("retrieval.item_index.SCORES_BLOCK", 4)
    scores = ItemIndex.build(vectors).scores(queries)
    np.testing.assert_allclose(scores[:, 1:], queries @ vectors[1:].T, rtol=1e-5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_search_agrees_with_a_full_sort(data):
    """Small whole numbers: products are exact, and duplicates, ties and zero vectors are common."""
    num_items = data.draw(st.integers(0, 30))
    numbers = st.integers(-2, 2)
    vectors = np.array(
        data.draw(st.lists(st.tuples(numbers, numbers), min_size=num_items + 1, max_size=num_items + 1)),
        np.float32,
    )
    queries = np.array(data.draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4)), np.float32)
    k = data.draw(st.integers(1, 40))
    bools = st.lists(st.booleans(), min_size=num_items + 1, max_size=num_items + 1)
    allowed = data.draw(st.none() | bools.map(np.array))

    index = ItemIndex.build(vectors)
    rows, scores = index.search(queries, k, allowed)
    may_come = [row for row in range(1, num_items + 1) if allowed is None or allowed[row]]
    assert rows.shape == scores.shape == (len(queries), min(k, len(may_come)))
    for query, found, found_scores in zip(queries, rows.tolist(), scores.tolist(), strict=True):
        product = {row: float(query @ vectors[row]) for row in may_come}
        assert found_scores == sorted(product.values(), reverse=True)[:k]
        assert set(found) <= set(may_come)
        assert found == sorted(set(found), key=lambda row: (-product[row], row))
        assert found_scores == [product[row] for row in found]


def test_large_k_and_many_queries_agree_with_scores():
    """FAISS takes other code paths for k >= 100 and for 20 queries and more."""
    rng = np.random.default_rng(1)
    index = ItemIndex.build(rng.standard_normal((2001, 8)).astype(np.float32))
    queries = rng.standard_normal((25, 8)).astype(np.float32)
    allowed = rng.random(2001) < 0.5
    every = np.where(allowed, index.scores(queries), -np.inf)
    for k in (1, 150, 1900):
        rows, scores = index.search(queries, k, allowed)
        expected = -np.sort(-every, axis=1)[:, : min(k, int(allowed[1:].sum()))]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
        assert allowed[rows].all()


def test_empty_catalog():
    index = ItemIndex.build(np.zeros((1, 4), np.float32))
    queries = np.ones((3, 4), np.float32)
    rows, scores = index.search(queries, 10)
    assert rows.shape == scores.shape == (3, 0)
    assert index.search(queries, 10, np.array([True]))[0].shape == (3, 0)
    assert index.scores(queries).tolist() == [[-np.inf]] * 3


def test_one_item_and_no_query():
    index = ItemIndex.build(np.ones((2, 4), np.float32))
    assert index.search(np.ones((1, 4), np.float32), 5)[0].tolist() == [[1]]
    assert index.search(np.ones((0, 4), np.float32), 5)[0].shape == (0, 1)
    assert index.scores(np.ones((0, 4), np.float32)).shape == (0, 2)


def test_build_leaves_the_padding_row_out():
    vectors = VECTORS.copy()
    vectors[0] = np.nan
    assert ItemIndex.build(vectors).num_items == 4


@pytest.mark.parametrize("num_items", [0, 4])
def test_save_and_load(tmp_path: Path, num_items: int):
    index = ItemIndex.build(VECTORS[: num_items + 1])
    index.save(tmp_path / "item_index.faiss")
    loaded = ItemIndex.load(tmp_path / "item_index.faiss")
    assert (loaded.num_items, loaded.dim) == (num_items, 2)
    query = np.array([[2, 1]], np.float32)
    for before, after in zip(index.search(query, 3), loaded.search(query, 3), strict=True):
        assert before.tolist() == after.tolist()


def test_load_refuses_another_metric(tmp_path: Path):
    faiss.write_index(faiss.IndexFlatL2(2), str(tmp_path / "l2.faiss"))
    with pytest.raises(ValueError, match="expected inner product"):
        ItemIndex.load(tmp_path / "l2.faiss")


@pytest.mark.parametrize("shape", [(3,), (0, 2), (3, 0), (1, 2, 3)])
def test_build_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"vectors has shape .*; expected \[I\+1, D\]"):
        ItemIndex.build(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(index, value):
    with pytest.raises(ValueError, match="vectors holds NaN or infinity"):
        ItemIndex.build(np.array([[0, 0], [1, value]], np.float32))
    with pytest.raises(ValueError, match="queries holds NaN or infinity"):
        index.search(np.array([[0, value]], np.float32), 1)
    with pytest.raises(ValueError, match="queries holds NaN or infinity"):
        index.scores(np.array([[0, value]], np.float32))


def test_overflow_is_an_error_and_not_row_0():
    index = ItemIndex.build(np.full((3, 2), 1e30, np.float32))
    with pytest.raises(ValueError, match="too large for float32"):
        index.search(np.full((1, 2), -1e30, np.float32), 2)


def test_search_names_what_is_wrong(index):
    query = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"queries has shape \(1, 3\); expected \[B, 2\]"):
        index.search(np.zeros((1, 3), np.float32), 1)
    with pytest.raises(ValueError, match=r"queries has shape \(2,\)"):
        index.search(np.zeros(2, np.float32), 1)
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        index.search(query, 0)
    with pytest.raises(ValueError, match=r"allowed is bool \(4,\); expected bool \(5,\)"):
        index.search(query, 1, np.ones(4, bool))
    with pytest.raises(ValueError, match="allowed is int64"):
        index.search(query, 1, np.ones(5, np.int64))


def test_serving_modules_do_not_load_torch():
    code = (
        "import sys, retrieval.item_index, retrieval.sources, reranking.rerank, ranking.onnx_scorer;"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
