"""First-order Markov chain: what came right after the item that was touched last."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from engine.history import NEGATIVE_EVENT
from training.data.interactions import Interactions
from training.data.splits import Holdout


class FirstOrderMarkov:
    """A score is P(next item | last item) = (n(last, next) + m p(next)) / (n(last) + m).

    n counts pairs of neighbouring events of the training histories, less immediate repeats; p is each item's
    share of these events. The Dirichlet prior (m, p) ranks what never followed by popularity.

    Args:
        prior: m, in events.
    """

    def __init__(self, prior: float = 1.0) -> None:
        if prior <= 0:
            raise ValueError(f"prior is {prior}; expected more than 0")
        self.prior = prior

    def fit(self, train: Interactions) -> None:
        """Count the steps of the training histories."""
        train = train.take(train.event_types != NEGATIVE_EVENT)
        train = train.take(train.is_next_item)
        follows = train.users[1:] == train.users[:-1]
        size = train.num_items + 1
        steps = (train.items[:-1][follows], train.items[1:][follows])
        self.steps = csr_array((np.ones(len(steps[0]), np.float32), steps), shape=(size, size))
        counts = np.bincount(train.items, minlength=size).astype(np.float32)
        self.share = counts / max(float(counts.sum()), 1.0)
        self.leaves = np.asarray(self.steps.sum(axis=1), np.float32)

    def scores(self, questions: Holdout) -> NDArray[np.float32]:
        """Return [Q, I+1]; without a history an item's share."""
        wanted = [history.wanted for _, history, _ in questions]
        last = np.array([items[-1] if len(items) else 0 for items in wanted], np.int64)
        scores: NDArray[np.float32] = self.steps[last].toarray() + self.prior * self.share
        scores /= (self.leaves[last] + self.prior)[:, None]
        return scores
