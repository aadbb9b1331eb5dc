"""SASRec against explicit loops, and for looking ahead."""

import math

import numpy as np
import pytest
import torch

from ranking.encoders.sasrec import SASRec
from ranking.encoders.sequence_encoder import causal_mask
from tests.ranking.encoders.loops import DIM, MAX_LENGTH, by_loops, disturbed, padded


def encoder(num_blocks=2, num_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    return disturbed(SASRec(MAX_LENGTH, dim=DIM, num_blocks=num_blocks, num_heads=num_heads).to(dtype))


def block_of(num_heads):
    """Return a block as the equations say, by loops over positions and heads."""
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    size = DIM // num_heads

    def block(weights, name, states, visible):
        queries, keys, values = [], [], []
        for state in states:
            mixed = weights.linear(f"{name}.query_key_value", weights.norm(f"{name}.attention_norm", state))
            queries.append(mixed[:DIM])
            keys.append(mixed[DIM : 2 * DIM])
            values.append(mixed[2 * DIM :])
        result = []
        for t, state in enumerate(states):
            heads = []
            for h in range(num_heads):
                part = slice(h * size, (h + 1) * size)
                logits = [
                    queries[t][part] @ keys[s][part] / math.sqrt(size)
                    + weights.weight[f"{name}.distance.bias.weight"][t - s][h]
                    for s in visible[t]
                ]
                shares = [math.exp(logit - max(logits)) for logit in logits]
                mean = sum(share * values[s][part] for share, s in zip(shares, visible[t], strict=True))
                heads.append(mean / sum(shares))
            after = state + weights.linear(f"{name}.attention_out", np.concatenate(heads))
            fed = weights.linear(f"{name}.feed_forward.0", weights.norm(f"{name}.feed_forward_norm", after))
            result.append(after + weights.linear(f"{name}.feed_forward.2", gelu(fed)))
        return result

    return block


@torch.no_grad()
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(0, 1), (1, 1), (2, 2), (1, 8)])
def test_parity_with_loops(num_blocks, num_heads):
    model = encoder(num_blocks, num_heads)
    items, vectors = padded(0, 1, MAX_LENGTH - 1, MAX_LENGTH, 3)
    states = model(items, vectors).numpy()
    np.testing.assert_allclose(states, by_loops(model, items, vectors, block_of(num_heads)), atol=1e-10)


def test_who_sees_whom():
    assert causal_mask(torch.tensor([[0, 0, 5, 7], [1, 2, 3, 4]])).int().tolist() == [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    ]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, MAX_LENGTH - 1, MAX_LENGTH])
def test_no_state_looks_ahead(length):
    model = encoder()
    items, vectors = padded(length)
    states = model(items, vectors)
    for place in range(MAX_LENGTH - length, MAX_LENGTH - 1):
        other_items, other_vectors = items.clone(), vectors.clone()
        other_items[:, place + 1 :] = 49
        other_vectors[:, place + 1 :] = 7.0
        other = model(other_items, other_vectors)
        torch.testing.assert_close(other[:, : place + 1], states[:, : place + 1])
        assert not torch.allclose(other[:, place + 1 :], states[:, place + 1 :])


@torch.no_grad()
def test_a_state_sees_everything_before_it():
    model = encoder(num_blocks=1)
    items, vectors = padded(MAX_LENGTH)
    states = model(items, vectors)
    for place in range(MAX_LENGTH):
        other = vectors.clone()
        other[:, place, 0] += 1
        changed = (model(items, other) - states).abs().amax(-1)[0] > 1e-9
        assert changed.tolist() == [t >= place for t in range(MAX_LENGTH)]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, MAX_LENGTH - 1, MAX_LENGTH])
def test_more_padding_changes_nothing(length):
    model = encoder()
    items, vectors = padded(length, width=length)
    states = model(items, vectors)
    for more in (1, 4):
        wider = torch.nn.functional.pad(items, (more, 0))
        filled = torch.cat([torch.full((1, more, DIM), 9.0, dtype=vectors.dtype), vectors], dim=1)
        torch.testing.assert_close(model(wider, filled)[:, more:], states)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0, 1, MAX_LENGTH - 1, MAX_LENGTH])
def test_finite_at_every_length(length, dtype):
    items, vectors = padded(length)
    states = encoder(dtype=dtype)(items, vectors.to(dtype))
    assert states.shape == (1, MAX_LENGTH, DIM)
    assert states.isfinite().all()


def test_padding_gives_finite_gradients_in_training():
    model = encoder(dtype=torch.float32).train()
    items, vectors = padded(0, 1, MAX_LENGTH)
    model(items, vectors.float()).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_users_do_not_see_each_other():
    model = encoder()
    items, vectors = padded(2, 5, 6)
    together = model(items, vectors)
    for user in range(3):
        alone = model(items[user : user + 1], vectors[user : user + 1])
        torch.testing.assert_close(alone[0], together[user])


def test_heads_have_to_divide_the_dimension():
    with pytest.raises(ValueError, match="num_heads is 3; expected a divisor of dim, which is 8"):
        SASRec(MAX_LENGTH, dim=8, num_heads=3)
