"""Hard filters: what they forbid is never shown, whatever the other rules say and however short the slate."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from reranking.families import Filter, Mask, Selection, looked_up, setting
from reranking.items import DAY_MS, NEVER, ItemFacts, RankedItems, Request


@dataclass(frozen=True, kw_only=True)
class InStock(Filter):
    """Show what is in stock."""

    rule = "in_stock"
    columns = ("stock",)
    absent = "an item whose stock is unknown counts as in stock"

    min_stock: int = setting(1, low=1)  # pieces

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        if items.stock is None:
            return np.ones(len(items), np.bool_)
        return (items.stock >= self.min_stock) | (items.stock < 0)


@dataclass(frozen=True, kw_only=True)
class Available(Filter):
    """Show what is on sale now: available_from <= now < available_until."""

    rule = "available"
    asks_request = True
    columns = ("available_from", "available_until")
    absent = "an item is on sale since ever, or for ever; without a clock every item is"

    changes: NDArray[np.int64] | None = looked_up()  # [C] ms, ascending: when some item comes on sale or goes

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        times = [times for times in (facts.available_from, facts.available_until) if times is not None]
        return replace(self, changes=np.unique(np.concatenate([np.zeros(0, np.int64), *times])))

    def moment(self, request: Request) -> Hashable | None:
        """See Filter.moment: how many changes there have been."""
        if request.now_ms is None or self.changes is None:
            return request.now_ms
        return int(np.searchsorted(self.changes, request.now_ms, side="right"))

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        allowed = np.ones(len(items), np.bool_)
        now = items.request.now_ms
        if now is not None and items.available_from is not None:
            allowed &= items.available_from <= now
        if now is not None and items.available_until is not None:
            allowed &= (items.available_until > now) | (items.available_until == 0)
        return allowed


@dataclass(frozen=True, kw_only=True)
class Allow(Selection, Filter):
    """Show only these items; with several such rules, what meets them all."""

    rule = "allow"

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        return self.about(items)


@dataclass(frozen=True, kw_only=True)
class Deny(Selection, Filter):
    """Never show these items. Two fields forbid what meets both: two rules forbid what meets either."""

    rule = "deny"

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        return ~self.about(items)


@dataclass(frozen=True, kw_only=True)
class PriceRange(Filter):
    """Show what costs between two prices, both inclusive."""

    rule = "price_range"
    columns = ("prices",)
    absent = "an item without a price is not shown"

    min_price: float | None = setting(None, low=0)
    max_price: float | None = setting(None, low=0)

    def check(self) -> None:
        """See Rule.check."""
        if self.min_price is None and self.max_price is None:
            raise ValueError("price_range: neither min_price nor max_price is given; expected at least one")
        if None not in (self.min_price, self.max_price) and self.low > self.high:
            raise ValueError(
                f"price_range: min_price is {self.min_price}; expected at most max_price, {self.max_price}"
            )

    @property
    def low(self) -> float:
        """The lowest price allowed."""
        return 0.0 if self.min_price is None else self.min_price

    @property
    def high(self) -> float:
        """The highest price allowed."""
        return np.inf if self.max_price is None else self.max_price

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        if items.prices is None:
            return np.zeros(len(items), np.bool_)
        return (items.prices >= self.low) & (items.prices <= self.high)


@dataclass(frozen=True, kw_only=True)
class BoughtWithin(Filter):
    """Do not show what the visitor bought in the last days."""

    rule = "bought_within"
    asks_request = True
    columns = ("bought_at",)
    absent = "a purchase at an unknown time counts as one of today; without a clock every purchase does"

    days: float = setting(above=0)

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        if items.bought_at is None:
            return np.ones(len(items), np.bool_)
        now = items.request.now_ms
        if now is None:
            return np.asarray(items.bought_at == NEVER)
        long_ago = (items.bought_at != 0) & (items.bought_at <= now - self.days * DAY_MS)
        return np.asarray((items.bought_at == NEVER) | long_ago)


@dataclass(frozen=True, kw_only=True)
class Region(Filter):
    """Show what has the attribute "region:DE" to visitors from DE, and what has no region to everybody."""

    rule = "region"
    asks_request = True
    absent = "an item without a region may be shown anywhere; a request without a region sees only such items"

    prefix: str = setting("region:")  # of the attributes
    context: str = setting("region")  # the key of the request's context
    tagged: dict[str, Mask] | None = looked_up()  # region -> [I+1]; "" -> items without any

    @property
    def context_keys(self) -> tuple[str, ...]:
        """See Rule.context_keys."""
        return (self.context,)

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        tagged = {"": np.ones(facts.num_items + 1, np.bool_)}
        for attribute, rows in facts.having.get("attribute", {}).items():
            if attribute.startswith(self.prefix):
                region = attribute.removeprefix(self.prefix)
                tagged.setdefault(region, np.zeros(facts.num_items + 1, np.bool_))[rows] = True
                tagged[""][rows] = False
        return replace(self, tagged=tagged)

    def moment(self, request: Request) -> Hashable | None:
        """See Filter.moment: the visitor's region, where some item has it."""
        region = request.context.get(self.context, "")
        return region if self.tagged is None or region in self.tagged else ""

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        if self.tagged is None:
            raise ValueError("region is not bound to a catalog; call bound_to first")
        allowed = self.tagged[""].take(items.rows)
        region = items.request.context.get(self.context, "")
        if region in self.tagged:
            allowed = allowed | self.tagged[region].take(items.rows)
        return allowed


@dataclass(frozen=True, kw_only=True)
class MinAge(Filter):
    """Show what the visitor is old enough for: an item with the attribute "age:18" from 18 years on."""

    rule = "min_age"
    asks_request = True
    absent = "an item without an age is for everybody; a request without an age sees only such items"

    prefix: str = setting("age:")  # of the attributes
    context: str = setting("age")  # the key of the request's context; its value in whole years
    ages: NDArray[np.int16] | None = looked_up()  # [I+1], 0 = for everybody
    limits: list[int] | None = looked_up()  # each of these ages once

    @property
    def context_keys(self) -> tuple[str, ...]:
        """See Rule.context_keys."""
        return (self.context,)

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        ages = np.zeros(facts.num_items + 1, np.int16)
        for attribute, rows in facts.having.get("attribute", {}).items():
            if attribute.startswith(self.prefix):
                years = attribute.removeprefix(self.prefix)
                if not (years.isascii() and years.isdigit()) or int(years) > 200:
                    raise ValueError(
                        f"min_age: the catalog has the attribute {attribute!r}; expected {self.prefix}YEARS"
                    )
                ages[rows] = np.maximum(ages[rows], int(years))
        return replace(self, ages=ages, limits=np.unique(ages).tolist())

    def moment(self, request: Request) -> Hashable | None:
        """See Filter.moment: how many of the catalog's ages the visitor has."""
        age = self._age(request)
        return age if self.limits is None else sum(limit <= age for limit in self.limits)

    def _age(self, request: Request) -> int:
        """Return the visitor's age in years, 0 where it is unknown."""
        years = request.context.get(self.context, "")
        return int(years) if years.isascii() and years.isdigit() else 0

    def allows(self, items: RankedItems) -> Mask:
        """See Filter.allows."""
        if self.ages is None:
            raise ValueError("min_age is not bound to a catalog; call bound_to first")
        return np.asarray(self.ages.take(items.rows) <= self._age(items.request))
