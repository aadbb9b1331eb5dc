"""The vector of a user whom training has never seen, by hand and against LightGCN's own propagation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.fold_in import distinct_items, event_weights, fold_in
from retrieval.graph_matrix import normalized_adjacency

VECTORS = np.array([[0, 0], [1, 0], [0, 1], [3, 3]], np.float32)
DEGREES = np.array([0, 4, 1, 0], np.float32)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], [0, 0]),
        ([1], [1 / 2, 0]),  # 1 / sqrt(1 * 4)
        ([2], [0, 1]),
        ([1, 2], [1 / np.sqrt(8), 1 / np.sqrt(2)]),
        ([2, 1, 2, 2], [1 / np.sqrt(8), 1 / np.sqrt(2)]),  # the order and repeats mean nothing
        ([0, 0, 1], [1 / 2, 0]),  # neither does padding
        ([0], [0, 0]),
        ([3], [3, 3]),  # no training event counts as one
    ],
)
def test_worked_out_answers(history, expected):
    vector = fold_in(VECTORS, DEGREES, np.array(history, np.int32))
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, expected, rtol=1e-6)


def test_a_user_of_the_graph_gets_what_propagation_gives():
    rng = np.random.default_rng(0)
    edges = torch.from_numpy(np.argwhere(rng.random((6, 9)) < 0.4).T) + 1
    items = np.concatenate([np.zeros((1, 4)), rng.standard_normal((9, 4))]).astype(np.float32)
    adjacency = normalized_adjacency(edges, 7, 10).to_dense()
    nodes = torch.cat([torch.zeros(7, 4), torch.from_numpy(items)])
    propagated = (adjacency @ nodes)[:7]
    degrees = torch.bincount(edges[1], minlength=10).float().numpy()
    for user in range(7):
        history = edges[1][edges[0] == user].numpy().astype(np.int32)
        np.testing.assert_allclose(fold_in(items, degrees, history), propagated[user], atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 3), max_size=6))
def test_the_order_means_nothing(history):
    forward, backward = np.array(history, np.int32), np.array(history[::-1], np.int32)
    assert fold_in(VECTORS, DEGREES, forward).tolist() == fold_in(VECTORS, DEGREES, backward).tolist()


def test_event_weights_by_hand():
    types = np.array([1, 0, 2, 1], np.uint8)
    by_type = np.array([3, 1, 0], np.float32)
    weights = event_weights(types, np.array([7.0, 5, 3, 1]), by_type, 2.0)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [1 / 8, 3 / 4, 0, 1])  # ages of 6, 4, 2 and 0 behind the youngest
    np.testing.assert_array_equal(event_weights(types, np.zeros(4), by_type, None), [1, 3, 0, 1])
    assert len(event_weights(types[:0], np.zeros(0), by_type, 2.0)) == 0
    long_ago = event_weights(types[:2], np.array([1e9, 1e9 + 2]), by_type, 2.0)
    np.testing.assert_allclose(long_ago, [1, 3 / 2])


def test_distinct_items_by_hand():
    rows, weights = distinct_items(np.array([3, 1, 3, 0, 2], np.int32), np.array([1, 2, 4, 9, 0], np.float32))
    assert rows.tolist() == [1, 3]  # 0 is padding, and item 2 weighs nothing
    np.testing.assert_allclose(weights, [2 / 3, 4 / 3])  # 2 and 4, at a mean of 1


def test_weights_by_hand():
    # Weights 3 and 1 are 1.5 and .5 at a mean of 1: 1.5 / sqrt(2 * 4) and .5 / sqrt(2 * 1).
    vector = fold_in(VECTORS, DEGREES, np.array([1, 2, 1], np.int32), np.array([1, 1, 3], np.float32))
    np.testing.assert_allclose(vector, [1.5 / np.sqrt(8), 0.5 / np.sqrt(2)], rtol=1e-6)
    nothing = fold_in(VECTORS, DEGREES, np.array([1, 2], np.int32), np.zeros(2, np.float32))
    assert nothing.tolist() == [0, 0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 3), max_size=6), st.floats(0.1, 100))
def test_equal_weights_change_nothing(history, weight):
    rows = np.array(history, np.int32)
    weights = np.full(len(rows), weight, np.float32)
    np.testing.assert_allclose(
        fold_in(VECTORS, DEGREES, rows, weights), fold_in(VECTORS, DEGREES, rows), rtol=1e-5
    )
