"""Cross-attention to graph vectors against explicit loops, and its user vector against the folded-in one."""

import math

import numpy as np
import pytest
import torch

from ranking.fusion import GraphCrossAttention
from retrieval.fold_in import fold_in

DIM, GRAPH_DIM, NUM_ITEMS = 6, 4, 9
START = NUM_ITEMS + 1


def example(*lengths, width=5):
    """Return items [B, 1+T] (padding, start token, history), states, graph vectors and fold weights."""
    rng = torch.Generator().manual_seed(0)
    items = torch.zeros(len(lengths), width + 1, dtype=torch.int64)
    for row, length in enumerate(lengths):
        items[row, width - length] = START
        items[row, width + 1 - length :] = torch.randint(1, START, (length,), generator=rng)
    table = torch.randn(START + 1, GRAPH_DIM, generator=rng, dtype=torch.float64)
    degrees = torch.randint(1, 20, (START + 1,), generator=rng).double()
    weights = degrees.rsqrt()
    table[[0, START]] = weights[[0, START]] = 0
    states = torch.randn(*items.shape, DIM, generator=rng, dtype=torch.float64)
    return items, states, table, weights, degrees


def fusion():
    torch.manual_seed(0)
    model = GraphCrossAttention(6, DIM, GRAPH_DIM, dropout=0.5).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def by_loops(model, states, items, graph, fold_weights):
    weight = {name: value.numpy() for name, value in model.state_dict().items()}

    def linear(name, x):
        return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]

    result = np.zeros(states.shape)
    for b, history in enumerate(items.tolist()):
        for t, state in enumerate(states[b].numpy()):
            norm = (state - state.mean()) / math.sqrt(state.var() + 1e-5)
            query = linear("query.1", norm * weight["query.0.weight"] + weight["query.0.bias"])
            count = sum(0 < item < START for item in history[: t + 1])
            user = sum(graph[b, s].numpy() * fold_weights[b, s].item() for s in range(t + 1))
            seen = [s for s in range(t + 1) if history[s] > 0 or s == t]
            pairs = [linear("key_value", graph[b, s].numpy()) for s in seen]
            pairs.append(linear("user_key_value", user / math.sqrt(max(count, 1))))
            biases = [weight["distance.bias.weight"][t - s][0] for s in seen] + [0.0]  # the user is no event
            shares = [
                math.exp(query @ pair[:DIM] / math.sqrt(DIM) + bias)
                for pair, bias in zip(pairs, biases, strict=True)
            ]
            mean = sum(share * pair[DIM:] for share, pair in zip(shares, pairs, strict=True)) / sum(shares)
            result[b, t] = state + linear("out", mean)
    return result


@torch.no_grad()
def test_parity_with_loops():
    items, states, table, weights, _ = example(0, 1, 3, 4, 5)
    inputs = (states, items, table[items], weights[items])
    np.testing.assert_allclose(fusion()(*inputs).numpy(), by_loops(fusion(), *inputs), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 4, 5])
def test_the_user_is_folded_in_from_the_items_so_far(length):
    items, _, table, weights, degrees = example(length)
    items[0, 6 - length :] = torch.arange(1, length + 1)  # each once
    model = fusion()
    # All attention to the user, whose value is its vector as it is.
    for parameter in model.parameters():
        parameter.zero_()
    model.query[1].bias += 1
    model.user_key_value.bias[:DIM] += 1000
    model.user_key_value.weight[DIM : DIM + GRAPH_DIM] = torch.eye(GRAPH_DIM)
    model.out.weight += torch.eye(DIM)
    states = torch.zeros(1, 6, DIM, dtype=torch.float64)
    users = model(states, items, table[items], weights[items])[0, :, :GRAPH_DIM]
    for place in range(6):
        so_far = items[0, : place + 1].numpy().astype(np.int32)
        expected = fold_in(table.numpy(), degrees.numpy(), so_far[(so_far > 0) & (so_far < START)])
        np.testing.assert_allclose(users[place], expected, rtol=1e-5, atol=1e-12)


def test_it_starts_without_effect_and_can_learn():
    model = GraphCrossAttention(6, DIM, GRAPH_DIM, dropout=0.5).double()
    items, states, table, weights, _ = example(0, 3, 5)
    fused = model(states, items, table[items], weights[items])
    assert torch.equal(fused, states)
    fused.square().sum().backward()
    assert model.out.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_no_state_looks_ahead():
    items, states, table, weights, _ = example(5)
    model = fusion()
    fused = model(states, items, table[items], weights[items])
    for place in range(5):
        other = items.clone()
        other[:, place + 1 :] = other[:, place + 1 :] % NUM_ITEMS + 1
        changed = model(states, other, table[other], weights[other])
        torch.testing.assert_close(changed[:, : place + 1], fused[:, : place + 1])
        assert not torch.allclose(changed[:, place + 1 :], fused[:, place + 1 :])
