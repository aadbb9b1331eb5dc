"""SparseRows against dense arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.sparse import SparseRows, strongest


def random_matrix(seed, num_rows, num_columns, density=0.3):
    rng = np.random.default_rng(seed)
    dense = rng.integers(-3, 4, (num_rows, num_columns)) * (rng.random((num_rows, num_columns)) < density)
    rows, columns = np.nonzero(dense)
    shuffled = rng.permutation(len(rows))
    entries = rows[shuffled], columns[shuffled], dense[rows, columns][shuffled].astype(np.float32)
    return dense, SparseRows.from_entries(*entries, num_rows, num_columns)


def as_dense(matrix):
    dense = np.zeros((len(matrix), matrix.num_columns))
    for row in range(len(matrix)):
        columns, values = matrix.row(row)
        dense[row, columns] = values
    return dense


@pytest.mark.parametrize("num_columns", [1, 7, 5000])  # few entries among many columns are sorted
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_dense_arrays(seed, num_columns):
    density = 0.3 if num_columns < 100 else 0.002
    dense, matrix = random_matrix(seed, 6, num_columns, density)
    matrix.check()
    np.testing.assert_array_equal(as_dense(matrix), dense)
    np.testing.assert_array_equal(as_dense(matrix.transposed()), dense.T)
    vectors = np.random.default_rng(seed).integers(-2, 3, (num_columns, 3)).astype(np.float32)
    np.testing.assert_array_equal(matrix.product(vectors), dense @ vectors)
    rows, weights = np.array([4, 0, 4, 2]), np.array([1, 2, 0.5, -1])
    columns, values = matrix.weighted_sum(rows, weights)
    expected = weights @ dense[rows]
    assert columns.tolist() == np.flatnonzero(expected).tolist()
    np.testing.assert_array_equal(values, expected[columns])
    assert (columns.dtype, values.dtype) == (np.int32, np.float32)


def test_nothing():
    _, matrix = random_matrix(0, 4, 5)
    columns, values = matrix.weighted_sum(np.zeros(0, np.int32), np.zeros(0))
    assert len(columns) == len(values) == 0
    empty = SparseRows.from_rows([], 5)
    assert (len(empty), empty.product(np.ones((5, 2), np.float32)).shape) == (0, (0, 2))


def test_rows_keep_the_order_they_came_in():
    matrix = SparseRows.from_rows(
        [(np.array([4, 1], np.int32), np.array([2, 1], np.float32)), (np.zeros(0, np.int32),) * 2], 5
    )
    assert matrix.offsets.tolist() == [0, 2, 2]
    assert matrix.row(0)[0].tolist() == [4, 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 14))
def test_strongest_agrees_with_sorting(values, k):
    columns = np.arange(len(values), dtype=np.int32) * 2
    found, best = strongest(columns, np.array(values, np.float32), k)
    expected = sorted(range(len(values)), key=lambda place: (-values[place], place))[:k]
    assert found.tolist() == [2 * place for place in expected]
    assert best.tolist() == [values[place] for place in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros(1, np.float32)}, "1 values for 2 columns"),
        ({"offsets": np.array([0, 1])}, "offsets do not rise from 0 to 2"),
        ({"offsets": np.array([0, 3, 2])}, "offsets do not rise"),
        ({"columns": np.array([0, 5], np.int32)}, "columns run from 0 to 5; expected 0 to 4"),
        ({"columns": np.array([-1, 1], np.int32)}, "columns run from -1 to 1"),
    ],
)
def test_arrays_that_are_no_matrix(change, message):
    parts = {
        "offsets": np.array([0, 1, 2]),
        "columns": np.array([0, 4], np.int32),
        "values": np.ones(2, np.float32),
        "num_columns": 5,
    }
    SparseRows(**parts).check()
    with pytest.raises(ValueError, match=message):
        SparseRows(**parts | change).check()
