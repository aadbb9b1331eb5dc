"""Vectors for items that the graph encoder was not trained on: from like items, or from their first users.

Both are one product of a sparse matrix with vectors that are there already; no training.
Shape legend: I items, U users, N new items, F features, D dimension, E events.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval.sparse import SparseRows, strongest

NUM_LIKE = 20  # content neighbours whose vectors a new item gets the mean of,
SHARPNESS = 4  # weighted by this power of their cosines; both chosen on validation (benchmarks/results)
MAX_HAVING = 20_000  # a feature of more items tells few apart, and takes as long as a thousand that do
NUM_OF_LIKE_DEGREE = 100  # trained items whose norms say how long a new vector is to be


def tfidf(
    items: NDArray[np.int32], features: NDArray[np.int32], num_items: int, num_features: int
) -> SparseRows:
    """Return the items' features weighted by rarity, [I+1, F], each row of length 1 or empty.

    A feature's weight is log((1 + I) / (1 + number of items that have it)) + 1; having it twice is having it.

    Args:
        items: [E] int32 item rows, with
        features: [E] int32 a feature that each has: 0..F-1, such as a word of its title, its brand.
        num_items: I.
        num_features: F.
    """
    pairs = np.unique(items.astype(np.int64) * num_features + features)
    rows, columns = pairs // max(num_features, 1), pairs % max(num_features, 1)
    rarity = np.log((1 + num_items) / (1 + np.bincount(columns, minlength=num_features))) + 1
    values = rarity[columns]
    lengths = np.sqrt(np.bincount(rows, values**2, minlength=num_items + 1))
    return SparseRows.from_entries(rows, columns, values / lengths[rows], num_items + 1, num_features)


def like_items(
    item_degrees: NDArray[np.float32],
    features: SparseRows,
    new: NDArray[np.int32],
    num_like: int = NUM_LIKE,
) -> SparseRows:
    """Return the trained items most like each new item, [N, I+1], weighted by cosine ** SHARPNESS.

    Features that more than MAX_HAVING items have play a part where an item has no others.

    Args:
        item_degrees: [I+1] float32; 0 where training never saw the item.
        features: [I+1, F], rows of length 1 (`tfidf`).
        new: [N] item rows.
        num_like: how many items a row has, at most.
    """
    items_having = features.transposed()
    is_frequent = np.diff(items_having.offsets) > MAX_HAVING
    rows = []
    for item in new:
        its, weights = features.row(item)
        if (telling := ~is_frequent[its]).any():
            its, weights = its[telling], weights[telling]
        columns, cosines = items_having.weighted_sum(its, weights)
        trained = (item_degrees[columns] > 0) & (columns != item)
        rows.append(strongest(columns[trained], cosines[trained] ** SHARPNESS, num_like))
    return SparseRows.from_rows(rows, len(item_degrees))


def content_vectors(
    item_vectors: NDArray[np.float32], item_degrees: NDArray[np.float32], like: SparseRows
) -> NDArray[np.float32]:
    """Return vectors [N, D] of new items: the weighted mean of the trained items most like each.

    The length is that of trained items of the fewest users (`of_like_norm`): a new item neither floods the
    inner-product search nor disappears from it. An item that is like no trained item gets the zero vector.

    Args:
        item_vectors: [I+1, D] float32.
        item_degrees: [I+1] float32.
        like: [N, I+1], of `like_items`.
    """
    return of_like_norm(
        like.product(item_vectors), np.zeros(len(like), np.float32), item_vectors, item_degrees
    )


def first_event_vectors(
    user_vectors: NDArray[np.float32],
    user_degrees: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    item_degrees: NDArray[np.float32],
    touches: SparseRows,
) -> NDArray[np.float32]:
    """Return vectors [N, D] of new items from the users who touched them first.

    One step of LightGCN's propagation (He et al. 2020, eq. 3) onto new item nodes: sum_u e_u / sqrt(d_i d_u),
    brought to the length of trained items of as many users, because a trained vector is a mean over several
    steps and so of another scale. An item that nobody with a vector touched gets the zero vector.

    Args:
        user_vectors: [U+1, D] float32.
        user_degrees: [U+1] float32, training interactions of each user; 0 counts as 1.
        item_vectors: [I+1, D] float32, for their lengths.
        item_degrees: [I+1] float32.
        touches: [N, U+1], an entry for each user who touched the item: 1, or how much the event counts.
    """
    weighted = SparseRows(
        touches.offsets,
        touches.columns,
        (touches.values / np.sqrt(np.maximum(user_degrees[touches.columns], 1.0))).astype(np.float32),
        touches.num_columns,
    )
    degrees = np.diff(touches.offsets).astype(np.float32)
    return of_like_norm(weighted.product(user_vectors), degrees, item_vectors, item_degrees)


def of_like_norm(
    vectors: NDArray[np.float32],
    degrees: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    item_degrees: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return vectors [N, D] scaled to the median length of the 100 trained items of the nearest degree.

    The more users an item has, the longer its trained vector; inner-product search favours long ones.
    Zero vectors stay zero.

    Args:
        vectors: [N, D] float32.
        degrees: [N] float32, how many users touched each new item; 0 for none.
        item_vectors: [I+1, D] float32.
        item_degrees: [I+1] float32; items of degree 0 are no example.
    """
    trained = np.flatnonzero(item_degrees > 0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not len(trained):
        return np.zeros_like(vectors)
    trained = trained[np.argsort(item_degrees[trained], kind="stable")]
    examples = np.linalg.norm(item_vectors[trained], axis=1)
    width = min(NUM_OF_LIKE_DEGREE, len(trained))
    # The middle of the run of items of this degree, and as many on both sides of it as make up the width.
    middle = (
        np.searchsorted(item_degrees[trained], degrees, "left")
        + np.searchsorted(item_degrees[trained], degrees, "right")
    ) // 2
    begins = np.clip(middle - width // 2, 0, len(trained) - width)
    median_from = {int(begin): np.median(examples[begin : begin + width]) for begin in np.unique(begins)}
    lengths = np.array([median_from[int(begin)] for begin in begins], np.float32)[:, None]
    scaled: NDArray[np.float32] = np.divide(
        vectors * lengths, norms, out=np.zeros_like(vectors), where=norms > 0
    )
    return scaled
