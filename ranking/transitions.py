"""What the ranker's scores gain where an item has often come next: a log-linear mixture of the two.

Shapes: I items, C candidates, N items that may come next.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

FLOOR = 3e-4  # below about this a probability says nothing; chosen on validation (benchmarks/results)


def transition_gain(probabilities: NDArray[np.float32], weight: float) -> NDArray[np.float32]:
    """Return what the scores of items that come next with a probability gain: weight * log(1 + p / FLOOR).

    A ranker's scores are logarithms of probabilities but for a constant, so the sum is the logarithm of a
    product: of the ranker's probability and of a power of this one.
    """
    return np.asarray(weight * np.log1p(probabilities / FLOOR), np.float32)


class TransitionBonus:
    """Adds up transition_gain with a table of all items, which is faster than to look each candidate up.

    The table is kept, one for each thread that asks: what a request has written there it takes back.
    """

    def __init__(self, num_items: int) -> None:
        """Take the number of items, I: rows are 0..I."""
        self._num_rows = num_items + 1
        self._of_thread = threading.local()

    def __call__(
        self,
        candidates: NDArray[np.int32],
        items: NDArray[np.int32],
        probabilities: NDArray[np.float32],
        weight: float,
    ) -> NDArray[np.float32]:
        """Return what to add to the scores of candidates, [C] float32: each one's transition_gain.

        Args:
            candidates: [C] item rows.
            items: [N] rows of the items that may come next, none twice; p of all others is 0.
            probabilities: [N] p.
            weight: 0 adds nothing.
        """
        table: NDArray[np.float32] | None = getattr(self._of_thread, "table", None)
        if table is None:
            table = self._of_thread.table = np.zeros(self._num_rows, np.float32)
        try:
            table[items] = transition_gain(probabilities, weight)
            return table[candidates]
        finally:
            table[items] = 0.0
