"""What the rules see: the items of one request, and the facts of the catalog that they are taken from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP_FIELDS = ("category", "brand", "seller_id")
DAY_MS = 86_400_000
NEVER = -1  # in bought_at

# The columns of the catalog that an item may come with; both ItemFacts and RankedItems have them.
COLUMNS = (
    "vectors",
    "content_vectors",
    "prices",
    "margins",
    "available_from",
    "available_until",
    "stock",
    "popularity",
    "shown",
    "clicked",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the rules may know of a request."""

    now_ms: int | None = None  # on the catalog's clock; None where its times are no real times
    seed: int = 0  # at least 0; the same request with the same seed gets the same slate
    context: Mapping[str, str] = field(default_factory=dict)  # such as {"region": "DE", "age": "17"}

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected at least 0")


@dataclass(frozen=True)
class RankedItems:
    """N items as ranking left them, best first, with what the rules look at.

    A column that is None is missing for every item; what that means is said by each rule (`Rule.absent`).
    """

    rows: NDArray[np.int32]  # [N] item rows, 1..I, none twice
    scores: NDArray[np.float32]  # [N] finite, descending
    vectors: NDArray[np.float32] | None  # [N, D] of the graph
    groups: Mapping[str, NDArray[np.int32]]  # group -> [N] number of each item's group, 0 = missing
    seen: NDArray[np.bool_]  # [N] the user already had to do with the item
    content_vectors: NDArray[np.float32] | None = None  # [N, C] of texts and attributes
    prices: NDArray[np.float64] | None = None  # [N] NaN = missing
    margins: NDArray[np.float64] | None = None  # [N] share of the price, NaN = missing
    available_from: NDArray[np.int64] | None = None  # [N] ms, 0 = missing
    available_until: NDArray[np.int64] | None = None  # [N] ms, 0 = missing
    stock: NDArray[np.int64] | None = None  # [N] pieces, -1 = missing
    popularity: NDArray[np.int64] | None = None  # [N] training events
    shown: NDArray[np.int64] | None = None  # [N] times on a slate so far
    clicked: NDArray[np.int64] | None = None  # [N] of these, how often it was clicked
    bought_at: NDArray[np.int64] | None = None  # [N] ms of the last purchase, 0 = time unknown, NEVER
    request: Request = field(default_factory=Request)

    def __post_init__(self) -> None:
        named = [(f.name, getattr(self, f.name)) for f in fields(self)]
        for name, array in [*named, *self.groups.items()]:
            if isinstance(array, np.ndarray) and len(array) != len(self.rows):
                raise ValueError(f"{name} has {len(array)} entries; expected {len(self.rows)}, one an item")

    def check(self) -> None:
        """Raise ValueError where an item comes twice or a score is no number."""
        if not np.isfinite(self.scores).all():
            raise ValueError("scores holds NaN or infinity; expected finite numbers")
        ordered = np.sort(self.rows)
        if (ordered[1:] == ordered[:-1]).any():
            raise ValueError("rows holds an item twice; expected every item once")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: NDArray[Any]) -> RankedItems:
        """Return the items at these positions, or where this mask is True."""
        changed: dict[str, Any] = {
            f.name: array[chosen]
            for f in fields(self)
            if isinstance(array := getattr(self, f.name), np.ndarray)
        }
        return replace(self, groups={name: codes[chosen] for name, codes in self.groups.items()}, **changed)

    def followed_by(self, other: RankedItems) -> RankedItems:
        """Return these items and those of `other`, which come with the same columns."""
        groups = {name: np.concatenate([codes, other.groups[name]]) for name, codes in self.groups.items()}
        changed: dict[str, Any] = {
            f.name: np.concatenate([array, getattr(other, f.name)])
            for f in fields(self)
            if isinstance(array := getattr(self, f.name), np.ndarray)
        }
        return replace(self, groups=groups, **changed)

    def directions(self, of: str) -> NDArray[np.float32]:
        """Return the vectors of a column at length 1, [N, D]; zeros stay zeros, no column is [N, 0]."""
        vectors: NDArray[np.float32] | None = getattr(self, of)
        if vectors is None:
            return np.zeros((len(self), 0), np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        lengths[lengths == 0] = 1
        return np.asarray(vectors / lengths[:, None], np.float32)


@dataclass(frozen=True, kw_only=True)
class ItemFacts:
    """What the catalog says of its I items, by row; row 0 is padding. Columns are those of RankedItems."""

    num_items: int
    groups: Mapping[str, NDArray[np.int32]]  # "category" (leaf), "category/0" (broadest), ..., [I+1]
    # "category" (any level of the path), "brand", "seller_id", "attribute" -> value -> the rows that have it
    having: Mapping[str, Mapping[str, NDArray[np.int32]]]
    row_of: Mapping[str, int]  # item id -> row
    vectors: NDArray[np.float32] | None = None
    content_vectors: NDArray[np.float32] | None = None
    prices: NDArray[np.float64] | None = None
    margins: NDArray[np.float64] | None = None
    available_from: NDArray[np.int64] | None = None
    available_until: NDArray[np.int64] | None = None
    stock: NDArray[np.int64] | None = None
    popularity: NDArray[np.int64] | None = None
    shown: NDArray[np.int64] | None = None
    clicked: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name, array in [*((name, getattr(self, name)) for name in COLUMNS), *self.groups.items()]:
            if array is not None and len(array) != self.num_items + 1:
                raise ValueError(
                    f"{name} has {len(array)} entries; expected {self.num_items + 1}, padding and one an item"
                )

    @cached_property
    def most_popular(self) -> int:
        """The largest popularity of any item, 0 where none is known."""
        return int(self.popularity.max(initial=0)) if self.popularity is not None else 0

    def ranked(
        self,
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
        seen: NDArray[np.bool_],
        *,
        columns: Iterable[str],
        groups: Iterable[str] = (),
        bought_at: NDArray[np.int64] | None = None,
        request: Request | None = None,
    ) -> RankedItems:
        """Return items with some columns and groups of theirs; the others are None.

        Args:
            rows: [N] item rows, none twice.
            scores: [N].
            seen: [N].
            columns: some of COLUMNS.
            groups: some of the keys of `groups`.
            bought_at: [N], as in RankedItems.
            request: who asks; nothing is known of the request where None.
        """
        given = {
            name: column.take(rows, axis=0)
            for name in columns
            if (column := getattr(self, name, None)) is not None
        }
        return RankedItems(
            rows=rows,
            scores=scores,
            vectors=given.pop("vectors", None),
            groups={name: self.groups[name].take(rows) for name in groups},
            seen=seen,
            bought_at=bought_at,
            request=request or Request(),
            **given,
        )

    def whole(self, columns: Iterable[str]) -> RankedItems:
        """Return the whole catalog by row, padding included, with some columns; nothing is copied."""
        length = self.num_items + 1
        given = {name: getattr(self, name) for name in columns if name in COLUMNS}
        return RankedItems(
            rows=np.arange(length, dtype=np.int32),
            scores=np.zeros(length, np.float32),
            vectors=given.pop("vectors", None),
            groups={},
            seen=np.zeros(length, np.bool_),
            **given,
        )


def last_purchase(
    rows: NDArray[np.int32], bought: NDArray[np.int32], bought_ms: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return when each item was last bought: [N] int64 ms, 0 where at an unknown time, NEVER where never.

    A purchase at an unknown time counts as the last one: it may have been a moment ago.

    Args:
        rows: [N] item rows.
        bought: [B] rows of the items that were bought.
        bought_ms: [B] when; 0 = unknown.
    """
    last = np.full(len(rows), NEVER, np.int64)
    if len(bought):
        times = np.where(bought_ms == 0, np.iinfo(np.int64).max, bought_ms)
        order = np.lexsort((times, bought))
        found = np.searchsorted(bought[order], rows, side="right") - 1
        known = (found >= 0) & (bought[order][found] == rows)
        last[known] = bought_ms[order][found[known]]
    return last
