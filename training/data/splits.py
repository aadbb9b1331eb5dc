"""Splits: what a model may learn from, and what it is then asked.

Every question is a prefix: a user's events before some position are the history, and the items to find come
after it. Nothing at or behind a question's position is ever part of what answers it.

Two protocols ask the test questions. Strict: the model has learned from `train`, and what validation asked
for is in the histories alone. Refit: settings and epochs are chosen on validation too, and then the model
learns anew from train and validation together (final_split), as a shop would. Their figures do not compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.history import NEGATIVE_EVENT, History
from training.data.dataset import Dataset, DatasetInfo
from training.data.interactions import EventLog, Interactions, load_event_log

SplitName = Literal["auto", "leave-one-out", "global-time", "given"]
Protocol = Literal["strict", "refit"]


@dataclass(frozen=True)
class Holdout:
    """Questions: given a user's events before a position, which items come next?"""

    events: Interactions  # holds the histories
    users: NDArray[np.int32]  # [Q] user rows, each once
    ends: NDArray[np.int64]  # [Q] the history of question q is events[offsets[users[q]] : ends[q]]
    targets: NDArray[np.int32]  # [M] item rows, all questions one after the other
    target_offsets: NDArray[np.int64]  # [Q+1]

    def __len__(self) -> int:
        return len(self.users)

    def history(self, question: int) -> History:
        """Return the history of one question, oldest first."""
        return self.events.history(int(self.users[question]), int(self.ends[question]))

    def target(self, question: int) -> NDArray[np.int32]:
        """Return the item rows to find, each once."""
        return self.targets[self.target_offsets[question] : self.target_offsets[question + 1]]

    def take(self, questions: NDArray[np.int64]) -> Holdout:
        """Return some of the questions."""
        targets = [self.target(int(q)) for q in questions]
        return Holdout(self.events, self.users[questions], self.ends[questions], *_ragged(targets))

    def sample(self, most: int) -> Holdout:
        """Return the questions, or so many of them, drawn with a fixed seed, in their order."""
        if most >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(0).permutation(len(self))[:most]))

    def __iter__(self) -> Iterator[tuple[int, History, NDArray[np.int32]]]:
        """Yield (user row, history, targets) of each question."""
        for question in range(len(self)):
            yield int(self.users[question]), self.history(question), self.target(question)


@dataclass(frozen=True)
class Split:
    """What to learn from and what to be asked."""

    name: str
    train: Interactions
    validation: Holdout
    test: Holdout
    # Whether each user's events have an order that a sequence model can learn from.
    ordered: bool
    # Whether items of the history may be targets again; they are excluded from rankings otherwise.
    repeats: bool
    before_test: NDArray[np.bool_]  # [N] of the log's events: what is known when the test is asked


def make_split(
    log: EventLog,
    name: SplitName = "auto",
    *,
    time: str = "unix",
    repeats: bool = False,
    holdout_fraction: float = 0.1,
    seed: int = 0,
) -> Split:
    """Split an event log.

    Args:
        log: the events of all users.
        name: "leave-one-out": each user's last new item is the test target and the one before it the
            validation target. "global-time": the last `holdout_fraction` of all events is the test period,
            the same share before it validation; a user's targets are the new items of the period.
            "given": the data set's own test set, with a random `holdout_fraction` of each user's train
            events as validation. "auto": "given" where the data set has one, else leave-one-out.
        time: what the timestamps mean (DatasetInfo.time).
        repeats: whether items may be targets again; otherwise only items that are new to the user are.
        holdout_fraction: share of each of validation and test, where the split is by share.
        seed: of the random draw in "given".

    Raises:
        ValueError: the data set lacks what the split needs.
    """
    if name == "auto":
        name = "given" if log.is_test is not None else "leave-one-out"
    if not 0 < holdout_fraction < 0.5:
        raise ValueError(f"holdout_fraction is {holdout_fraction}; expected more than 0 and less than 0.5")
    if name == "given":
        if log.is_test is None:
            raise ValueError(
                "split is 'given', but the data set has none; expected auto, leave-one-out or global-time"
            )
        return _given(log.events, log.is_test, repeats, holdout_fraction, seed)
    if time == "none":
        raise ValueError(
            f"split is {name!r}, but the events of this data set have no order; expected given, "
            "which takes a data set with a test set of its own"
        )
    if name == "leave-one-out":
        return _leave_one_out(log.events, repeats)
    if name == "global-time":
        if time != "unix":
            raise ValueError(
                "split is 'global-time', but the data set has an order and no times; "
                "expected auto or leave-one-out"
            )
        return _global_time(log.events, repeats, holdout_fraction)
    raise ValueError(f"split is {name!r}; expected auto, leave-one-out, global-time or given")


def _may_be_target(events: Interactions, repeats: bool) -> NDArray[np.bool_]:
    new = events.is_next_item if repeats else events.is_first_touch
    positive: NDArray[np.bool_] = events.event_types != NEGATIVE_EVENT
    return new & positive


