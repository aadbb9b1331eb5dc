"""Losses as pure functions, one formula each. Shapes: B examples, D dimension, I items, M negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def full_softmax_loss(states: Tensor, item_vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the whole catalog: -log softmax over items of state . item.

    Args:
        states: [B, D].
        item_vectors: [I+1, D]; row 0 is padding and takes no part.
        targets: [B] int64, item rows 1..I.
    """
    everything = torch.arange(1, len(item_vectors), device=targets.device)
    return sampled_softmax_loss(states, item_vectors, targets, everything)


def sampled_softmax_loss(
    states: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_expected_count: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy of each target against negatives that the whole batch shares.

    Bengio and Senecal 2008; logits of negatives drawn from q are corrected by -log(M q), so that in
    expectation the loss is the full softmax. A negative that equals an example's target is left out of it, so
    with every item as a negative this is the full softmax.

    The logits never exist at once: they are made, turned into the gradient and dropped by chunks of examples,
    so memory grows with M and not with B times M. Products run in bfloat16 under autocast, sums and
    exponentials in float32.

    Args:
        states: [B, D].
        item_vectors: [I+1, D].
        targets: [B] int64, item rows 1..I.
        negatives: [M] int64, item rows 1..I.
        log_expected_count: [M] log(M q) of each negative; None leaves the logits as they are.
    """
    # embedding() and not [...]: the gradient of indexing sorts its rows, on one thread.
    positive = functional.embedding(targets, item_vectors)
    negative = functional.embedding(negatives, item_vectors)
    loss: Tensor = _SharedNegatives.apply(  # type: ignore[no-untyped-call]
        states, positive, negative, targets, negatives, log_expected_count
    )
    return loss


class _SharedNegatives(torch.autograd.Function):
    """The sum behind sampled_softmax_loss, with the gradient worked out in the forward pass."""

    CHUNK_LOGITS = 4_000_000  # at a time: 16 MB of float32, which caches hold and malloc hands out again

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        positives: Tensor,
        negatives: Tensor,
        targets: Tensor,
        negative_rows: Tensor,
        correction: Tensor | None,
    ) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        # Sums are in float32 at least; float64 stays what it is.
        wide = torch.promote_types(states.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            x, table = states.to(dtype), negatives.to(dtype)
            positive = (states.to(wide) * positives.to(wide)).sum(1, keepdim=True)
            loss = torch.zeros((), dtype=wide, device=states.device)
            pull = torch.empty_like(positive)  # the gradient's weight on the target: p(target) - 1
            grad_states = torch.empty_like(states, dtype=wide)
            grad_table = torch.zeros_like(negatives, dtype=wide)
            size = max(1, _SharedNegatives.CHUNK_LOGITS // max(1, len(table)))
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                logits = (x[part] @ table.T).to(wide)
                if correction is not None:
                    logits -= correction
                logits.masked_fill_(targets[part, None] == negative_rows, -torch.inf)
                peak = torch.maximum(logits.amax(1, keepdim=True), positive[part])
                weights = logits.sub_(peak).exp_()
                wanted = (positive[part] - peak).exp_()
                total = weights.sum(1, keepdim=True).add_(wanted)
                loss += (total.log() + peak - positive[part]).sum()
                pull[part] = wanted / total - 1
                gradient = weights.div_(total).to(dtype)
                grad_states[part] = gradient @ table
                grad_table += gradient.T @ x[part]
            grad_states += pull * positives
        ctx.save_for_backward(grad_states, pull, states, grad_table)
        ctx.dtypes = states.dtype, positives.dtype, negatives.dtype
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, pull, states, grad_table = ctx.saved_tensors
        scale = gradients[0] / len(states)
        of_states, of_positives, of_negatives = ctx.dtypes
        return (
            (grad_states * scale).to(of_states),
            (states * (pull * scale)).to(of_positives),
            (grad_table * scale).to(of_negatives),
            None,
            None,
            None,
        )


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the Bayesian personalized ranking loss, mean of -log sigmoid(positive - negative).

    Rendle et al. 2009, eq. 4 (without the regulariser). Both arguments: scores of one shape.
    """
    return functional.softplus(negative - positive).mean()


def embedding_l2(*embeddings: Tensor) -> Tensor:
    """Return half the squared norm of the rows, per row of the first: the regulariser of LightGCN's code.

    He et al. 2020, eq. 15, on the initial embeddings of the batch's nodes only.
    """
    total = sum((e.float().square().sum() for e in embeddings), torch.zeros((), device=embeddings[0].device))
    return 0.5 * total / len(embeddings[0])
