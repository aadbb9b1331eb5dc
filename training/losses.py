"""Losses as pure functions, one formula each. Shapes: B examples, D dimension, I items, M negatives."""

from __future__ import annotations

from collections.abc import Callable
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


def negatives_by_popularity(degrees: Tensor, popularity: float, count: int) -> tuple[Tensor, Tensor]:
    """Draw negatives as often as they occur in training, to a power; what never occurs is not drawn.

    Args:
        degrees: [N] float32, how often each occurs.
        popularity: the power.
        count: M.

    Returns:
        [M] int64 places in `degrees`, and [M] float32 for sampled_softmax_loss's log_expected_count.
    """
    weights = degrees.pow(popularity) * (degrees > 0)
    drawn = torch.multinomial(weights, count, replacement=True)
    return drawn, (count * weights[drawn] / weights.sum()).log()


class _SharedNegatives(torch.autograd.Function):
    """The sum behind sampled_softmax_loss, with the gradient worked out in the forward pass."""

    MULTIPLE = 64  # of the examples of a step, those of padding included
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
            # Rows of zeros, so that shapes repeat from step to step: kernels are compiled for each.
            padding = (0, 0, 0, -len(states) % _SharedNegatives.MULTIPLE)
            x, table = functional.pad(states.to(dtype), padding), negatives.to(dtype)
            positive = functional.pad((states.to(wide) * positives.to(wide)).sum(1, keepdim=True), padding)
            loss = torch.zeros((), dtype=wide, device=states.device)
            pull = torch.empty_like(positive)  # the gradient's weight on the target: p(target) - 1
            grad_states = torch.empty_like(x, dtype=wide)
            grad_table = torch.zeros_like(negatives, dtype=wide)
            examples, columns = _equal_pairs(targets, negative_rows)
            multiple = _SharedNegatives.MULTIPLE  # fewer examples at once would leave a product no work
            size = _SharedNegatives.CHUNK_LOGITS // max(1, len(table)) // multiple * multiple or multiple
            starts = torch.arange(0, len(x) + size, size, device=states.device)
            bounds = torch.searchsorted(examples, starts).tolist()
            for number, start in enumerate(range(0, len(states), size)):
                part = slice(start, start + size)
                logits = (x[part] @ table.T).to(wide)
                if correction is not None:
                    logits -= correction
                pairs = slice(bounds[number], bounds[number + 1])
                logits[examples[pairs] - start, columns[pairs]] = -torch.inf
                peak = torch.maximum(logits.amax(1, keepdim=True), positive[part])
                weights = logits.sub_(peak).exp_()
                wanted = (positive[part] - peak).exp_()
                total = weights.sum(1, keepdim=True).add_(wanted)
                loss += (total.log() + peak - positive[part])[: len(states) - start].sum()
                pull[part] = wanted / total - 1
                gradient = weights.div_(total).to(dtype)
                grad_states[part] = gradient @ table
                grad_table += gradient.T @ x[part]
            grad_states, pull = grad_states[: len(states)], pull[: len(states)]
            grad_states += pull * positives
        ctx.save_for_backward(grad_states, pull, states, grad_table)
        ctx.dtypes = states.dtype, positives.dtype, negatives.dtype
        return loss / len(states)

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