def _leave_one_out(events: Interactions, repeats: bool) -> Split:
    candidates = np.flatnonzero(_may_be_target(events, repeats))
    users = events.users[candidates]
    counts = np.bincount(users, minlength=events.num_users + 1)
    last = np.cumsum(counts) - 1  # place of each user's last candidate among the candidates
    enough = np.flatnonzero(counts >= 3)
    test = candidates[last[enough]]
    validation = candidates[last[enough] - 1]

    # A user's events from the target on are kept from what asks for it.
    def before(targets: NDArray[np.int64]) -> NDArray[np.bool_]:
        first_kept_back = np.full(events.num_users + 1, len(events), np.int64)
        first_kept_back[enough] = targets
        known: NDArray[np.bool_] = np.arange(len(events)) < first_kept_back[events.users]
        return known

    def holdout(positions: NDArray[np.int64]) -> Holdout:
        one_each = np.arange(len(positions) + 1)
        return Holdout(events, enough.astype(np.int32), positions, events.items[positions], one_each)

    return Split(
        "leave-one-out",
        events.take(before(validation)),
        holdout(validation),
        holdout(test),
        ordered=True,
        repeats=repeats,
        before_test=before(test),
    )


def _global_time(events: Interactions, repeats: bool, fraction: float) -> Split:
    times = np.sort(events.timestamps, kind="stable")
    test_start = times[int(len(times) * (1 - fraction))]
    validation_start = times[int(len(times) * (1 - 2 * fraction))]
    if validation_start in (times[0], test_start):
        raise ValueError(
            "split is 'global-time', but too many events share one time to cut between them; "
            "expected leave-one-out, or another holdout_fraction"
        )
    target = _may_be_target(events, repeats)

    def holdout(start: np.int64, end: np.int64 | None) -> Holdout:
        inside = (events.timestamps >= start) & target
        if end is not None:
            inside &= events.timestamps < end
        return _asked(events, inside, events.timestamps < start, repeats)

    return Split(
        "global-time",
        events.take(events.timestamps < validation_start),
        holdout(validation_start, test_start),
        holdout(test_start, None),
        ordered=True,
        repeats=repeats,
        before_test=events.timestamps < test_start,
    )


def _given(
    events: Interactions, is_test: NDArray[np.bool_], repeats: bool, fraction: float, seed: int
) -> Split:
    # Each user's events are laid out as train, validation, test, so that histories are prefixes here too.
    draw = np.random.default_rng(seed).random(len(events))
    part = np.where(is_test, 2, np.where(draw < fraction, 1, 0))
    # A user whose every train event was drawn would be left without a history: give those back.
    left = np.bincount(events.users[part == 0], minlength=events.num_users + 1)
    part = np.where((part == 1) & (left[events.users] == 0), 0, part)
    order = np.lexsort((np.arange(len(events)), part, events.users))
    events, part = events.take(order), part[order]
    target = _may_be_target(events, repeats)

    def holdout(which: int) -> Holdout:
        return _asked(events, (part == which) & target, part < which, repeats)

    # Validation was drawn from anywhere in the past, so the layout is not the order of time, even where the
    # events have times: a sequence model would learn from what came after its questions.
    return Split(
        "given",
        events.take(part == 0),
        holdout(1),
        holdout(2),
        ordered=False,
        repeats=repeats,
        before_test=~is_test,
    )


def questions_at_once(num_items: int) -> int:
    """Return how many questions to score all items for at once: 1 to 256, for 80 MB of float32 at most."""
    return int(np.clip(20_000_000 // (num_items + 1), 1, 256))


def _asked(
    events: Interactions, wanted: NDArray[np.bool_], known: NDArray[np.bool_], repeats: bool
) -> Holdout:
    """Return a question for each user who has a wanted event, with the known ones as history: a prefix.

    The item of the last known event is not asked for, see engine.history.not_asked_for.
    """
    num_known = np.bincount(events.users[known], minlength=events.num_users + 1)
    if repeats:
        last = np.append(events.items, 0)[np.where(num_known, events.offsets[:-1] + num_known - 1, -1)]
        wanted = wanted & (events.items != last[events.users])
    users, first = np.unique(events.users[wanted], return_index=True)
    ends = events.offsets[users] + num_known[users]
    targets = np.split(events.items[wanted], first[1:]) if len(users) else []
    return Holdout(events, users.astype(np.int32), ends, *_ragged([_distinct(items) for items in targets]))


def _distinct(items: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.asarray(list(dict.fromkeys(items.tolist())), np.int32)


def _ragged(rows: list[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    flat = np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32)
    return flat, np.cumsum([0, *map(len, rows)]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How a data set is cut into training, validation and test.

    Attributes:
        name: leave-one-out, global-time, given, or auto: given where the data set has one, leave-one-out
            where it has none.
        holdout_fraction: share of validation (and test) where the split is by share.
        seed: of the draw of validation in a given split.
    """

    name: SplitName = "auto"
    holdout_fraction: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class SplitData:
    """A data set, read and split: what both training stages and the evaluation start from."""

    info: DatasetInfo
    log: EventLog
    split: Split


def load_split(directory: str | Path, options: SplitOptions) -> SplitData:
    """Read and split a data set directory; the same options give the same split, always."""
    dataset = Dataset.open(directory)
    log = load_event_log(dataset)
    split = make_split(
        log,
        options.name,
        time=dataset.info.time,
        repeats=dataset.info.repeats,
        holdout_fraction=options.holdout_fraction,
        seed=options.seed,
    )
    return SplitData(dataset.info, log, split)


def final_split(data: SplitData) -> Split:
    """Return the split of a last fit: train and validation events together in `train`.

    `validation` is then part of what is learned, and says nothing any more; `test` stays as it is.
    """
    return dataclasses.replace(data.split, train=data.log.events.take(data.split.before_test))


def split_as_trained(data: SplitData, protocol: Protocol) -> Split:
    """Return the split whose `train` is what a model of this protocol has learned from."""
    return final_split(data) if protocol == "refit" else data.split
