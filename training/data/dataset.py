"""A data set directory: what `trirank import` and `trirank simulate` write and everything else reads.

events.parquet     who did what to which item, when (EVENT_SCHEMA)
items.parquet      what is known of each item (ITEM_SCHEMA); holds every item of events.parquet once
dataset.json       DatasetInfo: source, counts, fingerprint, what the times mean
rejected.parquet   the source's rows that broke a rule, with the reason; only where there are any
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from engine.history import EVENT_TYPES

EVENT_SCHEMA: dict[str, pl.DataType] = {
    "user_id": pl.String(),
    "item_id": pl.String(),
    "timestamp": pl.Int64(),  # what it counts: DatasetInfo.time
    "event_type": pl.String(),  # one of EVENT_TYPES
    # the rest is optional: a column stands only where the source has it
    "session_id": pl.String(),
    "price": pl.Float64(),
    "rating": pl.Float64(),
    "split": pl.String(),  # "train" or "test", where DatasetInfo.split is "given"
}
# Beside these stand the columns that DatasetInfo.context names: String, or Float64 where they are numeric.
CONTEXT_TYPES: dict[str, pl.DataType] = {"categorical": pl.String(), "numeric": pl.Float64()}
REQUIRED_EVENT_COLUMNS = ("user_id", "item_id", "timestamp", "event_type")

ITEM_SCHEMA: dict[str, pl.DataType] = {
    "item_id": pl.String(),
    # the rest is optional
    "title": pl.String(),
    "description": pl.String(),
    "category": pl.List(pl.String()),  # the path, broadest first
    "brand": pl.String(),
    "seller_id": pl.String(),
    "price": pl.Float64(),
    "margin": pl.Float64(),  # share of the price, 0 to 1
    "available_from": pl.Int64(),  # same clock as the events' timestamp
    "available_until": pl.Int64(),  # from then on it is not on sale any more
    "stock": pl.Int64(),  # pieces, at least 0
    "attributes": pl.List(pl.String()),
}

TimeKind = Literal["unix", "order", "none"]
ColumnKind = Literal["categorical", "numeric"]


@dataclass(kw_only=True)
class DatasetInfo:
    """The contents of dataset.json."""

    name: str
    source: dict[str, Any]  # {"format": "s3rec", "files": ["Beauty.txt.gz", ...], ...}
    time: TimeKind  # unix: milliseconds since 1970 UTC; order: place in the user's sequence; none: all 0
    split: Literal["given"] | None = None
    repeats: bool = False  # True where users return to the same items (groceries, sessions)
    simulated: bool = False
    num_users: int = 0
    num_items: int = 0
    num_events: int = 0
    num_rejected: int = 0
    rejected_reasons: dict[str, int] = field(default_factory=dict)
    event_types: dict[str, int] = field(default_factory=dict)  # event type -> number of events
    # What events.parquet says of the moment of an event: column -> kind
    context: dict[str, ColumnKind] = field(default_factory=dict)
    fingerprint: str = ""  # sha256 over events.parquet and items.parquet


class DatasetError(ValueError):
    """A data set directory that cannot be used, and why."""


def fingerprint(directory: Path) -> str:
    """Return the sha256 (hex) over events.parquet followed by items.parquet."""
    digest = hashlib.sha256()
    for name in ("events.parquet", "items.parquet"):
        with (directory / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def write_info(directory: Path, info: DatasetInfo) -> DatasetInfo:
    """Write dataset.json with the fingerprint of the Parquet files that already stand beside it."""
    info = dataclasses.replace(info, fingerprint=fingerprint(directory))
    text = json.dumps(dataclasses.asdict(info), indent=2, ensure_ascii=False)
    (directory / "dataset.json").write_text(text + "\n", encoding="utf-8")
    return info


@dataclass(frozen=True)
class Dataset:
    """A data set directory, opened; the tables are read lazily."""

    directory: Path
    info: DatasetInfo

    @classmethod
    def open(cls, directory: str | Path) -> Dataset:
        """Open a data set directory; raise DatasetError where it is none, or is damaged."""
        directory = Path(directory)
        for name in ("dataset.json", "events.parquet", "items.parquet"):
            if not (directory / name).is_file():
                raise DatasetError(
                    f"{directory} is not a data set directory: {name} is missing; "
                    "make one with `trirank import` or `trirank simulate`"
                )
        try:
            raw = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
            info = DatasetInfo(**raw)
        except (json.JSONDecodeError, TypeError) as error:
            raise DatasetError(f"{directory / 'dataset.json'} cannot be read: {error}") from error
        dataset = cls(directory, info)
        try:
            dataset._check_schema()
        except pl.exceptions.PolarsError as error:
            raise DatasetError(f"a table of {directory} is damaged: {error}") from error
        return dataset

    @property
    def events(self) -> pl.LazyFrame:
        """The events, in file order (EVENT_SCHEMA)."""
        return pl.scan_parquet(self.directory / "events.parquet")

    @property
    def items(self) -> pl.LazyFrame:
        """The items, in row order: the first stands at row 1 of every table (ITEM_SCHEMA)."""
        return pl.scan_parquet(self.directory / "items.parquet")

    def _check_schema(self) -> None:
        for file, frame, allowed, required in (
            ("events.parquet", self.events, EVENT_SCHEMA, REQUIRED_EVENT_COLUMNS),
            ("items.parquet", self.items, ITEM_SCHEMA, ("item_id",)),
        ):
            schema = frame.collect_schema()
            for column in required:
                if column not in schema:
                    raise DatasetError(f"{self.directory / file} has no column {column!r}")
            for column, dtype in schema.items():
                if column in allowed and dtype != allowed[column]:
                    raise DatasetError(
                        f"{self.directory / file}: column {column!r} is {dtype}; expected {allowed[column]}"
                    )
        schema = self.events.collect_schema()
        for key, kind in self.info.context.items():
            if key in EVENT_SCHEMA or kind not in CONTEXT_TYPES:
                raise DatasetError(
                    f"{self.directory / 'dataset.json'}: context names {key!r} as {kind!r}; expected a "
                    "column that is no other part of an event, categorical or numeric"
                )
            if schema.get(key) != CONTEXT_TYPES[kind]:
                raise DatasetError(
                    f"{self.directory / 'events.parquet'}: column {key!r} is {schema.get(key)}; expected "
                    f"{CONTEXT_TYPES[kind]}, as dataset.json says {kind}"
                )


__all__ = [
    "CONTEXT_TYPES",
    "EVENT_SCHEMA",
    "EVENT_TYPES",
    "ITEM_SCHEMA",
    "REQUIRED_EVENT_COLUMNS",
    "ColumnKind",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "TimeKind",
    "fingerprint",
    "write_info",
]
