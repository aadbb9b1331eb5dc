"""Items that training has no event of get vectors in both stages: from the trained items most like them."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from ranking.ranker import HybridRanker
from retrieval.new_items import content_vectors
from retrieval.sparse import SparseRows

# How long a new item's vector in the ranker is, beside those of the trained items of the fewest users. A mean
# of like items is always about right: as long as theirs, it takes the places of items that are known to sell.
# Chosen by NDCG@10 of all questions of validation (benchmarks/results).
RANKER_SCALE = 0.65


def new_items(items: pl.DataFrame, item_degrees: NDArray[np.float32], clock: int) -> NDArray[np.int32]:
    """Return the rows of the items on sale that training has no event of, [N], ascending.

    An item that goes on sale after the clock is none: it gets no vector, so that search does not offer it.

    Args:
        items: the data set's items, in row order.
        item_degrees: [I+1] float32, of stage one.
        clock: time of the newest training event; 0 where the data has no times.
    """
    is_new = item_degrees == 0
    is_new[0] = False
    if clock and "available_from" in items.columns:
        is_new[1:] &= items["available_from"].fill_null(0).to_numpy() <= clock
    return np.flatnonzero(is_new).astype(np.int32)


def with_new_items(
    item_vectors: NDArray[np.float32],
    item_degrees: NDArray[np.float32],
    new: NDArray[np.int32],
    like: SparseRows,
) -> NDArray[np.float32]:
    """Return stage one's item vectors [I+1, D] with those of the new items.

    Args:
        item_vectors: [I+1, D] float32.
        item_degrees: [I+1] float32.
        new: [N], of `new_items`.
        like: [N, I+1], of retrieval.new_items.like_items.
    """
    completed = item_vectors.copy()
    completed[new] = content_vectors(item_vectors, item_degrees, like)
    return completed


@torch.no_grad()
def give_new_items_vectors(
    ranker: HybridRanker, item_degrees: NDArray[np.float32], new: NDArray[np.int32], like: SparseRows
) -> None:
    """Let a trained ranker score the new items, and read them in a history, by the trained ones like them.

    That ranks new items better than a ranker that learned to read their content does (benchmarks/results).
    What is like no trained item stays as it is.

    Args:
        ranker: on the CPU and in evaluation mode; it is changed.
        item_degrees: [I+1] float32.
        new: [N], of `new_items`.
        like: [N, I+1], of retrieval.new_items.like_items.
    """
    # What was trained and what the graph says stand at scales of their own.
    parts = ranker.item_parts().float().tensor_split([ranker.embedding.embedding_dim], dim=1)
    vectors = np.concatenate([content_vectors(part.numpy(), item_degrees, like) for part in parts], axis=1)
    is_like_any = vectors.any(axis=1)
    ranker.set_vectors(
        torch.from_numpy(new[is_like_any]).long(), torch.from_numpy(RANKER_SCALE * vectors[is_like_any])
    )
