"""The blend's scores are the weighted sum of its parts' scores, each on one scale."""

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData

from retrieval.encoders.blend import SpectralLightGCN
from retrieval.graph_matrix import USER_ITEM


def random_graph(num_users=30, num_items=20):
    liked = np.random.default_rng(0).random((num_users, num_items)) < 0.2
    graph = HeteroData()
    graph["user"].num_nodes, graph["item"].num_nodes = num_users + 1, num_items + 1
    graph[USER_ITEM].edge_index = torch.from_numpy(np.argwhere(liked).T + 1)
    return graph


def scores(vectors):
    return (vectors["user"] @ vectors["item"].T)[1:, 1:].detach().double().numpy()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_scores_are_the_weighted_sum_of_both_on_one_scale(weight):
    graph = random_graph()
    model = SpectralLightGCN(graph, dim=4, spectral_dim=6, spectral_weight=weight).eval()
    learned, filtered = scores(model.learned(graph)), scores(model.filter(graph))

    def on_one_scale(table):
        return table / np.sqrt(table.var(axis=1).mean())

    expected = weight * on_one_scale(filtered) + (1 - weight) * on_one_scale(learned)
    np.testing.assert_allclose(scores(model(graph)), expected, atol=1e-4)


def test_only_lightgcn_is_trained_and_alone():
    graph = random_graph()
    model = SpectralLightGCN(graph, dim=4, spectral_dim=6).train()
    torch.testing.assert_close(model(graph)["item"], model.learned(graph)["item"])
    assert [name for name, _ in model.named_parameters()] == ["learned.embedding.weight"]


def test_a_weight_beyond_one():
    with pytest.raises(ValueError, match=r"spectral_weight is 1.5; expected 0 to 1"):
        SpectralLightGCN(random_graph(), spectral_weight=1.5)
