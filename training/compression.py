"""Vectors of more numbers as ones of fewer, for nearly the same scores.

Shapes: N queries, I items, Q numbers before, D after.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def weighted(
    queries: NDArray[np.float32],
    items: NDArray[np.float32],
    dim: int,
    weight: float,
    examples: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return queries [N, Q] whose products with the items are the scores that an export of them has.

    Those are of the ranker and of `weight` times the graph itself, in D numbers; without a weight the
    ranker's alone.

    Args:
        queries: [N, Q], D numbers of the ranker and then those of the graph (HybridRanker.query).
        items: [I, Q], likewise, at a weight of 1; the first row is padding.
        dim: D.
        weight: of the graph's own scores.
        examples: [M, Q] other queries, whose scores are to change least; None for these.
    """
    weights = np.where(np.arange(items.shape[1]) < dim, 1, weight).astype(np.float32)
    if not weight or items.shape[1] == dim:
        return queries * weights
    of_queries, of_items = compression(queries if examples is None else examples, items[1:] * weights, dim)
    found: NDArray[np.float32] = queries @ (of_queries @ of_items.T) * weights
    return found


def compression(
    queries: NDArray[np.float32], items: NDArray[np.float32], dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what to multiply queries and items with, [Q, D] each, so that their products change least.

    The best approximation of rank D to the scores of these queries, in the mean square (Eckart and Young,
    Psychometrika 1936). What all items have in common is left out: it moves all scores of a query alike.

    Args:
        queries: [N, Q], such as will be asked.
        items: [I, Q].
        dim: D, at most Q.
    """
    of_queries = _root(queries)
    of_items = _root(items - items.mean(axis=0))
    left, strengths, right = np.linalg.svd(of_queries @ of_items.T)
    shared = np.sqrt(strengths[:dim])
    return (
        (np.linalg.pinv(of_queries) @ left[:, :dim] * shared).astype(np.float32),
        (np.linalg.pinv(of_items) @ right[:dim].T * shared).astype(np.float32),
    )


def _root(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return R [Q, Q] with R^T R = rows^T rows: what the rows come to, whatever their number."""
    values, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    root: NDArray[np.float64] = np.sqrt(np.maximum(values, 0))[:, np.newaxis] * vectors.T
    return root
