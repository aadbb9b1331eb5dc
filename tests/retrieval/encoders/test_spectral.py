"""The spectral filter against a dense decomposition, and its users against the fold-in that serving uses."""

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData

from retrieval.encoders.spectral import SpectralFilter
from retrieval.fold_in import fold_in
from retrieval.graph_matrix import USER_ITEM


def random_graph(num_users=30, num_items=20, share=0.2):
    liked = np.random.default_rng(0).random((num_users, num_items)) < share
    graph = HeteroData()
    graph["user"].num_nodes, graph["item"].num_nodes = num_users + 1, num_items + 1
    graph[USER_ITEM].edge_index = torch.from_numpy(np.argwhere(liked).T + 1)
    return graph, liked


def dense_filter(liked, rank, s, p):
    """Score every item for every user with dense matrices; rows and columns without padding."""
    events = liked.astype(np.float64)
    users, items = np.maximum(events.sum(1), 1), np.maximum(events.sum(0), 1)
    normalized = events / np.sqrt(users[:, None] * items[None])
    _, values, right = np.linalg.svd(normalized, full_matrices=False)
    kept = right[:rank]
    low_pass = kept.T @ np.diag(values[:rank] ** s) @ kept
    return np.diag(users**-0.5) @ events @ np.diag(items ** (p - 0.5)) @ low_pass @ np.diag(items**p)


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(("s", "p"), [(0.0, 0.5), (0.5, 0.4), (1.0, 0.0)])
def test_scores_equal_the_dense_filter(rank, s, p):
    graph, liked = random_graph()
    vectors = SpectralFilter(graph, dim=rank, spectrum_power=s, degree_power=p)(graph)
    scores = (vectors["user"] @ vectors["item"].T).numpy()
    np.testing.assert_allclose(scores[1:, 1:], dense_filter(liked, rank, s, p), atol=1e-4)
    assert not scores[0].any()
    assert not scores[:, 0].any()


def test_a_known_user_is_the_fold_in_of_the_history():
    graph, liked = random_graph()
    vectors = SpectralFilter(graph, dim=6)(graph)
    degrees = np.concatenate([[0], liked.sum(0)]).astype(np.float32)
    history = (np.flatnonzero(liked[4]) + 1).astype(np.int32)
    folded = fold_in(vectors["item"].numpy(), degrees, history)
    np.testing.assert_allclose(folded, vectors["user"][5].numpy(), atol=1e-5)


def test_more_dimensions_than_the_graph_has():
    graph, _ = random_graph()
    assert SpectralFilter(graph, dim=1000)(graph)["item"].shape == (21, 20)


def test_no_dimensions():
    with pytest.raises(ValueError, match="dim is 0; expected 1 or more"):
        SpectralFilter(random_graph()[0], dim=0)
