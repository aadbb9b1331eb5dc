"""GF-CF: two graph filters in closed form.

Yifei Shen et al., "How Powerful is Graph Convolution for Recommendation?", CIKM 2021, arXiv:2108.07567.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import svds


class GFCF:
    """Scores r (N^T N + alpha D_I^-1/2 V V^T D_I^1/2) of a history r, with N = D_U^-1/2 R D_I^-1/2.

    The first term is the linear filter; the second the ideal low-pass filter: V holds the right singular
    vectors of N's largest singular values. The defaults are the authors' for Gowalla and Yelp2018.

    Args:
        rank: singular vectors that pass; fewer where the matrix has no more.
        alpha: weight of the ideal low-pass filter.
    """

    def __init__(self, rank: int = 256, alpha: float = 0.3) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}; expected 1 or more")
        self.rank, self.alpha = rank, alpha

    def fit(self, touched: csr_array) -> None:
        """Decompose the matrix [U+1, I+1] of who touched what."""
        of_user = np.sqrt(np.maximum(np.asarray(touched.sum(axis=1)).ravel(), 1.0))
        self.of_item = np.sqrt(np.maximum(np.asarray(touched.sum(axis=0)).ravel(), 1.0)).astype(np.float32)
        scaled = diags_array(1.0 / of_user) @ touched @ diags_array(1.0 / self.of_item.astype(np.float64))
        rank = min(self.rank, min(touched.shape) - 1)
        start = np.random.default_rng(0).standard_normal(min(touched.shape))
        _, _, rows = svds(csr_array(scaled), k=rank, v0=start)
        self.low_pass = np.ascontiguousarray(rows, np.float32)  # V^T, [rank, I+1]
        self.scaled = csr_array(scaled, dtype=np.float32)
        self.scaled_by_item = csr_array(self.scaled.T)

    def scores(self, histories: csr_array) -> NDArray[np.float32]:
        """Return [Q, I+1] for Q histories [Q, I+1]."""
        linear: NDArray[np.float32] = (histories @ self.scaled_by_item @ self.scaled).toarray()
        spectrum = (histories @ diags_array(1.0 / self.of_item)) @ self.low_pass.T
        linear += self.alpha * (spectrum.astype(np.float32) @ self.low_pass) * self.of_item
        return linear
