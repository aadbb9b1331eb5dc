"""Policies at work on one catalog: item rows and scores in, the slate out."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reranking.families import Filter, Rule
from reranking.items import ItemFacts, RankedItems, Request, last_purchase
from reranking.policy import Policies, Policy
from reranking.rerank import Reranked, rerank
from reranking.slots import Pin

MOMENTS_KEPT = 16  # of which the filters' answers are kept: a byte an item each
RESERVE_LENGTH = 500  # items of the reserve that take part where it is needed, or `limit` where that is more

NO_ROWS = np.zeros(0, np.int32)
NO_SCORES = np.zeros(0, np.float32)


class Purchases(NamedTuple):
    """What the visitor bought, B events in any order."""

    rows: NDArray[np.int32] = NO_ROWS  # [B]
    times_ms: NDArray[np.int64] = np.zeros(0, np.int64)  # [B], 0 = unknown


NO_PURCHASES = Purchases()


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """What the stages before re-ranking found for a request."""

    rows: NDArray[np.int32]  # [N] ranked items, best first, none twice
    scores: NDArray[np.float32]  # [N] finite, descending
    reserve_rows: NDArray[np.int32] = field(
        default_factory=lambda: NO_ROWS
    )  # [M] what retrieval found, in any order; what is ranked may stand here too
    reserve_scores: NDArray[np.float32] = field(
        default_factory=lambda: NO_SCORES
    )  # [M] finite, on a scale of their own; equal ones count by their order
    seen: NDArray[np.bool_] | None = None  # [I+1] the visitor already had to do with the item
    # [I+1] what the request's own filters and exclusions let through. The items above have passed them; an
    # item that only a pin names is shown only where this says so, and never where it is None.
    eligible: NDArray[np.bool_] | None = None
    purchases: Purchases = NO_PURCHASES


class Reranker:
    """Policies bound to a catalog. Holds no state of a request: any number of threads may call it at once.

    Attributes:
        policies: bound to the catalog.
        warnings: what the catalog lacks that some rule reads, a sentence each.
    """

    def __init__(self, policies: Policies, facts: ItemFacts) -> None:
        """Bind the policies; PolicyError where one does not fit the catalog."""
        self.facts = facts
        self.policies = policies.bound_to(facts)
        self.warnings = policies.warnings(facts)
        filters = [
            r for policy in self.policies.by_name.values() for r in policy.rules if isinstance(r, Filter)
        ]
        self._catalog = facts.whole({column for rule in filters for column in rule.reads})
        # What a filter says whoever asks, [I+1]: worked out once.
        self._allowed = {rule: rule.allows(self._catalog) for rule in filters if not rule.asks_request}
        # A rule's hash takes in all it names, 100,000 item ids maybe: too long for each request.
        numbers = {rule: number for number, rule in enumerate(filters)}  # equal ones have one
        self._numbers = {id(rule): numbers[rule] for rule in filters}
        # What the filters of a policy say together at a moment (Filter.moment), of late.
        self._together: dict[Hashable, NDArray[np.bool_]] = {}
        self._lock = threading.Lock()

    def policy(self, name: str | None = None, overrides: Mapping[str, float] | None = None) -> Policy:
        """Return what a request asks for; PolicyError where that is not allowed."""
        return self.policies[name].with_overrides(overrides or {})

    def filters(
        self, policy: Policy, request: Request, purchases: Purchases = NO_PURCHASES
    ) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield the name of every hard filter of a policy, and which items it allows, [I+1] bool.

        Args:
            policy: one that `policy` returned.
            request: who asks.
            purchases: what the visitor bought.
        """
        return self._masks([r for r in policy.rules if isinstance(r, Filter)], request, purchases)

    def _masks(
        self, rules: Sequence[Filter], request: Request, purchases: Purchases
    ) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        catalog = replace(self._catalog, request=request)
        for rule in rules:
            if rule in self._allowed:
                yield rule.name, self._allowed[rule]
            elif "bought_at" in rule.reads:  # only what was bought can be forbidden
                rows = np.unique(purchases.rows)
                bought = catalog.take(rows)
                last = last_purchase(rows, purchases.rows, purchases.times_ms)
                allowed = np.ones(len(catalog), np.bool_)
                allowed[rows] = rule.allows(replace(bought, bought_at=last))
                yield rule.name, allowed
            else:
                yield rule.name, rule.allows(catalog)

    def allowed(
        self, policy: Policy, request: Request, purchases: Purchases = NO_PURCHASES
    ) -> NDArray[np.bool_]:
        """Return which items all hard filters of a policy allow: [I+1] bool, not to be changed, row 0 False.

        What `filters` yields, taken together. What is the same for all requests of a moment is kept.
        """
        shared, own = [], []
        for rule in policy.rules:
            if isinstance(rule, Filter):
                moment = rule.moment(request)
                if moment is None:
                    own.append(rule)
                else:
                    shared.append((rule, moment))
        key = tuple((self._numbers.get(id(rule), rule), moment) for rule, moment in shared)
        found = self._together.get(key)
        if found is None:
            found = self._all_of([rule for rule, _ in shared], request, purchases)
            found.setflags(write=False)
            with self._lock:
                while len(self._together) >= MOMENTS_KEPT:
                    del self._together[next(iter(self._together))]  # the oldest
                self._together[key] = found
        return found & self._all_of(own, request, purchases) if own else found

    def _all_of(self, rules: Sequence[Filter], request: Request, purchases: Purchases) -> NDArray[np.bool_]:
        allowed = np.ones(len(self._catalog), np.bool_)
        allowed[0] = False
        for _, mask in self._masks(rules, request, purchases):
            allowed &= mask
        return allowed

    def slate(
        self, policy: Policy, funnel: Funnel, limit: int, request: Request, *, explain: bool = False
    ) -> Reranked:
        """Return the slate.

        `order` holds positions in the funnel's lists, the reserve counted on from N; -1 is a pinned item that
        is in neither.

        Args:
            policy: one that `policy` returned.
            funnel: what there is to show.
            limit: places, at least 1; fewer are filled only where the hard filters let fewer items through.
            request: who asks.
            explain: whether to work out the reasons.
        """
        num_ranked = len(funnel.rows)
        pinned = self._pinned(policy, funnel)
        rows = np.concatenate([funnel.rows, pinned]) if len(pinned) else funnel.rows
        scores = funnel.scores
        if len(pinned):
            scores = np.concatenate([scores, np.zeros(len(pinned), np.float32)])
        items = self._items(policy.rules, rows, scores, funnel, request)
        positions = np.zeros(0, np.int64)  # in the reserve, of those that take part

        def reserve() -> RankedItems:
            nonlocal positions
            new = np.flatnonzero(~np.isin(funnel.reserve_rows, rows))
            new = new[self._allows(policy, funnel, funnel.reserve_rows[new], request)]
            best_first = np.argsort(-funnel.reserve_scores[new], kind="stable")
            positions = new[best_first][: max(RESERVE_LENGTH, limit)]
            found = funnel.reserve_rows[positions], funnel.reserve_scores[positions]
            return self._items(policy.rules, *found, funnel, request)

        result = rerank(
            items,
            policy.rules,
            limit,
            reserve=reserve if len(funnel.reserve_rows) else None,
            pin_only=len(pinned),
            explain=explain,
        )
        place_of = [np.arange(num_ranked), np.full(len(pinned), -1), num_ranked + positions]
        return replace(result, order=np.concatenate(place_of)[result.order])

    def _allows(
        self, policy: Policy, funnel: Funnel, rows: NDArray[np.int32], request: Request
    ) -> NDArray[np.bool_]:
        """Return which items (rows [N]) the policy's hard filters allow, [N] bool."""
        filters = [rule for rule in policy.rules if isinstance(rule, Filter)]
        items = self._items(filters, rows, np.zeros(len(rows), np.float32), funnel, request)
        allowed = np.ones(len(rows), np.bool_)
        for rule in filters:
            allowed &= rule.allows(items)
        return allowed

    def _pinned(self, policy: Policy, funnel: Funnel) -> NDArray[np.int32]:
        """Return the rows of the pinned items that were not ranked and may be shown."""
        if funnel.eligible is None:
            # Those of the reserve have passed the request's filters.
            rows = {pin.row for pin in policy.rules if isinstance(pin, Pin)} - set(funnel.rows.tolist())
            return np.array([row for row in funnel.reserve_rows if row in rows], np.int32)
        return np.array(
            [
                pin.row
                for pin in policy.rules
                if isinstance(pin, Pin) and funnel.eligible[pin.row] and not (funnel.rows == pin.row).any()
            ],
            np.int32,
        )

    def _items(
        self,
        rules: Sequence[Rule],
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
        funnel: Funnel,
        request: Request,
    ) -> RankedItems:
        """Return the items with what these rules read."""
        columns = {column for rule in rules for column in rule.reads}
        bought_at = None
        if "bought_at" in columns:
            bought_at = last_purchase(rows, funnel.purchases.rows, funnel.purchases.times_ms)
        seen = np.zeros(len(rows), np.bool_) if funnel.seen is None else funnel.seen.take(rows)
        return self.facts.ranked(
            rows,
            scores,
            seen,
            columns=columns,
            groups={group for rule in rules for group in rule.groups},
            bought_at=bought_at,
            request=request,
        )
