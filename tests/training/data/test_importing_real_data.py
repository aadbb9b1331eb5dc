"""The formats on the real files, with the counts that were published."""

import os
from pathlib import Path

import polars as pl
import pytest

from training.data.dataset import Dataset
from training.data.importing import main

DATA = Path(os.environ.get("TRIRANK_DATA", Path(__file__).parents[3] / "../shared/data"))

REES46 = (
    "--columns.timestamp event_time --columns.item_id product_id --columns.session_id user_session "
    "--columns.category category_code --repeats"
)
RETAILROCKET = "--columns.user_id user --columns.item_id item"
BEHAVIORS = ["--columns.event_type", "behavior", "--event_types", '{"buy": "purchase"}']


def imported(tmp_path: Path, format_name: str, source: str, *options: str) -> Dataset:
    if not list((DATA / source).parent.glob(f"{Path(source).name}*")):
        pytest.skip(f"{DATA / source} is not there; set TRIRANK_DATA to the folder of the real data sets")
    out = tmp_path / "out"
    assert main([format_name, str(DATA / source), "--out", str(out), *options]) == 0
    return Dataset.open(out)


@pytest.mark.parametrize(
    ("format_name", "source", "options", "counts"),
    [
        ("s3rec", "amazon-5core/Beauty", [], (22_363, 12_101, 198_502)),
        ("s3rec", "amazon-5core/Toys_and_Games", [], (19_412, 11_924, 167_597)),
        ("pairs", "ml-1m/ml-1m.txt.gz", [], (6_040, 3_416, 999_611)),
        ("lightgcn", "gowalla", [], (29_858, 40_981, 810_128 + 217_242)),
        ("recbole", "ml-100k", [], (943, 1_682, 100_000)),
        ("table", "rees46-sample/2019-Oct-first-hours.csv.gz", REES46.split(), (4_504, 6_493, 17_434)),
        (
            "table",
            "retailrocket-multibehavior/train.tsv.gz",
            [*RETAILROCKET.split(), *BEHAVIORS],
            (2_174, 29_905, 97_381),
        ),
    ],
)
def test_published_counts(tmp_path, format_name, source, options, counts):
    info = imported(tmp_path, format_name, source, *options).info
    assert (info.num_users, info.num_items, info.num_events) == counts
    assert info.num_rejected == 0


def test_beauty_has_titles_paths_and_attributes(tmp_path):
    dataset = imported(tmp_path, "s3rec", "amazon-5core/Beauty")
    first = dataset.items.head(1).collect().row(0, named=True)
    assert first["title"].startswith("OPI Nail Lacquer")
    assert first["category"] == ["Beauty", "Makeup", "Nails", "Nail Polish"]
    assert first["attributes"]
    history = dataset.events.filter(pl.col("user_id") == "2").collect()
    assert history["item_id"].to_list() == ["6", "7", "8", "9", "10", "4", "11"]
    assert history["timestamp"].to_list() == list(range(7))


def test_ml_1m_has_genres(tmp_path):
    items = str(DATA / "ml-1m/items.tsv")
    dataset = imported(tmp_path, "pairs", "ml-1m/ml-1m.txt.gz", "--items", items)
    assert dataset.items.head(1).collect().to_dicts() == [
        {
            "item_id": "1",
            "title": "Raiders of the Lost Ark (1981)",
            "category": ["Action"],
            "attributes": ["Action", "Adventure"],
        }
    ]


def test_gowalla_keeps_the_given_split(tmp_path):
    dataset = imported(tmp_path, "lightgcn", "gowalla")
    sizes = dataset.events.group_by("split").len().collect()
    assert dict(sizes.iter_rows()) == {"train": 810_128, "test": 217_242}


def test_retailrocket_test_file_has_no_times(tmp_path):
    options = [*RETAILROCKET.split(), "--default_event_type", "purchase"]
    info = imported(tmp_path, "table", "retailrocket-multibehavior/test.tsv.gz", *options).info
    assert (info.time, info.event_types) == ("order", {"purchase": 2_174})
