"""Rules about single places: pins, and slots that are kept for paid or for new items."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from reranking.families import (
    LAST_PLACE,
    Floats,
    Guard,
    Mask,
    Page,
    Rule,
    Selection,
    SoftRule,
    choice,
    looked_up,
    rows_of,
    setting,
)
from reranking.items import DAY_MS, ItemFacts


@dataclass(frozen=True, kw_only=True)
class Pin(Rule):
    """Put an item on a place. Only a hard filter beats a pin; a place beyond the slate is no place.

    The item need not have been found: a pinned item that ranking never saw is shown as well.
    """

    rule = "pin"

    item_id: str = setting()
    place: int = setting(low=1, high=LAST_PLACE)  # 1 is the first
    row: int | None = looked_up()

    @property
    def name(self) -> str:
        """The rule with its place: "pin@1"."""
        return f"pin@{self.place}"

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        return replace(self, row=int(rows_of(facts, f"{self.name}: item_id", "item_id", self.item_id)[0]))


@dataclass(frozen=True, kw_only=True)
class _Slots(SoftRule):
    """Places that are kept for some items."""

    places: tuple[int, ...] = setting(low=1, high=LAST_PLACE)  # 1 is the first

    def check(self) -> None:
        """See Rule.check."""
        if not self.places:
            raise ValueError(f"{self.rule}: places is empty; expected at least one place")
        if len(set(self.places)) < len(self.places):
            raise ValueError(f"{self.rule}: places are {list(self.places)}; expected every place once")


class _SlotGuard(Guard):
    """At some places, objects to all items but some."""

    def __init__(self, page: Page, weight: float, places: set[int], wanted: Mask) -> None:
        self.page, self.weight, self.places = page, weight, places
        self.objected = ~wanted

    def enter(self, place: int) -> None:
        """See Guard.enter."""
        if place in self.places:
            self.page.penalty[self.objected] += self.weight

    def chose(self, place: int, pick: int) -> None:
        """See Guard.chose."""
        if place in self.places:
            self.page.penalty[self.objected] -= self.weight


@dataclass(frozen=True, kw_only=True)
class Sponsored(Selection, _Slots):
    """Keep places for paid items: the one that is worth the most there, among those relevant enough.

    The floor is on the relevance that the scores alone give, 0 for the worst ranked item and 1 for the best,
    so only ranked items qualify, never the reserve. Where none qualifies, the rule yields.
    """

    rule = "sponsored"
    ranked_only = True

    min_relevance: float = setting(0.0, low=0, high=1)

    def check(self) -> None:
        """See Rule.check."""
        Selection.check(self)
        _Slots.check(self)

    def start(self, page: Page, weight: float) -> Guard:
        """See SoftRule.start."""
        wanted = self.about(page.items) & (page.unadjusted >= self.min_relevance)
        wanted[page.num_ranked :] = False
        return _SlotGuard(page, weight, {place - 1 for place in self.places}, wanted)


@dataclass(frozen=True, kw_only=True)
class Explore(_Slots):
    """Keep places for new items, so that something is learned about them.

    `method: thompson` shows, at every such place, the new item with the largest draw from its
    Beta(1 + clicked, 1 + shown - clicked) (Thompson 1933). `method: epsilon` keeps each place with the
    probability epsilon, and any new item is as likely as another. The draws come from the request's seed, so
    a retry shows the same page. Items of the reserve may be shown too.
    """

    rule = "explore"
    columns = ("available_from", "popularity", "shown", "clicked")
    absent = (
        "an item of unknown age or popularity is not new; without counts all new items are equally likely"
    )

    method: Literal["thompson", "epsilon"] = setting("thompson")
    epsilon: float | None = setting(None, above=0, high=1)
    newer_than_days: float | None = setting(None, above=0)
    fewer_events_than: int | None = setting(None, low=1)

    def check(self) -> None:
        """See Rule.check."""
        super().check()
        if self.newer_than_days is None and self.fewer_events_than is None:
            raise ValueError(
                f"explore: nothing says which items are new; expected "
                f"{choice('', ('newer_than_days', 'fewer_events_than'))}"
            )
        if (self.epsilon is None) != (self.method == "thompson"):
            raise ValueError(
                f"explore: epsilon is {self.epsilon} and method is {self.method!r}; expected epsilon with "
                "method: epsilon and only there"
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """See Rule.reads."""
        return (
            *(("available_from",) if self.newer_than_days is not None else ()),
            *(("popularity",) if self.fewer_events_than is not None else ()),
            *(("shown", "clicked") if self.method == "thompson" else ()),
        )

    def start(self, page: Page, weight: float) -> Guard | None:
        """See SoftRule.start."""
        random = np.random.default_rng([page.items.request.seed, zlib.crc32(self.rule.encode())])
        places = {place - 1 for place in self.places}
        if self.epsilon is not None:
            kept = random.random(len(self.places)) < self.epsilon
            places = {place - 1 for place, is_kept in zip(self.places, kept, strict=True) if is_kept}
        if not places:
            return None
        return _ExploreGuard(page, weight, places, self._draws(page, random))

    def _draws(self, page: Page, random: np.random.Generator) -> Floats:
        """Return a draw for every new item, -inf for the others."""
        items = page.items
        new = np.ones(len(items), np.bool_)
        if self.newer_than_days is not None:
            now, since = items.request.now_ms, items.available_from
            if now is None or since is None:
                new[:] = False
            else:
                new &= (since != 0) & (since > now - self.newer_than_days * DAY_MS)
        if self.fewer_events_than is not None:
            if items.popularity is None:
                new[:] = False
            else:
                new &= items.popularity < self.fewer_events_than
        if self.method == "epsilon" or items.shown is None or items.clicked is None:
            draws = random.random(len(items))
        else:
            draws = random.beta(1 + items.clicked, 1 + np.maximum(items.shown - items.clicked, 0))
        return np.where(new, draws, -np.inf).astype(np.float32)


class _ExploreGuard(Guard):
    """At some places, objects to all items but one: the largest draw among those least objected to."""

    def __init__(self, page: Page, weight: float, places: set[int], draws: Floats) -> None:
        self.page, self.weight, self.places, self.draws = page, weight, places, draws
        self.objected: Mask | None = None

    def enter(self, place: int) -> None:
        """See Guard.enter."""
        if place not in self.places:
            return
        page = self.page
        new = np.flatnonzero((self.draws > -np.inf) & (page.worth.value > -np.inf))
        self.objected = np.ones(len(self.draws), np.bool_)
        if len(new):
            least = new[page.penalty[new] == page.penalty[new].min()]
            self.objected[least[self.draws[least].argmax()]] = False
        page.penalty[self.objected] += self.weight

    def chose(self, place: int, pick: int) -> None:
        """See Guard.chose."""
        if self.objected is not None:
            self.page.penalty[self.objected] -= self.weight
            self.objected = None
