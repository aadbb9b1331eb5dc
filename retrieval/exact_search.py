"""The k largest inner products, exactly, at the price of an 8-bit scan.

1. onnxruntime multiplies the query with an 8-bit copy of all vectors (`MatMulNBits`, the kernel that large
   language models run on). One pass over I*D bytes, a quarter of float32.
2. The rounding error of each product has an upper bound. What cannot be among the best k, even with its whole
   error in its favour, is left out. A sample of the products tells where to cut, so that nothing is sorted.
3. The rest, about 1.5 k items for a k of 10,000 in a million, gets its float32 product.

So the answer is that of a full float32 search: the 8 bits decide what is looked at, never what comes back.

The bound. With x = x' + r and q = q' + s, where x' and q' are what 8 bits can hold, q.x - q'.x' = q.r + s.x',
which Cauchy and Schwarz keep below (|q| c + |s|) |x'| for c = max |r| / |x'| over all vectors. Call that
w |x'|. The scan is given q'/w as its query, so that its products are in units of w, and these plus and minus
|x'| are upper and lower bounds.

Shape legend: B queries, D dimension, I items, N rows of a part of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

ROWS_AT_ONCE = 16_384  # vectors that are copied at a time: 4 MiB at D = 64
SAMPLE = 4_096  # products that are looked at to guess where to cut, or, where these are fewer,
SAMPLED_BEST = 32  # so many that this many of the best k are among them
QUERIES_AT_ONCE = 8  # products held at a time: 32 MB for a million items
LONGEST = 1e30  # of a vector that the scan takes: its bounds must stay within float32
SHORTEST = 1e-35  # shorter vectors count as this long, so that no ratio is taken of nothing


class StoredVectors:
    """Float32 vectors, one after the other in memory that someone else owns and that need not be aligned.

    In a mapped file they start at any byte. NumPy copies such an array whole before it takes rows of it; an
    array of opaque records it takes as it is.
    """

    def __init__(self, data: NDArray[np.uint8], dim: int) -> None:
        """Take I*D*4 bytes."""
        self._records = data.view(np.dtype((np.void, 4 * dim)))
        self.dim = dim

    def __len__(self) -> int:
        """I."""
        return len(self._records)

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return a copy of some vectors: [stop-start, D]."""
        return self._records[start:stop].copy().view(np.float32).reshape(-1, self.dim)

    def products(self, rows: NDArray[np.int64], query: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the inner products of some vectors with a query: [N] float32.

        Row by row, without BLAS: a product does not depend on what else is asked for, and no thread starts.
        """
        products = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = self._records.take(rows[start : start + ROWS_AT_ONCE]).view(np.float32)
            np.vecdot(part.reshape(-1, self.dim), query, out=products[start : start + ROWS_AT_ONCE])
        return products


class ExactSearch:
    """Finds the items with the largest inner products; several threads may search at once.

    Holds a byte a number and 20 bytes an item in this process's own memory: 85 MB for a million items of 64
    numbers.
    """

    def __init__(self, vectors: StoredVectors, num_threads: int = 1) -> None:
        """Make the 8-bit copy: most of a second for a million vectors of 64 numbers.

        Args:
            vectors: at least one vector, all finite.
            num_threads: of one scan. They belong to this object, whatever BLAS and OpenMP are set to.

        Raises:
            ValueError: a vector is longer than 1e30.
            RuntimeError: onnxruntime's 8-bit product is wrong on this processor.
        """
        self._vectors = vectors
        self._block = 64 if vectors.dim > 32 else 32 if vectors.dim > 16 else 16
        self._blocks = -(-vectors.dim // self._block)
        num_items, padded = len(vectors), self._blocks * self._block
        codes = np.empty((num_items, self._blocks, self._block), np.uint8)
        scales = np.empty((num_items, self._blocks), np.float32)
        self._lengths = np.empty(num_items, np.float32)
        self._error = 0.0  # c of the module's docstring
        for start in range(0, num_items, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, num_items)
            x = np.zeros((stop - start, padded), np.float32)
            x[:, : vectors.dim] = vectors.block(start, stop)
            if float(np.abs(x).max()) * padded**0.5 > LONGEST:
                raise ValueError(
                    f"a vector is longer than {LONGEST:g}; expected shorter ones, or kind='flat'"
                )
            whole, scale = _to_8_bits(x.reshape(stop - start, self._blocks, self._block))
            codes[start:stop], scales[start:stop] = whole + 128, scale
            held = (whole * scale[..., np.newaxis]).reshape(stop - start, padded)
            # In float64, which the squares of no float32 overflow or vanish in.
            length = np.maximum(np.linalg.norm(held.astype(np.float64), axis=1), SHORTEST)
            error = np.linalg.norm((x - held).astype(np.float64), axis=1)
            self._lengths[start:stop] = length
            self._error = max(self._error, float((error / length).max()))
        self._mean_length = float(self._lengths.mean())
        self._longest = float(self._lengths.max())
        self._scan = _open_scan(codes, scales, num_threads)
        self._check(codes, scales)

    def search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the k best of each query: numbers [B, k] int64 from 0, and scores [B, k] float32.

        Best first, equal scores by lower number, also where the cut falls among equals.

        Args:
            queries: [B, D] float32, finite.
            k: 1 to the number of allowed items.
            allowed: [I] bool; None allows all.

        Raises:
            ValueError: an inner product could be too large for float32.
        """
        rows, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            for number, rough in enumerate(self._rough_products(part)[0], start):
                near = self._candidates(rough + self._lengths, k, allowed)
                products = self._vectors.products(near, queries[number])
                rows[number], scores[number] = best(near, products, k)
        return rows, scores

    def rough_search(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return what `search` does, but of the best by the 8-bit products, with these as scores.

        A product is wrong by a few thousandths of the two lengths' product, so that what is missed lies at
        the cut. For who scores the items again: of 10,000 among 100,000 in half the time.
        """
        rows, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            for number, (rough, unit) in enumerate(zip(*self._rough_products(part), strict=True), start):
                near, _ = self._first(rough, k, allowed, 0.0)
                rows[number], scores[number] = best(near, rough[near] * unit, k)
        return rows, scores

    def _rough_products(
        self, queries: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the 8-bit products, [B, I], each row in a unit of its own, and these units, [B].

        In this unit a product is wrong by at most the vector's length in 8 bits.
        """
        lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
        if lengths.max() * self._longest * 1.1 > np.finfo(np.float32).max:
            raise ValueError("an inner product is too large for float32; expected smaller query values")
        padded = np.zeros((len(queries), self._blocks * self._block))
        # Queries of length 1: only the order counts here, and no square of a tiny number vanishes.
        padded[:, : queries.shape[1]] = (
            queries / np.maximum(lengths, np.finfo(np.float64).tiny)[:, np.newaxis]
        )
        whole, scale = _to_8_bits(padded.reshape(len(queries), self._blocks, self._block))
        held = (whole * scale[..., np.newaxis]).reshape(padded.shape)
        # A hundredth more, and D roundings of float32, for the arithmetic of the scan and of the products.
        w = 1.01 * (self._error + np.linalg.norm(padded - held, axis=1)) + padded.shape[1] * 2e-7
        return self._run((held / w[:, np.newaxis]).astype(np.float32)), (w * lengths).astype(np.float32)

    def _candidates(
        self, upper: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """Return the items that may be among the best k: [N], ascending."""
        first, cut = self._first(upper, k, allowed, 2 * self._mean_length)
        bounds = upper[first]
        lower = bounds - 2 * self._lengths[first]
        floor = np.partition(lower, len(lower) - k)[len(lower) - k]  # k items have at least this score
        if floor >= cut:
            return np.asarray(first[bounds >= floor])
        near = upper >= floor
        return np.flatnonzero(near if allowed is None else near & allowed)

    def _first(
        self, values: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None, margin: float
    ) -> tuple[NDArray[np.int64], np.float32]:
        """Return the items of at least some value, [N], ascending, and that value; N is at least k.

        A sample tells where to cut: N is a little more than k, and what lies `margin` below.
        """
        step = max(1, len(values) // SAMPLE, k // SAMPLED_BEST)
        sample = values[::step] if allowed is None else values[::step][allowed[::step]]
        share = k / step  # of the best k that the sample holds, with three standard deviations of luck
        place = int(share + 3 * share**0.5) + 2
        while True:
            cut = np.float32(-np.inf)
            if place < len(sample):
                at = len(sample) - place
                cut = np.partition(sample, at)[at] - np.float32(margin)
            near = values >= cut
            first = np.flatnonzero(near if allowed is None else near & allowed)
            if len(first) >= k:
                return first, cut
            place *= 2

    def _run(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        products: NDArray[np.float32] = self._scan.run(None, {"queries": queries})[0]
        return products

    def _check(self, codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> None:
        """Compare the scan with NumPy on large sums: kernels without 32-bit sums saturate."""
        whole = codes[:1024].astype(np.float32) - 128
        query = np.where(whole[0] < 0, -1, 1).astype(np.float32)
        expected = np.einsum("nbd,bd,nb->n", whole, query, scales[:1024])
        found = self._run(query.reshape(1, -1))[0, :1024]
        if (np.abs(found - expected) > 1e-4 * query.size**0.5 * self._lengths[:1024]).any():
            raise RuntimeError(
                "onnxruntime's 8-bit matrix product is wrong on this processor; use kind='flat'"
            )


def best(
    rows: NDArray[np.int64], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the k largest scores and their rows, best first, equal scores by lower row: [k] and [k].

    Sorts one whole number an item, made of the score and the row: many times faster than a sort of places.

    Args:
        rows: [N] int64, 0 to 2^32 - 1.
        scores: [N] float32, no NaN.
        k: at most N.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 turns -0 into 0, which is its equal
    sign = np.uint32(1 << 31)
    ascending = np.where(bits & sign, ~bits, bits | sign)  # whole numbers in the order of the floats
    keys = ((~ascending).astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)
    if k < len(keys):
        keys.partition(k - 1)
        keys = keys[:k]
    keys.sort()
    ascending = ~(keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ascending & sign, ascending ^ sign, ~ascending)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), bits.view(np.float32)


def _to_8_bits(x: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return whole numbers -127..127 and their scales: [N, blocks, block] and [N, blocks] float32."""
    scale = (np.abs(x).max(axis=2) / 127).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return np.rint(x / scale[..., np.newaxis]).astype(np.float32), scale


def _open_scan(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], num_threads: int
) -> onnxruntime.InferenceSession:
    """Return the product `queries [B, blocks*block] @ codes.T * scales`: [B, I] float32.

    The arrays are handed over beside the graph. In it they would be copied four times, in calls that keep the
    interpreter's lock for a quarter of a second with a million items, and be kept beside what is packed.
    """
    from onnx import TensorProto, helper

    num_items, blocks, block = codes.shape
    arrays: dict[str, NDArray[Any]] = {"codes": codes, "scales": scales.reshape(-1)}
    node = helper.make_node(
        "MatMulNBits",
        ["queries", "codes", "scales"],
        ["products"],
        domain="com.microsoft",
        K=blocks * block,
        N=num_items,
        bits=8,
        block_size=block,
        accuracy_level=4,  # multiply whole numbers; without it the codes are turned back into float32
    )
    tables = []
    for name, array in arrays.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        table = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        table.external_data.add(key="location", value=name)  # there is no such file
        tables.append(table)
    graph = helper.make_graph(
        [node],
        "scan",
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["B", blocks * block])],
        [helper.make_tensor_value_info("products", TensorProto.FLOAT, ["B", num_items])],
        tables,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
