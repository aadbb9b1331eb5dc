"""What every GraphEncoder keeps to. A file in retrieval/encoders/ is found and tested by itself."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from torch import nn

import retrieval.encoders
from engine.history import EVENT_CODE
from retrieval.graph_matrix import USER_ITEM
from training.data.graph import build_graph
from training.data.interactions import Interactions
from training.losses import sampled_softmax_loss

DIM = 8
# Vectors worked out from the graph when the encoder is made: they have tests of their own.
CLOSED_FORM = {"SpectralFilter", "SpectralLightGCN"}


def graph_encoders():
    """Return the trained encoders of all files: all but those in closed form."""
    found = []
    for entry in pkgutil.iter_modules(retrieval.encoders.__path__):
        module = importlib.import_module(f"retrieval.encoders.{entry.name}")
        classes = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        encoders = [c for c in classes if issubclass(c, nn.Module)]
        assert encoders, f"{module.__name__} holds no GraphEncoder"
        found += [c for c in encoders if c.__name__ not in CLOSED_FORM]
    return found


every_encoder = pytest.mark.parametrize("encoder", graph_encoders(), ids=lambda c: c.__name__)


def event_graph(pairs, num_users, num_items):
    """Return the graph that training builds from (user row, item row) pairs."""
    users, items = np.array(sorted(pairs), np.int32).reshape(-1, 2).T
    kind = np.full(len(users), EVENT_CODE["view"], np.uint8)
    times = np.arange(len(users), dtype=np.int64)
    return build_graph(Interactions(users.copy(), items.copy(), kind, times, num_users, num_items))


def random_graph():
    """Return a graph of 12 users and 9 items; user 12 and item 9 have no edge."""
    rng = np.random.default_rng(0)
    return event_graph([(u, i) for u in range(1, 12) for i in range(1, 9) if rng.random() < 0.4], 12, 9)


def test_the_encoders_are_found():
    assert {"LightGCN", "MF", "NGCF"} <= {encoder.__name__ for encoder in graph_encoders()}


@every_encoder
def test_one_vector_per_node(encoder):
    graph = random_graph()
    model = encoder(graph, dim=DIM).eval()
    vectors, initial = model(graph), model.initial_vectors()
    assert set(vectors) == set(initial) == {"user", "item"}
    assert (len(vectors["user"]), len(vectors["item"])) == (13, 10)
    assert vectors["user"].shape[1] == vectors["item"].shape[1] >= DIM
    assert (initial["user"].shape, initial["item"].shape) == ((13, DIM), (10, DIM))
    for vector in [*vectors.values(), *initial.values()]:
        assert vector.dtype == torch.float32
        assert vector.isfinite().all()
    again = model(graph)
    assert all(torch.equal(again[kind], vectors[kind]) for kind in vectors)


@every_encoder
def test_rows_without_edges_touch_nobody(encoder):
    graph = random_graph()
    model = encoder(graph, dim=DIM).eval()
    before = {kind: vectors.detach().clone() for kind, vectors in model(graph).items()}
    with torch.no_grad():
        for kind, lonely in (("user", 12), ("item", 9)):
            model.initial_vectors()[kind][[0, lonely]] += 100.0
    after = model(graph)
    for kind, lonely in (("user", 12), ("item", 9)):
        torch.testing.assert_close(after[kind][1:lonely], before[kind][1:lonely])
        assert not torch.allclose(after[kind][[0, lonely]], before[kind][[0, lonely]])


@every_encoder
def test_every_parameter_is_learned(encoder):
    graph = random_graph()
    model = encoder(graph, dim=DIM).eval()
    vectors = model(graph)
    ((vectors["user"][1:12].sum(0) + vectors["item"][1:9].sum(0)) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@every_encoder
def test_the_regulariser_reaches_the_parameters(encoder):
    graph = random_graph()
    model = encoder(graph, dim=DIM)
    sum(vectors.square().sum() for vectors in model.initial_vectors().values()).backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@every_encoder
def test_the_order_of_edges_does_not_matter(encoder):
    graph = random_graph()
    model = encoder(graph, dim=DIM).eval()
    shuffled = graph.clone()
    edges = shuffled[USER_ITEM]
    order = torch.randperm(edges.edge_index.shape[1])
    edges.edge_index = edges.edge_index[:, order]
    edges.time, edges.event_type = edges.time[order], edges.event_type[order]
    for kind, vectors in model(shuffled).items():
        torch.testing.assert_close(vectors, model(graph)[kind])


@every_encoder
def test_names_of_nodes_do_not_matter(encoder):
    """With its nodes renumbered and their embeddings moved along, a graph gives the same vectors."""
    graph = random_graph()
    model = encoder(graph, dim=DIM).eval()
    vectors = model(graph)
    place = {
        kind: torch.cat([torch.zeros(1).long(), torch.randperm(n) + 1])
        for kind, n in (("user", 12), ("item", 9))
    }
    renumbered = graph.clone()
    users, items = graph[USER_ITEM].edge_index
    renumbered[USER_ITEM].edge_index = torch.stack([place["user"][users], place["item"][items]])
    other = encoder(renumbered, dim=DIM).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for kind in place:
            other.initial_vectors()[kind][place[kind]] = model.initial_vectors()[kind]
    for kind, moved in other(renumbered).items():
        torch.testing.assert_close(moved[place[kind]], vectors[kind])


@every_encoder
def test_weights_are_all_there_is(encoder):
    graph = random_graph()
    model, other = encoder(graph, dim=DIM).eval(), encoder(graph, dim=DIM).eval()
    assert not torch.equal(model(graph)["item"], other(graph)["item"])
    other.load_state_dict(model.state_dict())
    for kind, vectors in other(graph).items():
        assert torch.equal(vectors, model(graph)[kind])


@every_encoder
def test_a_graph_without_edges(encoder):
    graph = event_graph([], 3, 4)
    vectors = encoder(graph, dim=DIM)(graph)
    assert vectors["user"].isfinite().all()
    assert vectors["item"].isfinite().all()


@every_encoder
def test_no_dimension(encoder):
    with pytest.raises(ValueError, match="dim is 0"):
        encoder(random_graph(), dim=0)


def held_out_above_the_rest(encoder, liked, seed=0):
    """Train on three quarters of `liked` [U, I]; return how often a held-out item outranks one not liked."""
    num_users, num_items = liked.shape
    pairs = np.random.default_rng(seed).permutation(np.argwhere(liked)) + 1
    train, held_out = np.split(pairs, [len(pairs) * 3 // 4])
    graph = event_graph([tuple(pair) for pair in train.tolist()], num_users, num_items)
    users, items = graph[USER_ITEM].edge_index
    torch.manual_seed(seed)
    model = encoder(graph, dim=DIM)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    everything = torch.arange(1, num_items + 1)
    for _ in range(40):
        vectors = model(graph)
        loss = sampled_softmax_loss(vectors["user"][users], vectors["item"], items, everything)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        vectors = model.eval()(graph)
        scores = (vectors["user"] @ vectors["item"].T).numpy()
    wins = [scores[user, item] > scores[user, 1:][~liked[user - 1]] for user, item in held_out]
    return float(np.mean(np.concatenate(wins)))


@every_encoder
def test_a_checkerboard_is_learned_and_noise_is_not(encoder):
    """Users of one parity like the items of that parity, which says what is held out; noise says nothing."""
    users, items = np.indices((24, 20))
    assert held_out_above_the_rest(encoder, (users + items) % 2 == 0) == 1.0
    noise = np.random.default_rng(3).random((24, 20)) < 0.5
    assert 0.35 < held_out_above_the_rest(encoder, noise) < 0.65
