"""The rules that turn a ranking into a slate: one small class each.

A rule takes the order that the rule before it made and returns its own: it may move items and drop them.
All rules here are soft: where keeping to one would leave the slate short, it yields and says so (`relaxed`).
A rule knows nothing of the rules before it, so the one whose word must stand comes last: MMR, then Cap.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

GROUP_FIELDS = ("category", "brand", "seller_id")


@dataclass(frozen=True)
class RankedItems:
    """N items as ranking left them, best first, with what the rules look at."""

    rows: NDArray[np.int32]  # [N] item rows, 1..I
    scores: NDArray[np.float32]  # [N] finite, descending
    vectors: NDArray[np.float32]  # [N, D]
    groups: dict[str, NDArray[np.int32]]  # one of GROUP_FIELDS -> [N] group of each item, 0 = missing
    seen: NDArray[np.bool_]  # [N] the user already had to do with the item

    def __post_init__(self) -> None:
        for name, array in [
            ("scores", self.scores),
            ("vectors", self.vectors),
            ("seen", self.seen),
            *self.groups.items(),
        ]:
            if len(array) != len(self.rows):
                raise ValueError(f"{name} has {len(array)} entries; expected {len(self.rows)}, one an item")
        if not np.isfinite(self.scores).all():
            raise ValueError("scores holds NaN or infinity; expected finite numbers")


class Rule(Protocol):
    """One reason to move or drop items."""

    @property
    def name(self) -> str:
        """What responses, logs and metrics call this rule."""

    def apply(
        self, items: RankedItems, order: NDArray[np.int64], limit: int
    ) -> tuple[NDArray[np.int64], bool]:
        """Return the new order, and whether the rule had to yield to fill the slate.

        Args:
            items: N ranked items.
            order: [M] int64 indices into `items`, none twice: what the rule before this one returned.
            limit: the length of the slate, at least 1. Only the first `limit` of the last order are shown.
        """


@dataclass(frozen=True)
class DropSeen:
    """Drop what the user already had to do with; seen items fill up, last, where too few are unseen."""

    name: ClassVar[str] = "drop_seen"

    def apply(
        self, items: RankedItems, order: NDArray[np.int64], limit: int
    ) -> tuple[NDArray[np.int64], bool]:
        """See Rule.apply."""
        seen = items.seen[order]
        unseen = order[~seen]
        filling = order[seen][: max(0, limit - len(unseen))]
        return np.concatenate([unseen, filling]), len(filling) > 0


@dataclass(frozen=True)
class Cap:
    """Show at most `max_items` of one group; the others of the group move behind all that are within the cap.

    Items whose group is missing (0) are never capped.
    """

    field: str  # one of GROUP_FIELDS
    max_items: int

    def __post_init__(self) -> None:
        if self.field not in GROUP_FIELDS:
            raise ValueError(f"cap: field is {self.field!r}; expected {_choice(self.field, GROUP_FIELDS)}")
        if type(self.max_items) is not int or self.max_items < 1:
            raise ValueError(f"cap: max_items is {self.max_items!r}; expected a whole number of at least 1")

    @property
    def name(self) -> str:
        """The rule with its field, as one policy may hold several caps: "cap:brand"."""
        return f"cap:{self.field}"

    def apply(
        self, items: RankedItems, order: NDArray[np.int64], limit: int
    ) -> tuple[NDArray[np.int64], bool]:
        """See Rule.apply."""
        groups = items.groups[self.field][order]
        by_group = np.argsort(groups, kind="stable")
        num_before = np.empty(len(order), np.int64)  # items of the same group that stand before each item
        num_before[by_group] = np.arange(len(order)) - np.searchsorted(groups[by_group], groups[by_group])
        within = (groups == 0) | (num_before < self.max_items)
        num_within = int(np.count_nonzero(within))
        relaxed = num_within < min(limit, len(order))
        return np.concatenate([order[within], order[~within]]), relaxed


@dataclass(frozen=True)
class MMR:
    """Maximal marginal relevance: trade an item's score against its likeness to the items chosen before it.

    Carbonell & Goldstein 1998. The next item is the one with the largest

        w * relevance - (1 - w) * (largest cosine with an item already chosen)

    where relevance is the score, scaled over `order` to lie in [0, 1], so that w means the same for every
    ranker. Equal values go to the item that came first. An all-zero vector is like nothing (cosine 0).
    The first `limit` items are chosen so; the rest follow in their old order.
    """

    relevance_weight: float  # w: 1 ranks by score alone, 0 by difference alone

    name: ClassVar[str] = "mmr"

    def __post_init__(self) -> None:
        weight = self.relevance_weight
        if type(weight) not in (int, float) or not 0 <= weight <= 1:
            raise ValueError(f"mmr: relevance_weight is {weight!r}; expected a number from 0 to 1")

    def apply(
        self, items: RankedItems, order: NDArray[np.int64], limit: int
    ) -> tuple[NDArray[np.int64], bool]:
        """See Rule.apply; relaxed is always False."""
        if not len(order):
            return order, False
        scores = items.scores[order].astype(np.float64)
        spread = scores.max() - scores.min()
        relevance = self.relevance_weight * (scores - scores.min()) / (spread if spread > 0 else 1.0)
        vectors = items.vectors[order]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        directions = vectors / np.where(norms > 0, norms, 1)

        chosen = np.empty(min(limit, len(order)), np.int64)
        likeness = np.zeros(len(order))  # the largest cosine with an item already chosen
        for step in range(len(chosen)):
            pick = int((relevance - (1 - self.relevance_weight) * likeness).argmax())
            chosen[step] = pick
            relevance[pick] = -np.inf  # never again
            cosines = directions @ directions[pick]
            likeness = np.maximum(likeness, cosines) if step else cosines
        rest = np.delete(order, chosen)
        return np.concatenate([order[chosen], rest]), False


RULES: dict[str, type[DropSeen] | type[Cap] | type[MMR]] = {"drop_seen": DropSeen, "cap": Cap, "mmr": MMR}


def rules_from_config(config: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """Return the rules of a policy, in its order.

    Args:
        config: one mapping a rule: "rule" names it (a key of RULES), the other keys are its settings:
            [{"rule": "drop_seen"}, {"rule": "mmr", "relevance_weight": 0.8},
             {"rule": "cap", "field": "category", "max_items": 3}]

    Raises:
        ValueError: on an unknown rule or key, a missing key, or a value out of range.
    """
    return [_rule_from_config(f"rules[{place}]", entry) for place, entry in enumerate(config)]


def _rule_from_config(place: str, entry: Mapping[str, Any]) -> Rule:
    if not isinstance(entry, Mapping) or "rule" not in entry:
        raise ValueError(f"{place} is {entry!r}; expected a mapping with the key 'rule'")
    name = entry["rule"]
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"{place}: rule is {name!r}; expected {_choice(name, RULES)}")
    settings = {key: value for key, value in entry.items() if key != "rule"}
    known = [field.name for field in dataclasses.fields(RULES[name])]
    for key in settings:
        if key not in known:
            allowed = _choice(key, known) if known else "no settings"
            raise ValueError(f"{place}: {name} has no setting {key!r}; expected {allowed}")
    for key in known:
        if key not in settings:
            raise ValueError(f"{place}: {name} needs the setting {key!r}")
    try:
        return RULES[name](**settings)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _choice(given: object, allowed: Iterable[str]) -> str:
    """Return the allowed words for an error message, and which of them is nearest to what was given."""
    allowed = list(allowed)
    words = allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"
    nearest = difflib.get_close_matches(str(given), allowed, n=1)
    return f"{words} (did you mean {nearest[0]!r}?)" if nearest else words
