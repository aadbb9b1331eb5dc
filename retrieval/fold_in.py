"""A query vector for a visitor whom training has never seen: one propagation from the history's items."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def fold_in(
    item_vectors: NDArray[np.float32], item_degrees: NDArray[np.float32], history: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Return the vector [D] of a user who touched the items in `history`.

    One step of LightGCN's propagation (He et al. 2020, eq. 3) onto a new user node, with the trained item
    vectors as its neighbours: sum_i e_i / sqrt(d_u d_i). A degree of 0 counts as 1, so that a new item does
    not blow up. Repeats count once, as an edge does.

    Args:
        item_vectors: [I+1, D] float32, row 0 is padding.
        item_degrees: [I+1] float32, training interactions of each item.
        history: [H] item rows 1..I, in any order; H = 0 gives the zero vector.
    """
    rows = np.unique(history)
    rows = rows[rows > 0]
    if not len(rows):
        return np.zeros(item_vectors.shape[1], np.float32)
    weights = 1.0 / np.sqrt(np.maximum(item_degrees[rows], 1.0) * len(rows))
    vector: NDArray[np.float32] = weights.astype(np.float32) @ item_vectors[rows]
    return vector
