"""From the ranked items to the slate, in one pass.

What rules say counts in this order, wherever a policy lists them:

1. Filters: an item that one forbids is never shown.
2. Adjustments: relevance is the score, scaled over the ranked items to run from 0 to 1, and what they add.
3. The slate is built place by place. A pin takes its place. Anywhere else stands the item that the soft
   rules object to least; among equals, the one of the largest worth: its relevance, or what the diversity
   rule makes of it beside the items chosen before. Equal worth goes to the better ranked item.

Of soft rules the later one has the last word: its objection weighs more than those of all earlier ones
together. So the earlier ones yield first, each for one place at a time. Items of the reserve (what retrieval
found and ranking did not keep) come in where no ranked item is left that every soft rule agrees to: before a
rule yields, and before a slate is short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reranking.constraints import ExposureGuard
from reranking.families import (
    Adjustment,
    Diversity,
    Filter,
    Floats,
    Guard,
    Mask,
    Page,
    Rule,
    SoftRule,
    Worth,
)
from reranking.items import RankedItems
from reranking.slots import Explore, Pin

MAX_SOFT_RULES = 20  # their weights are powers of two in a float32


@dataclass(frozen=True)
class SellerExposure:
    """How one seller fared under an exposure rule."""

    seller: int  # its number in RankedItems.groups
    due: float  # share of the slate's exposure that the rule owed it
    given: float  # share that it got


@dataclass(frozen=True)
class Move:
    """What one rule did to one item.

    Places count from 1 and go on beyond the slate, by relevance. None: the item may not be shown.
    """

    rule: str
    from_place: int | None
    to_place: int | None


@dataclass(frozen=True)
class Effect:
    """What one rule did to the slate."""

    rule: str
    num_entered: int  # items that came into the slate
    num_left: int  # items that went out of the slate
    num_moved: int  # items that are in the slate before and after, on another place
    num_yielded: int  # places at which the rule yielded


@dataclass(frozen=True)
class Reasons:
    """Why the slate is what it is.

    A rule's effect is the difference that it makes when the rules are taken one by one, in the order in which
    they count: filters, adjustments, diversity, soft rules from the weakest, pins. So the moves of an item
    lead from its place in the ranking to its place in the slate without a gap.
    """

    moves: dict[int, list[Move]]  # item row -> its moves; items of the slate and of the first of the ranking
    relevance: dict[int, tuple[float, float]]  # of the same items: by the scores alone, and adjusted
    effects: list[Effect]


@dataclass(frozen=True)
class Reranked:
    """The slate."""

    order: NDArray[np.int64]  # [L <= limit] positions in the ranked items, those of the reserve counted on
    rows: NDArray[np.int32]  # [L] the item rows
    relaxed: list[str]  # names of the soft rules that yielded, in the policy's order
    yields: dict[str, int]  # of each of these: places at which it did
    exposure: dict[str, list[SellerExposure]]  # exposure rule -> its account, by seller
    reasons: Reasons | None = None


def rerank(
    items: RankedItems,
    rules: Sequence[Rule],
    limit: int,
    *,
    reserve: Callable[[], RankedItems] | None = None,
    pin_only: int = 0,
    explain: bool = False,
) -> Reranked:
    """Return the slate: `limit` items, fewer only where fewer pass the filters.

    The same arguments give the same slate. With no rules, it is the ranking as it is.

    Args:
        items: N ranked items, best first.
        rules: the policy's rules, in its order.
        limit: places of the slate, at least 1.
        reserve: returns further items, best first, with scores on a scale of their own; called only where the
            ranked ones do not suffice. Those that are ranked already are left out.
        pin_only: the last items of `items` that are there for a pin to find, and for nothing else.
        explain: whether to work out the reasons; without it nothing is computed for them.

    Raises:
        ValueError: limit is below 1, or a rule cannot work: not bound to a catalog, too many soft rules.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    items.check()
    num_ranked = len(items) - pin_only
    pool = _Pool(items, num_ranked, pin_only)
    built = _build(pool, rules, limit)
    if reserve is not None and (len(built.order) < limit or built.wants_reserve):
        more = reserve()
        if len(more):
            pool = pool.with_reserve(more)
            built = _build(pool, rules, limit)
    order = np.array(built.order, np.int64)
    return Reranked(
        order=order,
        rows=pool.items.rows[order],
        relaxed=[rule.name for rule in rules if rule.name in built.yields],
        yields=built.yields,
        exposure=built.exposure,
        reasons=_reasons(pool, rules, limit, built) if explain else None,
    )


