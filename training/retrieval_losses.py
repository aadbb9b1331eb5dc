"""What a graph encoder can be fitted by: `--retrieval.model.loss training.retrieval_losses.DirectAU`.

A loss takes a batch of edges with the vectors of all nodes; each is a few settings around formulas of
training/losses.py. Figures of all of them on one data set are in benchmarks/results/README.md.

Shapes: B edges of a batch, U users, I items, M negatives, D dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from training.losses import (
    alignment_loss,
    bpr_loss,
    cosine_contrastive_loss,
    negatives_by_popularity,
    sampled_softmax_loss,
    ultragcn_loss,
    uniformity_loss,
)


@dataclass(frozen=True, kw_only=True)
class EdgeBatch:
    """Edges, and all vectors as they are now. Row 0 is padding everywhere.

    Attributes:
        users: [B] int64, user rows.
        items: [B] int64, item rows.
        user_vectors: [U+1, D].
        item_vectors: [I+1, D].
        user_degrees: [U+1] float32, training edges of each user.
        item_degrees: [I+1] float32, training edges of each item.
    """

    users: Tensor
    items: Tensor
    user_vectors: Tensor
    item_vectors: Tensor
    user_degrees: Tensor
    item_degrees: Tensor

    # embedding() and not [...]: the gradient of indexing sorts its rows, on one thread.

    @property
    def states(self) -> Tensor:
        """The users' vectors, [B, D]."""
        return embedding(self.users, self.user_vectors)

    @property
    def targets(self) -> Tensor:
        """The items' vectors, [B, D]."""
        return embedding(self.items, self.item_vectors)

    def uniform(self, count: int) -> Tensor:
        """Draw from the items that have edges, as many of each: [count] int64 rows."""
        rows = self.item_degrees.nonzero().squeeze(1)
        return rows[torch.randint(len(rows), (count,), device=rows.device)]


class RetrievalLoss(ABC):
    """Turns a batch into one number to minimise."""

    @abstractmethod
    def __call__(self, batch: EdgeBatch) -> Tensor:
        """Return the loss, a scalar."""


@dataclass(frozen=True)
class SampledSoftmax(RetrievalLoss):
    """Cross-entropy of each edge's item against negatives that the batch shares (see sampled_softmax_loss).

    Args:
        num_negatives: M.
        popularity: draw negatives as often as they occur in training, to this power, and correct the logits
            for it; 0 draws all that have edges as often and corrects nothing: the softmax of M items.
    """

    num_negatives: int = 2048
    popularity: float = 0.0

    def __call__(self, batch: EdgeBatch) -> Tensor:
        """See RetrievalLoss."""
        if not self.popularity:
            negatives = batch.uniform(self.num_negatives)
            return sampled_softmax_loss(batch.states, batch.item_vectors, batch.items, negatives)
        negatives, expected = negatives_by_popularity(batch.item_degrees, self.popularity, self.num_negatives)
        return sampled_softmax_loss(batch.states, batch.item_vectors, batch.items, negatives, expected)


@dataclass(frozen=True)
class BPR(RetrievalLoss):
    """Each edge's item above one uniform negative of its own (see bpr_loss)."""

    def __call__(self, batch: EdgeBatch) -> Tensor:
        """See RetrievalLoss."""
        users, negatives = batch.states, embedding(batch.uniform(len(batch.items)), batch.item_vectors)
        return bpr_loss((users * batch.targets).sum(1), (users * negatives).sum(1))


@dataclass(frozen=True)
class DirectAU(RetrievalLoss):
    """Edges close, users and items each spread over the sphere (see alignment_loss and uniformity_loss).

    Args:
        gamma: weight of the spread (the paper: 0.2 to 10, by data set).
    """

    gamma: float = 1.0

    def __call__(self, batch: EdgeBatch) -> Tensor:
        """See RetrievalLoss."""
        users, items = batch.states, batch.targets
        close = alignment_loss(users, items)
        if len(users) < 2:  # what an epoch has left
            return close
        return close + self.gamma / 2 * (uniformity_loss(users) + uniformity_loss(items))


@dataclass(frozen=True)
class CosineContrastive(RetrievalLoss):
    """SimpleX's loss (see cosine_contrastive_loss).

    Args:
        num_negatives: M.
        margin: cosine up to which a negative costs nothing.
        negative_weight: of the negatives against the target.
    """

    num_negatives: int = 2048
    margin: float = 0.9
    negative_weight: float = 300.0

    def __call__(self, batch: EdgeBatch) -> Tensor:
        """See RetrievalLoss."""
        return cosine_contrastive_loss(
            batch.states,
            batch.item_vectors,
            batch.items,
            batch.uniform(self.num_negatives),
            margin=self.margin,
            negative_weight=self.negative_weight,
        )


@dataclass(frozen=True)
class UltraGCN(RetrievalLoss):
    """Cross-entropy weighted as infinitely many layers would weigh an edge (see ultragcn_loss).

    Meant for vectors that nothing propagates: encoder `retrieval.encoders.mf.MF`.

    Args:
        num_negatives: M.
        negative_weight: of the negatives against the target.
    """

    num_negatives: int = 2048
    negative_weight: float = 300.0

    def __call__(self, batch: EdgeBatch) -> Tensor:
        """See RetrievalLoss."""
        return ultragcn_loss(
            batch.states,
            batch.item_vectors,
            batch.items,
            batch.uniform(self.num_negatives),
            batch.user_degrees[batch.users],
            batch.item_degrees,
            negative_weight=self.negative_weight,
        )
