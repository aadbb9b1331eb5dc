"""Policies: named lists of rules in YAML, checked as a whole before the first request meets them.

    default: home
    policies:
      shop:                              # what all pages have in common
        rules:
          - {rule: in_stock}
          - {rule: drop_seen}
      home:
        extends: shop                    # the rules of shop, then these
        rules:
          - {rule: mmr, relevance_weight: 0.8}
          - {rule: cap, field: category, max_items: 3, window: 10}
        overrides:                       # what a request may change, and how far
          mmr.relevance_weight: {min: 0.5, max: 1}

Reading is a pure function: it returns new objects or raises, and changes nothing. So a server keeps serving
with the policies it has until new ones are complete, bound to its catalog and found right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from reranking.adjustments import Boost, Bury
from reranking.constraints import Cap
from reranking.families import Diversity, Rule, Selection, SoftRule, choice, settings_of
from reranking.filters import Allow, Deny, PriceRange
from reranking.items import COLUMNS, ItemFacts, RankedItems
from reranking.rerank import MAX_SOFT_RULES
from reranking.rules import rule_from_config
from reranking.slots import Explore, Pin, Sponsored


class PolicyError(ValueError):
    """Policies that cannot be used: the message names the policy, the rule, the key and what is allowed."""


@dataclass(frozen=True)
class Bounds:
    """How far a request may move a setting, both ends inclusive."""

    min: float
    max: float


@dataclass(frozen=True)
class Policy:
    """A named list of rules, in order, and what a request may change of them."""

    name: str
    rules: tuple[Rule, ...]
    overrides: Mapping[str, Bounds] = field(default_factory=dict)  # "mmr.relevance_weight" -> bounds

    def with_overrides(self, asked: Mapping[str, float]) -> Policy:
        """Return the policy with some settings as a request asks for them.

        Raises PolicyError where a setting may not be changed, or not that far.
        """
        if not asked:
            return self
        rules = list(self.rules)
        for key, value in asked.items():
            if key not in self.overrides:
                allowed = choice(key, self.overrides) if self.overrides else "none, as the policy has none"
                raise PolicyError(f"policy {self.name!r}: override {key!r}; expected {allowed}")
            bounds = self.overrides[key]
            if not bounds.min <= value <= bounds.max:  # NaN too
                raise PolicyError(
                    f"policy {self.name!r}: override {key} is {value!r}; "
                    f"expected {bounds.min:g} to {bounds.max:g}"
                )
            at, setting_name, kind = _target(self.rules, key)  # names may change with their settings
            rules[at] = _changed(self.name, rules[at], key, setting_name, kind, value)
        _check_together(self.name, rules)
        return replace(self, rules=tuple(rules))

    def bound_to(self, facts: ItemFacts) -> Policy:
        """Return the policy with what its rules name looked up in a catalog.

        Raises PolicyError where the catalog has no such thing, or the rules contradict each other on it.
        """
        bound = []
        for rule in self.rules:
            for group in rule.groups:
                if group not in facts.groups:
                    raise PolicyError(
                        f"policy {self.name!r}: {rule.name}: the catalog has no group {group!r}; "
                        f"expected {choice(group, facts.groups)}"
                    )
            try:
                bound.append(rule.bound_to(facts))
            except ValueError as error:
                raise PolicyError(f"policy {self.name!r}: {error}") from None
        _check_on_catalog(self.name, bound, facts)
        return replace(self, rules=tuple(bound))

    def warnings(self, facts: ItemFacts) -> list[str]:
        """Return what a catalog lacks that the rules read, a sentence each, with what follows from it."""
        lacking = [
            (rule, what)
            for rule in self.rules
            for what in (*rule.reads, *rule.groups)
            if (what in COLUMNS and getattr(facts, what) is None)
            or (what in facts.groups and not facts.groups[what].any())
        ]
        return [
            f"policy {self.name!r}: {rule.name} reads {what}, which the catalog lacks: {rule.absent}"
            for rule, what in lacking
        ]

    @property
    def context_keys(self) -> set[str]:
        """The keys of a request's context that some rule reads."""
        return {key for rule in self.rules for key in rule.context_keys}


