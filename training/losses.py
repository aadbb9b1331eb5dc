"""Losses as pure functions, one formula each. Shapes: B examples, D dimension, I items, M negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def full_softmax_loss(states: Tensor, item_vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log softmax(states @ item_vectors[1:].T)[target]: cross-entropy over the catalog.

    The logits never exist at once: they are made, turned into the gradient and dropped by chunks of
    examples, so memory grows with the catalog and not with batch times catalog. Products run in bfloat16
    under autocast, sums and exponentials in float32.

    Args:
        states: [B, D].
        item_vectors: [I+1, D]; row 0 is padding and takes no part.
        targets: [B] int64, item rows 1..I.
    """
    result: Tensor = _LinearCrossEntropy.apply(states, item_vectors, targets)  # type: ignore[no-untyped-call]
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, with the gradient worked out in the forward pass."""

    CHUNK_ELEMENTS = 4_000_000  # logits at a time: 16 MB of float32, about what a CPU's caches hold

    @staticmethod
    def forward(ctx: Any, states: Tensor, item_vectors: Tensor, targets: Tensor) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        with torch.autocast(device, enabled=False):
            x, table = states.to(dtype), item_vectors.to(dtype)
            loss = states.new_zeros((), dtype=torch.float32)
            grad_states = torch.empty_like(x)
            grad_table = torch.zeros_like(item_vectors, dtype=torch.float32)
            step = max(1, _LinearCrossEntropy.CHUNK_ELEMENTS // len(table))
            for start in range(0, len(x), step):
                chunk, target = x[start : start + step], targets[start : start + step, None]
                logits = (chunk @ table.T).float()
                logits[:, 0] = -torch.inf
                peak = logits.amax(1, keepdim=True)
                wanted = logits.gather(1, target) - peak
                probability = logits.sub_(peak).exp_()
                total = probability.sum(1, keepdim=True)
                loss += (total.log() - wanted).sum()
                probability /= total
                probability.scatter_add_(1, target, torch.full_like(total, -1.0))
                gradient = probability.to(dtype)
                grad_states[start : start + step] = gradient @ table
                grad_table += (gradient.T @ chunk).float()
        ctx.save_for_backward(grad_states, grad_table)
        ctx.dtypes = states.dtype, item_vectors.dtype
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_states, grad_table = ctx.saved_tensors
        scale = gradients[0] / len(grad_states)
        return (grad_states * scale).to(ctx.dtypes[0]), (grad_table * scale).to(ctx.dtypes[1]), None


def sampled_softmax_loss(
    states: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_expected_count: Tensor | float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of each target against negatives that the whole batch shares.

    Bengio and Senecal 2008; logits of negatives drawn from q are corrected by -log(M q), so that in
    expectation the loss is the full softmax. Negatives that equal an example's target are left out of it.

    Args:
        states: [B, D].
        item_vectors: [I+1, D].
        targets: [B] int64, item rows 1..I.
        negatives: [M] int64, item rows 1..I.
        log_expected_count: [M] or a number, log(M q) of each negative; 0 leaves the logits as they are.
    """
    positive = (states * item_vectors[targets]).sum(-1, keepdim=True).float()
    negative = (states @ item_vectors[negatives].T).float() - log_expected_count
    negative = negative.masked_fill(targets[:, None] == negatives, -torch.inf)
    logits = torch.cat([positive, negative], dim=1)
    return functional.cross_entropy(logits, targets.new_zeros(len(targets)))


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
