from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from engine.catalog import Catalog


@pytest.fixture
def items() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item_id": ["a b", "🎉", "c", "d"],
            "title": ["A", None, "C", "D"],
            "category": [["beauty", "hair"], ["beauty", "skin"], None, ["tools", "hair"]],
            "brand": ["x", "", None, "x"],
            "price": [1.0, 2.5, None, 4.0],
            "available_from": [2**60 + 1, None, 3, 4],
        }
    )


def test_rows_ids_and_titles(items: pl.DataFrame) -> None:
    catalog = Catalog(items)
    assert catalog.num_items == 4
    assert catalog.ids.tolist() == ["", "a b", "🎉", "c", "d"]
    assert catalog.titles.tolist() == ["", "A", "", "C", "D"]
    rows = catalog.rows(["d", "unknown", "", "🎉"])
    assert rows.tolist() == [4, 0, 0, 2]
    assert rows.dtype == np.int32


def test_columns_by_row(items: pl.DataFrame) -> None:
    catalog = Catalog(items)
    np.testing.assert_array_equal(catalog.prices, [np.nan, 1, 2.5, np.nan, 4])
    assert catalog.available_from.tolist() == [0, 2**60 + 1, 0, 3, 4]  # exact: not by way of a float
    assert catalog.popularity.tolist() == [0, 0, 0, 0, 0]


def test_codes(items: pl.DataFrame) -> None:
    catalog = Catalog(items)
    leaf = catalog.codes("category")
    assert leaf.dtype == np.int32
    assert leaf[[0, 3]].tolist() == [0, 0]
    assert len({0, leaf[1], leaf[2], leaf[4]}) == 4  # two leaves of one name stand on different branches
    broadest = catalog.codes("category", level=0)
    assert broadest[1] == broadest[2] != broadest[4]
    assert catalog.codes("category", level=5).tolist() == [0] * 5
    brand = catalog.codes("brand")
    assert brand[1] == brand[4] > 0
    assert brand[[2, 3]].tolist() == [0, 0]
    assert catalog.codes("seller_id").tolist() == [0] * 5
    with pytest.raises(ValueError, match="field is 'colour'; expected one of category, brand, seller_id"):
        catalog.codes("colour")


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, [1, 2, 3, 4]),
        ({"categories": ["hair"]}, [1, 4]),
        ({"categories": ["hair", "skin"]}, [1, 2, 4]),
        ({"categories": ["beauty"], "brands": ["x"]}, [1]),
        ({"brands": ["no such brand"]}, []),
        ({"seller_ids": ["anyone"]}, []),
        ({"min_price": 1.0, "max_price": 2.5}, [1, 2]),
        ({"min_price": 0.0}, [1, 2, 4]),
        ({"max_price": 0.5}, []),
    ],
)
def test_matching(items: pl.DataFrame, conditions: dict[str, object], expected: list[int]) -> None:
    mask = Catalog(items).matching(**conditions)  # type: ignore[arg-type]
    assert mask.dtype == np.bool_
    assert np.flatnonzero(mask).tolist() == expected


@pytest.mark.parametrize("num_items", [0, 1])
def test_tiny_catalogs(num_items: int, items: pl.DataFrame, tmp_path: Path) -> None:
    items.head(num_items).write_parquet(tmp_path / "items.parquet")
    catalog = Catalog.from_parquet(tmp_path / "items.parquet")
    assert catalog.num_items == num_items
    assert catalog.matching().tolist() == [False, True][: num_items + 1]
    assert len(catalog.codes("category")) == num_items + 1


def test_bad_tables() -> None:
    with pytest.raises(ValueError, match="no column 'item_id'"):
        Catalog(pl.DataFrame({"id": ["a"]}))
    with pytest.raises(ValueError, match="item_id 'a' stands in the catalog twice"):
        Catalog(pl.DataFrame({"item_id": ["a", "b", "a"]}))
    with pytest.raises(ValueError, match="without an item_id"):
        Catalog(pl.DataFrame({"item_id": ["a", None]}))
    with pytest.raises(ValueError, match="column 'price' is String; expected Float64"):
        Catalog(pl.DataFrame({"item_id": ["a"], "price": ["1"]}))


def test_what_rules_ask_for(items: pl.DataFrame) -> None:
    catalog = Catalog(
        items.with_columns(
            stock=pl.Series([0, None, 7, 2]),
            margin=pl.Series([0.5, None, 0.0, 1.0]),
            available_until=pl.Series([2**60 + 1, None, 3, 4]),
            attributes=pl.Series([["age:18", "vegan"], [], None, ["vegan"]], dtype=pl.List(pl.String)),
        )
    )
    assert catalog.stock.tolist() == [-1, 0, -1, 7, 2]
    np.testing.assert_array_equal(catalog.margins, [np.nan, 0.5, np.nan, 0, 1])
    assert catalog.available_until.tolist() == [0, 2**60 + 1, 0, 3, 4]
    assert {tag: rows.tolist() for tag, rows in catalog.having["attribute"].items()} == {
        "age:18": [1],
        "vegan": [1, 4],
    }
    assert catalog.category_depth == 2
    assert catalog.names["brand"] == ["", "x"]
    assert catalog.names["seller_id"] == [""]
    assert catalog.row_of["🎉"] == 2
    assert Catalog(items.select("item_id")).category_depth == 0
