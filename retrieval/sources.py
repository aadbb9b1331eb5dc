"""The ways to find candidates, and how their findings become one list.

A source is one small class with a name and `find`; the pipeline asks several, until one has given as many
items as are wanted in all, and then the others for their shares, and merges by quota. A new source is a class
like these and a line in engine/sources.py.

Shape legend: I items, H events of a history, N items of a list, D and S dimensions.
"""

from __future__ import annotations

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
    temperature: float = 1.0  # what the sum of both is divided by


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
    """Candidates of several sources, each item once, of each source best first.

    A ranker does not ask for their order; `turns` has it.
    """

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


class Gathering:
    """Candidates of one source after the other, until there are enough of them: each item once.

    One full list is enough to fill up with. So the first sources are asked for all that is wanted, until one
    has given so much; from then on a source is asked for its share, of what is not taken yet. What one cannot
    fill of its share comes from the others, in their order.

    Attributes:
        left: [I+1] bool, the items that may still come: what the next source is to be asked with.
    """

    def __init__(self, quotas: Sequence[float], limit: int, allowed: NDArray[np.bool_]) -> None:
        """Begin with nothing.

        Args:
            quotas: share of `limit` that each source is to give, 0 to 1, summing to at most 1; 0 only fills
                up.
            limit: at least 1.
            allowed: [I+1] bool, becomes `left` and is changed.
        """
        _check_limit(limit)
        self.left = allowed
        self._limit = limit
        self._shares = shares_of(quotas, limit)
        self._is_full = False
        # Of each source its share, and what it found beyond: rows and scores.
        self._shared: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []
        self._others: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []

    @property
    def wanted(self) -> int:
        """Items that the next source is to be asked for."""
        return self._shares[len(self._shared)] if self._is_full else self._limit

    def add(self, part: Candidates) -> None:
        """Take what the next source found. An item counts for the first source that has it in its share."""
        share = self._shares[len(self._shared)]
        self._is_full = self._is_full or len(part) >= self._limit
        rows, scores = part.rows, part.scores
        if not self.left[rows[:share]].all():
            free = self.left[rows]
            rows, scores = rows[free], scores[free]
        self.left[rows[:share]] = False
        self._shared.append((rows[:share], scores[:share]))
        self._others.append((rows[share:], scores[share:]))

    def merged(self) -> Merged:
        """Return up to `limit` items, of each source best first. To be called once, at the end."""
        chosen = list(enumerate(self._shared))
        room = self._limit - sum(len(rows) for rows, _ in self._shared)
        for source, (rows, scores) in enumerate(self._others):
            if room <= 0:
                break
            kept = np.flatnonzero(self.left[rows])[:room]
            rows = rows[kept]
            self.left[rows] = False
            chosen.append((source, (rows, scores[kept])))
            room -= len(rows)
        sources = np.array([source for source, _ in chosen], np.int16)
        return Merged(
            np.concatenate([np.zeros(0, np.int32), *(rows for _, (rows, _) in chosen)]),
            np.concatenate([np.zeros(0, np.float32), *(scores for _, (_, scores) in chosen)]),
            np.repeat(sources, [len(rows) for _, (rows, _) in chosen]),
        )


def merge(parts: Sequence[Candidates], quotas: Sequence[float], limit: int) -> Merged:
    """Return what a Gathering of lists makes that were found without one another."""
    num_rows = 1 + max((int(part.rows.max(initial=0)) for part in parts), default=0)
    gathering = Gathering(quotas, limit, np.ones(num_rows, np.bool_))
    for part in parts:
        gathering.add(part)
    return gathering.merged()


def turns(source_of: NDArray[np.int16], quotas: Sequence[float]) -> NDArray[np.int64]:
    """Return in which order the items of several sources are to be read where the order counts, [M].

    The n-th item that a source gives stands at the place n / quota among all: a source of twice the quota has
    two items for one of the other's, from the top on. Equal places, and quotas of 0, go by source. Items of
    sources that have no quota come last, as they are.

    Args:
        source_of: [M] which source gave each item; those of one source best first.
        quotas: of the sources 0, 1, ..., each 0 to 1.
    """
    by_source = np.argsort(np.minimum(source_of, len(quotas)), kind="stable")
    lengths = np.bincount(np.minimum(source_of, len(quotas)), minlength=len(quotas) + 1).tolist()
    places = [np.arange(1, n + 1) / max(quota, 1e-9) for n, quota in zip(lengths, quotas, strict=False)]
    places.append(np.full(lengths[-1], np.inf))
    return by_source[np.argsort(np.concatenate(places), kind="stable")]


def shares_of(quotas: Sequence[float], limit: int) -> list[int]:
    """Return how many of `limit` items each source gives, as long as it has them."""
    ends = [0, *(round(total * limit) for total in itertools.accumulate(quotas))]
    return [end - begin for begin, end in itertools.pairwise(ends)]


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