@dataclass(frozen=True)
class _Pool:
    """Ranked items, then those for pins only, then the reserve."""

    items: RankedItems
    num_ranked: int
    pin_only: int

    def with_reserve(self, reserve: RankedItems) -> _Pool:
        new = ~np.isin(reserve.rows, self.items.rows)
        items = self.items.followed_by(reserve.take(new))
        items.check()
        return _Pool(items, self.num_ranked, self.pin_only)

    def relevance(self) -> Floats:
        """Scale the scores of the ranked items and, apart from them, of the reserve to run from 0 to 1."""
        relevance = np.zeros(len(self.items), np.float32)
        for part in (slice(0, self.num_ranked), slice(self.num_ranked + self.pin_only, None)):
            scores = self.items.scores[part].astype(np.float64)
            if len(scores):
                low = scores.min()
                spread = scores.max() - low
                relevance[part] = (scores - low) / (spread if spread > 0 else 1.0)
        return relevance


@dataclass(frozen=True)
class _Built:
    order: list[int]
    yields: dict[str, int]
    exposure: dict[str, list[SellerExposure]]
    wants_reserve: bool  # some rule yielded that an item of the reserve might have satisfied
    allowed: Mask  # by the filters
    scaled: Floats  # relevance by the scores alone
    relevance: Floats  # adjusted


def _build(pool: _Pool, rules: Sequence[Rule], limit: int) -> _Built:
    items = pool.items
    allowed = np.ones(len(items), np.bool_)
    scaled = pool.relevance()
    relevance = scaled
    diversity: Diversity | None = None
    soft: list[SoftRule] = []
    pins: list[Pin] = []
    for rule in rules:
        match rule:
            case Filter():
                allowed &= rule.allows(items)
            case Adjustment():
                relevance = relevance + rule.added(items)
            case Diversity():
                diversity = rule
            case SoftRule():
                soft.append(rule)
            case Pin():
                pins.append(rule)
            case _:
                raise TypeError(f"{rule!r} is of no family of rules")
    if len(soft) > MAX_SOFT_RULES:
        raise ValueError(f"{len(soft)} soft rules; expected at most {MAX_SOFT_RULES}")

    pinned, homeless = _pinned(pool, pins, allowed, limit)
    available = allowed
    if pinned or pool.pin_only:
        available = allowed.copy()
        available[list(pinned.values())] = False
        available[pool.num_ranked : pool.num_ranked + pool.pin_only] = False
    # Penalties are sums of powers of two: every set of objecting rules has a level of its own, and levels lie
    # farther apart than any two worths, so the largest (worth - penalty) is the right item.
    unit = _unit(relevance[available], diversity.spread if diversity else 0.0)
    penalty = np.zeros(len(items), np.float32)
    penalty[pool.num_ranked :] = unit  # the reserve
    page = Page(
        items=items,
        limit=limit,
        num_ranked=pool.num_ranked,
        relevance=relevance,
        unadjusted=scaled,
        available=available,
        pins=pinned,
        penalty=penalty,
        lasting=penalty.copy(),
    )
    if diversity is None:
        page.worth = Worth(np.where(available, relevance, np.float32(-np.inf)))
    else:
        page.worth = diversity.start(page)
    started = [(rule, rule.start(page, unit * 2.0 ** (i + 1))) for i, rule in enumerate(soft)]
    # Explore looks at what the others object to.
    started.sort(key=lambda pair: isinstance(pair[0], Explore))
    guards = [guard for _, guard in started if guard is not None]

    order, levels = _fill(page, guards)
    yields, wants_reserve = _yields(soft, levels, unit)
    for pin in homeless:
        yields[pin.name] = 1
    exposure = {
        rule.name: _account(guard, order) for rule, guard in started if isinstance(guard, ExposureGuard)
    }
    return _Built(order, yields, exposure, wants_reserve, allowed, scaled, relevance)


def _fill(page: Page, guards: Sequence[Guard]) -> tuple[list[int], list[float]]:
    """Return the items place by place, and the penalties of those that some soft rule objected to."""
    worth, penalty, pins = page.worth, page.penalty, page.pins
    value = worth.value
    difference = np.empty_like(value)
    order: list[int] = []
    levels: list[float] = []
    entering = [guard.enter for guard in guards if type(guard).enter is not Guard.enter]
    for place in range(page.limit):
        for enter in entering:
            enter(place)
        worth.enter(page.lasting)
        pick = pins.get(place, -1)
        if pick < 0:
            np.subtract(value, penalty, out=difference)
            if not len(difference):
                break
            pick = int(difference.argmax())
            if difference.item(pick) == -math.inf:
                break
            level = penalty.item(pick)
            if level > 0:  # beside a penalty, small differences of worth were rounded away
                equals = (penalty == level).nonzero()[0]
                pick = int(equals[value[equals].argmax()])
                levels.append(level)
        order.append(pick)
        worth.chose(pick)
        for guard in guards:
            guard.chose(place, pick)
    # Too few items to reach the last pins: these close ranks.
    order += [pick for place, pick in sorted(pins.items()) if place >= len(order) and pick not in order]
    return order, levels


