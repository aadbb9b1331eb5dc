"""Items between two stages of the funnel: rows, scores and who found them, best first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ItemList:
    """Items between two stages, best first: three arrays of one length."""

    rows: NDArray[np.int32]  # [N] 1..I, none twice
    scores: NDArray[np.float32]  # [N] of the stage that made the list
    sources: NDArray[np.str_]  # [N] the candidate source that found each item

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: NDArray[np.int64] | slice) -> ItemList:
        """Return the items at these positions, in that order."""
        return ItemList(self.rows[positions], self.scores[positions], self.sources[positions])

    def followed_by(self, other: ItemList) -> ItemList:
        """Return these items and those of `other` behind them."""
        return ItemList(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.sources, other.sources]),
        )

    def with_falling_scores(self) -> ItemList:
        """Return the items with scores that fall with the order: sources score on scales of their own."""
        return ItemList(self.rows, np.minimum.accumulate(self.scores), self.sources)

    def ordered_by(self, scores: NDArray[np.float32], num_kept: int) -> Ranked:
        """Return the items with the best new scores [N], best first; equal scores keep their order.

        Raises ValueError where there is not one finite score for each item.
        """
        if scores.shape != self.rows.shape or not np.isfinite(scores).all():
            raise ValueError(f"scores {scores.shape} for {len(self)} items; expected one finite score each")
        kept = largest(scores, num_kept)
        is_left = np.ones(len(self), np.bool_)
        is_left[kept] = False
        scored = ItemList(self.rows, scores, self.sources)
        return Ranked(scored.take(kept), scored.take(np.flatnonzero(is_left)))


class Ranked(NamedTuple):
    """What ranking keeps, and what it does not."""

    items: ItemList  # best first
    reserve: ItemList  # the other candidates, in any order

    @classmethod
    def as_they_are(cls, candidates: ItemList, num_kept: int) -> Ranked:
        """Return the candidates in their own order."""
        falling = candidates.with_falling_scores()
        return cls(falling.take(slice(num_kept)), falling.take(slice(num_kept, None)))


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
