"""The ways to find candidates, and how their findings become one list.

A source is one small class with a name and `find`; the pipeline asks several, until one has given as many
items as are wanted in all, and then the others for their shares, and merges by quota. A new source is a class
like these and a line in engine/sources.py.

Shape legend: I items, H events of a history, N items of a list, D and S dimensions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.fold_in import distinct_items, fold_in
from retrieval.item_index import ItemIndex
from retrieval.sparse import SparseRows, strongest


@dataclass(frozen=True)
class Query:
    """What the sources may know of a visitor and of the moment."""

    items: NDArray[np.int32]  # [H] items of the history that the visitor wanted, oldest first
    weights: NDArray[np.float32]  # [H] how much each event counts (retrieval.fold_in.event_weights)
    state: Callable[[], NDArray[np.float32]]  # -> [S], what the ranker makes of the whole history
    now: int  # the data set's clock
    # -> [N] items that may come next, ascending, and how likely each is [N] (see retrieval.transitions)
    next_items: Callable[[], tuple[NDArray[np.int32], NDArray[np.float32]]]
    transition_weight: float = 0.0  # how much that counts in the ranker's scores


@dataclass(frozen=True)
class Candidates:
    """What one source found, best first: two arrays of one length."""

    rows: NDArray[np.int32]  # [N] item rows, 1..I
    scores: NDArray[np.float32]  # [N] the source's own scale: comparable within a source only
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def none(cls, source: str) -> Candidates:
        """Return the findings of a source that found nothing."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.float32), source)


class Merged(NamedTuple):
    """Candidates of several sources, each item once."""

    rows: NDArray[np.int32]  # [M] item rows, 1..I
    scores: NDArray[np.float32]  # [M] on the scale of the source that gave the item
    source_of: NDArray[np.int16]  # [M] which of the sources gave the item: its place in the arguments


class CandidateSource(Protocol):
    """One way to find candidates."""

    @property
    def name(self) -> str:
        """What recipes, logs, metrics and responses call this source."""

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """Return up to `limit` candidates, best first, none twice.

        Args:
            query: who asks, and when; of a visitor of whom nothing is known, `items` is empty.
            allowed: [I+1] bool, the items that may come back; None allows all.
            limit: at least 1.
        """


class EmbeddingSource:
    """Items whose graph vectors have the largest inner product with the one folded in from the history."""

    name = "embedding"

    def __init__(
        self, index: ItemIndex, item_vectors: NDArray[np.float32], item_degrees: NDArray[np.float32]
    ) -> None:
        """Take the index to search, and vectors [I+1, D] and degrees [I+1] to fold in from."""
        self._index, self._vectors, self._degrees = index, item_vectors, item_degrees

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """See CandidateSource.find; scores are inner products. Nothing is found without a history."""
        _check_limit(limit)
        vector = fold_in(self._vectors, self._degrees, query.items, query.weights)
        if not vector.any():
            return Candidates.none(self.name)
        rows, scores = self._index.search(vector[np.newaxis], limit, allowed)
        return Candidates(rows[0], scores[0], self.name)


class SequenceSource:
    """Items that the ranker itself puts first: its state of the history, searched over its item vectors.

    The only source that knows the order of the history.
    """

    name = "sequence"

    def __init__(self, index: ItemIndex) -> None:
        """Take an index over the vectors that the ranker scores with."""
        self._index = index

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """See CandidateSource.find; scores are about the ranker's own, which scores the items again.

        Nothing is found without a history.
        """
        _check_limit(limit)
        if not len(query.items):
            return Candidates.none(self.name)
        rows, scores = self._index.rough_search(query.state()[np.newaxis], limit, allowed)
        return Candidates(rows[0], scores[0], self.name)


class NeighbourSource:
    """Items that are neighbours of the history's items: the sum of their weights over the history."""

    name = "neighbours"

    def __init__(self, neighbours: SparseRows) -> None:
        """Take each item's neighbours, [I+1, I+1] (retrieval.neighbours)."""
        self._neighbours = neighbours

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """See CandidateSource.find; equal scores by lower row. Nothing is found without a history."""
        _check_limit(limit)
        items, weights = distinct_items(query.items, query.weights)
        rows, scores = self._neighbours.weighted_sum(items, weights)
        if allowed is not None:
            kept = allowed[rows]
            rows, scores = rows[kept], scores[kept]
        rows, scores = strongest(rows, scores, limit)
        return Candidates(rows, scores, self.name)


class TransitionSource:
    """Items that have come after the history's last items, the likeliest first."""

    name = "transitions"

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """See CandidateSource.find; scores are probabilities, equal ones by lower row."""
        _check_limit(limit)
        rows, scores = query.next_items()
        if allowed is not None:
            kept = allowed[rows]
            rows, scores = rows[kept], scores[kept]
        rows, scores = strongest(rows, scores, limit)
        return Candidates(rows, scores, self.name)


