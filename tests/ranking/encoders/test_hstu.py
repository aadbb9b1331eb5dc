"""HSTU against explicit loops."""

import math

import numpy as np
import pytest
import torch

from ranking.encoders.hstu import HSTU
from tests.ranking.encoders.loops import DIM, MAX_LENGTH, by_loops, disturbed, padded


def encoder(num_blocks=2, num_heads=2):
    torch.manual_seed(0)
    return disturbed(HSTU(MAX_LENGTH, dim=DIM, num_blocks=num_blocks, num_heads=num_heads).double())


def block_of(num_heads):
    """Return a block by loops over positions and heads: eq. 1 to 3 of the paper."""
    silu = np.vectorize(lambda x: x / (1 + math.exp(-x)))
    size = DIM // num_heads

    def block(weights, name, states, visible):
        mixed = [
            silu(weights.linear(f"{name}.project", weights.norm(f"{name}.norm", state))) for state in states
        ]
        gates, values, queries, keys = ([row[k * DIM : (k + 1) * DIM] for row in mixed] for k in range(4))
        result = []
        for t, state in enumerate(states):
            heads = []
            for h in range(num_heads):
                part = slice(h * size, (h + 1) * size)
                total = np.zeros(size)
                for s in visible[t]:
                    bias = weights.weight[f"{name}.distance.bias.weight"][t - s][h]
                    total += silu(queries[t][part] @ keys[s][part] + bias) * values[s][part]
                heads.append(total / MAX_LENGTH)
            attended = weights.norm(f"{name}.attention_norm", np.concatenate(heads))
            result.append(state + weights.linear(f"{name}.out", attended * gates[t]))
        return result

    return block


@torch.no_grad()
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(0, 1), (1, 1), (2, 2), (1, 8)])
def test_parity_with_loops(num_blocks, num_heads):
    model = encoder(num_blocks, num_heads)
    items, vectors = padded(0, 1, MAX_LENGTH - 1, MAX_LENGTH, 3)
    states = model(items, vectors).numpy()
    np.testing.assert_allclose(states, by_loops(model, items, vectors, block_of(num_heads)), atol=1e-10)


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
