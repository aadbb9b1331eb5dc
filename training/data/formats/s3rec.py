"""S3-Rec's text files: one line a user, oldest first (https://github.com/RUCAIBox/CIKM2020-S3Rec)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl

from training.data.formats.source import Source, existing, required, stem


def read(src: str) -> Source:
    """Import S3-Rec's text files: `user item item ...` lines, oldest first, and what is known of the items.

    Args:
        src: What the file names start with: amazon/Beauty reads amazon/Beauty.txt, and where they are there
            Beauty_items.jsonl and Beauty_item2attributes.json; each may be gzipped.
    """
    path = Path(src)
    if path.is_file():
        path = path.with_name(stem(path))
    log = required(path.with_name(path.name + ".txt"))
    table = existing(path.with_name(path.name + "_items.jsonl"))
    attributes = existing(path.with_name(path.name + "_item2attributes.json"))
    return Source(
        name=path.name,
        files=[file for file in (log, table, attributes) if file],
        events=scan_adjacency(log),
        items=_read_items(table, attributes),
        time="order",
    )


def scan_adjacency(path: Path) -> pl.LazyFrame:
    """Return user_id and item_id of `user item item ...` lines; for a user without items, one null item."""
    ids = pl.col("line").str.extract_all(r"\S+")
    return (
        pl.scan_lines(path, glob=False)
        .filter(pl.col("line").str.strip_chars() != "")
        .select(user_id=ids.list.first(), item_id=ids.list.slice(1))
        .explode("item_id", empty_as_null=True)
    )


def _read_items(table: Path | None, attributes: Path | None) -> pl.LazyFrame | None:
    items = None
    if table:
        schema: dict[str, pl.DataType] = {
            "item": pl.String(),
            "title": pl.String(),
            "categories": pl.List(pl.List(pl.String)),
        }
        items = pl.scan_ndjson(table, schema=schema).select(
            item_id="item",
            title="title",
            category=pl.col("categories").list.first(),  # of several paths, the first
        )
    if attributes:
        with (gzip.open if attributes.suffix == ".gz" else open)(attributes, "rt", encoding="utf-8") as file:
            lists = {item: [str(a) for a in values] for item, values in json.load(file).items()}
        columns = {"item_id": list(lists), "attributes": list(lists.values())}
        frame = pl.LazyFrame(columns, {"item_id": pl.String(), "attributes": pl.List(pl.String)})
        items = frame if items is None else items.join(frame, on="item_id", how="left", maintain_order="left")
    return items
