"""Nearest neighbours of a session, the newest events counting most: V-SKNN.

Malte Ludewig and Dietmar Jannach, "Evaluation of Session-based Recommendation Algorithms", UMUAI 2018. Where
we differ: neighbours are sought among all training histories instead of a sample of the newest, an event's
weight falls by half-lives instead of linearly, and a neighbour's length is divided out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from benchmarks.baselines.item_knn import largest


class SessionKNN:
    """A score is the sum of the similarities of the K nearest training histories that hold the item.

    Similarity: q^T F^2 n / |F n|, with q the weighted items of the history, n the items of a training history
    (ones and zeros) and F = diag(log(U / users of the item)).

    Args:
        num_neighbours: K; the default is the authors' smallest.
    """

    def __init__(self, num_neighbours: int = 100) -> None:
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours is {num_neighbours}; expected 1 or more")
        self.num_neighbours = num_neighbours

    def fit(self, touched: csr_array) -> None:
        """Keep the matrix [U+1, I+1] of who touched what."""
        users = np.maximum(np.asarray(touched.sum(axis=0)).ravel(), 1.0)
        num_users = max(int(np.count_nonzero(np.diff(touched.indptr))), 1)
        rarity = np.log(num_users / users)
        weighted = touched @ diags_array(rarity)
        norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
        scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        self.touched = csr_array(touched, dtype=np.float32)
        # [I+1, U+1]: F^2 n / |F n| of each training history n.
        self.by_item = csr_array((diags_array(scale) @ weighted @ diags_array(rarity)).T, dtype=np.float32)

    def scores(self, histories: csr_array) -> NDArray[np.float32]:
        """Return [Q, I+1] for Q histories [Q, I+1] of weights."""
        near = csr_array(histories @ self.by_item)
        rows = np.repeat(np.arange(near.shape[0]), np.diff(near.indptr))
        found: NDArray[np.float32] = (largest(near, rows, self.num_neighbours) @ self.touched).toarray()
        return found
