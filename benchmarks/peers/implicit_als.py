"""Alternating least squares of the `implicit` library, where it is installed.

Yifan Hu, Yehuda Koren, Chris Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, csr_matrix

INSTALL = "implicit is not installed; expected `pip install implicit` (tried with 0.7.3)"


class ImplicitALS:
    """A score is the product of the item's factors with those that the history gives the user.

    Args:
        dim: factors.
        regularization: weight of the squared factors.
        alpha: an event's confidence is 1 + alpha.
        iterations: of alternating least squares.
        seed: of the first factors.

    Raises:
        ValueError: implicit is not installed.
    """

    def __init__(
        self,
        dim: int = 64,
        regularization: float = 0.05,
        alpha: float = 1.0,
        iterations: int = 15,
        seed: int = 0,
    ) -> None:
        if importlib.util.find_spec("implicit") is None:
            raise ValueError(INSTALL)
        from implicit.cpu.als import AlternatingLeastSquares

        self.model = AlternatingLeastSquares(
            factors=dim,
            regularization=regularization,
            alpha=1.0 + alpha,  # there the confidence itself; untouched items have 1
            iterations=iterations,
            random_state=seed,
        )

    def fit(self, touched: csr_array) -> None:
        """Factorise the matrix [U+1, I+1] of who touched what."""
        self.model.fit(csr_matrix(touched), show_progress=False)

    def scores(self, histories: csr_array) -> NDArray[np.float32]:
        """Return [Q, I+1] for Q histories [Q, I+1], ones and zeros."""
        users = self.model.recalculate_user(np.arange(histories.shape[0]), csr_matrix(histories))
        scores: NDArray[np.float32] = np.asarray(users, np.float32) @ np.asarray(self.model.item_factors).T
        return scores