@dataclass(frozen=True)
class Policies:
    """Policies by name, and the one that holds where a request names none."""

    by_name: Mapping[str, Policy]
    default: str

    def __getitem__(self, name: str | None) -> Policy:
        """Return a policy, the default for None or ""; PolicyError where there is none of that name."""
        name = name or self.default
        if name not in self.by_name:
            raise PolicyError(f"policy is {name!r}; expected {choice(name, self.by_name)}")
        return self.by_name[name]

    def bound_to(self, facts: ItemFacts) -> Policies:
        """Return all policies bound to a catalog; see Policy.bound_to."""
        return replace(self, by_name={name: policy.bound_to(facts) for name, policy in self.by_name.items()})

    def warnings(self, facts: ItemFacts) -> list[str]:
        """Return the warnings of all policies, each once."""
        return list(dict.fromkeys(w for policy in self.by_name.values() for w in policy.warnings(facts)))


def policy_files(path: str | Path) -> list[Path]:
    """Return the file itself, or the .yaml and .yml files of a directory, by name, but for hidden ones."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix in (".yaml", ".yml") and not file.name.startswith(".") and file.is_file()
    )


def load_policies(path: str | Path) -> Policies:
    """Read a YAML file of policies, or a directory of such files, which together are one set of policies.

    Raises:
        PolicyError: anything in them is wrong, or two files of a directory say the same; it names the file.
        OSError: a file cannot be read.
    """
    files = policy_files(path)
    if not files:
        raise PolicyError(f"{path} holds no policies; expected at least one .yaml file")
    merged: dict[str, Any] = {}
    for file in files:
        try:
            data = _plain_data(file.read_text(encoding="utf-8"))
            if len(files) == 1:
                return policies_from_config(data)
            for key, value in _mapping("the file", data, {"policies": False, "default": False}).items():
                if key == "default" and key in merged:
                    raise PolicyError(f"default is {value!r}, and another file says {merged[key]!r}")
                if key == "default":
                    merged[key] = value
                    continue
                if not isinstance(value, Mapping):
                    raise PolicyError(f"policies is {value!r}; expected a mapping of names to policies")
                for name in value:
                    if name in merged.setdefault("policies", {}):
                        raise PolicyError(f"policy {name!r} stands in another file too; expected once")
                merged["policies"] |= value
        except (PolicyError, UnicodeDecodeError) as error:
            raise PolicyError(f"{file}: {error}") from None
    try:
        return policies_from_config(merged)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def parse_policies(text: str) -> Policies:
    """Return the policies of a YAML text; PolicyError where anything in it is wrong."""
    return policies_from_config(_plain_data(text))


def _plain_data(text: str) -> object:
    try:
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PolicyError(f"not YAML: {' '.join(str(error).split())}") from None
    except (TypeError, RecursionError):
        raise PolicyError("a key is a list or a mapping, or something holds itself; expected names") from None


def policies_from_config(data: object) -> Policies:
    """Return the policies of a mapping that has the form of the YAML file."""
    top = _mapping("the file", data, {"policies": True, "default": False})
    entries = top["policies"]
    if not isinstance(entries, Mapping) or not entries:
        raise PolicyError(f"policies is {entries!r}; expected a mapping of names to policies, at least one")
    entries = {str(name): entry for name, entry in entries.items()}
    for name, entry in entries.items():
        _mapping(f"policy {name!r}", entry, {"rules": True, "extends": False, "overrides": False})
    by_name = {name: _policy(name, entries) for name in entries}
    default = top.get("default", next(iter(entries)) if len(entries) == 1 else None)
    if default is None:
        raise PolicyError("default is missing; expected it beside several policies")
    if not isinstance(default, str) or default not in by_name:
        raise PolicyError(f"default is {default!r}; expected {choice(default, by_name)}")
    return Policies(by_name, default)


def single_policy(config: Sequence[Mapping[str, Any]], name: str = "default") -> Policies:
    """Return one policy made of a list of rules."""
    return policies_from_config({"policies": {name: {"rules": config}}})


def _policy(name: str, entries: Mapping[str, Mapping[str, Any]]) -> Policy:
    rules: list[Rule] = []
    overrides: dict[str, Any] = {}
    for ancestor in _lineage(name, entries):
        entry = entries[ancestor]
        config = entry["rules"]
        if not isinstance(config, list):
            raise PolicyError(f"policy {ancestor!r}: rules is {config!r}; expected a list")
        for place, rule in enumerate(config):
            try:
                rules.append(rule_from_config(f"rules[{place}]", rule))
            except ValueError as error:
                raise PolicyError(f"policy {ancestor!r}: {error}") from None
        given = entry.get("overrides") or {}
        if not isinstance(given, Mapping):
            raise PolicyError(f"policy {ancestor!r}: overrides is {given!r}; expected a mapping")
        overrides |= given
    _check_together(name, rules)
    bounds = {str(key): _bounds(name, str(key), given, rules) for key, given in overrides.items()}
    return Policy(name, tuple(rules), bounds)


def _lineage(name: str, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the policies that make up one, the most general first."""
    line = [name]
    while (parent := entries[line[0]].get("extends")) is not None:
        if not isinstance(parent, str) or parent not in entries:
            others = [other for other in entries if other != line[0]] or ["another policy"]
            raise PolicyError(f"policy {line[0]!r}: extends is {parent!r}; expected {choice(parent, others)}")
        if parent in line:
            circle = " -> ".join([*line[line.index(parent) :: -1], parent])
            raise PolicyError(f"policy {name!r}: extends runs in a circle: {circle}")
        line.insert(0, parent)
    return line


