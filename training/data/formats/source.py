"""What a format hands to the importer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from training.data.dataset import ColumnKind, TimeKind

TimeUnit = Literal["s", "ms", "us", "iso", "auto"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source, opened but not read: raw text columns that the importer checks, converts and counts.

    `events` has the names of EVENT_SCHEMA and of `context`, all String; only `user_id` and `item_id` must be
    there. It may also have item facts (`title`, `category`, `brand`, `seller_id`), of which the last
    non-blank one of an item wins, `line` (the row as it stands in the source) and `malformed` (Boolean: the
    row could not be taken apart).

    `items` has the names of ITEM_SCHEMA, String or, for `category` and `attributes`, List(String), and
    `malformed` as above. A `category` that is text is split at `category_separator`, `attributes` at
    `attribute_separator`.
    """

    name: str
    files: list[Path]
    events: pl.LazyFrame
    items: pl.LazyFrame | None = None
    time: TimeKind
    time_unit: TimeUnit = "auto"  # of `timestamp` and `available_from`, where time is "unix"
    split: Literal["given"] | None = None  # "given": events have the column `split`
    event_types: Mapping[str, str] = field(default_factory=dict)  # the source's name -> ours
    default_event_type: str = "interaction"  # where events have no column `event_type`
    context: Mapping[str, ColumnKind] = field(default_factory=dict)  # DatasetInfo.context
    category_separator: str = "."
    attribute_separator: str = "|"


def existing(path: Path) -> Path | None:
    """Return `path` or `path`.gz, whichever is a file; None where neither is."""
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def required(path: Path) -> Path:
    """Return `path` or `path`.gz; raise ValueError that says what lies beside it where neither is a file."""
    found = existing(path)
    if found is None:
        folder = path if path.is_dir() else path.parent
        names = sorted(p.name for p in folder.iterdir() if p.is_file())[:12] if folder.is_dir() else []
        beside = f"; {folder} has {', '.join(names)}" if names else ""
        raise ValueError(f"no file {path} or {path}.gz{beside}")
    return found


def stem(path: Path) -> str:
    """Return the file's name without its ending: Beauty.txt.gz -> Beauty."""
    return Path(path.name.removesuffix(".gz")).stem
