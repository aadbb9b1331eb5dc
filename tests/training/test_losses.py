"""Losses against torch's own cross-entropy, and against numbers worked out by hand."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from training.losses import (
    _SharedNegatives,
    bpr_loss,
    embedding_l2,
    full_softmax_loss,
    sampled_softmax_loss,
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
    monkeypatch.setattr(_SharedNegatives, "CHUNK_LOGITS", chunk_examples * NUM_ITEMS)
    states, vectors, targets = example(dtype)
    loss, expected = full_softmax_loss(states, vectors, targets), plain_softmax_loss(states, vectors, targets)
    torch.testing.assert_close(loss, expected, **TOLERANCE[dtype])
    for found, right in zip(
        gradients(loss, states, vectors), gradients(expected, states, vectors), strict=True
    ):
        torch.testing.assert_close(found, right, **TOLERANCE[dtype])


def test_a_chunk_holds_one_example_at_least(monkeypatch):
    monkeypatch.setattr(_SharedNegatives, "CHUNK_LOGITS", 1)
    states, vectors, targets = example()
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
