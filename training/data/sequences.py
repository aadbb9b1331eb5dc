"""Training sequences for a ranker: histories in batches of like length, with the items to predict.

Shapes: B batch, T the longest history of the batch, K keys of the context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.history import NEGATIVE_EVENT
from ranking.context import ContextTable, Encoded
from training.data.context import encoded_context
from training.data.interactions import Interactions

NO_CONTEXT = ContextTable()
T = TypeVar("T")


@dataclass(frozen=True)
class Sequences:
    """Windows of histories, ragged: item n of a window is the input of the one place behind it.

    A user's events are cut from the end backwards into windows of `history_length` targets, so that every
    event is learned from once, however long the history; but for a user's oldest beyond MAX_EVENTS. Every
    window has something to predict.
    """

    # [N] item rows; the first of a window is only input, unless has_start: the start token predicts it then
    items: NDArray[np.int32]
    is_target: NDArray[np.bool_]  # [N] whether the place may be predicted
    starts: NDArray[np.int64]  # [W] a window's places are starts[w] to ends[w]
    ends: NDArray[np.int64]  # [W]
    users: NDArray[np.int32]  # [W] whose window it is
    has_start: NDArray[np.bool_]  # [W] whether the window begins where the user's history begins
    context: Encoded  # [N, K] of the moment of each event
    # [N] which kinds of events the user has with the item, here or later: 1 << code, added up
    kinds: NDArray[np.uint8]
    num_left_out: int = 0  # events of users with more than MAX_EVENTS

    def __len__(self) -> int:
        return len(self.starts)


def make_sequences(
    events: Interactions,
    history_length: int,
    *,
    repeats: bool = False,
    context: ContextTable = NO_CONTEXT,
) -> Sequences:
    """Cut every user's events into windows.

    Events that say "not this" are left out: the ranker does not know an event's type, and would take them for
    wishes. One that repeats the item just before it is dropped; an item that the user knows already stays in
    the history and is not predicted, unless `repeats`. `context` says which keys of the context to keep.
    """
    events = events.take(events.event_types != NEGATIVE_EVENT)
    kept = events.is_learned_in_order
    num_left_out = int(np.count_nonzero(events.is_next_item & ~kept))
    kinds = _kinds(events, repeats)[kept]
    target = _may_be_predicted(events, repeats)[kept]
    events = events.take(kept)
    starts: list[int] = []
    ends: list[int] = []
    has_start: list[bool] = []
    for first, end in zip(events.offsets[1:-1].tolist(), events.offsets[2:].tolist(), strict=True):
        while end > first:
            begins = end - first <= history_length
            # A window that begins mid-history has one more place: its first item is input alone.
            start = first if begins else end - history_length - 1
            # A batch of windows with nothing to predict would have a loss of 0/0.
            if target[start if begins else start + 1 : end].any():
                starts.append(start)
                ends.append(end)
                has_start.append(begins)
            end = first if begins else start + 1
    return Sequences(
        events.items,
        target,
        np.asarray(starts, np.int64),
        np.asarray(ends, np.int64),
        events.users[np.asarray(starts, np.int64)],
        np.asarray(has_start, bool),
        encoded_context(context, events),
        kinds,
        num_left_out,
    )


def targets_per_item(train: Interactions, repeats: bool) -> float:
    """Return how many events of an item there are to learn from, on average over the items that have any.

    The density of the data, which defaults follow from: what a user does with one item in a row, and where
    repeats are not normal all of it, counts once.
    """
    events = train.take(train.event_types != NEGATIVE_EVENT)
    targets = events.items[events.is_learned_in_order & _may_be_predicted(events, repeats)]
    return len(targets) / max(1, len(np.unique(targets)))


def _may_be_predicted(events: Interactions, repeats: bool) -> NDArray[np.bool_]:
    return np.ones(len(events), np.bool_) if repeats else events.is_first_touch


def _kinds(events: Interactions, repeats: bool) -> NDArray[np.uint8]:
    """Return the kinds of events that a user has with an item, [N] for each event of theirs.

    Where repeats are normal, each run of events with one item stands alone: what was bought once is not
    bought at every visit.
    """
    if repeats:
        group = np.cumsum(events.is_next_item) - 1
    else:
        pair = events.users.astype(np.int64) * (events.num_items + 1) + events.items
        group = np.unique(pair, return_inverse=True)[1]
    kinds = np.zeros(int(group.max(initial=-1)) + 1, np.uint8)
    np.bitwise_or.at(kinds, group, np.left_shift(np.uint8(1), events.event_types))
    of_event: NDArray[np.uint8] = kinds[group]
    return of_event


@dataclass  # not frozen: Lightning moves a batch's tensors in place
class SequenceBatch:
    """One batch: histories and, for the start token and every event, the item that came next."""

    history: Tensor  # [B, T] int64, padded on the left with 0
    targets: Tensor  # [B, T+1] int64, 0 where nothing is to be predicted
    context_rows: Tensor  # [B, T+1, K] int64, of the moment at which each target is asked for
    context_weights: Tensor  # [B, T+1, K] float32
    target_kinds: Tensor  # [B, T+1] uint8, Sequences.kinds of each target
    fold: int  # that all its users are of, see training/cross_fit.py


def num_batches(sequences: Sequences, batch_size: int, max_tokens: int) -> int:
    """Return how many batches sequence_batches makes of all windows, in one fold."""
    length = np.sort(sequences.ends - sequences.starts)
    return sum(1 for _ in _parts(length, int(length.max(initial=1)), batch_size, max_tokens))


def _parts(length: NDArray[np.int64], most: int, batch_size: int, max_tokens: int) -> Iterator[slice]:
    """Cut windows of these lengths, ascending, into batches, from the longest: its length sets the size."""
    position = len(length)
    while position > 0:
        size = max(1, min(batch_size, max_tokens // padded_length(int(length[position - 1]), most)))
        yield slice(max(0, position - size), position)
        position -= size


def sequence_batches(
    sequences: Sequences,
    batch_size: int,
    max_tokens: int,
    rng: np.random.Generator | None,
    rank: int = 0,
    world_size: int = 1,
    num_folds: int = 1,
) -> Iterator[SequenceBatch]:
    """Yield every window once, in batches of like length and of users of one fold.

    Args:
        sequences: the windows.
        batch_size: most windows of a batch.
        max_tokens: most places of a batch, padding included.
        rng: shuffles which windows meet and the order of batches; None keeps one order.
        rank: which process of a distributed run this is; each yields batches of its own.
        world_size: how many processes there are.
        num_folds: user rows that leave one remainder when divided by it are a fold.
    """
    length = sequences.ends - sequences.starts
    most = int(length.max(initial=1))
    # Ties of length are broken at random: short histories abound and must not always meet the same ones.
    tie = rng.random(len(length)) if rng is not None else np.arange(len(length))
    order = np.lexsort((tie, length))
    folds = sequences.users % num_folds
    batches: list[NDArray[np.int64]] = []
    for fold in range(num_folds):
        of_fold = order[folds[order] == fold]
        batches += [of_fold[part] for part in _parts(length[of_fold], most, batch_size, max_tokens)]
    if rng is not None:
        rng.shuffle(batches)
    for batch in equal_share(batches, rank, world_size):
        longest = padded_length(int(length[batch].max()), most)
        yield _collate(sequences, batch, longest, int(folds[batch[0]]))


def padded_length(length: int, most: int) -> int:
    """Return how long windows of this length are made: above 16 a multiple of 8, and at most `most`.

    Kernels are compiled for each shape of a batch, some milliseconds each, and thousands of shapes neither
    repeat nor fit in oneDNN's cache: on MovieLens-1M a step took twice as long after seven epochs.
    """
    return length if length <= 16 else min(-(-length // 8) * 8, most)


def _collate(sequences: Sequences, batch: NDArray[np.int64], longest: int, fold: int) -> SequenceBatch:
    starts, ends = sequences.starts[batch], sequences.ends[batch]
    # The last item of a window is only a target, so the history is one shorter than the window.
    width = max(1, longest - 1)
    # place[b, t]: which event stands at column t of the targets; below starts[b] it is padding.
    place = ends[:, None] - 1 - np.arange(width, -1, -1)[None, :]
    inside = place >= starts[:, None]
    place = np.where(inside, place, 0)
    items = np.where(inside, sequences.items[place], 0)
    targets = np.where(inside & sequences.is_target[place], items, 0)
    # A window that begins mid-history does not predict its first item, which the start token would have to.
    first = inside & (place == starts[:, None]) & ~sequences.has_start[batch][:, None]
    targets[first] = 0
    # The state at column t follows the history up to column t-1. Right before a window's first item that is
    # the state of the start token (HybridRanker.states), from which it is predicted.
    return SequenceBatch(
        torch.from_numpy(items[:, :-1].astype(np.int64)),
        torch.from_numpy(targets.astype(np.int64)),
        torch.from_numpy(sequences.context.rows[place]),
        torch.from_numpy(sequences.context.weights[place]),
        torch.from_numpy(sequences.kinds[place]),
        fold,
    )


def equal_share(batches: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return every world_size-th batch from `rank` on, as many for each process: they step together.

    Fewer batches than processes go to all of them.
    """
    even = len(batches) - len(batches) % world_size
    return batches[rank:even:world_size] if even else batches
