"""Losses against torch's own cross-entropy, and against numbers worked out by hand."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from training.losses import (
    _SharedNegatives,
    alignment_loss,
    bpr_loss,
    cosine_contrastive_loss,
    embedding_l2,
    full_softmax_loss,
    sampled_softmax_loss,
    ultragcn_loss,
    uniformity_loss,
)

NUM_ITEMS = 30


def example(dtype=torch.float32, num_examples=7, dim=5):
    """Return states [B, D], item vectors [I+1, D] and targets [B]; row 0 is no zero, and must not matter."""
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(num_examples, dim, generator=rng, dtype=dtype, requires_grad=True)
    vectors = torch.randn(NUM_ITEMS + 1, dim, generator=rng, dtype=dtype, requires_grad=True)
    targets = torch.randint(1, NUM_ITEMS + 1, (num_examples,), generator=rng)
    targets[1] = targets[0]  # one item wanted twice
    return states, vectors, targets


def plain_softmax_loss(states, vectors, targets):
    return functional.cross_entropy(states @ vectors[1:].T, targets - 1)


def gradients(loss, *inputs):
    return torch.autograd.grad(3.0 * loss, inputs)  # not 1, so that the outer gradient counts


TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-14}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_examples", [1, 3, 7, 100])
def test_full_softmax_is_cross_entropy(monkeypatch, dtype, chunk_examples):
    monkeypatch.setattr(_SharedNegatives, "MULTIPLE", 1)
    monkeypatch.setattr(_SharedNegatives, "CHUNK_LOGITS", chunk_examples * NUM_ITEMS)
    states, vectors, targets = example(dtype)
    loss, expected = full_softmax_loss(states, vectors, targets), plain_softmax_loss(states, vectors, targets)
    torch.testing.assert_close(loss, expected, **TOLERANCE[dtype])
    for found, right in zip(
        gradients(loss, states, vectors), gradients(expected, states, vectors), strict=True
    ):
        torch.testing.assert_close(found, right, **TOLERANCE[dtype])


def test_however_many_items_some_examples_are_in_a_chunk(monkeypatch):
    monkeypatch.setattr(_SharedNegatives, "CHUNK_LOGITS", 1)
    states, vectors, targets = example(num_examples=100)
    expected = plain_softmax_loss(states, vectors, targets)
    torch.testing.assert_close(full_softmax_loss(states, vectors, targets), expected)


def test_padding_gets_no_gradient():
    states, vectors, targets = example()
    (grad,) = torch.autograd.grad(full_softmax_loss(states, vectors, targets), vectors)
    assert grad[0].tolist() == [0.0] * 5
    assert (grad[1:] != 0).all()


def test_large_scores_stay_finite():
    states, vectors, targets = example()
    states = (states * 1e4).detach().requires_grad_()
    loss = full_softmax_loss(states, vectors, targets)
    torch.testing.assert_close(loss, plain_softmax_loss(states, vectors, targets), rtol=1e-5, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(loss, states, vectors))


def test_close_under_bfloat16_autocast():
    states, vectors, targets = example(num_examples=64)
    expected = plain_softmax_loss(states, vectors, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax_loss(states, vectors, targets)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss - expected) < 0.01 * expected  # bfloat16 was used, and is close
    for found, right in zip(
        gradients(loss, states, vectors), gradients(expected, states, vectors), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - right).norm() < 0.02 * right.norm()


def plain_sampled_loss(states, vectors, targets, negatives, log_expected_count):
    """Return the loss of Bengio and Senecal, one logit after the other."""
    total = 0.0
    for state, target in zip(states, targets.tolist(), strict=True):
        logits = [state @ vectors[target]]
        for row, correction in zip(negatives.tolist(), log_expected_count.tolist(), strict=True):
            if row != target:
                logits.append(state @ vectors[row] - correction)
        total = total + torch.stack(logits).logsumexp(0) - logits[0]
    return total / len(states)


@pytest.mark.parametrize("chunk_examples", [1, 3, 100])
def test_sampled_softmax_and_its_gradient_are_the_plain_ones(monkeypatch, chunk_examples):
    monkeypatch.setattr(_SharedNegatives, "MULTIPLE", 1)
    monkeypatch.setattr(_SharedNegatives, "CHUNK_LOGITS", chunk_examples * 12)
    states, vectors, targets = example(torch.float64)
    negatives = torch.tensor([*targets[:3].tolist(), 4, 4, 4, 9, 11, 12, 13, 14, 15])  # hits and repeats
    correction = torch.linspace(-2, 1, 12, dtype=torch.float64)
    loss = sampled_softmax_loss(states, vectors, targets, negatives, correction)
    expected = plain_sampled_loss(states, vectors, targets, negatives, correction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, right in zip(
        gradients(loss, states, vectors), gradients(expected, states, vectors), strict=True
    ):
        torch.testing.assert_close(found, right, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("order", ["as they are", "shuffled"])
def test_sampled_softmax_over_all_items_is_the_full_softmax(order):
    states, vectors, targets = example()
    everything = torch.arange(1, NUM_ITEMS + 1)
    if order == "shuffled":
        everything = everything[torch.randperm(NUM_ITEMS)]
    loss = sampled_softmax_loss(states, vectors, targets, everything)
    expected = plain_softmax_loss(states, vectors, targets)
    torch.testing.assert_close(loss, expected)
    for found, right in zip(
        gradients(loss, states, vectors), gradients(expected, states, vectors), strict=True
    ):
        torch.testing.assert_close(found, right)


def test_negatives_that_are_the_target_are_left_out():
    states, vectors, targets = example()
    one = targets[:1]
    assert sampled_softmax_loss(states[:1], vectors, one, one.repeat(4)).item() == 0


def test_sampled_softmax_by_hand():
    # Scores: target log 3, negatives log 2 and log 4, of which the second is expected twice: 3 / (3 + 2 + 2).
    vectors = torch.tensor([[0.0], [math.log(3)], [math.log(2)], [math.log(4)]])
    negatives, log_expected_count = torch.tensor([2, 3]), torch.tensor([0.0, math.log(2)])
    loss = sampled_softmax_loss(torch.ones(1, 1), vectors, torch.tensor([1]), negatives, log_expected_count)
    assert loss.item() == pytest.approx(math.log(7 / 3))
    # Without a correction: 3 / (3 + 2 + 4).
    loss = sampled_softmax_loss(torch.ones(1, 1), vectors, torch.tensor([1]), negatives)
    assert loss.item() == pytest.approx(math.log(9 / 3))


def test_corrected_negatives_are_right_in_expectation():
    """Over every possible draw of two negatives, the mean of the softmax's sum is the whole catalog's."""
    chance = torch.tensor([0.5, 0.2, 0.1, 0.2], dtype=torch.float64)  # of items 1..4
    scores = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    vectors = torch.cat([torch.zeros(1, dtype=torch.float64), scores])[:, None]
    state, target = torch.ones(1, 1, dtype=torch.float64), torch.tensor([3])
    mean = 0.0
    for draw in itertools.product(range(4), repeat=2):
        drawn = torch.tensor(draw)
        log_expected_count = (2 * chance[drawn]).log()
        loss = sampled_softmax_loss(state, vectors, target, drawn + 1, log_expected_count)
        total = math.exp(loss.item() + scores[2].item())  # loss = log(total) - score of the target
        mean += chance[drawn].prod().item() * total
    assert mean == pytest.approx(scores.exp().sum().item(), rel=1e-6)


def test_bpr_by_hand():
    # Differences log 3 and 0: sigmoid 3/4 and 1/2.
    positive, negative = torch.tensor([math.log(3) + 5, 2.0]), torch.tensor([5.0, 2.0])
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert bpr_loss(positive, negative).item() == pytest.approx(expected)
    assert bpr_loss(torch.tensor([-1e4]), torch.tensor([0.0])).item() == pytest.approx(1e4)


def test_embedding_l2_by_hand():
    users, items = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert embedding_l2(users, items).item() == pytest.approx((1 + 4 + 4 + 9) / 2 / 2)
    assert embedding_l2(users[:1]).item() == pytest.approx(5 / 2)


def test_alignment_by_hand():
    # Of length 1: the first pair is one point, the second a right angle, the third opposite: 0, 2 and 4.
    users = torch.tensor([[3.0, 4.0], [2.0, 0.0], [0.0, 1.0]])
    items = torch.tensor([[0.6, 0.8], [0.0, 5.0], [0.0, -7.0]])
    assert alignment_loss(users, items).item() == pytest.approx((0 + 2 + 4) / 3)


def test_uniformity_by_hand():
    # Three pairs: two at a right angle (squared distance 2) and one opposite (4).
    vectors = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity_loss(vectors).item() == pytest.approx(expected)
    assert uniformity_loss(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-6)  # all in one point
    with pytest.raises(ValueError, match="vectors has 1 rows; expected 2 or more"):
        uniformity_loss(vectors[:1])


def plain_uniformity(vectors):
    pairs = torch.pdist(functional.normalize(vectors))
    return pairs.square().mul(-2).exp().mean().log()


def test_cosine_contrastive_by_hand():
    # Cosines: target 0.6; negatives 1, 0.8 and the target itself, which counts as 0 of the three.
    state = torch.tensor([[2.0, 0.0]])
    vectors = torch.tensor([[9.0, 9.0], [3.0, 4.0], [1.0, 0.0], [4.0, 3.0]])
    loss = cosine_contrastive_loss(
        state, vectors, torch.tensor([1]), torch.tensor([2, 3, 1]), margin=0.5, negative_weight=6.0
    )
    assert loss.item() == pytest.approx(0.4 + 6 * (0.5 + 0.3 + 0) / 3)


def plain_cosine_contrastive(states, vectors, targets, negatives, margin, negative_weight):
    total = 0.0
    for state, target in zip(states, targets.tolist(), strict=True):
        cosines = functional.cosine_similarity(state[None], vectors)
        over = [(cosines[row] - margin).clamp(min=0) for row in negatives.tolist() if row != target]
        total = total + 1 - cosines[target] + negative_weight * sum(over) / len(negatives)
    return total / len(states)


def test_ultragcn_by_hand():
    # A user of 3 edges, a target of 0 and a negative of 8: beta = sqrt(4 / 1) / 3 and sqrt(4 / 9) / 3.
    state, vectors = torch.ones(1, 1), torch.tensor([[9.0], [math.log(3)], [math.log(2)]])
    loss = ultragcn_loss(
        state, vectors, torch.tensor([1]), torch.tensor([2, 1]), torch.tensor([3.0]),
        torch.tensor([0.0, 0.0, 8.0]), constraint_weight=3.0, base_weight=0.5, negative_weight=10.0,
    )  # fmt: skip
    target = (0.5 + 2) * math.log(4 / 3)  # softplus(-log 3)
    negatives = ((0.5 + 2 / 3) * math.log(3) + 0) / 2  # softplus(log 2); the target counts as 0
    assert loss.item() == pytest.approx(target + 10 * negatives)


def plain_ultragcn(states, vectors, targets, negatives, user_degrees, item_degrees):
    total = 0.0
    for state, target, degree in zip(states, targets.tolist(), user_degrees.tolist(), strict=True):

        def cost(row, label, state=state, degree=degree):
            weight = 1e-6 + math.sqrt((degree + 1) / (item_degrees[row].item() + 1)) / degree
            return weight * functional.binary_cross_entropy_with_logits(state @ vectors[row], label)

        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        rows = [row for row in negatives.tolist() if row != target]
        total = total + cost(target, one) + 300 * sum(cost(row, zero) for row in rows) / len(negatives)
    return total / len(states)


NEGATIVES = torch.tensor([3, 4, 4, 9, 11, 12, 13, 14, 15, 30])


def chunked_and_plain(name):
    """Return a loss as written here and as a plain loop, both functions of states and item vectors."""
    _, _, targets = example(torch.float64)
    negatives = torch.cat([targets[:2], NEGATIVES])  # hits and repeats
    degrees = torch.arange(1.0, 8.0), torch.arange(NUM_ITEMS + 1.0)
    return {
        "uniformity": (lambda x, v: uniformity_loss(v), lambda x, v: plain_uniformity(v)),
        "cosine_contrastive": (
            lambda x, v: cosine_contrastive_loss(x, v, targets, negatives, margin=0.1, negative_weight=9.0),
            lambda x, v: plain_cosine_contrastive(x, v, targets, negatives, 0.1, 9.0),
        ),
        "ultragcn": (
            lambda x, v: ultragcn_loss(x, v, targets, negatives, *degrees),
            lambda x, v: plain_ultragcn(x, v, targets, negatives, *degrees),
        ),
    }[name]


CHUNKED = ["uniformity", "cosine_contrastive", "ultragcn"]


@pytest.mark.parametrize("chunk_logits", [1, 40, 10_000])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_losses_and_their_gradients_are_the_plain_ones(monkeypatch, name, chunk_logits):
    monkeypatch.setattr(_SharedNegatives, "CHUNK_LOGITS", chunk_logits)
    states, vectors, _ = example(torch.float64)
    chunked, plain = chunked_and_plain(name)
    loss, expected = chunked(states, vectors), plain(states, vectors)
    torch.testing.assert_close(loss, expected, **TOLERANCE[torch.float64])
    wanted = [vectors] if name == "uniformity" else [states, vectors]
    for found, right in zip(gradients(loss, *wanted), gradients(expected, *wanted), strict=True):
        torch.testing.assert_close(found, right, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_losses_are_close_under_bfloat16_autocast(name):
    states, vectors, _ = example()
    chunked, _ = chunked_and_plain(name)
    expected = chunked(states, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked(states, vectors)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss - expected) < 0.02 * abs(expected)  # bfloat16 was used, and is close
    (found,), (right,) = gradients(loss, vectors), gradients(expected, vectors)
    assert found.dtype == torch.float32
    assert (found - right).norm() < 0.05 * right.norm()
