"""`Interactions`: who touched what, how and when, as equal-length NumPy columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from engine.history import EVENT_TYPES, NEGATIVE_EVENT, History
from ranking.context import HOUR_MS, KeyKind
from training.data.dataset import Dataset, DatasetError

RARE = 0.1  # the share that is taken for noise where a log is judged by the order of its rows
MIN_TIES = 20  # neighbours of one time, that say in what order they stand
MAX_EVENTS = 5000  # of a user that are learned from in order: who has more is a machine


@dataclass(frozen=True)
class ContextColumn:
    """One key of the context, as each event has it."""

    kind: KeyKind
    values: (
        NDArray[np.int32] | NDArray[np.float32]
    )  # [N] codes, 0 for none; of a numeric key numbers, NaN for none
    names: tuple[str, ...] = ()  # names[code - 1] is what a code stands for

    def take(self, where: NDArray[np.bool_] | NDArray[np.int64]) -> ContextColumn:
        """Return the column of the events that a mask or positions select."""
        return ContextColumn(self.kind, self.values[where], self.names)

    def text(self, position: int) -> str | None:
        """Return what a request would say at the moment of an event; None where nothing is known."""
        value = self.values[position]
        if self.kind == "numeric":
            return None if np.isnan(value) else repr(float(value))
        return self.names[int(value) - 1] if value else None


@dataclass(frozen=True)
class Interactions:
    """Events grouped by user, each user's oldest first.

    All arrays have length N. What a user did at one time stands in the order of the event log, where that is
    one of time (see _ordered).
    """

    users: NDArray[np.int32]  # user rows 1..U, ascending
    items: NDArray[np.int32]  # item rows 1..I
    event_types: NDArray[np.uint8]  # codes into EVENT_TYPES
    timestamps: NDArray[np.int64]  # the data set's clock
    num_users: int  # U
    num_items: int  # I
    # Of the moment of each event: the declared keys, and hour and weekday where there are unix times.
    context: Mapping[str, ContextColumn] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """[U+2]: the events of user u stand at offsets[u] to offsets[u + 1]."""
        return np.searchsorted(self.users, np.arange(self.num_users + 2)).astype(np.int64)

    def take(self, where: NDArray[np.bool_] | NDArray[np.int64]) -> Interactions:
        """Return the events that a mask or ascending positions select."""
        return Interactions(
            self.users[where],
            self.items[where],
            self.event_types[where],
            self.timestamps[where],
            self.num_users,
            self.num_items,
            {name: column.take(where) for name, column in self.context.items()},
        )

    @property
    def wanted_types(self) -> tuple[str, ...]:
        """The event types that there are, less the one that says "not this"."""
        counts = np.bincount(self.event_types, minlength=len(EVENT_TYPES))
        return tuple(name for code, name in enumerate(EVENT_TYPES) if counts[code] and code != NEGATIVE_EVENT)

    def context_at(self, position: int) -> dict[str, str]:
        """Return what a request at the moment of an event would say of it, but for what the time says."""
        told = {
            name: column.text(position) for name, column in self.context.items() if column.kind != "clock"
        }
        return {name: text for name, text in told.items() if text is not None}

    def history(self, user: int, end: int | None = None) -> History:
        """Return what `user` did, up to but without the event at position `end`."""
        rows = slice(self.offsets[user], self.offsets[user + 1] if end is None else end)
        return History(self.items[rows], self.event_types[rows], self.timestamps[rows])

    @cached_property
    def is_first_touch(self) -> NDArray[np.bool_]:
        """[N]: True where the user has not touched the item before."""
        pair = self.users.astype(np.int64) * (self.num_items + 1) + self.items
        first = np.zeros(len(self), bool)
        first[np.unique(pair, return_index=True)[1]] = True
        return first

    @cached_property
    def is_next_item(self) -> NDArray[np.bool_]:
        """[N]: False where the event repeats the item of the user's event just before it."""
        same = (self.users[1:] == self.users[:-1]) & (self.items[1:] == self.items[:-1])
        return np.concatenate([np.ones(min(1, len(self)), bool), ~same])

    @cached_property
    def is_learned_in_order(self) -> NDArray[np.bool_]:
        """[N]: is_next_item, less a user's oldest beyond MAX_EVENTS of those."""
        kept = np.flatnonzero(self.is_next_item)
        users = self.users[kept]
        num_from_end = np.searchsorted(users, users, side="right") - np.arange(len(kept))
        learned = np.zeros(len(self), np.bool_)
        learned[kept[num_from_end <= MAX_EVENTS]] = True
        return learned

    @cached_property
    def edges(self) -> Interactions:
        """The first event of each user with each item, less those that say "not this"."""
        positive = self.take(self.event_types != NEGATIVE_EVENT)
        return positive.take(positive.is_first_touch)

    def item_counts(self) -> NDArray[np.int64]:
        """Return how many users each item has an edge to, [I+1]."""
        return np.bincount(self.edges.items, minlength=self.num_items + 1).astype(np.int64)

    def user_counts(self) -> NDArray[np.int64]:
        """Return how many items each user has an edge to, [U+1]."""
        return np.bincount(self.edges.users, minlength=self.num_users + 1).astype(np.int64)


@dataclass(frozen=True)
class EventLog:
    """The whole event log of a data set, in rows."""

    events: Interactions
    user_ids: list[str]  # user_ids[u - 1] is the external id of user row u
    item_ids: list[str]  # item_ids[i - 1] is the external id of item row i
    is_test: NDArray[np.bool_] | None  # [N] where the data set comes with a split of its own


