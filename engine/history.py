"""What each user did: the histories that serving starts from.

In-process here; another store is another class with the same two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from engine.ids import rows_by_id, strings

# The vocabulary of event types, in the order of their codes (uint8).
EVENT_TYPES = ("interaction", "view", "click", "wishlist", "cart", "remove_from_cart", "purchase", "rating")
EVENT_CODE = {name: code for code, name in enumerate(EVENT_TYPES)}
# An event that says "not this": no target, no edge of the graph, and nothing to search with.
NEGATIVE_EVENT = EVENT_CODE["remove_from_cart"]


@dataclass(frozen=True)
class History:
    """Events of one user, oldest first: three arrays of one length."""

    items: NDArray[np.int32]  # [H] item rows, 1..I
    event_types: NDArray[np.uint8]  # [H] codes into EVENT_TYPES
    timestamps: NDArray[np.int64]  # [H] the data set's clock; 0 where unknown

    def __len__(self) -> int:
        return len(self.items)

    @property
    def wanted(self) -> NDArray[np.int32]:
        """The items of all events but those that say "not this": [H'] item rows, oldest first."""
        wanted: NDArray[np.int32] = self.items[self.event_types != NEGATIVE_EVENT]
        return wanted


EMPTY_HISTORY = History(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int64))


def without_repeats(items: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return a history [H] with each run of one item as a single event."""
    is_first = np.ones(len(items), np.bool_)
    np.not_equal(items[1:], items[:-1], out=is_first[1:])
    return items[is_first]


def not_asked_for(items: NDArray[np.int32], repeats: bool) -> NDArray[np.int32]:
    """Return the items of a history [H] that take no part in a ranking.

    All of them; where users return to what they know, that of the last event alone: they are there already.
    """
    return items[-1:] if repeats else items


def left_padded(histories: Sequence[NDArray[np.int32]], length: int) -> NDArray[np.int64]:
    """Return histories as a ranker takes them: [B, T] item rows, newest last, padded on the left with 0.

    Each loses its immediate repeats, as in training, and then all but its newest `length` events. T is as
    short as that allows, and at least 1.
    """
    newest = [without_repeats(items)[-length:] for items in histories]
    padded = np.zeros((len(newest), max([1, *map(len, newest)])), np.int64)
    for row, items in zip(padded, newest, strict=True):
        if len(items):
            row[-len(items) :] = items
    return padded


# Users and what they did as a table: one line a user, the events oldest first.
USERS_SCHEMA: dict[str, pl.DataType] = {
    "user_id": pl.String(),
    "items": pl.List(pl.Int32()),
    "event_types": pl.List(pl.UInt8()),
    "timestamps": pl.List(pl.Int64()),
}


class HistoryStore(Protocol):
    """Where the pipeline looks up what a user did."""

    def row(self, user_id: str) -> int:
        """Return the user's row in the table of user vectors, 1..U; 0 for an unknown user."""

    def get(self, user_id: str) -> History:
        """Return the user's events, oldest first; none for an unknown user."""


class BundleHistoryStore:
    """The histories that a bundle carries, as three flat arrays and where each user's part begins."""

    def __init__(
        self,
        user_ids: Sequence[str] | NDArray[np.object_],
        begins: NDArray[np.int64],
        events: History,
        num_items: int,
    ) -> None:
        """Take histories; raise ValueError where they break a rule.

        Args:
            user_ids: U ids.
            begins: [U+1]: the events of user n stand at begins[n] to begins[n + 1].
            events: all events, user after user.
            num_items: I.
        """
        self._row_of = rows_by_id(user_ids)
        if len(self._row_of) != len(user_ids) or None in self._row_of or "" in self._row_of:
            raise ValueError("user_id is repeated or missing; expected every user once, with an id")
        items = events.items
        lengths = {len(items), len(events.event_types), len(events.timestamps)}
        if len(begins) != len(user_ids) + 1 or {int(begins[-1])} != lengths:
            raise ValueError("the histories do not end where their events end")
        if begins[0] != 0 or (begins[1:] < begins[:-1]).any():
            raise ValueError("the histories do not begin at 0, or one ends before it begins")
        if len(items) and not 1 <= items.min() <= items.max() <= num_items:
            raise ValueError(f"item rows run from {items.min()} to {items.max()}; expected 1 to {num_items}")
        self._begins = begins
        self._events = events

    @classmethod
    def from_table(cls, users: pl.DataFrame, num_items: int) -> BundleHistoryStore:
        """Take a table with the columns of USERS_SCHEMA."""
        begins, events = flat_histories(users)
        return cls(strings(users["user_id"]), begins, events, num_items)

    def __len__(self) -> int:
        return len(self._row_of)

    def row(self, user_id: str) -> int:
        """Return the user's row, 1..U; 0 for an unknown user."""
        return self._row_of.get(user_id, 0)

    def get(self, user_id: str) -> History:
        """Return the user's events, oldest first; EMPTY_HISTORY for an unknown user."""
        row = self.row(user_id)
        if not row:
            return EMPTY_HISTORY
        part = slice(self._begins[row - 1], self._begins[row])
        events = self._events
        return History(events.items[part], events.event_types[part], events.timestamps[part])


def flat_histories(users: pl.DataFrame) -> tuple[NDArray[np.int64], History]:
    """Return the histories of a table one behind the other, and where each begins: [U+1].

    Raises ValueError where the table has other columns than USERS_SCHEMA, or its lists do not fit together.
    """
    if dict(users.schema) != USERS_SCHEMA:
        raise ValueError(f"columns are {dict(users.schema)}; expected {USERS_SCHEMA}")
    lengths = users.select(pl.col("items", "event_types", "timestamps").list.len().fill_null(0)).to_numpy()
    if (lengths != lengths[:, :1]).any():
        raise ValueError("a user's items, event_types and timestamps differ in length; expected one length")
    begins = np.concatenate([[0], np.cumsum(lengths[:, 0], dtype=np.int64)])
    events = History(
        items=_flat(users["items"], np.int32),
        event_types=_flat(users["event_types"], np.uint8),
        timestamps=_flat(users["timestamps"], np.int64),
    )
    if len(events.items) != begins[-1]:
        raise ValueError("a history has an empty cell; expected a value for every event")
    return begins, events


def _flat(lists: pl.Series, dtype: type[np.generic]) -> NDArray[Any]:
    return lists.explode().drop_nulls().to_numpy().astype(dtype, copy=False)
