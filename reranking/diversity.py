"""Rules for variety: what an item is worth depends on the items that were chosen before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from reranking.families import LAST_PLACE, Diversity, Floats, Mask, Page, Worth, setting

SMALLEST_VOLUME = 1e-6  # of one more item of a DPP; below it float32 knows nothing


@dataclass(frozen=True, kw_only=True)
class _Trade(Diversity):
    """Relevance against variety."""

    absent = "an item without a vector is like no other"

    relevance_weight: float = setting(low=0, high=1)  # w: 1 for relevance alone, 0 for variety alone
    over: Literal["graph", "content"] = setting("graph")  # whose vectors say what is alike

    @property
    def reads(self) -> tuple[str, ...]:
        """See Rule.reads."""
        return ("vectors" if self.over == "graph" else "content_vectors",)

    def _base(self, page: Page) -> Floats:
        return np.where(
            page.available, page.relevance * np.float32(self.relevance_weight), np.float32(-np.inf)
        )

    def _directions(self, page: Page) -> Floats:
        return page.items.directions(self.reads[0])


@dataclass(frozen=True, kw_only=True)
class MMR(_Trade):
    """Maximal marginal relevance: trade an item's relevance against its likeness to those chosen before it.

    Carbonell & Goldstein 1998. The next item is the one with the largest

        w * relevance - (1 - w) * (largest cosine with an item already chosen)

    Equal values go to the item that came first. An all-zero vector is like nothing (cosine 0).
    """

    rule = "mmr"

    @property
    def spread(self) -> float:
        """See Diversity.spread."""
        return 2 * (1 - self.relevance_weight)

    def start(self, page: Page) -> Worth:
        """See Diversity.start."""
        # Directions of length sqrt(1 - w): their products are the cosines, weighed.
        directions = self._directions(page) * np.float32(np.sqrt(1 - self.relevance_weight))
        return _Marginal(self._base(page), directions)


class _Marginal(Worth):
    """min over the chosen j of (w * relevance - (1 - w) * cosine with j): the largest cosine, taken off."""

    def __init__(self, base: Floats, directions: Floats) -> None:
        super().__init__(base.copy())
        self.base, self.directions = base, directions
        self.product = np.empty(len(base), np.float32)
        self.is_first = True

    def chose(self, pick: int) -> None:
        """See Worth.chose."""
        self.base[pick] = -np.inf
        np.dot(self.directions, self.directions[pick], out=self.product)
        if self.is_first:  # beside nothing, a cosine below 0 is a gain
            np.subtract(self.base, self.product, out=self.value)
            self.is_first = False
        else:
            np.subtract(self.base, self.product, out=self.product)
            np.minimum(self.value, self.product, out=self.value)


@dataclass(frozen=True, kw_only=True)
class DPP(_Trade):
    """Determinantal point process: the greedy MAP of Chen et al. 2018, algorithm 1.

    The next item is the one that adds the most to w * (sum of relevance) + (1 - w) * log det S, where
    S = (1 + cosine) / 2 off the diagonal and 1 on it: the log of the squared volume that the chosen items
    span. That is their eq. 11 with w instead of theta. What an item adds to the volume is kept up to date by
    one more row of the Cholesky factor a step. Where it falls below SMALLEST_VOLUME, it counts as that: then
    relevance alone decides. So it is after as many items as the vectors have numbers.
    """

    rule = "dpp"

    @property
    def spread(self) -> float:
        """See Diversity.spread."""
        return -(1 - self.relevance_weight) * float(np.log(SMALLEST_VOLUME))

    def start(self, page: Page) -> Worth:
        """See Diversity.start."""
        return _Volume(self._base(page), self._directions(page), 1 - self.relevance_weight)


class _Volume(Worth):
    """w * relevance + (1 - w) * log of the squared volume that an item adds to the chosen ones."""

    def __init__(self, base: Floats, directions: Floats, weight: float) -> None:
        super().__init__(base.copy())
        self.base, self.directions, self.weight = base, directions, np.float32(weight)
        self.volume = np.ones(len(base), np.float32)
        self.factor = np.empty((16, len(base)), np.float32)  # rows of the Cholesky factor; grows
        self.num_chosen = 0

    def chose(self, pick: int) -> None:
        """See Worth.chose."""
        self.base[pick] = -np.inf
        self.value[pick] = -np.inf
        if self.volume.item(pick) <= SMALLEST_VOLUME:
            return  # it lies in what the others span: it takes from nobody, and its row would be noise
        if self.num_chosen == len(self.factor):
            self.factor = np.concatenate([self.factor, np.empty_like(self.factor)])
        row = self.factor[self.num_chosen]
        np.dot(self.directions, self.directions[pick], out=row)
        row *= np.float32(0.5)
        row += np.float32(0.5)
        if self.num_chosen:
            before = self.factor[: self.num_chosen]
            row -= before[:, pick] @ before
        row /= np.sqrt(self.volume.item(pick))
        self.num_chosen += 1
        self.volume -= row * row
        np.maximum(self.volume, np.float32(SMALLEST_VOLUME), out=self.volume)
        np.log(self.volume, out=self.value)
        self.value *= self.weight
        self.value += self.base


@dataclass(frozen=True, kw_only=True)
class MaxSum(_Trade):
    """Max-sum diversification (Gollapudi & Sharma 2009): choose n items at once, show them by relevance.

    The n items of a screen are chosen greedily to make the most of

        w * (sum of chance / log2(place + 1)) + (1 - w) * (mean of 1 - cosine over their pairs)

    which is the discounted gain expected of the screen, traded against its intra-list diversity (place 1 is
    the screen's first). A chance is the softmax over the ranked items of adjusted relevance, in units of the
    scores, divided by `temperature`. A slate's last screen may be shorter; pins count on their screens.
    So where the ranker is sure, its word counts; where it is not, variety costs little. It costs next to
    nothing, too, behind an item that the ranker is all but sure of; so a screen is chosen from the best that
    are left, `depth` times as many, and behind them the ranking goes on as it is. On the screen the
    items stand by relevance: that changes no pair and brings the likeliest to the top. What a soft rule
    objects to for good is chosen last; where one objects at a place, the next of the screen stands there, or
    else the item that would have been chosen next.
    """

    rule = "max_sum"

    screen: int = setting(10, low=2, high=LAST_PLACE)  # n
    depth: int = setting(5, low=1)  # a screen is chosen from the best depth * n items that are left
    temperature: float = setting(1.0, above=0)  # 1 for scores that are logarithms of chances, as a bundle's

    @property
    def spread(self) -> float:
        """See Diversity.spread."""
        return 8.0  # what _Screen.enter adds to the items of the screen, and how far the others lie apart

    def start(self, page: Page) -> Worth:
        """See Diversity.start."""
        scores = page.items.scores[: page.num_ranked]
        score_range = float(scores.max() - scores.min()) if len(scores) else 0.0
        chances = _chances(page.relevance * (score_range / self.temperature), page)
        return _Screen(page, self.relevance_weight * chances, self._directions(page), self)


def _chances(logits: Floats, page: Page) -> Floats:
    """Return the softmax over the available ranked items; the others are measured by the same sum."""
    among = logits[: page.num_ranked][page.available[: page.num_ranked]]
    if not len(among):
        among = logits
    top = among.max(initial=-np.inf)
    chances = np.exp(np.minimum(logits - top, 0)) / np.exp(among - top).sum()
    return np.asarray(chances, np.float32)


class _Screen(Worth):
    """Chooses the items of a screen when its first place comes, and puts them above all others."""

    def __init__(self, page: Page, gain: Floats, directions: Floats, rule: MaxSum) -> None:
        super().__init__(np.where(page.available, gain, np.float32(-np.inf)))
        # Not the page: it has this object, and each would keep the other until the collector runs.
        self.limit, self.pins, self.relevance = page.limit, page.pins, page.relevance
        self.gain, self.directions, self.rule = gain, directions, rule
        eligible = page.relevance[page.available]
        self.lowest = float(eligible.min(initial=np.inf))
        reach = max(float(eligible.max(initial=-np.inf)) - self.lowest, 1.0)
        self.scaled = (page.relevance - self.lowest) / np.float32(reach)  # 0 to 1, where available
        self.num_chosen = 0
        self.discount = (1 / np.log2(np.arange(2, rule.screen + 2))).astype(np.float32)
        self.product = np.empty(len(gain), np.float32)

    def enter(self, lasting: Floats) -> None:
        """See Worth.enter."""
        begin = self.num_chosen
        if begin % self.rule.screen:
            return
        end = min(begin + self.rule.screen, self.limit)
        num_pairs = max((end - begin) * (end - begin - 1) / 2, 1)
        weight = np.float32((1 - self.rule.relevance_weight) / num_pairs)
        weighed = self.directions * weight
        is_free = not lasting.any()  # as on most screens
        likeness = np.zeros_like(self.gain)  # to the items of the screen, weighed
        chosen = [pick for place, pick in self.pins.items() if begin <= place < end]
        num_pinned = len(chosen)
        for pick in chosen:
            likeness += np.dot(self.directions, weighed[pick], out=self.product)
        others = np.where(self.value > -np.inf, self.gain, np.float32(-np.inf))
        left = np.where(self._is_best(others, lasting), others, np.float32(-np.inf))
        for _ in range(min(end - begin - num_pinned, int(np.count_nonzero(left > -np.inf)))):
            np.multiply(left, self.discount[len(chosen)], out=self.value)
            self.value -= likeness
            wanted = self.value if is_free else np.subtract(self.value, lasting, out=self.product)
            pick = int(wanted.argmax())
            chosen.append(pick)
            left[pick] = others[pick] = -np.inf
            likeness += np.dot(self.directions, weighed[pick], out=self.product)
        of_screen = chosen[num_pinned:]
        np.multiply(others, self.discount[end - begin - 1], out=self.value)  # who would have been next
        self.value -= likeness
        # Behind all others, by their places in the ranking, what the screen was not to be chosen from.
        np.copyto(self.value, self.scaled - 4, where=(left == -np.inf) & (others > -np.inf))
        self.value[of_screen] = self.relevance[of_screen] - self.lowest + 3

    def _is_best(self, gain: Floats, lasting: Floats) -> Mask:
        """Return what a screen is chosen from, [N] bool; by relevance, of which gains are a rounded power."""
        size = self.rule.depth * self.rule.screen
        if size >= len(gain):
            return np.ones(len(gain), np.bool_)
        wanted = np.where(gain > -np.inf, self.relevance, np.float32(-np.inf)) - lasting
        return np.asarray(wanted >= np.partition(wanted, -size)[-size])

    def chose(self, pick: int) -> None:
        """See Worth.chose."""
        self.num_chosen += 1
        self.value[pick] = -np.inf
