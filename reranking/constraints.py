"""Soft rules about what may stand beside what: each objects to items, and yields where no other is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from reranking.families import Guard, Mask, Page, SoftRule, looked_up, rows_of, setting
from reranking.items import ItemFacts


@dataclass(frozen=True, kw_only=True)
class DropSeen(SoftRule):
    """Leave out what the visitor already had to do with, as long as other items can fill the slate."""

    rule = "drop_seen"

    def start(self, page: Page, weight: float) -> None:
        """See SoftRule.start."""
        page.penalty[page.items.seen] += weight
        page.lasting[page.items.seen] += weight


@dataclass(frozen=True, kw_only=True)
class Cap(SoftRule):
    """Show at most `max_items` of one group in any `window` consecutive places (the whole slate where None).

    Pinned items count, in the windows before their place too. Items whose group is missing are never capped.
    """

    rule = "cap"
    absent = "an item without the group is not capped"

    field: Literal["category", "brand", "seller_id"] = setting()
    max_items: int = setting(low=1)
    window: int | None = setting(None, low=2)
    level: int | None = setting(None, low=0)  # of the category path, 0 the broadest; None for the leaf

    def check(self) -> None:
        """See Rule.check."""
        if self.level is not None and self.field != "category":
            raise ValueError(f"{self.name}: level is {self.level}; only a category has levels")
        if self.window is not None and self.max_items >= self.window:
            raise ValueError(
                f"{self.name}: max_items is {self.max_items} in a window of {self.window}, which forbids "
                f"nothing; expected 1 to {self.window - 1}"
            )

    @property
    def name(self) -> str:
        """The rule with its group and window: "cap:category", "cap:category/0", "cap:brand@10"."""
        return f"cap:{self.group}" + (f"@{self.window}" if self.window else "")

    @property
    def group(self) -> str:
        """The key of RankedItems.groups."""
        return self.field if self.level is None else f"{self.field}/{self.level}"

    @property
    def groups(self) -> tuple[str, ...]:
        """See Rule.groups."""
        return (self.group,)

    def start(self, page: Page, weight: float) -> Guard:
        """See SoftRule.start."""
        codes = page.items.groups[self.group]
        if self.window is None or self.window >= page.limit:
            return _WholeCap(page, weight, codes, self.max_items)
        return _WindowCap(page, weight, codes, self.max_items, self.window)


class _WholeCap(Guard):
    def __init__(self, page: Page, weight: float, codes: NDArray[np.int32], max_items: int) -> None:
        self.penalties, self.weight, self.codes = (page.penalty, page.lasting), weight, codes
        self.group_of: list[int] = codes.tolist()
        self.left: dict[int, int] = {}  # of each group met so far
        self.max_items = max_items
        self.pins = page.pins
        for pick in page.pins.values():
            self._count(pick)

    def chose(self, place: int, pick: int) -> None:
        """See Guard.chose."""
        if place not in self.pins:
            self._count(pick)

    def _count(self, pick: int) -> None:
        group = self.group_of[pick]
        if group:
            left = self.left.get(group, self.max_items) - 1
            self.left[group] = left
            if left == 0:
                members = (self.codes == group).nonzero()[0]
                for penalty in self.penalties:
                    penalty[members] += self.weight


class _WindowCap(Guard):
    def __init__(
        self, page: Page, weight: float, codes: NDArray[np.int32], max_items: int, window: int
    ) -> None:
        self.page, self.penalty, self.weight, self.codes = page, page.penalty, weight, codes
        self.group_of: list[int] = codes.tolist()
        self.max_items, self.window = max_items, window
        self.at = [0] * page.limit  # the group at each place, 0 where none is yet
        for place, pick in page.pins.items():
            self.at[place] = self.group_of[pick]
        self.last_pin = max(page.pins, default=-1)
        self.members: dict[int, NDArray[np.int64]] = {}
        self.full: set[int] = set()  # groups that have no room at the place

    def enter(self, place: int) -> None:
        """See Guard.enter."""
        at, first = self.at, max(0, place - self.window + 1)
        # Only what has just come in and what has just gone out can have changed, and what stands ahead.
        changed = {at[place - 1]} if place else set()
        if first:
            changed.add(at[first - 1])
        ahead: list[int] = []
        if place <= self.last_pin:
            ahead = [at[other] for other in self.page.pins if place < other < place + self.window]
            changed.update((at[place], *ahead))
            at[place] = 0  # a pin does not stand in its own way
        for group in changed:
            if group:
                is_full = at[first : first + self.window].count(group) >= self.max_items
                if group in ahead:  # the later windows that hold the place hold more of it, maybe
                    starts = range(first + 1, min(place, len(at) - self.window) + 1)
                    is_full |= any(at[s : s + self.window].count(group) >= self.max_items for s in starts)
                if is_full != (group in self.full):
                    self._turn(group, is_full)

    def chose(self, place: int, pick: int) -> None:
        """See Guard.chose."""
        self.at[place] = self.group_of[pick]

    def _turn(self, group: int, is_full: bool) -> None:
        members = self.members.get(group)
        if members is None:
            members = self.members[group] = np.flatnonzero(self.codes == group)
        if is_full:
            self.full.add(group)
            self.penalty[members] += self.weight
        else:
            self.full.remove(group)
            self.penalty[members] -= self.weight


@dataclass(frozen=True, kw_only=True)
class Exposure(SoftRule):
    """Give every seller its due part of the slate's exposure, as far as it has items.

    A place p (1 is the first) is worth 1 / log2(p + 1) of exposure. A seller's due is `strength` times its
    share of what has been given away so far; it is owed a place when its due has grown by that place's worth
    over what it got, and then only owed sellers are shown. The shares are proportional to the merit of the
    sellers' eligible ranked items (Singh and Joachims 2018), or stated by contract; the rest is nobody's due.
    """

    rule = "exposure"
    absent = "an item without a seller counts for the total and is owed nothing"

    field: Literal["seller_id", "brand"] = setting("seller_id")
    merit: Literal["relevance", "items", "shares"] = setting("relevance")
    strength: float = setting(1.0, above=0, high=1)
    shares: dict[str, float] | None = setting(None, above=0, high=1)  # with merit: shares
    share_of: dict[int, float] | None = looked_up()  # group -> share

    def check(self) -> None:
        """See Rule.check."""
        if (self.shares is not None) != (self.merit == "shares"):
            raise ValueError(
                f"exposure: shares is {self.shares} and merit is {self.merit!r}; expected shares with "
                "merit: shares and only there"
            )
        if self.shares and sum(self.shares.values()) > 1:
            raise ValueError(f"exposure: shares sum to {sum(self.shares.values()):g}; expected at most 1")

    @property
    def name(self) -> str:
        """The rule with its field: "exposure:seller_id"."""
        return f"exposure:{self.field}"

    @property
    def groups(self) -> tuple[str, ...]:
        """See Rule.groups."""
        return (self.field,)

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        if self.shares is None:
            return self
        rows = {name: rows_of(facts, "exposure: shares", self.field, name) for name in self.shares}
        codes = facts.groups[self.field]
        return replace(
            self, share_of={int(codes[rows[name][0]]): share for name, share in self.shares.items()}
        )

    def start(self, page: Page, weight: float) -> Guard:
        """See SoftRule.start."""
        ranked = page.available.copy()
        ranked[page.num_ranked :] = False
        ranked[list(page.pins.values())] = True
        sellers, seller_of = np.unique(page.items.groups[self.field], return_inverse=True)
        if self.merit == "shares":
            if self.share_of is None:
                raise ValueError(f"{self.name} names sellers and is not bound to a catalog")
            share = np.array([self.share_of.get(int(seller), 0.0) for seller in sellers])
        else:
            merit = page.unadjusted.astype(np.float64) if self.merit == "relevance" else np.ones(len(ranked))
            total = np.bincount(seller_of, merit * ranked, minlength=len(sellers))
            share = total / max(total.sum(), 1e-12)
        share[sellers == 0] = 0
        return ExposureGuard(page, weight, sellers, seller_of, self.strength * share)


def attention(limit: int) -> NDArray[np.float64]:
    """Return the exposure that each place gives, [limit] float64: 1 / log2(place + 1), place 1 the first."""
    return 1 / np.log2(np.arange(2, limit + 2))


class ExposureGuard(Guard):
    """Keeps the account of one page."""

    def __init__(
        self,
        page: Page,
        weight: float,
        sellers: NDArray[np.int32],
        seller_of: NDArray[np.int64],
        share: NDArray[np.float64],
    ) -> None:
        self.page, self.weight = page, weight
        self.sellers, self.seller_of, self.share = sellers, seller_of, share
        self.attention = attention(page.limit)
        self.total = np.cumsum(self.attention)
        self.given = np.zeros(len(sellers))
        self.num_left = np.bincount(seller_of, page.available, minlength=len(sellers))
        self.objected: Mask | None = None

    def enter(self, place: int) -> None:
        """See Guard.enter."""
        due = self.share * self.total.item(place) - self.given
        owed = (due >= self.attention.item(place)) & (self.num_left > 0)
        if owed.any():
            self.objected = ~owed[self.seller_of]
            self.page.penalty[self.objected] += self.weight

    def chose(self, place: int, pick: int) -> None:
        """See Guard.chose."""
        seller = self.seller_of.item(pick)
        self.given[seller] += self.attention.item(place)
        if place not in self.page.pins:
            self.num_left[seller] -= 1
        if self.objected is not None:
            self.page.penalty[self.objected] -= self.weight
            self.objected = None

    def given_by(self, order: Sequence[int]) -> NDArray[np.float64]:
        """Return the exposure of each of `sellers` in a whole slate, with pins that closed ranks."""
        given = np.zeros(len(self.sellers))
        np.add.at(given, self.seller_of[list(order)], self.attention[: len(order)])
        return given