def _bounds(policy: str, key: str, given: object, rules: Sequence[Rule]) -> Bounds:
    what = f"policy {policy!r}: overrides: {key}"
    entry = _mapping(what, given, {"min": True, "max": True})
    ends = {}
    for end in ("min", "max"):
        if type(entry[end]) not in (int, float):
            raise PolicyError(f"{what}: {end} is {entry[end]!r}; expected a number")
        ends[end] = float(entry[end])
    if ends["min"] > ends["max"]:
        raise PolicyError(f"{what}: min is {ends['min']:g}; expected at most max, {ends['max']:g}")
    try:
        at, name, kind = _target(rules, key)
    except PolicyError as error:
        raise PolicyError(f"policy {policy!r}: overrides: {error}") from None
    for value in ends.values():
        changed = _changed(policy, rules[at], key, name, kind, value)
        _check_together(policy, [*rules[:at], changed, *rules[at + 1 :]])
    own = getattr(rules[at], name)
    if own is not None and not ends["min"] <= own <= ends["max"]:
        raise PolicyError(
            f"{what}: {ends['min']:g} to {ends['max']:g} leaves out the policy's own {own:g}; expected it in"
        )
    return Bounds(**ends)


def _target(rules: Sequence[Rule], key: str) -> tuple[int, str, type]:
    """Return which rule an override is about, and the setting with its type."""
    numbers = {
        f"{rule.name}.{s.name}": (at, s.name, kind)
        for at, rule in enumerate(rules)
        for s in settings_of(type(rule))
        if (kind := _number(s.hint)) is not None
    }
    if key not in numbers:
        allowed = choice(key, numbers) if numbers else "nothing, as no rule has a number"
        raise PolicyError(f"{key!r} is no number of this policy's rules; expected {allowed}")
    return numbers[key]


def _number(hint: Any) -> type | None:
    parts = [part for part in getattr(hint, "__args__", (hint,)) if part is not type(None)]
    return parts[0] if parts in ([int], [float]) and getattr(hint, "__origin__", None) is None else None


def _changed(policy: str, rule: Rule, key: str, setting_name: str, kind: type, value: float) -> Rule:
    try:
        whole = kind is int and float(value).is_integer()
        return replace(rule, **{setting_name: int(value) if whole else value})
    except ValueError as error:
        raise PolicyError(f"policy {policy!r}: override {key}: {error}") from None


def _mapping(what: str, given: object, keys: Mapping[str, bool]) -> Mapping[str, Any]:
    """Return a mapping with these keys (True: it must be there) and no others, or raise."""
    if not isinstance(given, Mapping):
        raise PolicyError(f"{what} is {given!r}; expected a mapping with the keys {', '.join(keys)}")
    for key in given:
        if key not in keys:
            raise PolicyError(f"{what} has the key {key!r}; expected {choice(key, keys)}")
    for key, is_needed in keys.items():
        if is_needed and key not in given:
            raise PolicyError(f"{what} needs the key {key!r}")
    return given


def _refuse_repeated_keys(node: Any) -> None:
    """YAML readers keep the last of two equal keys and say nothing; a policy would be gone."""
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if key.value in keys:
                raise PolicyError(
                    f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice; expected once"
                )
            keys.add(key.value)
            _refuse_repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value)


# Rules that are right by themselves and not together.


