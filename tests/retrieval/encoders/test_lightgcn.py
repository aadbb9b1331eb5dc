"""LightGCN against PyG's, against dense matrices, and on a graph whose answers are known."""

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData
from torch_geometric.nn import LightGCN as ReferenceLightGCN

from retrieval.encoders.lightgcn import LightGCN
from retrieval.graph_matrix import USER_ITEM, normalized_adjacency, propagate
from training.losses import sampled_softmax_loss

NUM_USERS, NUM_ITEMS = 9, 7  # row 0 of each comes on top


def bipartite(edge_index, num_users=NUM_USERS, num_items=NUM_ITEMS):
    graph = HeteroData()
    graph["user"].num_nodes, graph["item"].num_nodes = num_users + 1, num_items + 1
    graph[USER_ITEM].edge_index = edge_index
    return graph


def random_graph(seed=0, density=0.3):
    rng = np.random.default_rng(seed)
    pairs = np.argwhere(rng.random((NUM_USERS, NUM_ITEMS)) < density) + 1
    return bipartite(torch.from_numpy(rng.permutation(pairs).T.copy()))  # in no order


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_parity_with_pyg(num_layers):
    graph = random_graph()
    model = LightGCN(graph, dim=5, num_layers=num_layers)
    user, item = graph[USER_ITEM].edge_index
    item = item + NUM_USERS + 1
    both_ways = torch.stack([torch.cat([user, item]), torch.cat([item, user])])
    reference = ReferenceLightGCN(model.embedding.num_embeddings, 5, num_layers)
    reference.embedding.load_state_dict(model.embedding.state_dict())

    expected = reference.get_embedding(both_ways)
    vectors = model(graph)
    torch.testing.assert_close(torch.cat([vectors["user"], vectors["item"]]), expected)

    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (torch.cat([vectors["user"], vectors["item"]]) * weights).sum().backward()
    torch.testing.assert_close(model.embedding.weight.grad, reference.embedding.weight.grad)


def test_worked_out_answer():
    # User 1 likes items 1 and 2, user 2 likes item 2: degrees 2, 1 and 1, 2.
    graph = bipartite(torch.tensor([[1, 1, 2], [1, 2, 2]]), num_users=2, num_items=2)
    model = LightGCN(graph, dim=1, num_layers=1)
    model.embedding.weight.data = torch.tensor([0.0, 1, 2, 0, 4, 8])[:, None]
    vectors = model(graph)
    half, root = 1 / 2, 1 / np.sqrt(2)  # of degrees 2 and 2, of degrees 1 and 2
    expected_users = [0, (1 + 4 * root + 8 * half) / 2, (2 + 8 * root) / 2]
    expected_items = [0, (4 + 1 * root) / 2, (8 + 1 * half + 2 * root) / 2]
    assert vectors["user"].squeeze(1).tolist() == pytest.approx(expected_users)
    assert vectors["item"].squeeze(1).tolist() == pytest.approx(expected_items)


def test_propagation_and_its_gradient_are_the_dense_ones():
    edge_index = random_graph()[USER_ITEM].edge_index
    num_nodes = NUM_USERS + NUM_ITEMS + 2
    biadjacency = torch.zeros(NUM_USERS + 1, NUM_ITEMS + 1)
    biadjacency[edge_index[0], edge_index[1]] = 1
    dense = torch.zeros(num_nodes, num_nodes)
    dense[: NUM_USERS + 1, NUM_USERS + 1 :] = biadjacency
    dense = dense + dense.T
    scale = dense.sum(1).clamp(min=1).rsqrt()
    dense = scale[:, None] * dense * scale

    adjacency = normalized_adjacency(edge_index, NUM_USERS + 1, NUM_ITEMS + 1)
    assert adjacency.crow_indices().dtype == adjacency.col_indices().dtype == torch.int32
    torch.testing.assert_close(adjacency.to_dense(), dense)

    x = torch.randn(num_nodes, 3, requires_grad=True)
    weights = torch.randn(num_nodes, 3)
    torch.testing.assert_close(propagate(adjacency, x), dense @ x)
    (grad,) = torch.autograd.grad((propagate(adjacency, x) * weights).sum(), x)
    torch.testing.assert_close(grad, dense.T @ weights)
    # Also where the gradient is a transposed view, as after x.T.
    (grad,) = torch.autograd.grad((propagate(adjacency, x).T * weights.T.contiguous()).sum(), x)
    torch.testing.assert_close(grad, dense @ weights)


def test_padding_and_nodes_without_edges_touch_nobody():
    graph = random_graph()
    model = LightGCN(graph, dim=4, num_layers=2)
    before = model(graph)
    with torch.no_grad():
        for node in (0, NUM_USERS + 1):
            model.embedding.weight[node] += 100
    after = model(graph)
    for kind in ("user", "item"):
        torch.testing.assert_close(after[kind][1:], before[kind][1:])
        own = model.initial_vectors()[kind][0]
        torch.testing.assert_close(after[kind][0], own / 3)


def test_without_layers_it_is_matrix_factorization():
    graph = random_graph()
    model = LightGCN(graph, dim=4, num_layers=0)
    for kind, vectors in model(graph).items():
        torch.testing.assert_close(vectors, model.initial_vectors()[kind])


