"""The candidate sources by name, and the part of a recipe that says how much each of them gives."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from engine.bundle import Bundle
from retrieval.sources import (
    CandidateSource,
    EmbeddingSource,
    FreshSource,
    NeighbourSource,
    PopularSource,
    SequenceSource,
    TransitionSource,
)

# One line a source; one that a bundle has nothing for gives None, and its share goes to the others.
SOURCES: dict[str, Callable[[Bundle], CandidateSource | None]] = {
    "sequence": lambda bundle: SequenceSource(bundle.ranker_index) if bundle.ranker_index else None,
    "embedding": lambda bundle: EmbeddingSource(bundle.index, bundle.item_vectors, bundle.item_degrees),
    "neighbours": lambda bundle: NeighbourSource(bundle.neighbours),
    "transitions": lambda bundle: TransitionSource() if bundle.transitions is not None else None,
    "popular": lambda bundle: PopularSource(bundle.recent_popularity, bundle.catalog.popularity),
    "fresh": lambda bundle: FreshSource(bundle.catalog.available_from),
}


def sources_from_config(
    entries: Sequence[Mapping[str, Any]], bundle: Bundle
) -> tuple[list[CandidateSource], list[float]]:
    """Return the sources of a recipe that the bundle can serve, in its order, and the quota of each.

    Popular knows every item: where the recipe does without it, it still fills up, last.
    """
    quotas = {entry["source"]: float(entry["quota"]) for entry in entries}
    quotas.setdefault("popular", 0.0)
    made = [(SOURCES[name](bundle), quota) for name, quota in quotas.items()]
    there = [(source, quota) for source, quota in made if source is not None]
    return [source for source, _ in there], [quota for _, quota in there]


def check_sources(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the entries are like {"source": "embedding", "quota": 0.3} and sum to 1."""
    names: list[str] = []
    for place, entry in enumerate(entries):
        where = f"pipeline.sources[{place}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} is {entry!r}; expected a mapping with the keys source and quota")
        for key in entry:
            if key not in ("source", "quota"):
                raise ValueError(f"{where} has the key {key!r}; expected {choice(key, ('source', 'quota'))}")
        for key in ("source", "quota"):
            if key not in entry:
                raise ValueError(f"{where} has no {key}; expected the keys source and quota")
        name, quota = entry["source"], entry["quota"]
        if not isinstance(name, str) or name not in SOURCES:
            raise ValueError(f"{where}.source is {name!r}; expected {choice(name, SOURCES)}")
        if name in names:
            raise ValueError(f"{where}.source is {name!r} for the second time; expected each source once")
        if not (is_number(quota) and 0 <= quota <= 1):
            raise ValueError(f"{where}.quota is {quota!r}; expected a number from 0 to 1")
        names.append(name)
    total = sum(entry["quota"] for entry in entries)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"the quotas of pipeline.sources sum to {total:g}; expected 1")


def is_number(value: object) -> bool:
    """Return whether a value of a recipe is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def choice(given: object, allowed: Iterable[str]) -> str:
    """Return the allowed words for an error message, and which of them is nearest to what was given."""
    words = list(allowed)
    nearest = difflib.get_close_matches(str(given), words, n=1)
    return f"one of {', '.join(words)}" + (f" (did you mean {nearest[0]!r}?)" if nearest else "")
