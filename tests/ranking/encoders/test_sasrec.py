"""SASRec against explicit loops, and for looking ahead."""

import math

import numpy as np
import pytest
import torch

from ranking.encoders.sasrec import SASRec
from ranking.encoders.sequence_encoder import causal_mask

DIM, MAX_LENGTH = 8, 6


def encoder(num_blocks=2, num_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    model = SASRec(MAX_LENGTH, dim=DIM, num_blocks=num_blocks, num_heads=num_heads).to(dtype).eval()
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
    """Return the states by loops over batch, positions and heads, as the equations say."""
    weight = {name: value.numpy() for name, value in model.state_dict().items()}
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)

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
            queries, keys, values = [], [], []
            for state in states:
                mixed = linear(f"{name}.query_key_value", norm(f"{name}.attention_norm", state))
                queries.append(mixed[:DIM])
                keys.append(mixed[DIM : 2 * DIM])
                values.append(mixed[2 * DIM :])
            attended = []
            for t in range(len(history)):
                visible = [s for s in range(t + 1) if history[s] > 0 or s == t]
                heads = []
                for h in range(block.num_heads):
                    part = slice(h * size, (h + 1) * size)
                    logits = [
                        queries[t][part] @ keys[s][part] / math.sqrt(size)
                        + weight[f"{name}.distance.bias.weight"][t - s][h]
                        for s in visible
                    ]
                    shares = [math.exp(logit - max(logits)) for logit in logits]
                    mean = sum(share * values[s][part] for share, s in zip(shares, visible, strict=True))
                    heads.append(mean / sum(shares))
                attended.append(linear(f"{name}.attention_out", np.concatenate(heads)))
            states = [state + more for state, more in zip(states, attended, strict=True)]
            fed = [
                linear(
                    f"{name}.feed_forward.2",
                    gelu(linear(f"{name}.feed_forward.0", norm(f"{name}.feed_forward_norm", state))),
                )
                for state in states
            ]
            states = [state + more for state, more in zip(states, fed, strict=True)]
        result[b] = [norm("norm", state) for state in states]
    return result


@torch.no_grad()
@pytest.mark.parametrize(("num_blocks", "num_heads"), [(0, 1), (1, 1), (2, 2), (1, 8)])
def test_parity_with_loops(num_blocks, num_heads):
    model = encoder(num_blocks, num_heads)
    items, vectors = padded(0, 1, MAX_LENGTH - 1, MAX_LENGTH, 3)
    states = model(items, vectors).numpy()
    np.testing.assert_allclose(states, by_loops(model, items, vectors), atol=1e-10)


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
