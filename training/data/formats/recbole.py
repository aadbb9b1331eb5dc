"""RecBole's atomic files (https://recbole.io/docs/user_guide/data/atomic_files.html)."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from training.data.formats.source import Source, existing, stem
from training.data.formats.table import OpenTable

# Names under which atomic files keep an item's genres or categories (token_seq: words between spaces).
GENRE_FIELDS = ("class", "genre", "genres", "categories", "category", "tags")


def read(src: str) -> Source:
    """Import RecBole's atomic files: tab-separated, with `name:type` headers.

    Read are user_id, item_id and, where they are there, rating and timestamp (seconds) of the .inter file,
    and title, brand, price and genres of the .item file beside it. All genres become attributes, the first
    one the category.

    Args:
        src: The .inter file, or the folder that holds exactly one; the .item file is looked for beside it.
    """
    path = _inter_file(Path(src))
    table = OpenTable.open(path, "\t")
    fields = _fields(table)
    names = ("user_id", "item_id", "rating", "timestamp")
    wanted = {ours: fields.get(ours) for ours in names}
    events = table.select(table.choose(wanted, required=names[:2]))
    item_path = existing(path.with_name(stem(path) + ".item"))
    return Source(
        name=stem(path),
        files=[path] if item_path is None else [path, item_path],
        events=events,
        items=None if item_path is None else _read_items(item_path),
        time="unix" if "timestamp" in fields else "order",
        time_unit="s",
    )


def _inter_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted([*path.glob("*.inter"), *path.glob("*.inter.gz")])
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{path}: expected an .inter file or a folder with exactly one; found {names}")
    return found[0]


def _fields(table: OpenTable) -> dict[str, str]:
    """Return name -> `name:type`, the column of the file."""
    return {column.split(":")[0]: column for column in table.columns}


def _read_items(path: Path) -> pl.LazyFrame:
    table = OpenTable.open(path, "\t")
    fields = _fields(table)
    wanted = {ours: fields.get(ours) for ours in ("item_id", "title", "brand", "price")}
    wanted["title"] = next(
        (c for name, c in fields.items() if name == "title" or name.endswith("_title")), None
    )
    wanted["genres"] = next((fields[name] for name in GENRE_FIELDS if name in fields), None)
    frame = table.select(table.choose(wanted, required=("item_id",)))
    if "genres" not in frame.collect_schema():
        return frame
    attributes = pl.col("genres").str.extract_all(r"\S+")
    return frame.with_columns(attributes=attributes, category=attributes.list.head(1)).drop("genres")
