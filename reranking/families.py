"""The families of rules, and what a rule's settings may be.

A rule is a frozen dataclass: its fields are its settings, with their types and ranges, and there is no other
list of them. What a rule may do is its family; `reranking.rerank` says in which order they work.

    Filter       hard: says which items may be shown at all
    Adjustment   adds to the relevance or takes from it
    Diversity    says what an item is worth beside those chosen before it; one a policy
    SoftRule     objects to items at a place; yields where there is no other
    Pin          puts one item on one place

Settings that name a category, a brand, a seller, an attribute or an item are looked up in the catalog once,
when a rule is bound to it (`bound_to`), not in every request.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from reranking.items import ItemFacts, RankedItems, Request

LAST_PLACE = 500  # places of the longest slate

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


def setting(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a dataclass field: a setting with its default and its range.

    Args:
        default: what holds where the setting is not given; without it, the setting has to be given.
        low: the smallest value allowed.
        high: the largest value allowed.
        above: every value has to be larger than this.
    """
    metadata = {"low": low, "high": high, "above": above}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def looked_up() -> Any:
    """Return a dataclass field that is no setting: what `bound_to` found in the catalog."""
    return field(default=None, repr=False, compare=False, metadata={"looked_up": True})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One reason to move or drop items."""

    rule: ClassVar[str]  # what policies call it
    columns: ClassVar[tuple[str, ...]] = ()  # of RankedItems, that the rule reads
    absent: ClassVar[str] = ""  # what a missing value in one of these columns means

    def __post_init__(self) -> None:
        for setting_ in settings_of(type(self)):
            given = getattr(self, setting_.name)
            checked = _checked(f"{self.rule}: {setting_.name}", given, setting_)
            object.__setattr__(self, setting_.name, checked)
        self.check()

    def check(self) -> None:
        """Raise ValueError where settings that are right by themselves do not go together."""

    @property
    def name(self) -> str:
        """What responses, logs, metrics and overrides call it; no two rules of a policy have the same."""
        return self.rule

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of RankedItems that the rule reads as it is set."""
        return self.columns

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of RankedItems that the rule reads."""
        return ()

    @property
    def context_keys(self) -> tuple[str, ...]:
        """The keys of the request's context that the rule reads."""
        return ()

    def bound_to(self, facts: ItemFacts) -> Self:
        """Return the rule with what it names looked up in a catalog; ValueError where that has none such."""
        return self


class Filter(Rule):
    """Hard: no item that it forbids is ever shown."""

    asks_request: ClassVar[bool] = False  # whether the answer depends on who asks, and when

    @abstractmethod
    def allows(self, items: RankedItems) -> Mask:
        """Return which items may be shown, [N] bool; for each item by itself, whatever the others are."""

    def moment(self, request: Request) -> Hashable | None:
        """Return what of a request the answer depends on: for equal ones the bound rule answers the same.

        None for a rule whose answers are nobody else's.
        """
        return None if self.asks_request else ()


class Adjustment(Rule):
    """Makes items worth more or less."""

    @abstractmethod
    def added(self, items: RankedItems) -> Floats:
        """Return what to add to each item's relevance, [N] float32. Scores make a relevance from 0 to 1."""


class Diversity(Rule):
    """Says what an item is worth beside those that were chosen before it."""

    @property
    @abstractmethod
    def spread(self) -> float:
        """How far apart two items of equal relevance can be in worth."""

    @abstractmethod
    def start(self, page: Page) -> Worth:
        """Return the worth of the page's items with none chosen; page.worth is not there yet."""


class Worth:
    """What each item is worth at the next place: `value` [N] float32, -inf for what cannot be chosen."""

    def __init__(self, value: Floats) -> None:
        self.value = value

    def enter(self, lasting: Floats) -> None:
        """Make ready for the next place; see Page.lasting [N]."""

    def chose(self, pick: int) -> None:
        """Take note of the item chosen: it cannot be chosen again."""
        self.value[pick] = -np.inf


@dataclass(kw_only=True)
class Page:
    """A slate in the making, as the rules see it: N items for `limit` places (0 is the first)."""

    items: RankedItems
    limit: int
    num_ranked: int  # items before this one were ranked, those from it on are of the reserve
    relevance: Floats  # [N] adjusted
    unadjusted: Floats  # [N] relevance by the scores alone, 0 to 1
    available: Mask  # [N] what may be chosen: all that the filters allow, but for what is pinned
    pins: Mapping[int, int]  # place -> the item that will stand there
    penalty: Floats  # [N] what the soft rules hold against each item at the next place
    lasting: Floats  # [N] of that, what they will hold against it at all places behind
    worth: Worth = field(init=False)


class Guard:
    """A soft rule at work on one page: it moves its own `weight` into page.penalty and out of it.

    Where it will never take it out, it moves it into page.lasting too.
    """

    def enter(self, place: int) -> None:
        """Object to items at this place."""

    def chose(self, place: int, pick: int) -> None:
        """Take note that the item stands at this place."""


class SoftRule(Rule):
    """Objects to items at a place; where every item left is objected to, the weakest rules yield."""

    ranked_only: ClassVar[bool] = False  # whether items of the reserve can never satisfy it

    @abstractmethod
    def start(self, page: Page, weight: float) -> Guard | None:
        """Return the rule at work, or None where what it did to page.penalty is all it has to say."""


SELECTABLE = ("category", "brand", "seller_id", "attribute", "item_id")