def _pinned(pool: _Pool, pins: Sequence[Pin], allowed: Mask, limit: int) -> tuple[dict[int, int], list[Pin]]:
    """Return place -> item for the pins of this slate, and the pins whose item is not to be had.

    A pin never looks into the reserve, which is not there in every request.
    """
    rows = pool.items.rows[: pool.num_ranked + pool.pin_only]
    pinned: dict[int, int] = {}
    homeless = []
    for pin in pins:
        if pin.row is None:
            raise ValueError(f"{pin.name} names an item and is not bound to a catalog; call bound_to first")
        if pin.place > limit:
            continue
        found = (rows == pin.row).nonzero()[0]
        if len(found) and allowed[found[0]]:
            pinned[pin.place - 1] = int(found[0])
        else:
            homeless.append(pin)
    return pinned, homeless


def _unit(relevance: Floats, spread: float) -> float:
    """Return a power of two above twice the distance that two worths can have."""
    reach = spread + (float(relevance.max() - relevance.min()) if len(relevance) else 0.0)
    return 2.0 ** math.ceil(math.log2(max(2 * reach, 1.0)) + 1)


def _yields(soft: Sequence[SoftRule], levels: Sequence[float], unit: float) -> tuple[dict[str, int], bool]:
    yields: dict[str, int] = {}
    wants_reserve = False
    for level in levels:
        objecting = int(level / unit)
        for bit, rule in enumerate(soft, start=1):
            if objecting >> bit & 1:
                yields[rule.name] = yields.get(rule.name, 0) + 1
                wants_reserve |= not rule.ranked_only
    return yields, wants_reserve


def _account(guard: ExposureGuard, order: Sequence[int]) -> list[SellerExposure]:
    shown = guard.given_by(order)
    total = max(float(shown.sum()), 1e-12)
    return [
        SellerExposure(int(seller), float(due), float(given) / total)
        for seller, due, given in zip(guard.sellers, guard.share, shown, strict=True)
        if due > 0 or given > 0
    ]


# Reasons.


def _counting_order(rules: Sequence[Rule]) -> list[Rule]:
    families = (Filter, Adjustment, Diversity, SoftRule, Pin)
    return [rule for family in families for rule in rules if isinstance(rule, family)]


def _reasons(pool: _Pool, rules: Sequence[Rule], limit: int, final: _Built) -> Reasons:
    rows: list[int] = pool.items.rows.tolist()
    ladder = _counting_order(rules)
    before = _places(pool, _build(pool, [], limit))
    watched = dict.fromkeys([*sorted(before, key=before.__getitem__)[:limit], *final.order])
    moves: dict[int, list[Move]] = {rows[pick]: [] for pick in watched}
    effects = []
    for step, rule in enumerate(ladder, start=1):
        # The policy's own order decides among the soft rules, so what is taken is taken in that order.
        built = final if step == len(ladder) else _build(pool, _among(rules, ladder[:step]), limit)
        after = _places(pool, built)
        shown_before = {pick for pick, place in before.items() if place <= limit}
        shown_after = {pick for pick, place in after.items() if place <= limit}
        for pick in watched:
            if before.get(pick) != after.get(pick):
                moves[rows[pick]].append(Move(rule.name, before.get(pick), after.get(pick)))
        effects.append(
            Effect(
                rule=rule.name,
                num_entered=len(shown_after - shown_before),
                num_left=len(shown_before - shown_after),
                num_moved=sum(before[pick] != after[pick] for pick in shown_before & shown_after),
                num_yielded=final.yields.get(rule.name, 0),
            )
        )
        before = after
    relevance = {rows[pick]: (final.scaled.item(pick), final.relevance.item(pick)) for pick in watched}
    return Reasons(moves, relevance, effects)


def _among(rules: Sequence[Rule], taken: Sequence[Rule]) -> list[Rule]:
    return [rule for rule in rules if any(rule is one for one in taken)]


def _places(pool: _Pool, built: _Built) -> dict[int, int]:
    """Return the place of every item that may be shown: those of the slate, then the rest by relevance."""
    reserve = np.arange(len(pool.items)) >= pool.num_ranked
    rest = np.lexsort((-built.relevance, reserve))
    pin_only = range(pool.num_ranked, pool.num_ranked + pool.pin_only)
    shown = set(built.order)
    order = [*built.order]
    order += [
        pick for pick in rest.tolist() if pick not in shown and built.allowed[pick] and pick not in pin_only
    ]
    return {pick: place for place, pick in enumerate(order, start=1)}
