"""`Interactions`: who touched what, how and when, as equal-length NumPy columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from engine.history import EVENT_TYPES, NEGATIVE_EVENT, History
from training.data.dataset import Dataset, DatasetError


@dataclass(frozen=True)
class Interactions:
    """Events grouped by user, each user's oldest first.

    All arrays have length N. Events of one user at the same time keep the order of the event log.
    """

    users: NDArray[np.int32]  # user rows 1..U, ascending
    items: NDArray[np.int32]  # item rows 1..I
    event_types: NDArray[np.uint8]  # codes into EVENT_TYPES
    timestamps: NDArray[np.int64]  # the data set's clock
    num_users: int  # U
    num_items: int  # I

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
        )

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

    def edges(self) -> Interactions:
        """Return the first event of each user with each item, less those that say "not this"."""
        positive = self.take(self.event_types != NEGATIVE_EVENT)
        return positive.take(positive.is_first_touch)

    def item_counts(self) -> NDArray[np.int64]:
        """Return how many users each item has an edge to, [I+1]."""
        return np.bincount(self.edges().items, minlength=self.num_items + 1).astype(np.int64)

    def user_counts(self) -> NDArray[np.int64]:
        """Return how many items each user has an edge to, [U+1]."""
        return np.bincount(self.edges().users, minlength=self.num_users + 1).astype(np.int64)


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
        DatasetError: an event names an item that items.parquet lacks, or there is no event at all.
    """
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
        )
        .join(users.with_row_index("user", offset=1).lazy(), on="user_id", how="left", maintain_order="left")
        .join(items.with_row_index("item", offset=1).lazy(), on="item_id", how="left", maintain_order="left")
        .drop("user_id", "item_id")
        .sort("user", "timestamp", maintain_order=True)
        .collect()
    )
    if not len(columns):
        raise DatasetError(f"{dataset.directory} has no events")
    if missing := columns["item"].null_count():
        raise DatasetError(f"{missing} events of {dataset.directory} name an item that items.parquet lacks")
    return EventLog(
        events=Interactions(
            columns["user"].cast(pl.Int32).to_numpy(),
            columns["item"].cast(pl.Int32).to_numpy(),
            columns["event_type"].to_numpy(),
            columns["timestamp"].to_numpy(),
            num_users=len(users),
            num_items=len(items),
        ),
        user_ids=users["user_id"].to_list(),
        item_ids=items["item_id"].to_list(),
        is_test=columns["is_test"].to_numpy() if has_split else None,
    )