def _check_together(policy: str, rules: Sequence[Rule]) -> None:
    def refuse(message: str) -> None:
        raise PolicyError(f"policy {policy!r}: {message}")

    soft = [rule for rule in rules if isinstance(rule, SoftRule)]
    if len(soft) > MAX_SOFT_RULES:
        refuse(f"{len(soft)} soft rules; expected at most {MAX_SOFT_RULES}")
    diverse = [rule.name for rule in rules if isinstance(rule, Diversity)]
    if len(diverse) > 1:
        refuse(f"{' and '.join(diverse)} both choose the next item; expected one of them")
    _check_places(rules, refuse)
    names: set[str] = set()
    for rule in rules:
        if rule.name in names:
            refuse(f"{rule.name} stands there twice; expected once")
        names.add(rule.name)
    _check_selections(rules, refuse)


def _check_places(rules: Sequence[Rule], refuse: Any) -> None:
    taken: dict[int, str] = {}
    pinned: dict[str, int] = {}
    for rule in rules:
        if isinstance(rule, Pin):
            if rule.place in taken and taken[rule.place].startswith("pin"):
                refuse(f"pin: two items are pinned to place {rule.place}; expected one")
            if rule.item_id in pinned:
                refuse(
                    f"pin: {rule.item_id!r} is pinned to the places {pinned[rule.item_id]} and {rule.place}; "
                    "expected one"
                )
            pinned[rule.item_id] = rule.place
        if isinstance(rule, (Pin, Sponsored, Explore)):
            for place in [rule.place] if isinstance(rule, Pin) else rule.places:
                if place in taken:
                    refuse(f"{rule.name} and {taken[place]} both want place {place}; expected one of them")
                taken[place] = rule.name


def _check_selections(rules: Sequence[Rule], refuse: Any) -> None:
    def of(kind: type[Selection]) -> list[Selection]:
        return [rule for rule in rules if isinstance(rule, kind)]

    for one, other in ((Allow, Deny), (Boost, Bury)):
        for rule in of(one):
            for against in of(other):
                if rule.selection == against.selection:
                    refuse(f"{rule.name} and {against.name} contradict each other; expected one of them")
    for deny in of(Deny):
        for allow in of(Allow):
            for key, values in deny.selection.items():
                allowed = allow.selection.get(key, ())
                if len(deny.selection) == 1 and allowed and set(allowed) <= set(values):
                    refuse(f"{deny.name} forbids all that {allow.name} allows; nothing could be shown")
    for key in ("brand", "seller_id", "item_id"):  # an item has one of these
        named = [(rule.name, set(getattr(rule, key))) for rule in of(Allow) if getattr(rule, key)]
        if len(named) > 1 and not set.intersection(*(values for _, values in named)):
            refuse(
                f"{' and '.join(name for name, _ in named)} have no {key} in common; nothing could be shown"
            )


def _check_on_catalog(policy: str, rules: Sequence[Rule], facts: ItemFacts) -> None:
    def refuse(message: str) -> None:
        raise PolicyError(f"policy {policy!r}: {message}")

    allowed = np.ones(facts.num_items + 1, np.bool_)
    for rule in rules:
        if isinstance(rule, Selection) and rule.selected is not None and not rule.selected.any():
            refuse(f"{rule.name} is about no item of the catalog; expected at least one")
        if isinstance(rule, (Allow, Deny)) and rule.selected is not None:
            allowed &= rule.selected if isinstance(rule, Allow) else ~rule.selected
    allowed[0] = False
    if facts.num_items and not allowed.any():
        refuse("allow and deny together forbid every item of the catalog; nothing could be shown")

    pins = [rule for rule in rules if isinstance(rule, Pin)]
    shown = _plain(np.array([pin.row for pin in pins], np.int32), facts)
    for rule in rules:
        if isinstance(rule, (Allow, Deny, PriceRange)):
            for pin, is_allowed in zip(pins, rule.allows(shown), strict=True):
                if not is_allowed:
                    refuse(
                        f"{pin.name}: {rule.name} never lets {pin.item_id!r} be shown; expected another item"
                    )
        if isinstance(rule, Cap):
            codes = facts.groups[rule.group][shown.rows]
            for pin, group in zip(pins, codes, strict=True):
                window = rule.window or 10**9
                near = sum(
                    other.place in range(pin.place, pin.place + window)
                    for other, code in zip(pins, codes, strict=True)
                    if code == group != 0
                )
                if near > rule.max_items:
                    refuse(
                        f"{rule.name} allows {rule.max_items}, and {near} pins from place {pin.place} on "
                        "are of one group; expected fewer pins or a higher max_items"
                    )


def _plain(rows: NDArray[np.int32], facts: ItemFacts) -> RankedItems:
    return facts.ranked(
        rows, np.zeros(len(rows), np.float32), np.zeros(len(rows), np.bool_), columns=["prices"]
    )
