"""Sparse matrices as three NumPy arrays: what serving needs of them, without SciPy.

Shape legend: R rows, C columns, N stored entries, H chosen rows, D dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Entries for each column from which on a table of all columns is faster than sorting: measured on 12 thousand
# and 1 million columns.
DENSE_SHARE = 1 / 16


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix [R, C], row after row (CSR)."""

    offsets: NDArray[np.int64]  # [R+1]: the entries of row r stand at offsets[r] to offsets[r + 1]
    columns: NDArray[np.int32]  # [N] 0..C-1
    values: NDArray[np.float32]  # [N]
    num_columns: int  # C

    @classmethod
    def from_entries(
        cls, rows: NDArray[np.integer], columns: NDArray[np.integer], values: NDArray[np.floating],
        num_rows: int, num_columns: int,
    ) -> SparseRows:  # fmt: skip
        """Return the matrix with these entries: three arrays [N], in any order; none twice."""
        order = np.lexsort((columns, rows))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]).astype(np.int64)
        return cls(offsets, columns[order].astype(np.int32), values[order].astype(np.float32), num_columns)

    @classmethod
    def from_rows(
        cls, rows: list[tuple[NDArray[np.int32], NDArray[np.float32]]], num_columns: int
    ) -> SparseRows:
        """Return the matrix whose rows have these columns and values."""
        columns = np.concatenate([np.zeros(0, np.int32), *(row[0] for row in rows)])
        values = np.concatenate([np.zeros(0, np.float32), *(row[1] for row in rows)])
        offsets = np.cumsum([0, *(len(row[0]) for row in rows)])
        return cls(offsets.astype(np.int64), columns, values, num_columns)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def check(self) -> None:
        """Raise ValueError where the arrays are no such matrix: what has been read from a file is asked."""
        num_entries = len(self.columns)
        if len(self.values) != num_entries:
            raise ValueError(f"{len(self.values)} values for {num_entries} columns")
        if self.offsets[0] != 0 or self.offsets[-1] != num_entries or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets do not rise from 0 to {num_entries}, the number of entries")
        if num_entries and not 0 <= self.columns.min() <= self.columns.max() < self.num_columns:
            raise ValueError(
                f"columns run from {self.columns.min()} to {self.columns.max()}; "
                f"expected 0 to {self.num_columns - 1}"
            )

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the columns and the values of one row."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        return self.columns[part], self.values[part]

    def weighted_sum(
        self, rows: NDArray[np.integer], weights: NDArray[np.floating]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return sum_h weights[h] * row rows[h], as (columns, values): ascending columns, zeros left out.

        Args:
            rows: [H] row numbers; one may stand there several times.
            weights: [H].
        """
        begins = self.offsets[rows]
        lengths = self.offsets[rows + 1] - begins
        place = _ranges(begins, lengths)
        columns = self.columns[place]
        values = self.values[place] * np.repeat(weights, lengths)
        if len(columns) > DENSE_SHARE * self.num_columns:
            sums = np.bincount(columns, values, minlength=self.num_columns)
            touched = np.flatnonzero(sums)
            return touched.astype(np.int32), sums[touched].astype(np.float32)
        if not len(columns):  # reduceat takes no empty array
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        order = np.argsort(columns)
        sorted_columns = columns[order]
        firsts = np.flatnonzero(np.diff(sorted_columns, prepend=-1))
        found = np.add.reduceat(values[order], firsts, dtype=np.float64)
        kept = found != 0
        return sorted_columns[firsts][kept], found[kept].astype(np.float32)

    def product(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the matrix product with vectors [C, D]: [R, D] float32."""
        result = np.zeros((len(self), vectors.shape[1]), np.float32)
        for row in np.flatnonzero(np.diff(self.offsets)).tolist():
            columns, values = self.row(row)
            result[row] = values @ vectors[columns]
        return result

    def transposed(self) -> SparseRows:
        """Return the matrix [C, R]."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return self.from_entries(self.columns, rows, self.values, self.num_columns, len(self))


def strongest(
    columns: NDArray[np.int32], values: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the k largest values with their columns, largest first; equal values by lower column.

    Args:
        columns: [N], ascending.
        values: [N].
        k: at least 1.
    """
    if len(values) > k:
        bar = np.partition(values, len(values) - k)[len(values) - k]
        kept = np.flatnonzero(values >= bar)
        columns, values = columns[kept], values[kept]
    order = np.argsort(-values, kind="stable")[:k]
    return columns[order], values[order]


def _ranges(begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return begins[0] .. begins[0] + lengths[0] - 1, then those of begins[1], and so on."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