@dataclass(frozen=True, kw_only=True)
class Selection(Rule):
    """A rule about some items.

    Values of one field are alternatives, and an item has to meet every field that is given. A category is any
    level of an item's path.
    """

    category: tuple[str, ...] = setting(())
    brand: tuple[str, ...] = setting(())
    seller_id: tuple[str, ...] = setting(())
    attribute: tuple[str, ...] = setting(())
    item_id: tuple[str, ...] = setting(())
    selected: Mask | None = looked_up()  # [I+1]

    def check(self) -> None:
        """See Rule.check."""
        if not self.selection:
            raise ValueError(f"{self.rule}: no items are named; expected {choice('', SELECTABLE)}")

    @property
    def selection(self) -> dict[str, tuple[str, ...]]:
        """The fields that say something."""
        return {key: getattr(self, key) for key in SELECTABLE if getattr(self, key)}

    @property
    def name(self) -> str:
        """The rule with what it is about: "deny:brand=Acme,Apex"."""
        about = ";".join(f"{key}={','.join(values)}" for key, values in self.selection.items())
        return f"{self.rule}:{about}"

    def bound_to(self, facts: ItemFacts) -> Self:
        """See Rule.bound_to."""
        selected = np.ones(facts.num_items + 1, np.bool_)
        selected[0] = False
        for key, values in self.selection.items():
            having = np.zeros_like(selected)
            for value in values:
                having[rows_of(facts, f"{self.rule}: {key}", key, value)] = True
            selected &= having
        return replace(self, selected=selected)

    def about(self, items: RankedItems) -> Mask:
        """Return which items the rule is about, [N] bool."""
        if self.selected is None:
            raise ValueError(f"{self.name} names items and is not bound to a catalog; call bound_to first")
        return self.selected.take(items.rows)


def rows_of(facts: ItemFacts, what: str, key: str, value: str) -> NDArray[np.int32]:
    """Return the rows that have a value; ValueError with the nearest known value where none has it."""
    if key == "item_id":
        if value in facts.row_of:
            return np.array([facts.row_of[value]], np.int32)
        known: Iterable[str] = facts.row_of
    else:
        having = facts.having.get(key, {})
        if value in having:
            return having[value]
        known = having
    known = list(known)
    if not known:
        raise ValueError(f"{what} is {value!r}; the catalog has no {key} at all")
    hint = nearest(value, known)
    raise ValueError(f"{what} is {value!r}; expected one of the catalog's {len(known):,}{hint}")


# What a setting may be.


_SETTINGS: dict[type[Rule], tuple[Setting, ...]] = {}  # reading type hints is slow


class Setting(NamedTuple):
    """A setting of a rule."""

    name: str
    hint: Any  # its type
    is_needed: bool
    limits: Mapping[str, Any]


def settings_of(rule: type[Rule]) -> tuple[Setting, ...]:
    """Return the settings of a rule."""
    if rule not in _SETTINGS:
        hints = typing.get_type_hints(rule)
        _SETTINGS[rule] = tuple(
            Setting(f.name, hints[f.name], f.default is MISSING, f.metadata)
            for f in dataclasses.fields(rule)
            if "looked_up" not in f.metadata
        )
    return _SETTINGS[rule]


def _checked(what: str, given: Any, setting_: Setting) -> Any:
    """Return a setting's value in its own type, or raise ValueError."""
    hint = setting_.hint
    if typing.get_origin(hint) is types.UnionType:  # X | None
        if given is None:
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint)
    if origin is Literal:
        if given not in typing.get_args(hint):
            raise ValueError(f"{what} is {given!r}; expected {choice(given, typing.get_args(hint))}")
        return given
    if origin is tuple:
        values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        inner = typing.get_args(hint)[0]
        return tuple(_scalar(what, value, inner, setting_.limits) for value in values)
    if origin is dict:
        if not isinstance(given, Mapping):
            raise ValueError(f"{what} is {given!r}; expected a mapping of names to numbers")
        return {
            str(key): _scalar(f"{what}.{key}", value, float, setting_.limits) for key, value in given.items()
        }
    return _scalar(what, given, hint, setting_.limits)


def _scalar(what: str, given: Any, kind: type, limits: Mapping[str, Any]) -> Any:
    low, high, above = (limits.get(key) for key in ("low", "high", "above"))
    wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
    ranges = {
        (True, True): f" from {low} to {high}",
        (True, False): f" of at least {low}",
        (False, True): f" above {above} and at most {high}" if above is not None else f" of at most {high}",
        (False, False): f" above {above}" if above is not None else "",
    }
    wanted += ranges[low is not None, high is not None]
    allowed = (int, float) if kind is float else (kind,)
    right = type(given) in allowed and (kind is not str or given != "")
    if right and kind in (int, float):
        right = (
            math.isfinite(given)
            and (low is None or given >= low)
            and (high is None or given <= high)
            and (above is None or given > above)
        )
    if not right:
        raise ValueError(f"{what} is {given!r}; expected {wanted}")
    return kind(given)


def choice(given: object, allowed: Iterable[object]) -> str:
    """Return the allowed words for an error message, and which of them is nearest to what was given."""
    words = [str(word) for word in allowed]
    return (words[0] if len(words) == 1 else f"one of {', '.join(words)}") + nearest(given, words)


def nearest(given: object, words: list[str]) -> str:
    """Return " (did you mean ...?)" with the word that is nearest to what was given, or nothing."""
    found = difflib.get_close_matches(str(given), words, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
