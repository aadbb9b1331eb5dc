"""Nearest items to a query vector: FAISS, inner product, one vector an item.

FAISS counts its vectors from 0, Trirank its items from 1; this file is the only place that knows both.
Shape legend: B queries, D dimension, I items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

SCORES_BLOCK = 65_536  # vectors scores() copies out of the index at a time: 16 MiB at D = 64


class ItemIndex:
    """Items by the inner product of their vectors with a query; several threads may search at once."""

    def __init__(self, index: Any) -> None:
        self._index = index  # a faiss.Index with METRIC_INNER_PRODUCT; its id n is item row n + 1

    @classmethod
    def build(cls, vectors: NDArray[np.float32]) -> ItemIndex:
        """Return an exact index over the items.

        Args:
            vectors: [I+1, D] float32, one item a row; row 0 is padding and is left out.

        Raises:
            ValueError: on another shape, or a value that is NaN or infinite.
        """
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise ValueError(f"vectors has shape {vectors.shape}; expected [I+1, D] with D of at least 1")
        if not np.isfinite(vectors[1:]).all():
            raise ValueError("vectors holds NaN or infinity; expected finite numbers")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors[1:], np.float32))
        return cls(index)

    @classmethod
    def load(cls, path: str | Path) -> ItemIndex:
        """Open an index that `save` wrote. FAISS trusts what it reads: check the file's hash first."""
        index = faiss.read_index(str(path))
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path} has FAISS metric {index.metric_type}; expected inner product")
        return cls(index)

    def save(self, path: str | Path) -> None:
        """Write the index to one file."""
        faiss.write_index(self._index, str(path))

    @property
    def num_items(self) -> int:
        """I, the number of items; their rows are 1..I."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return int(self._index.d)

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the k best items of each query: rows [B, k'] int32 in 1..I, and scores [B, k'] float32.

        k' = min(k, number of allowed items): a short answer is short, never padded. Best first, equal scores
        by lower row; where the cut at k falls among equal scores, FAISS decides which of them come in.

        Args:
            queries: [B, D] float32.
            k: at least 1.
            allowed: [I+1] bool, the items that may come back (entry 0 is ignored); None allows all.

        Raises:
            ValueError: on a wrong shape or k, on NaN or infinity, and where an inner product overflows.
        """
        queries = self._check_queries(queries)
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        k = min(k, self.num_items)
        params = None
        if allowed is not None:
            if allowed.shape != (self.num_items + 1,) or allowed.dtype != np.bool_:
                raise ValueError(
                    f"allowed is {allowed.dtype} {allowed.shape}; expected bool ({self.num_items + 1},)"
                )
            num_allowed = int(np.count_nonzero(allowed[1:]))
            k = min(k, num_allowed)
            if num_allowed < self.num_items:
                # One bit an item: of FAISS's selectors the fastest to make and to ask. It holds on to its
                # array, and `params` to it, so the bits outlive the search.
                bits = np.packbits(allowed[1:], bitorder="little")
                selector = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
                params = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        if k == 0:
            return np.zeros((len(queries), 0), np.int32), np.zeros((len(queries), 0), np.float32)

        scores, ids = self._index.search(queries, k, params=params)
        if (ids < 0).any():  # FAISS drops what does not compare above its lowest float
            raise ValueError("an inner product is too large for float32; expected smaller query values")
        if (scores[:, 1:] == scores[:, :-1]).any():  # FAISS leaves equal scores in no promised order
            by_score = np.lexsort((ids, -scores), axis=1)
            scores, ids = np.take_along_axis(scores, by_score, 1), np.take_along_axis(ids, by_score, 1)
        return (ids + 1).astype(np.int32), scores

    def scores(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the inner product with every stored vector: [B, I+1] float32, column 0 is -inf.

        Nothing is skipped or estimated, whatever the kind of index: this is what evaluation ranks by.
        """
        queries = self._check_queries(queries)
        scores = np.full((len(queries), self.num_items + 1), -np.inf, np.float32)
        for start in range(0, self.num_items, SCORES_BLOCK):
            vectors = self._index.reconstruct_n(start, min(SCORES_BLOCK, self.num_items - start))
            scores[:, start + 1 : start + 1 + len(vectors)] = queries @ vectors.T
        return scores

    def _check_queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries has shape {queries.shape}; expected [B, {self.dim}]")
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            raise ValueError("queries holds NaN or infinity; expected finite numbers")
        return queries
