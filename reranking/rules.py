"""All rules by name, and one rule read from plain data."""

from __future__ import annotations

from collections.abc import Mapping

from reranking.adjustments import Boost, Bury, DampenPopularity, Freshness, Margin
from reranking.constraints import Cap, DropSeen, Exposure
from reranking.diversity import DPP, MMR, MaxSum
from reranking.families import Rule, choice, settings_of
from reranking.filters import Allow, Available, BoughtWithin, Deny, InStock, MinAge, PriceRange, Region
from reranking.slots import Explore, Pin, Sponsored

RULES: dict[str, type[Rule]] = {
    rule.rule: rule
    for rule in (
        *(InStock, Available, Allow, Deny, PriceRange, BoughtWithin, Region, MinAge),
        *(Freshness, Margin, DampenPopularity, Boost, Bury),
        *(MMR, DPP, MaxSum),
        *(DropSeen, Cap, Exposure, Explore, Sponsored),
        Pin,
    )
}


def rule_from_config(place: str, entry: object) -> Rule:
    """Return one rule of a policy.

    Args:
        place: where the entry stands, for messages.
        entry: a mapping; "rule" names the rule (a key of RULES), the other keys are its settings:
            {"rule": "cap", "field": "category", "max_items": 3}.

    Raises:
        ValueError: on an unknown rule or key, a missing key, or a value out of range; begins with `place`.
    """
    if not isinstance(entry, Mapping) or "rule" not in entry:
        raise ValueError(f"{place} is {entry!r}; expected a mapping with the key 'rule'")
    name = entry["rule"]
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"{place}: rule is {name!r}; expected {choice(name, RULES)}")
    given = {str(key): value for key, value in entry.items() if key != "rule"}
    known = {s.name: s.is_needed for s in settings_of(RULES[name])}
    for key in given:
        if key not in known:
            allowed = choice(key, known) if known else "no settings"
            raise ValueError(f"{place}: {name} has no setting {key!r}; expected {allowed}")
    for key, is_needed in known.items():
        if is_needed and key not in given:
            raise ValueError(f"{place}: {name} needs the setting {key!r}")
    try:
        return RULES[name](**given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
