"""Lines of `user item`, oldest first: SASRec's text files."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from training.data.formats.source import Source, existing, stem
from training.data.formats.table import OpenTable


def read(src: str, *, items: Path | None = None) -> Source:
    """Import lines of `user item`, oldest first within a user, plain or gzipped.

    Args:
        src: The file, such as ml-1m.txt.gz.
        items: Item table (CSV, TSV or Parquet with a header) with item_id, and where it has them title and
            category or genres. Genres are split at "|": all become attributes, the first one the category.
    """
    path = existing(Path(src))
    if path is None:
        folder = Path(src)
        names = sorted(p.name for p in folder.glob("*.txt*")) if folder.is_dir() else []
        raise ValueError(
            f"no file {src}" + (f"; it is a folder: which of {', '.join(names)} is meant?" if names else "")
        )
    pair = pl.col("line").str.extract_groups(r"^\s*(?<user_id>\S+)\s+(?<item_id>\S+)\s*$")
    events = (
        pl.scan_lines(path, glob=False)
        .filter(pl.col("line").str.strip_chars() != "")
        .select("line", pair.struct.unnest())
        .with_columns(malformed=pl.col("user_id").is_null())
    )
    return Source(
        name=stem(path),
        files=[path] if items is None else [path, items],
        events=events,
        items=None if items is None else _read_items(items),
        time="order",
        category_separator="|",
    )


def _read_items(path: Path) -> pl.LazyFrame:
    table = OpenTable.open(path)
    wanted = dict.fromkeys(("item_id", "title", "category", "genres"))
    frame = table.select(table.choose(wanted, required=("item_id",)))
    if "genres" not in frame.collect_schema():
        return frame
    attributes = pl.col("genres").str.split("|")
    return frame.with_columns(attributes=attributes, category=attributes.list.head(1)).drop("genres")
