"""The most popular items, the same for all: the floor of every table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


class Popularity:
    """A score is the number of users who touched the item."""

    def fit(self, touched: csr_array) -> None:
        """Count the users of each item in the matrix [U+1, I+1] of who touched what."""
        self.counts: NDArray[np.float32] = np.asarray(touched.sum(axis=0), np.float32)

    def scores(self, histories: csr_array) -> NDArray[np.float32]:
        """Return [Q, I+1] for Q histories [Q, I+1]."""
        return np.repeat(self.counts[None], histories.shape[0], axis=0)