def load_event_log(dataset: Dataset) -> EventLog:
    """Read a data set's events in rows: items as in items.parquet, users by first appearance.

    Raises:
        DatasetError: an event lacks a field or names an item that items.parquet lacks, there is no event at
            all, or a table is damaged.
    """
    try:
        return _load_event_log(dataset)
    except pl.exceptions.PolarsError as error:
        raise DatasetError(f"a table of {dataset.directory} is damaged: {error}") from error


def _load_event_log(dataset: Dataset) -> EventLog:
    items = dataset.items.select("item_id").collect()
    events = dataset.events
    users = events.select("user_id").unique(maintain_order=True).collect()
    has_split = "split" in events.collect_schema()
    columns = (
        events.select(
            pl.col("user_id"),
            pl.col("item_id"),
            pl.col("timestamp"),
            pl.col("event_type").cast(pl.Enum(EVENT_TYPES)).to_physical().cast(pl.UInt8),
            *([(pl.col("split") == "test").alias("is_test")] if has_split else []),
            *(pl.col(name).alias(f"context {name}") for name in dataset.info.context),
        )
        .join(users.with_row_index("user", offset=1).lazy(), on="user_id", how="left", maintain_order="left")
        .join(items.with_row_index("item", offset=1).lazy(), on="item_id", how="left", maintain_order="left")
        .drop("user_id", "item_id")
        .with_row_index("row")
        .sort("user", "timestamp", maintain_order=True)
        .collect()
    )
    if not len(columns):
        raise DatasetError(f"{dataset.directory} has no events")
    for name in ("user", "timestamp", "event_type"):
        if missing := columns[name].null_count():
            raise DatasetError(f"{missing} events of {dataset.directory} have no {name}")
    if missing := columns["item"].null_count():
        raise DatasetError(f"{missing} events of {dataset.directory} name an item that items.parquet lacks")
    columns = _ordered(columns, items["item_id"])
    return EventLog(
        events=Interactions(
            columns["user"].cast(pl.Int32).to_numpy(),
            columns["item"].cast(pl.Int32).to_numpy(),
            columns["event_type"].to_numpy(),
            columns["timestamp"].to_numpy(),
            num_users=len(users),
            num_items=len(items),
            context=_context(dataset, columns),
        ),
        user_ids=users["user_id"].to_list(),
        item_ids=items["item_id"].to_list(),
        is_test=columns["is_test"].to_numpy() if has_split else None,
    )


def _ordered(columns: pl.DataFrame, item_ids: pl.Series) -> pl.DataFrame:
    """Put in order what a user did at one time; the rest is in order already, as `row` is within one time.

    A log that grows has what was done in one second in the order in which it was done. One that is not in the
    order of time says nothing of it, nor does one whose rows of one time stand in the order of the items, as
    in dumps that know the day alone; and what such an order says would be learned: the next item is the one
    further down the list. There chance decides, the same each time; events of one item keep their order.
    """
    users, items = columns["user"].to_numpy(), columns["item"].to_numpy().astype(np.int64)
    rows = columns["row"].to_numpy().astype(np.int64)
    same_user = np.diff(users) == 0
    same_time = same_user & (np.diff(columns["timestamp"].to_numpy()) == 0)
    if not same_time.any():
        return columns
    first = np.flatnonzero(np.concatenate([[True], ~same_time]))  # of what a user did at one time
    backwards = (np.diff(rows[first]) < 0)[np.diff(users[first]) == 0]
    in_order_of_time = not len(backwards) or backwards.mean() < RARE
    ids = item_ids, item_ids.cast(pl.Float64, strict=False)  # as text, and as numbers where they are
    if in_order_of_time and not any(_stand_in_order(each, items, same_time) for each in ids):
        return columns
    pairs = users * (items.max() + 1) + items
    pair = np.unique(pairs, return_inverse=True)[1]
    drawn = np.random.default_rng(0).permutation(pair.max() + 1)[pair]
    return columns.sort("user", "timestamp", pl.Series(drawn), maintain_order=True)


def _stand_in_order(ids: pl.Series, items: NDArray[np.int64], beside: NDArray[np.bool_]) -> bool:
    """Return whether ids of neighbours that are `beside` each other rise nearly always, or nearly never."""
    places = np.append(np.nan, ids.rank("dense").cast(pl.Float64).fill_null(np.nan).to_numpy())[items]
    steps = np.diff(places)[beside]
    steps = steps[np.isfinite(steps) & (steps != 0)]
    return len(steps) >= MIN_TIES and not RARE <= np.mean(steps > 0) <= 1 - RARE


def _context(dataset: Dataset, columns: pl.DataFrame) -> dict[str, ContextColumn]:
    """Return the declared keys, and those of the clock that no declared one stands in for."""
    context = {}
    for name, kind in dataset.info.context.items():
        values = columns[f"context {name}"]
        if kind == "numeric":
            context[name] = ContextColumn("numeric", values.fill_null(np.nan).cast(pl.Float32).to_numpy())
        else:
            names = tuple(values.replace("", None).drop_nulls().unique().sort().to_list())
            if not names:
                continue
            codes = values.cast(pl.Enum(names), strict=False).to_physical().cast(pl.Int32) + 1
            context[name] = ContextColumn("categorical", codes.fill_null(0).to_numpy(), names)
    if dataset.info.time == "unix":
        hours = columns["timestamp"].to_numpy() // HOUR_MS
        for name, told, size in (("hour", hours % 24, 24), ("weekday", (hours // 24 + 3) % 7, 7)):
            if name not in context:
                names = tuple(map(str, range(size)))
                context[name] = ContextColumn("clock", (told + 1).astype(np.int32), names)
    return context