def _equal_pairs(targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return (example, column) of every negative that equals an example's target, by example; int64.

    As sorted lists find each other: a comparison of all with all costs as much as the exponentials.
    """
    ordered, columns = negatives.sort()
    targets = targets.contiguous()
    first = torch.searchsorted(ordered, targets)
    count = torch.searchsorted(ordered, targets, right=True) - first
    examples = torch.repeat_interleave(count)
    # The n-th of an example's pairs stands n places behind its first.
    nth = torch.arange(len(examples), device=targets.device) - (count.cumsum(0) - count)[examples]
    return examples, columns[first[examples] + nth]


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


def alignment_loss(users: Tensor, items: Tensor) -> Tensor:
    """Return the mean squared distance of the two vectors of each pair, scaled to length 1.

    DirectAU's first half (Chenyang Wang et al., "Towards Representation Alignment and Uniformity in
    Collaborative Filtering", KDD 2022). The whole is alignment_loss(users, items) + gamma / 2 *
    (uniformity_loss(users) + uniformity_loss(items)).

    Args:
        users: [B, D].
        items: [B, D], of the items that they touched.
    """
    difference = functional.normalize(users.float()) - functional.normalize(items.float())
    return difference.square().sum(1).mean()


def uniformity_loss(vectors: Tensor) -> Tensor:
    """Return log of the mean of exp(-2 |x - y|^2) over all pairs x, y of rows, scaled to length 1.

    DirectAU's second half (Chenyang Wang et al., KDD 2022). A pair is two different rows, even where they
    hold the same node. B x B distances never exist at once; products run in bfloat16 under autocast.

    Args:
        vectors: [B, D], B >= 2.
    """
    if len(vectors) < 2:
        raise ValueError(f"vectors has {len(vectors)} rows; expected 2 or more")
    x = functional.normalize(vectors)

    def similarity(part: Tensor, table: Tensor, rows: slice) -> Tensor:
        # Of length 1: |x - y|^2 = 2 - 2 x.y. A row's pair with itself is no pair.
        near = (4.0 * (part @ table.T).to(_wide(vectors)) - 4.0).exp()
        itself = torch.arange(rows.start, rows.start + len(part), device=x.device)[:, None]
        return near.scatter(1, itself, 0.0).sum()

    return (_sum_over_chunks(similarity, x, x) / (len(x) * (len(x) - 1))).log()


def cosine_contrastive_loss(
    states: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    margin: float,
    negative_weight: float,
) -> Tensor:
    """Return the mean of (1 - cos(target)) + negative_weight * mean over negatives of max(0, cos - margin).

    Kelong Mao et al., "SimpleX: A Simple and Strong Baseline for Collaborative Filtering", CIKM 2021, eq. 1;
    here the batch shares its negatives. One that equals an example's target counts as 0. Memory and precision
    as in sampled_softmax_loss.

    Args:
        states: [B, D].
        item_vectors: [I+1, D].
        targets: [B] int64, item rows 1..I.
        negatives: [M] int64, item rows 1..I.
        margin: cosine up to which a negative costs nothing (the paper: 0.4 to 0.9).
        negative_weight: of the negatives against the target (the paper: 150 to 1000).
    """
    x, positives = functional.normalize(states), functional.normalize(item_vectors[targets])

    def excess(part: Tensor, table: Tensor, rows: slice) -> Tensor:
        over = (part @ table.T).to(_wide(states)).sub(margin).relu()
        return over.masked_fill(targets[rows, None] == negatives, 0.0).sum()

    total = _sum_over_chunks(excess, x, functional.normalize(item_vectors[negatives]))
    return (1.0 - (x * positives).sum(1)).mean() + negative_weight * total / (len(x) * len(negatives))


def ultragcn_loss(
    states: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    negatives: Tensor,
    user_degrees: Tensor,
    item_degrees: Tensor,
    *,
    constraint_weight: float = 1.0,
    base_weight: float = 1e-6,
    negative_weight: float = 300.0,
) -> Tensor:
    """Return UltraGCN's weighted binary cross-entropy: L_O and its user-item constraint L_C in one.

    Kelong Mao et al., "UltraGCN: Ultra Simplification of Graph Convolutional Networks for Recommendation",
    CIKM 2021. The mean over examples of w(u, i) softplus(-s(u, i)) + negative_weight * mean over negatives of
    w(u, j) softplus(s(u, j)), where w = base_weight + constraint_weight * beta and
    beta(u, i) = sqrt((d_u + 1) / (d_i + 1)) / d_u is what infinitely many layers would make of the edge.
    The item-item constraint L_I is left out. The defaults are the authors' for Gowalla. Here the batch shares
    its negatives, and one that equals an example's target counts as 0. Memory and precision as in
    sampled_softmax_loss.

    Args:
        states: [B, D].
        item_vectors: [I+1, D].
        targets: [B] int64, item rows 1..I.
        negatives: [M] int64, item rows 1..I.
        user_degrees: [B] edges of each example's user, 1 or more.
        item_degrees: [I+1] edges of each item.
        constraint_weight: of beta.
        base_weight: of the plain cross-entropy.
        negative_weight: of the negatives against the target.
    """
    wide = _wide(states)
    of_user = (user_degrees.to(wide) + 1).sqrt() / user_degrees.to(wide)
    of_item = (item_degrees.to(wide) + 1).rsqrt()

    def weight(users: Tensor, items: Tensor) -> Tensor:
        return base_weight + constraint_weight * users * items

    def cost(part: Tensor, table: Tensor, rows: slice) -> Tensor:
        scores = (part @ table.T).to(wide)
        costs = weight(of_user[rows, None], of_item[negatives]) * functional.softplus(scores)
        return costs.masked_fill(targets[rows, None] == negatives, 0.0).sum()

    positive = (states.to(wide) * item_vectors[targets].to(wide)).sum(1)
    pull = (weight(of_user, of_item[targets]) * functional.softplus(-positive)).mean()
    push = _sum_over_chunks(cost, states, item_vectors[negatives]) / (len(states) * len(negatives))
    return pull + negative_weight * push


def _wide(x: Tensor) -> torch.dtype:
    """Sums are in float32 at least; float64 stays what it is."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum_over_chunks(term: Callable[[Tensor, Tensor, slice], Tensor], x: Tensor, table: Tensor) -> Tensor:
    """Return the sum of term(x[part], table, part) over chunks of x, with its gradient; see _ChunkedSum."""
    total: Tensor = _ChunkedSum.apply(term, x, table)  # type: ignore[no-untyped-call]
    return total


class _ChunkedSum(torch.autograd.Function):
    """A sum over chunks of examples, each chunk's gradient taken before the next chunk is made.

    So B x M scores never exist at once, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, term: Callable[[Tensor, Tensor, slice], Tensor], x: Tensor, table: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=_wide(x), device=x.device)
        grad_x, grad_table = torch.empty_like(x), torch.zeros_like(table)
        table = table.detach().requires_grad_()
        size = max(1, _SharedNegatives.CHUNK_LOGITS // max(1, len(table)))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            with torch.enable_grad():
                part = x[rows].detach().requires_grad_()
                value = term(part, table, rows)
            of_part, of_table = torch.autograd.grad(value, (part, table))
            grad_x[rows] = of_part
            grad_table += of_table
            total += value.detach()
        ctx.save_for_backward(grad_x, grad_table)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_table = ctx.saved_tensors
        return None, grad_x * gradients[0], grad_table * gradients[0]
