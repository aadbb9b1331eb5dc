"""The vector of a user whom training has never seen, by hand and against LightGCN's own propagation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.fold_in import fold_in
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
