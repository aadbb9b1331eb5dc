"""`trirank import FORMAT SRC --out DIR`: make a data set directory (see dataset.py) out of a source.

A format only opens its files (formats/); checking, converting, counting and writing are here, once. The log
is read in one streaming pass and never held in memory; the items are. Sources in which only the order stands
for time are the exception: numbering each user's events takes the accepted events in memory.

No row vanishes: a row that breaks a rule goes to rejected.parquet with the reason, and is counted on screen.
Where more than `max_rejected` of the rows do, nothing is written at DIR, and the rejected rows are kept
beside it, in DIR.rejected.parquet.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from jsonargparse import DefaultHelpFormatter
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from engine.arguments import ArgumentParser
from ranking.context import HOUR_MS
from training.data.dataset import EVENT_TYPES, ITEM_SCHEMA, DatasetInfo, write_info
from training.data.formats import lightgcn, pairs, recbole, s3rec, table
from training.data.formats.source import Source, TimeUnit

# A new format is one file in formats/ and one line here.
FORMATS: dict[str, Callable[..., Source]] = {
    "s3rec": s3rec.read,
    "lightgcn": lightgcn.read,
    "pairs": pairs.read,
    "recbole": recbole.read,
    "table": table.read,
}
EXAMPLES = {"table": table.EXAMPLES}

# Text that an event log may hold beside the event.
ITEM_FACTS = ("title", "description", "category", "brand", "seller_id")
MOMENTS = ("available_from", "available_until")  # of the item table, on the clock of the events
UNKNOWN_EVENT_TYPE = "unknown event_type"
REJECTED = pl.col("reason").is_not_null()
MAX_TIMESTAMP_MS = 253_402_300_799_999  # the end of the year 9999; beyond it the unit was wrong

# Times without an offset are UTC; a closing " UTC" or "Z" and the "T" in the middle are taken away first.
ISO_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M", "%Y-%m-%d")
MS_PER_UNIT = {"s": 1e3, "ms": 1.0, "us": 1e-3}
# The years 1990 to 2100, in seconds: `auto` takes a number for a time only where it falls there.
PLAUSIBLE_SECONDS = (6.3e8, 4.1e9)

REPEATS_HELP = (
    "Users return to the same items (groceries, sessions), so items already seen may be recommended."
)
MAX_REJECTED_HELP = "The share of rows that may be rejected, 0 to 1; with more than that nothing is imported."


def import_source(
    source: Source,
    out: Path,
    *,
    format_name: str,
    name: str | None = None,
    repeats: bool = False,
    max_rejected: float = 0.01,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[DatasetInfo, list[str]]:
    """Write the data set directory `out`; return its DatasetInfo and remarks for the reader.

    `say` is told each step. Raises ValueError where the source or an option is at fault; `out` is then
    left as it was.
    """
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"max_rejected is {max_rejected}; expected 0 to 1")
    for event_type in (source.default_event_type, *source.event_types.values()):
        if event_type not in EVENT_TYPES:
            raise ValueError(f"event type is {event_type!r}; expected one of {', '.join(EVENT_TYPES)}")
    out = out.resolve()
    _check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        directory = Path(temporary, "dataset")
        directory.mkdir()
        say(f"reading {', '.join(file.name for file in source.files)}")
        seen = _write_events(source, directory, Path(temporary, "checked.parquet"), notes)
        say("counting")
        info = DatasetInfo(
            name=name or source.name,
            source={"format": format_name, "files": [file.name for file in source.files]},
            time=source.time,
            split=source.split,
            context=dict(source.context),
            repeats=repeats,
            **_counts(directory),
        )
        unknown = _unknown_event_types(directory)
        notes += [unknown] if unknown else []
        _judge_rejected(directory, info, max_rejected, out, unknown)
        say("writing items")
        items = _items(source, seen, max_rejected, notes)
        items.write_parquet(directory / "items.parquet")
        info = write_info(directory, dataclasses.replace(info, num_items=items.height))
        if out.exists():
            os.replace(out, Path(temporary, "replaced"))
        os.replace(directory, out)
    return info, notes


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; expected a directory")
    # Only a data set is ever replaced: a mistyped --out must not cost anyone a home directory.
    if not (out / "dataset.json").is_file():
        raise ValueError(
            f"--out {out} holds something that is not a data set; expected a new or empty directory"
        )
    if not overwrite:
        raise ValueError(f"--out {out} holds a data set already; --overwrite replaces it")


# --- events ---------------------------------------------------------------------------------------


def _write_events(source: Source, directory: Path, scratch: Path, notes: list[str]) -> pl.DataFrame:
    """Write events.parquet and rejected.parquet; return the events' items.

    They stand in the order of their first appearance, with what the log has of them: ITEM_FACTS (as in the
    log) and price. `scratch` is a file to write over.
    """
    schema = source.events.collect_schema()
    unit = source.time_unit
    if "timestamp" in schema and unit == "auto":
        sample = source.events.select("timestamp").filter(~_blank("timestamp")).head(1000)
        unit = time_unit_of(sample.collect(engine="streaming").to_series())
        notes.append(f"times are in {'ISO 8601' if unit == 'iso' else unit}, by the look of the first ones")
    event = _event(schema, unit, source)
    # Without these an event is still one: what cannot be read is left out, and counted.
    optional = [name for name, kind in source.context.items() if kind == "numeric"]
    optional += [name for name in ("price", "rating") if name in event]
    unreadable = pl.struct(_is_unreadable(name).alias(name) for name in optional) if optional else None
    facts = {name: _blank_to_null(name, schema[name]) for name in ITEM_FACTS if name in schema}
    raw = pl.struct(_as_text(name, dtype) for name, dtype in schema.items() if name != "malformed")
    checked = (
        source.events.with_row_index("row", offset=1)
        .with_columns(event=pl.struct(expr.alias(name) for name, expr in event.items()))
        .with_columns(reason=_reason(schema))
        .select(
            "row",
            "reason",
            pl.col("event").struct.unnest(),
            **facts,
            raw=pl.when(REJECTED).then(raw),
            **({} if unreadable is None else {"unreadable": unreadable}),
        )
    )
    # Written once, because three results are made of it and reading the source is the slow part.
    checked.sink_parquet(scratch, compression="lz4", engine="streaming")
    checked = pl.scan_parquet(scratch, glob=False)

    rejected = checked.filter(REJECTED).select("reason", "row", pl.col("raw").struct.unnest())
    rejected.sink_parquet(directory / "rejected.parquet", engine="streaming")

    accepted = checked.filter(~REJECTED)
    if unreadable is not None:
        fields = accepted.select(pl.col("unreadable").struct.unnest().sum())
        for name, number in fields.collect(engine="streaming").row(0, named=True).items():
            _note(notes, number, f"values of {name} in the events cannot be used; left out")
    events = accepted.select(*event)
    if source.time == "order":
        place = pl.int_range(pl.len(), dtype=pl.Int64).over("user_id")
        events = events.with_columns(timestamp=place)
    else:
        tomorrow = time.time() * 1000 + 24 * HOUR_MS  # times without an offset may be those of another zone
        late = accepted.select((pl.col("timestamp") > tomorrow).sum())
        number = late.collect(engine="streaming").item()
        _note(notes, number, "events are of days to come; the newest event is what counts as now")
    events.sink_parquet(directory / "events.parquet", engine="streaming")

    known = [*facts, *(["price"] if "price" in event else [])]
    last = [pl.col(name).last(ignore_nulls=True) for name in known]
    seen = accepted.group_by("item_id").agg(pl.col("row").min(), *last)
    return seen.collect(engine="streaming").sort("row").drop("row")


def _event(schema: pl.Schema, unit: TimeUnit, source: Source) -> dict[str, pl.Expr]:
    """Return the columns of events.parquet; null where the text cannot be read."""
    timestamp = milliseconds(pl.col("timestamp"), unit) if "timestamp" in schema else pl.lit(0, pl.Int64)
    if "event_type" in schema:
        names = {name: name for name in EVENT_TYPES} | dict(source.event_types)
        # Not replace_strict: the streaming engine would hold the whole column for it.
        event_type = pl.coalesce(
            *(pl.when(pl.col("event_type") == theirs).then(pl.lit(ours)) for theirs, ours in names.items())
        )
    else:
        event_type = pl.lit(source.default_event_type)
    columns = {
        "user_id": pl.col("user_id"),
        "item_id": pl.col("item_id"),
        "timestamp": timestamp,
        "event_type": event_type,
    }
    if "session_id" in schema:
        columns["session_id"] = _blank_to_null("session_id")
    columns |= {name: _amount(name) for name in ("price", "rating") if name in schema}
    if "split" in schema:
        columns["split"] = pl.col("split")
    for name, kind in source.context.items():
        columns[name] = _blank_to_null(name) if kind == "categorical" else _finite(name)
    return columns


def _reason(schema: pl.Schema) -> pl.Expr:
    """Why a row is rejected; null where it is accepted. The first reason that holds is the one given."""
    event = pl.col("event").struct
    reasons = {}
    if "malformed" in schema:
        reasons["wrong number of fields"] = pl.col("malformed")
    reasons["missing user_id"] = _blank("user_id")
    reasons["missing item_id"] = _blank("item_id")
    if "timestamp" in schema:
        reasons["unreadable timestamp"] = event.field("timestamp").is_null()
    if "event_type" in schema:
        reasons[UNKNOWN_EVENT_TYPE] = event.field("event_type").is_null()
    return pl.coalesce(*(pl.when(broken).then(pl.lit(reason)) for reason, broken in reasons.items()))


def _blank(name: str) -> pl.Expr:
    return pl.col(name).is_null() | (pl.col(name).str.strip_chars() == "")


def _is_unreadable(name: str) -> pl.Expr:
    """Whether a column of the source says something of which the event has nothing."""
    return ~_blank(name) & pl.col("event").struct.field(name).is_null()


def _blank_to_null(name: str, dtype: pl.DataType | None = None) -> pl.Expr:
    if isinstance(dtype, pl.List):
        return pl.col(name)
    return pl.when(~_blank(name)).then(pl.col(name))


def _as_text(name: str, dtype: pl.DataType) -> pl.Expr:
    return pl.col(name).list.join("|") if isinstance(dtype, pl.List) else pl.col(name)


def _finite(name: str) -> pl.Expr:
    """Return a Float64 column: null where the text is no finite number."""
    number = pl.col(name).str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(number.is_finite()).then(number)


def _amount(name: str) -> pl.Expr:
    """Return a Float64 column: null where the text is no finite number of at least 0."""
    number = pl.col(name).str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(number.is_finite() & (number >= 0)).then(number)


def milliseconds(text: pl.Expr, unit: TimeUnit) -> pl.Expr:
    """Return Int64 milliseconds since 1970 UTC; null where the text is no such time, or beyond year 9999."""
    text = text.str.strip_chars()
    if unit == "iso":
        plain = text.str.strip_suffix("Z").str.strip_suffix(" UTC").str.replace("T", " ", literal=True)
        times = [
            plain.str.to_datetime(f, strict=False, time_unit="ms", time_zone="UTC" if "%z" in f else None)
            .dt.replace_time_zone(None)
            .cast(pl.Int64)
            for f in ISO_FORMATS
        ]
        return pl.coalesce(*times)
    ms = text.cast(pl.Float64, strict=False) * MS_PER_UNIT[unit]
    return pl.when(ms.abs() <= MAX_TIMESTAMP_MS).then(ms.round().cast(pl.Int64, strict=False))


def time_unit_of(sample: pl.Series) -> TimeUnit:
    """Return the unit of some times given as text; raise ValueError where it is not clear."""
    if sample.is_empty():
        return "iso"  # all blank: every row is rejected, whatever the unit
    numbers = sample.str.strip_chars().cast(pl.Float64, strict=False).drop_nulls()
    if numbers.len() < sample.len() / 2:
        return "iso"
    typical = numbers.median()
    low, high = PLAUSIBLE_SECONDS
    units: tuple[TimeUnit, ...] = ("s", "ms", "us")
    for unit in units:
        if isinstance(typical, float) and low <= typical * MS_PER_UNIT[unit] / 1e3 <= high:
            return unit
    raise ValueError(
        f"the unit of times such as {sample[0]!r} is not clear; say --time_unit s, ms, us or iso"
    )


# --- counts ---------------------------------------------------------------------------------------


def _counts(directory: Path) -> dict[str, Any]:
    """Return the fields of DatasetInfo that count users, events and rejected rows."""
    events = pl.scan_parquet(directory / "events.parquet")
    event_types = _tally(events, "event_type")
    reasons = _tally(pl.scan_parquet(directory / "rejected.parquet"), "reason")
    return {
        "num_users": events.select(pl.col("user_id").n_unique()).collect(engine="streaming").item(),
        "num_events": sum(event_types.values()),
        "num_rejected": sum(reasons.values()),
        "rejected_reasons": reasons,
        "event_types": event_types,
    }


def _tally(frame: pl.LazyFrame, column: str) -> dict[str, int]:
    """Return value -> number of rows, most frequent first."""
    counts = frame.group_by(column).len().collect(engine="streaming")
    counts = counts.sort("len", column, descending=[True, False])
    return {str(value): int(number) for value, number in counts.iter_rows()}


def _unknown_event_types(directory: Path) -> str:
    """Return what to say of event types that are not known: no shop is to lose its purchases for a word."""
    rejected = pl.scan_parquet(directory / "rejected.parquet")
    if "event_type" not in rejected.collect_schema():
        return ""
    unknown = _tally(
        rejected.filter((pl.col("reason") == UNKNOWN_EVENT_TYPE) & ~_blank("event_type")), "event_type"
    )
    if not unknown:
        return ""
    top = list(unknown.items())[:5]
    return (
        f"event types that are not known: {', '.join(f'{name!r} ({number:,})' for name, number in top)}; say "
        f'which of {", ".join(EVENT_TYPES)} they are, as in --event_types \'{{"buy": "purchase"}}\''
    )


def _judge_rejected(
    directory: Path, info: DatasetInfo, max_rejected: float, out: Path, unknown_event_types: str
) -> None:
    total = info.num_events + info.num_rejected
    if total == 0:
        raise ValueError(f"{', '.join(info.source['files'])}: no events at all")
    if info.num_rejected == 0:
        (directory / "rejected.parquet").unlink()
    elif info.num_events == 0 or info.num_rejected > max_rejected * total:
        kept = out.with_name(out.name + ".rejected.parquet")
        os.replace(directory / "rejected.parquet", kept)
        top = ", ".join(f"{reason} ({n:,})" for reason, n in list(info.rejected_reasons.items())[:3])
        raise ValueError(
            f"{info.num_rejected:,} of {total:,} rows ({info.num_rejected / total:.1%}) are rejected, "
            f"more than max_rejected {max_rejected:.1%}: {top}. "
            f"Nothing was imported; the rejected rows are in {kept}"
            + (f". There are {unknown_event_types}" if unknown_event_types else "")
        )


# --- items ----------------------------------------------------------------------------------------


def _items(source: Source, seen: pl.DataFrame, max_rejected: float, notes: list[str]) -> pl.DataFrame:
    """Return ITEM_SCHEMA: the item table in its order, then the other items in the order of first appearance.

    A fact of the item table goes before the one in the event log.
    """
    known = seen.select("item_id").clear()
    if source.items is not None:
        known = _item_table(source.items, source, max_rejected, notes)
    if "category" in seen.columns:
        path = _parts(pl.col("category"), seen.schema["category"], source.category_separator)
        seen = seen.with_columns(category=path)
    added = seen.select("item_id").join(known, on="item_id", how="anti", maintain_order="left")
    if source.items is not None:
        _note(notes, added.height, "items of the events are not in the item table; added with their id")
    items = pl.concat([known, added], how="diagonal")
    shared = [name for name in seen.columns if name in items.columns and name != "item_id"]
    items = items.join(seen, on="item_id", how="left", suffix="_seen", maintain_order="left")
    items = items.with_columns(pl.coalesce(name, f"{name}_seen").alias(name) for name in shared)
    return items.select(
        pl.col(name).cast(dtype) for name, dtype in ITEM_SCHEMA.items() if name in items.columns
    )


def _note(notes: list[str], number: int, what: str) -> None:
    if number:
        notes.append(f"{number:,} {what}")


def _item_table(items: pl.LazyFrame, source: Source, max_rejected: float, notes: list[str]) -> pl.DataFrame:
    """Return the source's item table in the types of ITEM_SCHEMA, each item once; count what was dropped.

    Raises ValueError where more than `max_rejected` of the rows cannot be taken apart.
    """
    rows = items.collect(engine="streaming")
    table = rows.filter(~pl.col("malformed").fill_null(True)) if "malformed" in rows.columns else rows
    _note(notes, rows.height - table.height, "rows of the item table dropped: wrong number of fields")
    if (num_malformed := rows.height - table.height) > max_rejected * rows.height:
        raise ValueError(
            f"{num_malformed:,} of {rows.height:,} rows of the item table have a wrong number of "
            f"fields, more than max_rejected {max_rejected:.1%}; expected one line an item with as many "
            "fields as the header, quoted where they hold a separator, and without line breaks; or Parquet"
        )
    rows, table = table, table.filter(~_blank("item_id"))
    _note(notes, rows.height - table.height, "rows of the item table dropped: missing item_id")
    rows, table = table, table.unique("item_id", keep="last", maintain_order=True)
    _note(notes, rows.height - table.height, "rows of the item table dropped: the item stands again below")

    facts: dict[str, pl.Expr] = {}
    if source.time != "unix" and (useless := [name for name in MOMENTS if name in table.columns]):
        notes.append(f"{' and '.join(useless)} of the item table left out: the events have no times")
    for name in table.columns:
        if name in ("price", "margin"):
            amount = _amount(name)
            facts[name] = pl.when(amount <= 1).then(amount) if name == "margin" else amount
        elif name in MOMENTS and source.time == "unix":
            facts[name] = _moment(table[name], source.time_unit)
        elif name == "stock":
            facts[name] = _amount(name).round().cast(pl.Int64)
        elif name in ("category", "attributes"):
            separator = source.category_separator if name == "category" else source.attribute_separator
            facts[name] = _parts(pl.col(name), table.schema[name], separator)
        elif name in ITEM_FACTS:
            facts[name] = _blank_to_null(name)
    typed = table.select("item_id", **facts)
    for name in ("price", "margin", *MOMENTS, "stock"):
        if name in facts:
            unreadable = (typed[name].is_null() & ~table.select(_blank(name)).to_series()).sum()
            _note(notes, int(unreadable), f"values of {name} in the item table cannot be used; left out")
    return typed


def _moment(texts: pl.Series, unit: TimeUnit) -> pl.Expr:
    if unit == "auto":
        unit = time_unit_of(texts.drop_nulls().filter(texts.drop_nulls().str.strip_chars() != ""))
    return milliseconds(pl.col(texts.name), unit)


def _parts(column: pl.Expr, dtype: pl.DataType, separator: str) -> pl.Expr:
    """Return List(String) without blank parts; null where none is left."""
    parts = column if isinstance(dtype, pl.List) else column.str.split(separator)
    parts = parts.list.eval(pl.element().filter(pl.element().str.strip_chars() != ""))
    return pl.when(parts.list.len() > 0).then(parts)


# --- command --------------------------------------------------------------------------------------


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def build_parser() -> ArgumentParser:
    """Return the parser of `trirank import`, one subcommand for each of FORMATS."""
    parser = ArgumentParser(
        prog="trirank import",
        description="Make a data set directory out of a source.",
        formatter_class=_HelpFormatter,  # the subcommands take it from here
    )
    formats = parser.add_subcommands(dest="format", required=True)
    for name, read in FORMATS.items():
        description, _, arguments = (read.__doc__ or "").partition("Args:")
        command = ArgumentParser(
            usage=f"trirank import {name} SRC --out DIR [options]",
            description=inspect.cleandoc(description),
            epilog=EXAMPLES.get(name),
        )
        src_help = re.search(r"src: (.*?)(\n +\w+: |$)", arguments.strip(), re.DOTALL)
        command.add_argument("src", metavar="SRC", help=src_help[1] if src_help else None)
        command.add_argument("--out", metavar="DIR", required=True, help="The data set directory to make.")
        command.add_argument("--name", help="Name of the data set; by default taken from the source.")
        command.add_argument("--repeats", action="store_true", help=REPEATS_HELP)
        command.add_argument("--max_rejected", type=float, default=0.01, help=MAX_REJECTED_HELP)
        command.add_argument(
            "--overwrite", action="store_true", help="Replace a data set that stands at DIR."
        )
        command.add_argument(
            "--json", action="store_true", help="Print dataset.json on stdout, not the directory."
        )
        command.add_function_arguments(read, skip={"src"})
        formats.add_subcommand(name, command, help=description.strip().split("\n")[0])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trirank import`; return the exit code: 0, or 2 where the source or an option is at fault."""
    parser = build_parser()
    parsed = parser.instantiate(parser.parse_args(argv)).as_dict()
    format_name = parsed["format"]
    options = parsed[format_name]
    options.pop("config")
    src = options.pop("src")
    common = {name: options.pop(name) for name in ("name", "repeats", "max_rejected", "overwrite")}
    out, as_json = Path(options.pop("out")), options.pop("json")
    console = Console(stderr=True, highlight=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("opening", total=None)

            def say(step: str) -> None:
                progress.update(task, description=escape(step))

            source = FORMATS[format_name](src, **options)
            info, notes = import_source(source, out, format_name=format_name, say=say, **common)
    except (ValueError, OSError) as error:
        print(f"trirank import: {error}", file=sys.stderr)
        return 2
    except pl.exceptions.PolarsError as error:  # a damaged file, text that is not UTF-8, a full disk
        print(f"trirank import: {src} cannot be read or written: {error}", file=sys.stderr)
        return 2
    _summarize(info, notes, console)
    print(json.dumps(dataclasses.asdict(info), ensure_ascii=False) if as_json else out)
    return 0


TIME_WORDS = {"unix": "unix times", "order": "order but no times", "none": "neither order nor times"}


def _summarize(info: DatasetInfo, notes: Sequence[str], console: Console) -> None:
    lines = [
        f"{info.name}: {info.num_users:,} users, {info.num_items:,} items, "
        f"{info.num_events:,} events; {TIME_WORDS[info.time]}",
        "  " + ", ".join(f"{name} {number:,}" for name, number in info.event_types.items()),
        *(f"  {note}" for note in notes),
        *(f"  rejected, {reason}: {number:,}" for reason, number in info.rejected_reasons.items()),
    ]
    if info.num_rejected:
        lines.append("  the rejected rows are in rejected.parquet")
    for line in lines:
        console.print(escape(line), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
