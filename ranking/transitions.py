"""What the ranker's scores gain where an item has often come next: a log-linear mixture of the two.

Shapes: C candidates, N items that may come next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOOR = 3e-4  # below about this a probability says nothing; chosen on validation (benchmarks/results)


def transition_gain(probabilities: NDArray[np.float32], weight: float) -> NDArray[np.float32]:
    """Return what the scores of items that come next with a probability gain: weight * log(1 + p / FLOOR).

    A ranker's scores are logarithms of probabilities but for a constant, so the sum is the logarithm of a
    product: of the ranker's probability and of a power of this one.
    """
    return np.asarray(weight * np.log1p(probabilities / FLOOR), np.float32)


def transition_bonus(
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
    # A table of all items, most of which no one touches, is faster than to look each candidate up.
    bonuses = np.zeros(1 + max(candidates.max(initial=0), items.max(initial=0)), np.float32)
    bonuses[items] = transition_gain(probabilities, weight)
    return bonuses[candidates]
