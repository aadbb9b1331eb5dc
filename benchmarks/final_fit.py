"""The split of a final fit: all that a test question may know is learned from, as published tables do it."""

from __future__ import annotations

import dataclasses

import numpy as np

from training.data.splits import Split, SplitData


def final_split(data: SplitData) -> Split:
    """Return the split with train and validation events together in `train`.

    `validation` is then part of what is learned, and says nothing any more; `test` stays as it is.

    Raises:
        ValueError: the split is by global time, where a last fit needs the clock and not the questions.
    """
    split = data.split
    if split.name == "given":
        assert data.log.is_test is not None
        return dataclasses.replace(split, train=data.log.events.take(~data.log.is_test))
    if split.name == "leave-one-out":
        events = split.test.events
        ends = events.offsets[1:].copy()  # who is not asked is learned from whole
        ends[split.test.users] = split.test.ends
        return dataclasses.replace(split, train=events.take(np.arange(len(events)) < ends[events.users]))
    raise ValueError(f"split is {split.name}; a final fit is defined for given and leave-one-out")
