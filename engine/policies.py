"""Policies at work in a bundle: what rules may know of its items, and what a response says that they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.catalog import Catalog
from engine.item_list import ItemList, Ranked
from reranking.constraints import Exposure as ExposureRule
from reranking.items import ItemFacts
from reranking.policy import Policy, policies_from_config
from reranking.rerank import Effect, Move, Reranked


def item_facts(
    catalog: Catalog,
    vectors: NDArray[np.float32] | None = None,
    content_vectors: NDArray[np.float32] | None = None,
) -> ItemFacts:
    """Return what rules may know of a catalog's items; a column without a single value is None.

    Args:
        catalog: the items.
        vectors: [I+1, D] of the graph.
        content_vectors: [I+1, C] of texts and attributes.
    """
    groups = {name: catalog.codes(name) for name in ("category", "brand", "seller_id")}
    for level in range(max(catalog.category_depth, 1)):
        groups[f"category/{level}"] = catalog.codes("category", level)

    def known(column: NDArray[Any] | None, missing: float) -> Any:
        if column is None or not len(column):
            return None
        has_value = ~np.isnan(column) if np.isnan(missing) else column != missing
        return column if has_value[1:].any() else None

    return ItemFacts(
        num_items=catalog.num_items,
        groups=groups,
        having=catalog.having,
        row_of=catalog.row_of,
        vectors=known(vectors, 0),
        content_vectors=known(content_vectors, 0),
        prices=known(catalog.prices, np.nan),
        margins=known(catalog.margins, np.nan),
        available_from=known(catalog.available_from, 0),
        available_until=known(catalog.available_until, 0),
        stock=known(catalog.stock, -1),
        popularity=known(catalog.popularity, 0),
    )


def check_policies(config: object, catalog: Catalog) -> None:
    """Raise PolicyError unless these are policies (see policies_from_config) that fit a catalog."""
    policies_from_config(config).bound_to(item_facts(catalog))


@dataclass(frozen=True)
class Exposure:
    """How one seller or brand fared under an exposure rule."""

    rule: str
    group: str  # its name; "" for items without one
    due: float  # share of the slate's attention that the rule owed it
    given: float  # share that it got


@dataclass(frozen=True)
class Filtered:
    """What one hard filter did to the catalog: with request filters and the filters before it taken first."""

    rule: str
    num_in: int
    num_out: int


@dataclass(frozen=True)
class ItemReasons:
    """Why an item stands where it does. Places count from 1; None: it did not come that far."""

    source: str
    retrieval_place: int | None
    retrieval_score: float | None  # on the scale of its source
    ranking_place: int | None
    ranking_score: float | None
    transition_score: float | None  # of ranking_score: what transitions added
    relevance: float  # 0 to 1, by the ranking's scores alone
    adjusted_relevance: float
    moves: list[Move]


@dataclass(frozen=True)
class Explanation:
    """What is worked out only where a request asks for it."""

    filters: list[Filtered]
    effects: list[Effect]  # of the other rules, in the order in which they count
    items: Mapping[int, ItemReasons]  # by row: of the slate, and of those that would be on it without rules
    displaced: list[int]  # rows of the latter that are not on the slate, best first


@dataclass(frozen=True)
class Arrangement:
    """How the slate came to be arranged as it is."""

    policy: str
    seed: int
    now_ms: int | None
    yields: Mapping[str, int] = field(default_factory=dict)  # soft rule -> places at which it gave way
    exposure: list[Exposure] = field(default_factory=list)
    explanation: Explanation | None = None


def exposure_of(policy: Policy, arranged: Reranked, catalog: Catalog) -> list[Exposure]:
    """Return the accounts of a slate's exposure rules, with names for numbers."""
    field_of = {rule.name: rule.field for rule in policy.rules if isinstance(rule, ExposureRule)}
    return [
        Exposure(rule, catalog.names[field_of[rule]][one.seller], one.due, one.given)
        for rule, account in arranged.exposure.items()
        for one in account
    ]


def _source(candidates: ItemList, place: int) -> str:
    return candidates.names[int(candidates.source_of[place - 1])]


def explanation(
    arranged: Reranked,
    filtered: list[Filtered],
    candidates: ItemList,
    ranked: Ranked,
    gained: Callable[[NDArray[np.int32]], NDArray[np.float32]] | None,
) -> Explanation | None:
    """Return why a slate is what it is; None where its reasons were not worked out.

    Args:
        arranged: the slate.
        filtered: what the filters did before.
        candidates: what retrieval found, best first.
        ranked: what ranking made of it.
        gained: of item rows, what transitions added to their scores; None where no ranker scored them.
    """
    reasons = arranged.reasons
    if reasons is None:
        return None

    def place_and_score(items: ItemList, row: int) -> tuple[int, float] | tuple[None, None]:
        found = np.flatnonzero(items.rows == row)
        return (int(found[0]) + 1, float(items.scores[found[0]])) if len(found) else (None, None)

    gains = None if gained is None else gained(np.fromiter(reasons.moves, np.int32)).tolist()
    items = {}
    for number, (row, moves) in enumerate(reasons.moves.items()):
        retrieval_place, retrieval_score = place_and_score(candidates, row)
        ranking_place, ranking_score = place_and_score(ranked.items, row)
        if ranking_place is None:
            _, ranking_score = place_and_score(ranked.scored, row)
        source = "pin" if retrieval_place is None else _source(candidates, retrieval_place)
        relevance, adjusted = reasons.relevance[row]
        items[row] = ItemReasons(
            source=source,
            retrieval_place=retrieval_place,
            retrieval_score=retrieval_score,
            ranking_place=ranking_place,
            ranking_score=ranking_score,
            transition_score=None if gains is None or ranking_score is None else gains[number],
            relevance=relevance,
            adjusted_relevance=adjusted,
            moves=moves,
        )
    filters = {one.rule for one in filtered}
    shown = set(arranged.rows.tolist())
    return Explanation(
        filtered,
        [effect for effect in reasons.effects if effect.rule not in filters],
        items,
        [row for row in items if row not in shown],
    )
