"""Item-item neighbours: which items the same users touch, as a sparse matrix.

Shape legend: U users, I items, E edges, K neighbours of an item.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval.sparse import SparseRows, strongest


def item_neighbours(
    users: NDArray[np.int32], items: NDArray[np.int32], num_users: int, num_items: int, k: int
) -> SparseRows:
    """Return the k strongest neighbours of each item, [I+1, I+1], strongest first; row 0 is empty.

    The weight of j as a neighbour of i is the linear graph filter of GF-CF (Shen et al. 2021),

        sum over users u of both  1 / (d_u sqrt(d_i d_j)),

    d being the number of edges: co-occurrence, where a user of few items says more than one of many, and an
    item of many users is no neighbour of everything. No item is its own neighbour: what the visitor has
    touched already is not looked for. Chosen on validation among other powers of the degrees
    (benchmarks/results/README.md).

    Args:
        users: [E] int32, 1..U.
        items: [E] int32, 1..I; each (user, item) pair once.
        num_users: U.
        num_items: I.
        k: most neighbours that an item keeps.
    """
    user_degrees = np.maximum(np.bincount(users, minlength=num_users + 1), 1)
    item_degrees = np.maximum(np.bincount(items, minlength=num_items + 1), 1)
    values = 1.0 / np.sqrt(user_degrees[users].astype(np.float64) * item_degrees[items])
    items_of = SparseRows.from_entries(users, items, values, num_users + 1, num_items + 1)
    users_of = SparseRows.from_entries(items, users, values, num_items + 1, num_users + 1)
    rows = []
    for item in range(num_items + 1):
        columns, weights = items_of.weighted_sum(*users_of.row(item))
        others = columns != item
        rows.append(strongest(columns[others], weights[others], k))
    return SparseRows.from_rows(rows, num_items + 1)
