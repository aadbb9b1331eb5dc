"""Slices of the questions: does a model find what is rare and serve who is new, or does it live off the head?

A slice is a part of the targets, not of the rankings: all items are ranked as ever, and a question counts
where at least one of its targets is in the slice, with these targets alone. Slices overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.interactions import Interactions
from training.data.splits import Holdout

SHORT_HISTORY = 5  # events; a history of fewer is short
TAIL_SHARE = 0.2  # of the training events
HEAD_ALONE = 0.99  # a model of whose accuracy the head makes more has it from there alone

DEFINITIONS = {
    "new users": "users without a training event",
    "short histories": f"histories of fewer than {SHORT_HISTORY} events when asked, new users too",
    "new items": "targets without a training event",
    "tail items": f"targets among the least popular items that make {TAIL_SHARE:.0%} of the training events",
    "head items": "targets among all other items with a training event",
    "returns": "targets that the user knows, where users return to what they know",
    "discoveries": "targets that the user does not know, there",
}

BY_ITEM = ("new items", "tail items", "head items")  # every target is in one of them


def target_slices(
    train: Interactions, holdout: Holdout, *, repeats: bool = False
) -> dict[str, NDArray[np.bool_]]:
    """Return which targets are in each slice of DEFINITIONS: {name: [M] bool}, like holdout.targets.

    Args:
        train: what the model has learned from.
        holdout: the questions.
        repeats: whether users return to items that they know; without that there are no slices of returns.
    """
    # A question's property is one of all its targets.
    num_targets = np.diff(holdout.target_offsets)
    num_trained = np.diff(train.offsets)[holdout.users]
    history_length = holdout.ends - holdout.events.offsets[holdout.users]
    popularity = train.item_counts()[holdout.targets]
    highest = tail_popularity(train.item_counts())
    slices = {
        "new users": np.repeat(num_trained == 0, num_targets),
        "short histories": np.repeat(history_length < SHORT_HISTORY, num_targets),
        "new items": popularity == 0,
        "tail items": (popularity > 0) & (popularity <= highest),
        "head items": popularity > highest,
    }
    if repeats:
        known = [np.isin(targets, history.items) for _, history, targets in holdout]
        returns = np.concatenate([np.zeros(0, np.bool_), *known])
        slices |= {"returns": returns, "discoveries": ~returns}
    return slices


def tail_popularity(counts: NDArray[np.int64]) -> int:
    """Return the popularity up to which an item belongs to the tail.

    It is the lowest p such that all items with at most p training events together make TAIL_SHARE of these
    events or more. Items of one popularity are in the tail together or not at all, so the tail may hold some
    more than its share; it depends on nothing but popularity.

    Args:
        counts: [I+1] training events of each item, repeats by one user not counted.
    """
    events_at = np.bincount(counts) * np.arange(counts.max(initial=0) + 1)
    return int(np.searchsorted(np.cumsum(events_at), TAIL_SHARE * events_at.sum()))


def head_share(slices: Mapping[str, Mapping[str, Any]], stage: str) -> float | None:
    """Return what head items make of a stage's recall@10; None where it finds nothing.

    It is that of the slices of BY_ITEM, each times its questions: where a question has one target, head items
    among all that the stage finds.

    Args:
        slices: of training.evaluate: {name: {"num_users", stage: metrics or None}}.
        stage: its name.
    """
    found = {
        name: slices[name]["num_users"] * slices[name][stage]["recall@10"] if slices[name][stage] else 0.0
        for name in BY_ITEM
    }
    total = sum(found.values())
    return found["head items"] / total if total else None