def test_a_graph_without_edges():
    graph = bipartite(torch.zeros(2, 0, dtype=torch.int64))
    model = LightGCN(graph, dim=4, num_layers=3)
    torch.testing.assert_close(model(graph)["item"], model.initial_vectors()["item"] / 4)


def test_shapes_and_initial_embeddings():
    graph = bipartite(torch.tensor([[1], [1]]), num_users=400, num_items=500)
    model = LightGCN(graph, dim=32, init="normal", init_std=0.1)
    vectors = model(graph)
    assert (vectors["user"].shape, vectors["item"].shape) == ((401, 32), (501, 32))
    assert model.initial_vectors()["item"].std().item() == pytest.approx(0.1, rel=0.05)
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]


def test_a_spectral_start_knows_the_communities_before_any_training():
    """Two groups of users and items that never meet: each item is nearer to its own group's users."""
    users, items = np.divmod(np.arange(24 * 20), 20)
    edges = np.stack([users, items])[:, (users + items) % 2 == 0] + 1
    graph = bipartite(torch.from_numpy(edges), 24, 20)
    model = LightGCN(graph, dim=4, init_std=0.3)
    assert model.embedding.weight.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.3)
    with torch.no_grad():
        scores = (model(graph)["user"] @ model(graph)["item"].T)[1:, 1:].numpy()
    same = (np.indices(scores.shape).sum(0) % 2) == 0
    assert scores[same].min() > scores[~same].max()


def test_users_with_an_item_of_their_own_do_not_take_the_spectral_start():
    """Each is a component, with the largest singular value there is; they are more than dimensions."""
    users, items = np.divmod(np.arange(24 * 20), 20)
    together = np.stack([users, items])[:, (users + items) % 2 == 0] + 1
    alone = np.stack([np.arange(25, 40), np.arange(21, 36)])
    graph = bipartite(torch.from_numpy(np.concatenate([together, alone], 1)), 39, 35)
    model = LightGCN(graph, dim=4, init_std=0.3)
    lengths = model.embedding.weight.detach().norm(dim=1)
    assert lengths.max() < 3 * lengths[1:].median()
    with torch.no_grad():
        scores = (model(graph)["user"] @ model(graph)["item"].T)[1:25, 1:21].numpy()
    same = (np.indices(scores.shape).sum(0) % 2) == 0
    assert scores[same].min() > scores[~same].max()


def test_a_spectral_start_of_more_dimensions_than_the_graph_has():
    model = LightGCN(random_graph(), dim=64)
    assert model.embedding.weight.isfinite().all()
    assert (model.embedding.weight[:, -1].std() > 0).all()


def test_another_graph_gives_other_vectors():
    first, second = random_graph(0), random_graph(1)
    model = LightGCN(first, dim=4)
    one = model(first)["item"]
    assert not torch.allclose(model(second)["item"], one)
    torch.testing.assert_close(model(first)["item"], one)


def test_close_under_bfloat16_autocast():
    """Rows are read in bfloat16, forward and back; what comes out is float32."""
    graph = random_graph()
    model = LightGCN(graph, dim=4)
    weights = torch.randn(len(model(graph)["item"]), 4)

    def vectors_and_gradient():
        model.zero_grad()
        vectors = model(graph)["item"]
        (vectors * weights).sum().backward()
        return vectors.detach(), model.embedding.weight.grad.clone()

    expected = vectors_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        found = vectors_and_gradient()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("options", [{"dim": 0}, {"num_layers": -1}])
def test_impossible_sizes(options):
    with pytest.raises(ValueError, match="expected dim >= 1 and num_layers >= 0"):
        LightGCN(random_graph(), **options)


def held_out_above_the_rest(liked, seed=0):
    """Train on three quarters of `liked` [U, I]; return how often a held-out item outranks one not liked."""
    num_users, num_items = liked.shape
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(np.argwhere(liked))
    train, held_out = np.split(pairs, [len(pairs) * 3 // 4])
    edges = torch.from_numpy(train.T + 1)
    graph = bipartite(edges, num_users, num_items)
    torch.manual_seed(seed)
    model = LightGCN(graph, dim=8, num_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    everything = torch.arange(1, num_items + 1)
    for _ in range(40):
        vectors = model(graph)
        loss = sampled_softmax_loss(vectors["user"][edges[0]], vectors["item"], edges[1], everything)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        vectors = model(graph)
        scores = (vectors["user"] @ vectors["item"].T).numpy()[1:, 1:]
    wins = [scores[user, item] > scores[user, ~liked[user]] for user, item in held_out]
    return float(np.mean(np.concatenate(wins)))


def test_a_checkerboard_is_learned_and_noise_is_not():
    """Users of one parity like the items of that parity, which says what is held out; noise says nothing."""
    users, items = np.indices((24, 20))
    assert held_out_above_the_rest((users + items) % 2 == 0) == 1.0
    noise = np.random.default_rng(3).random((24, 20)) < 0.5
    assert 0.35 < held_out_above_the_rest(noise) < 0.65
