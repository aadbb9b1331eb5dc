"""What is known of each item, by row; the only place that turns the shop's own item ids into rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from engine.ids import rows_by_id, strings

# The columns of catalog.parquet: those of a data set's items.parquet, and how many users training saw with
# each item. Only item_id has to be there.
CATALOG_SCHEMA: dict[str, pl.DataType] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "category": pl.List(pl.String()),  # the path, broadest first
    "brand": pl.String(),
    "seller_id": pl.String(),
    "price": pl.Float64(),
    "margin": pl.Float64(),
    "available_from": pl.Int64(),
    "available_until": pl.Int64(),
    "stock": pl.Int64(),
    "attributes": pl.List(pl.String()),
    "popularity": pl.Int64(),
}
GROUP_FIELDS = ("category", "brand", "seller_id")
PATH_SEPARATOR = "\x1f"  # stands in no category's name


class Catalog:
    """The items of a shop: row 0 is padding, rows 1..I are the lines of the table, in order.

    Attributes:
        num_items: I.
        ids: [I+1] str, item id of each row; "" at row 0.
        titles: [I+1] str, title of each row; "" where there is none.
        prices: [I+1] float64; NaN where there is none.
        margins: [I+1] float64, share of the price; NaN where there is none.
        available_from: [I+1] int64, the data set's clock; 0 where unknown.
        available_until: [I+1] int64, the same clock: from then on not on sale any more; 0 where unknown.
        stock: [I+1] int64, pieces; -1 where unknown.
        popularity: [I+1] int64, training users of each item, by events that do not say "not this".
        having: "category" (any level of the path), "brand", "seller_id" or "attribute" -> value -> the rows
            that have it, int32.
        names: "brand" or "seller_id" -> what each number of `codes` stands for; "" at 0.
    """

    def __init__(self, items: pl.DataFrame) -> None:
        """Take a table with the columns of CATALOG_SCHEMA; raise ValueError where it breaks a rule."""
        if "item_id" not in items.columns:
            raise ValueError(f"the catalog has no column 'item_id'; it has {items.columns}")
        for column, expected in CATALOG_SCHEMA.items():
            if column not in items.columns:
                items = items.with_columns(pl.lit(None, expected).alias(column))
            elif items.schema[column] != expected:
                raise ValueError(f"column {column!r} is {items.schema[column]}; expected {expected}")

        self.num_items = items.height
        self.ids, self.titles = (
            strings(pl.concat([pl.Series([""]), items[column].fill_null("")]))
            for column in ("item_id", "title")
        )
        self.prices = _column(items["price"], np.nan, np.float64)
        self.margins = _column(items["margin"], np.nan, np.float64)
        self.available_from = _column(items["available_from"], 0, np.int64)
        self.available_until = _column(items["available_until"], 0, np.int64)
        self.stock = _column(items["stock"], -1, np.int64)
        self.popularity = _column(items["popularity"], 0, np.int64)
        self._groups = items.select(GROUP_FIELDS)
        # What items have -> value -> the rows that have it; a category is any level of the path.
        self.having = {field: _rows_by_value(items[field]) for field in GROUP_FIELDS}
        self.having["attribute"] = _rows_by_value(items["attributes"])

        self.names = {
            field: ["", *self._groups[field].replace("", None).drop_nulls().unique().sort()]
            for field in ("brand", "seller_id")
        }
        self._row_of = rows_by_id(self.ids[1:])
        if "" in self._row_of:
            raise ValueError("the catalog has an item without an item_id; every item needs one")
        if len(self._row_of) != self.num_items:
            repeated = items["item_id"].filter(items["item_id"].is_duplicated())[0]
            raise ValueError(f"item_id {repeated!r} stands in the catalog twice; expected once")

    @classmethod
    def from_parquet(cls, path: str | Path) -> Catalog:
        """Read catalog.parquet or a data set's items.parquet."""
        return cls(pl.read_parquet(path))

    def rows(self, ids: Iterable[str]) -> NDArray[np.int32]:
        """Return the row of each id, [N] int32; 0 for an id that is not in the catalog."""
        return np.fromiter((self._row_of.get(item_id, 0) for item_id in ids), np.int32)

    @property
    def category_depth(self) -> int:
        """The number of levels of the longest category path; 0 where no item has a category."""
        depths = self._groups["category"].list.len().fill_null(0).to_numpy()
        return int(depths.max(initial=0))

    @property
    def row_of(self) -> Mapping[str, int]:
        """The row of every item id."""
        return MappingProxyType(self._row_of)

    def codes(self, field: str, level: int | None = None) -> NDArray[np.int32]:
        """Return a number for each item's category, brand or seller: [I+1] int32, 0 where it has none.

        Equal numbers mean equal values; the numbers themselves mean nothing.

        Args:
            field: "category", "brand" or "seller_id".
            level: which step of the category path: 0 the broadest, -1 the leaf; None means the leaf. A
                category is its path down to there: "Shoes" below "Men" is not "Shoes" below "Women".
        """
        if field not in GROUP_FIELDS:
            raise ValueError(f"field is {field!r}; expected one of {', '.join(GROUP_FIELDS)}")
        values = self._groups[field]
        if field == "category":
            level = -1 if level is None else level
            path = pl.col(field)
            depth = pl.lit(level + 1) if level >= 0 else path.list.len().cast(pl.Int64) + level + 1
            named = path.list.get(level, null_on_oob=True).replace("", None).is_not_null()
            down_to = pl.when(named).then(path.list.head(depth).list.join(PATH_SEPARATOR))
            values = values.to_frame(field).select(down_to).to_series()
        values = values.replace("", None)
        codes = values.rank("dense")  # null stays null
        return _column(codes.cast(pl.Int32), 0, np.int32)

    def matching(
        self,
        categories: Sequence[str] = (),
        brands: Sequence[str] = (),
        seller_ids: Sequence[str] = (),
        min_price: float | None = None,
        max_price: float | None = None,
    ) -> NDArray[np.bool_]:
        """Return which rows meet every condition: [I+1] bool, row 0 always False.

        Values of one field are alternatives; an empty field is no condition. A category matches at any level
        of its path. Prices are inclusive, and an item without a price fails a price condition.
        """
        mask = np.ones(self.num_items + 1, np.bool_)
        for field, wanted in zip(GROUP_FIELDS, (categories, brands, seller_ids), strict=True):
            if wanted:
                having = np.zeros_like(mask)
                for value in wanted:
                    having[self.having[field].get(value, [])] = True
                mask &= having
        if min_price is not None:
            mask &= self.prices >= min_price
        if max_price is not None:
            mask &= self.prices <= max_price
        mask[0] = False
        return mask


def _column(values: pl.Series, missing: float, dtype: type[np.generic]) -> NDArray[Any]:
    """Return a column by row: the missing value at row 0 and where the table has none."""
    filled = values.fill_null(missing).to_numpy()
    return np.concatenate([[missing], filled]).astype(dtype)


def _rows_by_value(values: pl.Series) -> dict[str, NDArray[np.int32]]:
    """Return the rows that have each value; a row with a list has all values of the list."""
    table = pl.DataFrame({"row": np.arange(1, len(values) + 1, dtype=np.int32), "value": values})
    if values.dtype == pl.List(pl.String):
        table = table.explode("value")
    groups = table.drop_nulls().group_by("value").agg("row").sort("value")
    return {value: rows.to_numpy() for value, rows in zip(groups["value"], groups["row"], strict=True)}
