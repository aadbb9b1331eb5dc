"""Rules that make items worth more or less.

Relevance runs from 0, the worst ranked item, to 1, the best, before these add to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from reranking.families import Adjustment, Floats, Selection, looked_up, setting
from reranking.items import DAY_MS, ItemFacts, RankedItems


@dataclass(frozen=True, kw_only=True)
class Freshness(Adjustment):
    """Add weight * 2^(-age / half-life): the weight for what came today, half of it after one half-life."""

    rule = "freshness"
    columns = ("available_from",)
    absent = "an item of unknown age gets nothing; without a clock no item does"

    weight: float = setting(above=0, high=1000)
    half_life_days: float = setting(above=0)

    def added(self, items: RankedItems) -> Floats:
        """See Adjustment.added."""
        now = items.request.now_ms
        if items.available_from is None or now is None:
            return np.zeros(len(items), np.float32)
        age = np.maximum(now - items.available_from, 0).astype(np.float32)
        fresh = self.weight * np.exp2(age * np.float32(-1 / (self.half_life_days * DAY_MS)))
        fresh[items.available_from == 0] = 0
        return np.asarray(fresh, np.float32)


@dataclass(frozen=True, kw_only=True)
class Margin(Adjustment):
    """Add what the shop earns, at a stated rate: a unit of it is worth `relevance_per_unit` of relevance.

    With `of: profit` a unit is one of the catalog's currency, and an item earns margin * price. With
    `of: share` an item earns its margin, from 0 to 1, whatever it costs.
    """

    rule = "margin"
    columns = ("margins", "prices")
    absent = "an item without a margin (or, for profit, a price) earns nothing"

    relevance_per_unit: float = setting(above=0, high=1000)
    of: Literal["profit", "share"] = setting("profit")

    @property
    def reads(self) -> tuple[str, ...]:
        """See Rule.reads."""
        return self.columns if self.of == "profit" else ("margins",)

    def added(self, items: RankedItems) -> Floats:
        """See Adjustment.added."""
        if items.margins is None or (self.of == "profit" and items.prices is None):
            return np.zeros(len(items), np.float32)
        earned = np.nan_to_num(items.margins, nan=0.0)
        if self.of == "profit" and items.prices is not None:
            earned *= np.nan_to_num(items.prices, nan=0.0)
        return (self.relevance_per_unit * earned).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DampenPopularity(Adjustment):
    """Take weight * log(1 + popularity) / log(1 + the largest popularity of the catalog).

    So the bestseller loses the whole weight.
    """

    rule = "dampen_popularity"
    columns = ("popularity",)
    absent = "an item of unknown popularity keeps its relevance"

    weight: float = setting(above=0, high=1000)
    most_popular: int | None = looked_up()

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        return replace(self, most_popular=facts.most_popular)

    def added(self, items: RankedItems) -> Floats:
        """See Adjustment.added."""
        if items.popularity is None or not len(items):
            return np.zeros(len(items), np.float32)
        largest = items.popularity.max() if self.most_popular is None else self.most_popular
        rate = -self.weight / np.log1p(max(largest, 1))
        return np.asarray(rate * np.log1p(items.popularity), np.float32)


@dataclass(frozen=True, kw_only=True)
class Boost(Selection, Adjustment):
    """Add to the relevance of these items."""

    rule = "boost"

    by: float = setting(above=0, high=1000)

    def added(self, items: RankedItems) -> Floats:
        """See Adjustment.added."""
        return self.about(items) * np.float32(self.by)


@dataclass(frozen=True, kw_only=True)
class Bury(Selection, Adjustment):
    """Take from the relevance of these items: more than 1 puts the best behind the worst."""

    rule = "bury"

    by: float = setting(above=0, high=1000)

    def added(self, items: RankedItems) -> Floats:
        """See Adjustment.added."""
        return self.about(items) * np.float32(-self.by)
