"""HSTU against explicit loops."""

import math

import numpy as np
import pytest
import torch

from ranking.encoders.hstu import HSTU

DIM, MAX_LENGTH = 8, 6


def encoder(num_blocks=2, num_heads=2):
    torch.manual_seed(0)
    model = HSTU(MAX_LENGTH, dim=DIM, num_blocks=num_blocks, num_heads=num_heads).double().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, and would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def padded(*lengths, width=MAX_LENGTH):
    """Return left-padded items [B, T] of these lengths and vectors [B, T, D] that padding shares."""
    rng = torch.Generator().manual_seed(1)
    items = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        items[row, width - length :] = torch.randint(1, 50, (length,), generator=rng)
    vectors = torch.randn(50, DIM, generator=rng, dtype=torch.float64)
    return items, vectors[items]


def by_loops(model, items, vectors):
    """Return the states by loops over batch, positions and heads: eq. 1 to 3 of the paper."""
    weight = {name: value.numpy() for name, value in model.state_dict().items()}
    silu = np.vectorize(lambda x: x / (1 + math.exp(-x)))

    def linear(name, x):
        return weight[f"{name}.weight"] @ x + weight[f"{name}.bias"]

    def norm(name, x):
        centred = x - sum(x) / len(x)
        scaled = centred / math.sqrt(sum(centred**2) / len(x) + 1e-5)
        return scaled * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    result = np.zeros(vectors.shape)
    for b, history in enumerate(items.tolist()):
        states = []
        for t, vector in enumerate(vectors[b].numpy()):
            position = max(0, sum(item > 0 for item in history[: t + 1]) - 1)
            states.append(vector + weight["position.weight"][position])
        for n, block in enumerate(model.blocks):
            name = f"blocks.{n}"
            size = DIM // block.num_heads
            mixed = [silu(linear(f"{name}.project", norm(f"{name}.norm", state))) for state in states]
            gates, values, queries, keys = ([row[k * DIM : (k + 1) * DIM] for row in mixed] for k in range(4))
            more = []
            for t in range(len(history)):
                heads = []
                for h in range(block.num_heads):
                    part = slice(h * size, (h + 1) * size)
                    total = np.zeros(size)
                    for s in range(t + 1):
                        if history[s] > 0 or s == t:
                            bias = weight[f"{name}.distance.bias.weight"][t - s][h]
                            total += silu(queries[t][part] @ keys[s][part] + bias) * values[s][part]
                    heads.append(total / MAX_LENGTH)
                attended = norm(f"{name}.attention_norm", np.concatenate(heads))
                more.append(linear(f"{name}.out", attended * gates[t]))
            states = [state + change for state, change in zip(states, more, strict=True)]
        result[b] = [norm("norm", state) for state in states]
    return result


@torch.no_grad()
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(0, 1), (1, 1), (2, 2), (1, 8)])
def test_parity_with_loops(num_blocks, num_heads):
    model = encoder(num_blocks, num_heads)
    items, vectors = padded(0, 1, MAX_LENGTH - 1, MAX_LENGTH, 3)
    states = model(items, vectors).numpy()
    np.testing.assert_allclose(states, by_loops(model, items, vectors), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, MAX_LENGTH - 1])
def test_a_prefix_has_the_same_states_alone_as_inside_a_longer_history(length):
    model = encoder()
    items, vectors = padded(MAX_LENGTH)
    whole = model(items, vectors)
    alone = model(items[:, :length], vectors[:, :length])
    torch.testing.assert_close(whole[:, :length], alone)
    assert not torch.allclose(whole[:, length:], whole[:, :1])


def test_padding_gives_finite_gradients_in_training():
    model = encoder().train()
    items, vectors = padded(0, 1, MAX_LENGTH)
    model(items, vectors).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_heads_have_to_divide_the_dimension():
    with pytest.raises(ValueError, match="num_heads is 3; expected a divisor of dim, which is 8"):
        HSTU(MAX_LENGTH, dim=8, num_heads=3)
