"""Graph vectors for the ranker that have not seen the histories which they are read beside.

An item's graph vector is made from all users' events, those of the history that the ranker is learning from
among them: in training the next item's vector is like the history's partly because this very user took both.
The ranker learns to trust that, and on what comes next, which no graph has seen, it is misled. So the users
are dealt into folds, stage one is fitted once without each of them, and a history is learned from beside the
vectors of the fit that lacked its fold. The cure is that of stacking (Wolpert, "Stacked Generalization",
Neural Networks 1992): what one model makes for another comes from data that it was not fitted to.

Each fit stands in a basis of its own, so all are turned towards one that they share. The ranker is asked, and
served, with the mean of the turned vectors.

Shapes: K folds, I items, G graph dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.data.interactions import Interactions


def without_fold(events: Interactions, fold: int, num_folds: int) -> Interactions:
    """Return the events of all users but those of a fold: users whose row is `fold` modulo `num_folds`.

    Raises:
        ValueError: no other user has an event.
    """
    others = events.take(events.users % num_folds != fold)
    if not len(others):
        raise ValueError(f"num_folds is {num_folds}; expected fewer: fold {fold} has all users with events")
    return others


def turned(
    vectors: NDArray[np.float32], item_degrees: NDArray[np.float32], reference: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the vectors of one fit, turned as a whole to stand as near as they can to those of another.

    Orthogonal Procrustes (Schoenemann, Psychometrika 1966) over the items that both have.

    Args:
        vectors: [I+1, G].
        item_degrees: [I+1] events that this fit had of each item; without one an item's vector is zero.
        reference: [I+1, G].
    """
    known = item_degrees > 0
    left, _, right = np.linalg.svd(vectors[known].astype(np.float64).T @ reference[known])
    found = np.zeros_like(vectors)
    found[known] = vectors[known] @ (left @ right)
    return found


def fold_vectors(
    fits: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], reference: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what each fit, (vectors [I+1, G], item_degrees [I+1]), makes of the items: [K, I+1, G]."""
    return np.stack([turned(vectors, degrees, reference) for vectors, degrees in fits])
