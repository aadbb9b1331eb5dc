"""NGCF against the paper's sums, message by message."""

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData

from retrieval.encoders.lightgcn import LightGCN
from retrieval.encoders.ngcf import NGCF
from retrieval.graph_matrix import USER_ITEM

NUM_USERS, NUM_ITEMS = 9, 7  # row 0 of each comes on top


def random_graph():
    pairs = np.argwhere(np.random.default_rng(0).random((NUM_USERS, NUM_ITEMS)) < 0.3) + 1
    graph = HeteroData()
    graph["user"].num_nodes, graph["item"].num_nodes = NUM_USERS + 1, NUM_ITEMS + 1
    graph[USER_ITEM].edge_index = torch.from_numpy(pairs.T.copy())
    return graph


def plain_ngcf(model, graph):
    """Return [N, (K+1) D] by eq. 3 to 6 and 9: one node, one neighbour at a time."""
    num_nodes = NUM_USERS + NUM_ITEMS + 2
    neighbours = {node: [] for node in range(num_nodes)}
    for user, item in graph[USER_ITEM].edge_index.T.tolist():
        neighbours[user].append(item + NUM_USERS + 1)
        neighbours[item + NUM_USERS + 1].append(user)
    layer = list(model.embedding.weight)
    outputs = [[vector] for vector in layer]
    for of_sum, of_product in zip(model.sums, model.products, strict=True):
        w_1, w_2 = of_sum.weight, of_product.weight
        next_layer = []
        for node in range(num_nodes):
            total = w_1 @ layer[node]
            for other in neighbours[node]:
                weight = 1 / np.sqrt(len(neighbours[node]) * len(neighbours[other]))
                total = total + weight * (w_1 @ layer[other] + w_2 @ (layer[other] * layer[node]))
            next_layer.append(torch.where(total > 0, total, 0.2 * total))
        layer = next_layer
        for node in range(num_nodes):
            outputs[node].append(layer[node] / layer[node].norm())
    return torch.stack([torch.cat(parts) for parts in outputs])


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_parity_with_plain_loops(num_layers):
    graph = random_graph()
    torch.manual_seed(0)
    model = NGCF(graph, dim=4, num_layers=num_layers).eval()
    expected = plain_ngcf(model, graph)
    vectors = model(graph)
    found = torch.cat([vectors["user"], vectors["item"]])
    torch.testing.assert_close(found, expected)

    weights = torch.randn_like(expected)
    parameters = list(model.parameters())
    right = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), parameters), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_spectral_start_is_that_of_lightgcn():
    graph = random_graph()
    torch.manual_seed(0)
    found = NGCF(graph, dim=4, init="spectral", init_std=0.3).initial_vectors()["item"]
    torch.manual_seed(0)
    expected = LightGCN(graph, dim=4, init="spectral", init_std=0.3).initial_vectors()["item"]
    # The two draw different numbers before the SVD, whose vectors have no sign.
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-4)


def test_dropout_is_for_training_alone():
    graph = random_graph()
    model = NGCF(graph, dim=50, num_layers=1, message_dropout=0.4).train()
    dropped = torch.cat([model(graph)["item"][:, 50:], model(graph)["user"][:, 50:]]) == 0
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.1)
    assert not (model(graph)["item"][:, :50] == 0).any()
    model.eval()
    assert not (model(graph)["item"] == 0).any()
    torch.testing.assert_close(model(graph)["item"], model(graph)["item"], rtol=0, atol=0)


def test_close_under_bfloat16_autocast():
    graph = random_graph()
    torch.manual_seed(0)
    model = NGCF(graph, dim=8).eval()
    expected = model(graph)["item"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(graph)["item"]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{"dim": 0}, {"num_layers": -1}, {"message_dropout": 1.0}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="expected dim >= 1, num_layers >= 0 and 0 <= message_dropout < 1"):
        NGCF(random_graph(), **options)
