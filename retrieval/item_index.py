"""Nearest items to a query vector by inner product, over several kinds of index behind one class.

FAISS counts its vectors from 0, Trirank its items from 1; this file is the only place that knows both.
Shape legend: B queries, D dimension, I items, N rows of a part of them.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval.exact_search import ExactSearch, StoredVectors, best

logger = logging.getLogger(__name__)

Kind = Literal["exact", "flat", "ivf", "hnsw", "sq8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
EXACT_KINDS: tuple[Kind, ...] = ("exact", "flat")  # that find all

SCORES_BLOCK = 65_536  # vectors scores() copies out of the index at a time: 16 MiB at D = 64
FEW_ALLOWED = 32  # up to I / 32 allowed items, their products one by one are faster than any index
FEW_ITEMS = 256  # of so few all are searched: that takes microseconds, and an approximate index could miss
SHARE_SEARCHED = 4  # an approximate index is asked for at most a quarter of the allowed items
# From a quarter of the allowed items on, to score and sort all is faster than how FAISS collects so many: all
# of 10,000 in 0.6 ms for 2.2, a fifth of 49,000 in 2.6 for 3.6.
SHARE_SORTED = 4
# Scored again on top of k * k_factor: the errors of the codes do not shrink with k. In a million items, tuned
# to a k of 10,000, a search finds .937 of the best 500 with 50 more and .988 with 1,000, in the same time.
MORE_CANDIDATES = 1_000
GPU_LARGEST_K = 2048  # of FAISS on a GPU, without cuVS
DEFAULT_K = 1000
TUNING_QUERIES = 128  # that a setting is chosen on; as many others tell whether it holds
TRAINING_ITEMS = 32_768  # that the 4-bit codes of ivf are fitted to
# Candidates that are scored again, as a multiple of k.
DEPTHS = (1.1, 1.3, 1.6, 2.0, 3.0, 4.0, 6.0, 10.0, 16.0, 32.0)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Which index to build; see `choose_kind` for what "auto" means."""

    kind: Kind | Literal["auto"] = "auto"
    k: int | None = None  # items a search will ask for, at which recall_target is met; None: 1,000
    recall_target: float = 0.99  # share of the true k best that must be found, on average; 1 asks for all
    num_lists: int | None = None  # of ivf: clusters; None: about sqrt(I), at most 1,024
    num_probes: int | None = None  # of ivf: clusters that a search looks into; None: tuned to recall_target
    num_links: int = 32  # of hnsw: links of an item on each level, twice as many on the lowest
    ef_search: int | None = None  # of hnsw: items that a search keeps in view; None: tuned to recall_target

    def __post_init__(self) -> None:
        if self.kind != "auto" and self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; expected auto or one of {', '.join(KINDS)}")
        if not 0 < self.recall_target <= 1:
            raise ValueError(f"recall_target is {self.recall_target}; expected more than 0, up to 1")
        for name in ("k", "num_lists", "num_probes", "num_links", "ef_search"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.num_links < 2:
            raise ValueError(f"num_links is {self.num_links}; expected at least 2")


class ItemIndex:
    """Items by the inner product of their vectors with a query; several threads may search at once.

    Every kind keeps the float32 vectors, and every score that `search` returns is the float32 product of that
    very item: an approximate kind can miss an item, but not misjudge one.

    - exact: an 8-bit scan with error bounds, then float32 (retrieval/exact_search.py); finds all
    - flat: FAISS IndexFlatIP; finds all; on a GPU where FAISS has one
    - ivf: clusters of items (k-means), of which a search looks into some; 4-bit codes, then float32
    - hnsw: a graph of near items, 8-bit codes, then float32; slow to build
    - sq8: 8-bit codes of all items, then float32; the slowest, and the least memory that a search touches

    Threads: a search runs on at most num_threads. FAISS's number is set for the calling thread each time, for
    every thread that calls FAISS has a setting and a pool of its own. A single query gets one thread of FAISS
    (on two, IndexFlatIP took twice as long) and all threads of exact. BLAS takes part in `scores` alone.
    """

    def __init__(
        self, index: Any, kind: Kind, num_threads: int, removed: NDArray[np.int32] | None = None
    ) -> None:
        """Take a faiss.IndexFlatIP or, with codes before it, a faiss.IndexRefineFlat; see build and load."""
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; expected at least 1")
        self._index = index  # its id n is item row n + 1
        self._kind: Kind = kind
        self._num_threads = num_threads
        self._base: Any = None if _is_flat(index) else faiss.downcast_index(index.base_index)
        self._flat = index if _is_flat(index) else faiss.downcast_index(index.refine_index)
        data = np.zeros(0, np.uint8)
        if self._flat.ntotal:
            data = faiss.rev_swig_ptr(self._flat.codes.data(), self._flat.ntotal * self._flat.d * 4)
        self._vectors = StoredVectors(data, self._flat.d)
        self._exact = ExactSearch(self._vectors, num_threads) if kind == "exact" and len(data) else None
        self._gpu = _on_gpu(self._flat) if kind == "flat" else None
        self._gpu_lock = threading.Lock()  # FAISS's GPU memory is for one thread at a time
        self._remove_lock = threading.Lock()
        self._live = np.ones(self._flat.ntotal + 1, np.bool_)  # [I+1] not removed; replaced, never changed
        self._has_removed = False
        if removed is not None and len(removed):
            self.remove(removed)

    @classmethod
    def build(
        cls,
        vectors: NDArray[np.float32],
        options: IndexOptions | None = None,
        *,
        queries: NDArray[np.float32] | None = None,
        num_threads: int = 1,
    ) -> ItemIndex:
        """Return an index over the items.

        Args:
            vectors: [I+1, D] float32, one item a row; row 0 is padding and is left out.
            options: the kind and what it must do; IndexOptions() where None.
            queries: [Q, D] float32, examples of what will be asked: an approximate kind is tuned on up to 128
                of them and checked on up to 128 others. None takes item vectors, which are poor examples
                where users lie elsewhere.
            num_threads: of building, and of each search.

        Raises:
            ValueError: on another shape, or a value that is NaN or infinite.
        """
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise ValueError(f"vectors has shape {vectors.shape}; expected [I+1, D] with D of at least 1")
        if not np.isfinite(vectors[1:]).all():
            raise ValueError("vectors holds NaN or infinity; expected finite numbers")
        options = options or IndexOptions()
        k = options.k or DEFAULT_K
        items = np.ascontiguousarray(vectors[1:], np.float32)
        kind = options.kind
        if kind == "auto":
            kind = choose_kind(len(items), k, options.recall_target, gpu=faiss.get_num_gpus() > 0)
        if kind in EXACT_KINDS or not len(items):
            return cls(_build_flat(items), "exact" if kind == "exact" else "flat", num_threads)
        with _faiss_threads(num_threads):
            base = {"ivf": _build_ivf, "hnsw": _build_hnsw, "sq8": _build_sq8}[kind](items, options)
            index = faiss.IndexRefineFlat(base, faiss.swig_ptr(items))
        base.this.disown()  # the outer index frees it; until now Python did
        index.own_fields = True
        built = cls(index, kind, num_threads)
        width = {"ivf": options.num_probes, "hnsw": options.ef_search}.get(kind)
        recall = built.tune(
            items if queries is None else queries, k=k, recall_target=options.recall_target, width=width
        )
        if recall < options.recall_target and options.kind == "auto":
            logger.warning("the index becomes exact instead")
            return cls(_build_flat(items), "exact", num_threads)
        return built

    @classmethod
    def load(cls, path: str | Path, *, num_threads: int = 1, kind: Kind | None = None) -> ItemIndex:
        """Open an index that `save` wrote, as a memory map: processes that open one file share its pages.

        FAISS trusts what it reads: check the file's hash first, and leave the file as it is while it is open.

        Args:
            path: the file.
            num_threads: of each search.
            kind: "exact" or "flat" for a file of plain vectors, which serves both; None leaves the choice to
                choose_kind. Other files hold their kind.

        Raises:
            ValueError: the file holds another metric, or an index that `build` does not make.
        """
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path} has FAISS metric {index.metric_type}; expected inner product")
        removed = None
        if isinstance(index, faiss.IndexIDMap):
            removed = np.flatnonzero(faiss.vector_to_array(index.id_map) < 0).astype(np.int32) + 1
            inner = faiss.downcast_index(index.index)
            inner.this.acquire()  # from here on Python frees it, not the map around it
            index.own_fields = False
            index = inner
        found = _kind_of(index)
        if found is None:
            raise ValueError(
                f"{path} holds a FAISS {type(index).__name__}; expected what ItemIndex.save writes"
            )
        if found == "flat":
            found = kind or choose_kind(index.ntotal, k=1, recall_target=1, gpu=faiss.get_num_gpus() > 0)
        if kind not in (None, found):
            raise ValueError(f"{path} holds an index of kind {found}; expected {kind}")
        return cls(index, found, num_threads, removed)

    def save(self, path: str | Path) -> None:
        """Write the index, and which items are removed, to one file that FAISS alone can open too."""
        index = self._index
        if len(self.removed):
            ids = np.arange(self.num_items)
            ids[self.removed - 1] = -1
            index = faiss.IndexIDMap(faiss.IndexFlatIP(self.dim))  # takes an empty index only
            index.index, index.ntotal, index.own_fields = self._index, self.num_items, False
            faiss.copy_array_to_vector(ids, index.id_map)
        faiss.write_index(index, str(path))

    @property
    def kind(self) -> Kind:
        """The kind of index in use."""
        return self._kind

    @property
    def setting(self) -> str:
        """What the kind was tuned to, in words; empty for exact and flat."""
        if self._base is None:
            return ""
        width = {"ivf": "nprobe {0.nprobe} of {0.nlist}, ", "hnsw": "efSearch {0.hnsw.efSearch}, "}
        return width.get(self._kind, "").format(self._base) + f"depth {self._index.k_factor:.1f}"

    @property
    def num_items(self) -> int:
        """I, the number of items, removed ones included; their rows are 1..I."""
        return int(self._flat.ntotal)

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        return int(self._flat.d)

    @property
    def num_threads(self) -> int:
        """Threads of one search."""
        return self._num_threads

    @property
    def removed(self) -> NDArray[np.int32]:
        """The rows of the removed items, ascending."""
        return np.flatnonzero(~self._live).astype(np.int32)

    def remove(self, rows: ArrayLike) -> None:
        """Take items out for good: no search that begins after this finds them. Other items keep their rows.

        Nothing is rebuilt and no memory is freed. `save` writes what is removed along.

        Args:
            rows: [N] whole numbers in 1..I; a row that is removed already stays so.

        Raises:
            ValueError: on another shape or type, or a row out of range.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise ValueError(f"rows is {rows.dtype} {rows.shape}; expected whole numbers [N]")
        if rows.size and not (rows.min() >= 1 and rows.max() <= self.num_items):
            wrong = rows[(rows < 1) | (rows > self.num_items)][0]
            raise ValueError(f"rows holds {wrong}; expected 1 to {self.num_items}")
        with self._remove_lock:
            live = self._live.copy()
            live[rows.astype(np.int64)] = False
            self._has_removed = self._has_removed or bool(rows.size)
            self._live = live

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the k best items of each query: rows [B, k'] int32 in 1..I, and scores [B, k'] float32.

        k' = min(k, number of allowed items that are not removed), whatever the kind: a short answer is short,
        never padded. Best first, equal scores by lower row; where the cut at k falls among equal scores,
        exact takes the lower rows, and for the other kinds FAISS decides. An approximate kind searches all
        where few items are allowed, where k is a large share of them, and where it comes back short.

        Args:
            queries: [B, D] float32.
            k: at least 1.
            allowed: [I+1] bool, the items that may come back (entry 0 is ignored); None allows all.

        Raises:
            ValueError: on a wrong shape or k, on NaN or infinity, and where an inner product overflows.
        """
        return self._search(queries, k, allowed, is_rough=False)

    def rough_search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return what `search` does, for who scores the items again: exact does not, see ExactSearch.

        So exact finds .995 of the best k, and its scores are good to a hundredth of their range. The other
        kinds answer as in `search`.
        """
        return self._search(queries, k, allowed, is_rough=True)

    def _search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None, *, is_rough: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        queries = self._check_queries(queries)
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        may_come, num_allowed = self._may_come(allowed)
        k = min(k, num_allowed)
        if k == 0 or not len(queries):
            return np.zeros((len(queries), k), np.int32), np.zeros((len(queries), k), np.float32)
        is_sorted = self._kind == "flat" and self._gpu is None and k * SHARE_SORTED >= num_allowed
        if num_allowed * FEW_ALLOWED < self.num_items or is_sorted:
            live = np.arange(self.num_items) if may_come is None else np.flatnonzero(may_come)
            ids, scores = self._score_all(queries, live, k)
        elif self._exact is not None:
            find = self._exact.rough_search if is_rough else self._exact.search
            ids, scores = find(queries, k, may_come)
        elif (
            self._base is None
            or num_allowed <= FEW_ITEMS
            or k * self._index.k_factor * SHARE_SEARCHED > num_allowed
        ):
            ids, scores = self._search_flat(queries, k, may_come)
        else:
            ids, scores = self._search_base(queries, k, may_come, num_allowed / self.num_items)
        return (ids + 1).astype(np.int32), scores

    def scores(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the inner product with every stored vector: [B, I+1] float32; column 0 and removed: -inf.

        Nothing is skipped or estimated, whatever the kind of index: this is what evaluation ranks by.
        It is a BLAS product, so its threads are those of BLAS (OPENBLAS_NUM_THREADS), not num_threads.
        """
        queries = self._check_queries(queries)
        scores = np.empty((len(queries), self.num_items + 1), np.float32)
        for start in range(0, self.num_items, SCORES_BLOCK):
            vectors = self._vectors.block(start, min(start + SCORES_BLOCK, self.num_items))
            scores[:, start + 1 : start + 1 + len(vectors)] = queries @ vectors.T
        scores[:, 0] = -np.inf
        scores[:, self.removed] = -np.inf
        return scores

    def recall(self, queries: NDArray[np.float32], k: int) -> float:
        """Return the share of the k best items of the queries that `search` finds: 0 to 1.

        What is found counts where its score reaches the true k-th best, so that ties harm nobody.
        """
        queries = self._check_queries(queries)
        may_come, num_allowed = self._may_come(None)
        k = min(k, num_allowed)
        if k == 0 or not len(queries):
            return 1.0
        return _recall(self.search(queries, k)[1], self._search_flat(queries, k, may_come)[1])

    def tune(
        self, queries: NDArray[np.float32], *, k: int, recall_target: float, width: int | None = None
    ) -> float:
        """Set ivf, hnsw and sq8 to the least work that finds recall_target of the best k, as `build` does.

        Not while others search. Where the target cannot be reached, that is logged as a warning.

        Args:
            queries: [Q, D] float32, examples of what will be asked, at least one.
            k: at least 1.
            recall_target: up to 1.
            width: nprobe of ivf or efSearch of hnsw; None chooses it.

        Returns:
            The recall on those examples that nothing was chosen on, unless there is but one example.
        """
        queries = self._check_queries(queries)
        if self._base is None:
            return 1.0
        if not len(queries):
            raise ValueError("queries is empty; expected at least one to tune on")
        k = min(k, max(1, self.num_items // (SHARE_SEARCHED + 1)))  # beyond that all are searched
        chosen = np.random.default_rng(0).permutation(len(queries))[: 2 * TUNING_QUERIES]
        tuning, held_out = (
            (queries[part], self._search_flat(queries[part], k, None)[1])
            for part in (chosen[::2], chosen[1::2] if len(chosen) > 1 else chosen)
        )

        def reached(examples: tuple[NDArray[np.float32], NDArray[np.float32]]) -> float:
            asked, expected = examples
            return _recall(self._search_base(asked, k, None, 1.0)[1], expected)

        # A quarter of what may be missed is kept back for queries that are not among these. First the depth:
        # with everything looked at, what is missing is the fault of the codes; half may be. Then the width.
        aim = recall_target + (1 - recall_target) / 4
        widths = [width] if width else self._widths(k)
        self._set_width(widths[-1])
        for depth in DEPTHS:
            if depth > DEPTHS[0] and k * depth * SHARE_SEARCHED > self.num_items:
                break  # a search would look at all items
            self._index.k_factor = depth
            if reached(tuning) >= (1 + aim) / 2:
                break
        low, high = 0, len(widths) - 1
        while low < high:
            middle = (low + high) // 2
            self._set_width(widths[middle])
            low, high = (low, middle) if reached(tuning) >= aim else (middle + 1, high)
        self._set_width(widths[low])
        while (recall := reached(held_out)) < recall_target and low + 1 < len(widths):
            low += 1
            self._set_width(widths[low])
        if recall < recall_target:
            message = "%s finds %.4f of the best %d, less than the %.4f asked for"
            logger.warning(message, self._kind, recall, k, recall_target)
        return recall

    def _may_come(self, allowed: NDArray[np.bool_] | None) -> tuple[NDArray[np.bool_] | None, int]:
        """Return which ids may come back, [I] bool or None for all, and how many."""
        live = self._live
        if allowed is not None:
            if allowed.shape != live.shape or allowed.dtype != np.bool_:
                raise ValueError(f"allowed is {allowed.dtype} {allowed.shape}; expected bool {live.shape}")
            live = live & allowed if self._has_removed else allowed
        may_come = live[1:]
        num_allowed = int(np.count_nonzero(may_come))
        return (None if num_allowed == self.num_items else may_come), num_allowed

    def _score_all(
        self, queries: NDArray[np.float32], ids: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best k of the given ids (at least k of them), each scored."""
        with np.errstate(over="ignore", invalid="ignore"):
            found = [best(ids, _finite(self._vectors.products(ids, query)), k) for query in queries]
        return np.stack([part[0] for part in found]), np.stack([part[1] for part in found])

    def _search_flat(
        self, queries: NDArray[np.float32], k: int, may_come: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best k of all that may come, by FAISS over float32."""
        if self._gpu is not None and may_come is None and k <= GPU_LARGEST_K:
            with self._gpu_lock:
                scores, ids = self._gpu.search(queries, k)
        else:
            params = None
            if may_come is not None:
                params = faiss.SearchParameters(sel=_selector(may_come))
            with _faiss_threads(min(self._num_threads, len(queries))):
                scores, ids = self._flat.search(queries, k, params=params)
        if (ids < 0).any():  # FAISS drops what does not compare above its lowest float
            raise ValueError("an inner product is too large for float32; expected smaller query values")
        if (scores[:, 1:] == scores[:, :-1]).any():  # FAISS leaves equal scores in no promised order
            by_score = np.lexsort((ids, -scores), axis=1)
            scores, ids = np.take_along_axis(scores, by_score, 1), np.take_along_axis(ids, by_score, 1)
        return ids, scores

    def _search_base(
        self, queries: NDArray[np.float32], k: int, may_come: NDArray[np.bool_] | None, share: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best k of what the codes find; `share` of the items may come."""
        depth = math.ceil(k * self._index.k_factor) + MORE_CANDIDATES
        # The items that may come are as hard to find as among all: look at 1 / share as many.
        if self._kind == "ivf":
            probes = min(self._base.nlist, math.ceil(self._base.nprobe / share))
            params = faiss.SearchParametersIVF(nprobe=probes)
        elif self._kind == "hnsw":
            ef = min(self.num_items, math.ceil(max(self._base.hnsw.efSearch, depth) / share))
            params = faiss.SearchParametersHNSW(efSearch=ef)
        else:
            params = faiss.SearchParameters()
        if may_come is not None:
            selector = _selector(may_come)  # `params` does not hold on to it
            params.sel = selector
        with _faiss_threads(min(self._num_threads, len(queries))):
            _, found = self._base.search(queries, depth, params=params)
        ids, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        for number, query in enumerate(queries):
            near = found[number][found[number] >= 0]
            if len(near) < k:
                ids[number : number + 1], scores[number : number + 1] = self._search_flat(
                    query[np.newaxis], k, may_come
                )
            else:
                ids[number : number + 1], scores[number : number + 1] = self._score_all(
                    query[np.newaxis], near, k
                )
        return ids, scores

    def _widths(self, k: int) -> list[int]:
        """Return the settings to choose from, ascending: probes of ivf, efSearch of hnsw."""
        if self._kind == "ivf":
            return sorted({math.ceil(self._base.nlist * step / 64) for step in range(1, 65)})
        if self._kind == "hnsw":
            return [min(self.num_items, k * 2**step) for step in range(6)]
        return [0]

    def _set_width(self, width: int) -> None:
        if self._kind == "ivf":
            self._base.nprobe = width
        elif self._kind == "hnsw":
            self._base.hnsw.efSearch = width

    def _check_queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries has shape {queries.shape}; expected [B, {self.dim}]")
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            raise ValueError("queries holds NaN or infinity; expected finite numbers")
        return queries


def choose_kind(num_items: int, k: int, recall_target: float, *, gpu: bool = False) -> Kind:
    """Return the kind that finds `recall_target` of the best k fastest, of those that build in a minute.

    Milliseconds for one query on one thread, D = 64, target 0.99, vectors of benchmarks/index_frontier.py:

        items        k        flat   exact   ivf
        10,000       1,000     0.3     0.3   0.3
        100,000      1,000     1.1     0.7   0.9
        100,000      10,000    4.6     2.1   2.4
        1,000,000    1,000     9.6     4.4   2.0
        1,000,000    10,000     13     6.6   5.5

    So a small catalog needs no index, and below 200,000 items nothing is missed to save a millisecond. On two
    threads exact is further ahead of flat. Where a large share of all items is asked for, clusters save
    nothing. hnsw is slow to build and sq8 slow to search: neither is chosen.
    """
    if gpu and k <= GPU_LARGEST_K:
        return "flat"
    if num_items < 50_000:
        return "flat"
    if recall_target == 1 or num_items < 200_000 or k * 20 > num_items:
        return "exact"
    return "ivf"


def _build_flat(items: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return index


def _build_ivf(items: NDArray[np.float32], options: IndexOptions) -> Any:
    num_items, dim = items.shape
    num_lists = min(options.num_lists or min(1024, round(num_items**0.5)), num_items)
    rng = np.random.default_rng(0)
    means = faiss.Kmeans(dim, num_lists, niter=10, seed=1, min_points_per_centroid=1)
    means.train(items[rng.permutation(num_items)[: max(64 * num_lists, TRAINING_ITEMS)]])
    by_distance, by_product = faiss.IndexFlatL2(dim), faiss.IndexFlatIP(dim)
    for quantizer in (by_distance, by_product):
        quantizer.add(means.centroids)
    # One code of 4 bits a number: the scan keeps its table in registers.
    index = faiss.IndexIVFPQFastScan(by_distance, dim, num_lists, dim, 4, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = True
    index.pq.cp.min_points_per_centroid = 1
    index.pq.cp.niter = 10
    # What is found is long, and errors grow with length: the codes are fitted to vectors drawn by length^4.
    # On the benchmark's vectors that finds 0.994 of the best with 1.3 k candidates, a plain draw 0.971.
    with np.errstate(over="ignore"):
        weights = np.vecdot(items, items).astype(np.float64) ** 2
    drawable = weights.any() and np.isfinite(weights.sum())
    drawn = rng.choice(num_items, TRAINING_ITEMS, p=weights / weights.sum() if drawable else None)
    index.train(items[drawn])
    index.add(items)
    # Items go into the list with the nearest mean, and a search looks into lists by inner product with it.
    # FAISS's own way, by inner product both times, gathers the items around the longest means.
    index.quantizer = by_product
    by_product.this.disown()
    index.own_fields = True
    return index


def _build_hnsw(items: NDArray[np.float32], options: IndexOptions) -> Any:
    quantizer = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexHNSWSQ(items.shape[1], quantizer, options.num_links, faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    index.add(items)
    return index


def _build_sq8(items: NDArray[np.float32], options: IndexOptions) -> Any:
    quantizer = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexScalarQuantizer(items.shape[1], quantizer, faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    index.add(items)
    return index


def _kind_of(index: Any) -> Kind | None:
    if _is_flat(index):
        return "flat"
    if not isinstance(index, faiss.IndexRefineFlat):
        return None
    kinds: dict[Any, Kind] = {
        faiss.IndexIVFPQFastScan: "ivf",
        faiss.IndexHNSWSQ: "hnsw",
        faiss.IndexScalarQuantizer: "sq8",
    }
    return kinds.get(type(faiss.downcast_index(index.base_index)))


def _is_flat(index: Any) -> bool:
    return isinstance(index, faiss.IndexFlat)


def _on_gpu(flat: Any) -> Any:
    """Return a copy of the index on the first GPU; None where FAISS has no GPU."""
    if faiss.get_num_gpus() == 0 or flat.ntotal == 0:
        return None
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat)


def _selector(may_come: NDArray[np.bool_]) -> Any:
    """Return an allow-mask in FAISS's form: one bit an item is the fastest to make and to ask."""
    return faiss.IDSelectorBitmap(np.packbits(may_come, bitorder="little"))


def _recall(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the share of the scores found, [B, k], that reach the last one expected, [B, k]."""
    slack = 1e-5 * np.abs(expected).max(axis=1)  # FAISS sums in another order
    return float((found >= (expected[:, -1] - slack)[:, np.newaxis]).mean())


def _finite(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(scores).all():
        raise ValueError("an inner product is too large for float32; expected smaller query values")
    return scores


@contextmanager
def _faiss_threads(num_threads: int) -> Iterator[None]:
    """Let the calling thread's FAISS calls run on so many threads; the setting is each thread's own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
