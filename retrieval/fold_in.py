"""A query vector for a visitor whom training has never seen: one propagation from the history's items.

Shape legend: H events of a history, D dimension, I items, E event types.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def event_weights(
    event_types: NDArray[np.uint8],
    ages: NDArray[np.floating],
    type_weights: NDArray[np.float32],
    half_life: float | None,
) -> NDArray[np.float32]:
    """Return how much each event counts, [H] float32: weight of its type * 2^(-age / half_life).

    Only ratios matter to what is made of the weights, so ages may be counted from any moment.

    Args:
        event_types: [H] uint8, codes into `type_weights`.
        ages: [H], in the unit of `half_life`: events behind it, days, ...
        type_weights: [E] float32, at least 0; a type of weight 0 does not count.
        half_life: age at which an event counts half; None lets age play no part.
    """
    weights = type_weights[event_types]
    if half_life is not None and len(ages):
        # From the youngest on: a history that ended long ago must not vanish below the smallest float.
        weights = weights * np.exp2(-(ages - ages.min()) / half_life)
    return weights.astype(np.float32)


def distinct_items(
    history: NDArray[np.int32], weights: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return each item of a history once, ascending, with the largest of its weights: two arrays [H'].

    The weights are scaled to a mean of 1, so that equal ones, whatever they are, change nothing. Items of
    weight 0 and padding are left out.

    Args:
        history: [H] item rows.
        weights: [H] float32, at least 0; None counts every event alike.
    """
    if weights is None:
        weights = np.ones(len(history), np.float32)
    order = np.argsort(-weights, kind="stable")
    rows, first = np.unique(history[order], return_index=True)
    strongest = weights[order][first]
    kept = (rows > 0) & (strongest > 0)
    rows, strongest = rows[kept], strongest[kept]
    return rows, strongest / strongest.mean() if len(rows) else strongest


def fold_in(
    item_vectors: NDArray[np.float32],
    item_degrees: NDArray[np.float32],
    history: NDArray[np.int32],
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return the vector [D] of a user who touched the items in `history`.

    One step of LightGCN's propagation (He et al. 2020, eq. 3) onto a new user node, with the trained item
    vectors as its neighbours: sum_i w_i e_i / sqrt(d_u d_i), where d_u is the number of different items. The
    paper's edges all weigh 1; ours may differ (`event_weights`), at a mean of 1. A degree of 0 counts as 1,
    so that a new item does not blow up. Repeats count once, as an edge does, with the largest weight.

    Args:
        item_vectors: [I+1, D] float32, row 0 is padding.
        item_degrees: [I+1] float32, training interactions of each item.
        history: [H] item rows 1..I, in any order; H = 0 gives the zero vector.
        weights: [H] float32, at least 0; None counts every event alike.
    """
    rows, strengths = distinct_items(history, weights)
    if not len(rows):
        return np.zeros(item_vectors.shape[1], np.float32)
    per_item = strengths / np.sqrt(np.maximum(item_degrees[rows], 1.0) * len(rows))
    vector: NDArray[np.float32] = per_item.astype(np.float32) @ item_vectors[rows]
    return vector