class PopularSource:
    """The items with the most events of late first, then those with the most ever, then by lower row."""

    name = "popular"

    def __init__(self, recent: NDArray[np.int64], popularity: NDArray[np.int64]) -> None:
        """Take the number of events of each item in a recent window and in all: [I+1] int64, entry 0 ignored.

        Where the data has no times the two are the same.
        """
        self._recent = recent.astype(np.float32)
        self._order = (np.lexsort((-popularity[1:], -recent[1:])) + 1).astype(np.int32)

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """See CandidateSource.find; scores are recent events. The visitor plays no part."""
        rows = _first_allowed(self._order, allowed, limit)
        return Candidates(rows, self._recent[rows], self.name)


class FreshSource:
    """The items that went on sale last, equal times by lower row; none of unknown age, none of the future."""

    name = "fresh"

    def __init__(self, available_from: NDArray[np.int64]) -> None:
        """Take when each item went on sale: [I+1] int64 on the data set's clock, 0 = unknown."""
        order = (np.argsort(-available_from[1:], kind="stable") + 1).astype(np.int32)
        self._order = order[available_from[order] > 0]
        self._times = available_from
        self._falling = -available_from[self._order]  # ascending, to find `now` in

    def find(self, query: Query, allowed: NDArray[np.bool_] | None, limit: int) -> Candidates:
        """See CandidateSource.find; scores are times as float32: exact to 2 minutes for unix milliseconds."""
        first_on_sale = np.searchsorted(self._falling, -query.now)
        rows = _first_allowed(self._order[first_on_sale:], allowed, limit)
        return Candidates(rows, self._times[rows].astype(np.float32), self.name)


def merge(parts: Sequence[Candidates], quotas: Sequence[float], limit: int) -> Merged:
    """Return up to `limit` items: each source's share, and what one cannot fill from the others in order.

    An item that several sources found counts for the first of them, and the later ones go on to their next.
    The n-th item that a source gives stands at the place n / quota among all: a source of twice the quota has
    two items for one of the other's, from the top on. Equal places, and quotas of 0, go by order.

    Args:
        parts: what each source found.
        quotas: share of `limit` that each is to give, 0 to 1, summing to at most 1; 0 only fills up.
        limit: at least 1.
    """
    _check_limit(limit)
    shares = shares_of(quotas, limit)
    taken = np.zeros(1 + max((int(part.rows.max(initial=0)) for part in parts), default=0), np.bool_)
    # Positions in each source's list: first its share, then, where there is room, what is left of it.
    chosen = [_take(part.rows, taken, share) for part, share in zip(parts, shares, strict=True)]
    room = limit - sum(map(len, chosen))
    for source, part in enumerate(parts):
        if room > 0:
            more = _take(part.rows, taken, room)
            chosen[source] = np.concatenate([chosen[source], more])
            room -= len(more)
    if not parts:
        return Merged(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int16))
    rows = np.concatenate([part.rows[kept] for part, kept in zip(parts, chosen, strict=True)])
    scores = np.concatenate([part.scores[kept] for part, kept in zip(parts, chosen, strict=True)])
    order, source_of = _interleaved(tuple(map(len, chosen)), tuple(quotas))
    return Merged(rows[order], scores[order], source_of)


@functools.lru_cache(maxsize=32)  # most requests get as many items of each source
def _interleaved(
    lengths: tuple[int, ...], quotas: tuple[float, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return in which order lists that stand one behind the other are to be read, [M], and whose each is."""
    places = [np.arange(1, n + 1) / max(quota, 1e-9) for n, quota in zip(lengths, quotas, strict=True)]
    order = np.argsort(np.concatenate(places), kind="stable")
    source_of = np.repeat(np.arange(len(lengths), dtype=np.int16), lengths)[order]
    for array in (order, source_of):
        array.setflags(write=False)  # it is handed out again
    return order, source_of


def shares_of(quotas: Sequence[float], limit: int) -> list[int]:
    """Return how many of `limit` items each source gives, as long as it has them."""
    ends = [0, *(round(total * limit) for total in itertools.accumulate(quotas))]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _take(rows: NDArray[np.int32], taken: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Return the positions of the first `count` rows that are not taken yet, and mark those rows as taken."""
    positions = np.flatnonzero(~taken[rows])[:count]
    taken[rows[positions]] = True
    return positions


def _first_allowed(
    order: NDArray[np.int32], allowed: NDArray[np.bool_] | None, limit: int
) -> NDArray[np.int32]:
    _check_limit(limit)
    if allowed is None:
        return order[:limit]
    # Most are allowed, as a rule: not the whole catalog is looked at, but as many as it takes.
    found: list[NDArray[np.int32]] = []
    begin, num_found = 0, 0
    while num_found < limit and begin < len(order):
        part = order[begin : begin + max(2 * limit, begin)]
        begin += len(part)
        part = part[allowed[part]]
        found.append(part)
        num_found += len(part)
    return np.concatenate([order[:0], *found])[:limit]


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
