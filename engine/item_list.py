"""Items between two stages of the funnel: rows, scores and who found them, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.sources import turns


@dataclass(frozen=True)
class ItemList:
    """Items between two stages, best first: three arrays of one length, and what the numbers of one mean.

    Candidates alone stand source by source: the ranker orders them anew. `in_turns` has them best first.
    """

    rows: NDArray[np.int32]  # [N] 1..I, none twice
    scores: NDArray[np.float32]  # [N] of the stage that made the list
    source_of: NDArray[np.int16]  # [N] the candidate source that found each item: its place in `names`
    names: tuple[str, ...]

    @classmethod
    def of_one(cls, rows: NDArray[np.int32], scores: NDArray[np.float32], source: str) -> ItemList:
        """Return items that all come from one source."""
        return cls(rows, scores, np.zeros(len(rows), np.int16), (source,))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sources(self) -> NDArray[np.str_]:
        """[N] the name of the candidate source that found each item."""
        return np.array(self.names, np.str_)[self.source_of]

    def take(self, positions: NDArray[np.int64] | slice) -> ItemList:
        """Return the items at these positions, in that order."""
        return replace(
            self,
            rows=self.rows[positions],
            scores=self.scores[positions],
            source_of=self.source_of[positions],
        )

    def followed_by(self, other: ItemList) -> ItemList:
        """Return these items and those of `other` behind them."""
        return ItemList(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.source_of, other.source_of + np.int16(len(self.names))]),
            self.names + other.names,
        )

    def in_turns(self, quotas: Sequence[float]) -> ItemList:
        """Return candidates best first, whose sources, in the order of `names`, have quotas (see turns)."""
        return self.take(turns(self.source_of, quotas))

    def with_falling_scores(self) -> ItemList:
        """Return the items with scores that fall with the order: sources score on scales of their own."""
        return replace(self, scores=np.minimum.accumulate(self.scores))

    def ordered_by(self, scores: NDArray[np.float32], num_kept: int) -> Ranked:
        """Return the items with the best new scores [N], best first; equal scores keep their order.

        Raises ValueError where there is not one finite score for each item.
        """
        if scores.shape != self.rows.shape or not np.isfinite(scores).all():
            raise ValueError(f"scores {scores.shape} for {len(self)} items; expected one finite score each")
        scored = replace(self, scores=scores)
        return Ranked(scored.take(largest(scores, num_kept)), scored)


class Ranked(NamedTuple):
    """What ranking keeps, and what it chose from."""

    items: ItemList  # best first
    scored: ItemList  # all candidates, in any order

    @classmethod
    def as_they_are(cls, candidates: ItemList, num_kept: int) -> Ranked:
        """Return the candidates in their own order."""
        falling = candidates.with_falling_scores()
        return cls(falling.take(slice(num_kept)), falling)


def largest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the positions of the k largest scores, the largest first; equal scores keep their order."""
    num_lower = len(scores) - k
    if num_lower <= 0:
        return np.argsort(-scores, kind="stable")
    bar = np.partition(scores, num_lower)[
        num_lower
    ]  # the k-th largest; where it is shared, the first ones get in
    above = np.flatnonzero(scores > bar)
    at_bar = np.flatnonzero(scores == bar)[: k - len(above)]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], at_bar])
