"""The ways to find candidates, and how their findings become one list.

A source is one small class with a name and `find`; the pipeline asks several and merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.item_index import ItemIndex


@dataclass(frozen=True)
class Candidates:
    """What one source found, best first: two arrays of one length."""

    rows: NDArray[np.int32]  # [N] item rows, 1..I
    scores: NDArray[np.float32]  # [N] the source's own scale: comparable within a source only
    source: str


class Merged(NamedTuple):
    """Candidates of several sources, each item once."""

    rows: NDArray[np.int32]  # [M] item rows, 1..I
    scores: NDArray[np.float32]  # [M] on the scale of the source that gave the item
    source_of: NDArray[np.int16]  # [M] which of the sources gave the item: its place in the arguments


class CandidateSource(Protocol):
    """One way to find candidates."""

    @property
    def name(self) -> str:
        """What logs, metrics and responses call this source."""

    def find(
        self, query: NDArray[np.float32] | None, allowed: NDArray[np.bool_] | None, limit: int
    ) -> Candidates:
        """Return up to `limit` candidates, best first, none twice.

        Args:
            query: [D] float32 query vector; None for a visitor of whom nothing is known.
            allowed: [I+1] bool, the items that may come back; None allows all.
            limit: at least 1.
        """


class EmbeddingSource:
    """Items whose vectors have the largest inner product with the query; nothing without a query."""

    name = "embedding"

    def __init__(self, index: ItemIndex) -> None:
        self._index = index

    def find(
        self, query: NDArray[np.float32] | None, allowed: NDArray[np.bool_] | None, limit: int
    ) -> Candidates:
        """See CandidateSource.find; scores are inner products."""
        if query is None:
            return Candidates(np.zeros(0, np.int32), np.zeros(0, np.float32), self.name)
        rows, scores = self._index.search(query[np.newaxis], limit, allowed)
        return Candidates(rows[0], scores[0], self.name)


class PopularSource:
    """The items with the most training events first, equal counts by lower row; the query plays no part."""

    name = "popular"

    def __init__(self, popularity: NDArray[np.int64]) -> None:
        """Take the number of training events of each item: [I+1] int64, entry 0 is ignored."""
        self._popularity = popularity.astype(np.float32)
        self._order = _rows_by_descending(popularity)

    def find(
        self, query: NDArray[np.float32] | None, allowed: NDArray[np.bool_] | None, limit: int
    ) -> Candidates:
        """See CandidateSource.find; scores are event counts."""
        rows = _first_allowed(self._order, allowed, limit)
        return Candidates(rows, self._popularity[rows], self.name)


class FreshSource:
    """The newest items first, equal times by lower row; items of unknown age are never fresh."""

    name = "fresh"

    def __init__(self, available_from: NDArray[np.int64]) -> None:
        """Take when each item went on sale: [I+1] int64 on the data set's clock, 0 = unknown."""
        self._available_from = available_from.astype(np.float32)
        order = _rows_by_descending(available_from)
        self._order = order[available_from[order] > 0]

    def find(
        self, query: NDArray[np.float32] | None, allowed: NDArray[np.bool_] | None, limit: int
    ) -> Candidates:
        """See CandidateSource.find; scores are times as float32: exact to 2 minutes for unix milliseconds."""
        rows = _first_allowed(self._order, allowed, limit)
        return Candidates(rows, self._available_from[rows], self.name)


def merge(parts: Sequence[Candidates], limit: int) -> Merged:
    """Return the first `limit` items, part after part; of an item found twice the first counts."""
    if not parts:
        return Merged(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int16))
    rows = np.concatenate([part.rows for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    source_of = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part.rows) for part in parts])
    return _each_item_once(rows, scores, source_of, limit)


def interleave(a: Candidates, b: Candidates, limit: int) -> Merged:
    """Return the first `limit` items of a and b in turns, a first; of an item found twice the first counts.

    The second is skipped and uses up its turn. Where one list runs out the other goes on.
    """
    turn = np.concatenate([np.arange(len(a.rows)), np.arange(len(b.rows))])
    order = np.argsort(turn, kind="stable")  # stable: a's turn comes before b's
    rows = np.concatenate([a.rows, b.rows])[order]
    scores = np.concatenate([a.scores, b.scores])[order]
    source_of = (order >= len(a.rows)).astype(np.int16)
    return _each_item_once(rows, scores, source_of, limit)


def _each_item_once(
    rows: NDArray[np.int32], scores: NDArray[np.float32], source_of: NDArray[np.int16], limit: int
) -> Merged:
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    first = np.sort(np.unique(rows, return_index=True)[1])[:limit]
    return Merged(rows[first], scores[first], source_of[first])


def _rows_by_descending(values: NDArray[np.int64]) -> NDArray[np.int32]:
    return (np.argsort(-values[1:], kind="stable") + 1).astype(np.int32)


def _first_allowed(
    order: NDArray[np.int32], allowed: NDArray[np.bool_] | None, limit: int
) -> NDArray[np.int32]:
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    return order[:limit] if allowed is None else order[allowed[order]][:limit]
