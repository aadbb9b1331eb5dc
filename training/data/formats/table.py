"""Tables with a header: CSV, TSV (either gzipped) and Parquet, with a mapping of columns."""

from __future__ import annotations

import csv
import dataclasses
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import polars as pl

from training.data.dataset import EVENT_SCHEMA, ITEM_SCHEMA, ColumnKind
from training.data.formats.source import Source, TimeUnit, stem

EXAMPLES = """
REES46 multi-category shop:
  trirank import table 2019-Oct.csv.gz --out data/rees46 --repeats \\
    --columns.timestamp event_time --columns.item_id product_id --columns.session_id user_session \\
    --columns.category category_code

Retailrocket with behaviours:
  trirank import table train.tsv.gz --out data/retailrocket --time_unit s \\
    --columns.user_id user --columns.item_id item --columns.event_type behavior \\
    --event_types '{"buy": "purchase"}'
"""


@dataclass(frozen=True, kw_only=True)
class EventColumns:
    """The source's columns; by default the columns with our own names, where there are any.

    Args:
        user_id: Who; required.
        item_id: What was touched; required.
        timestamp: When; without it the order of the rows is the order of time.
        event_type: How; see --event_types.
        session_id: The visit.
        price: Price of the item at that time; the last one also becomes the item's price.
        rating: Stars or the like; kept, but nothing uses them yet.
        title: Item fact.
        category: Item fact; see --category_separator.
        brand: Item fact.
        seller_id: Item fact.
    """

    user_id: str | None = None
    item_id: str | None = None
    timestamp: str | None = None
    event_type: str | None = None
    session_id: str | None = None
    price: str | None = None
    rating: str | None = None
    title: str | None = None
    category: str | None = None
    brand: str | None = None
    seller_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ItemColumns:
    """The item table's columns; by default the columns with our own names, where there are any.

    Args:
        item_id: Which item; required.
        title: Its name.
        description: What is said of it.
        category: Its category path; see --category_separator.
        brand: Its brand.
        seller_id: Who sells it.
        attributes: What else is said of it, such as "color:red|cotton"; see --attribute_separator.
        price: Its price.
        margin: Share of the price, 0 to 1.
        available_from: When it came on sale, in the unit of --time_unit.
        available_until: From when on it is not on sale any more, in the same unit.
        stock: Pieces in stock.
    """

    item_id: str | None = None
    title: str | None = None
    description: str | None = None
    category: str | None = None
    brand: str | None = None
    seller_id: str | None = None
    attributes: str | None = None
    price: str | None = None
    margin: str | None = None
    available_from: str | None = None
    available_until: str | None = None
    stock: str | None = None


# What the importer calls its own columns.
RESERVED = ("line", "malformed", "row", "reason", "raw", "event", "unreadable")
ALL_DEFAULT_EVENTS = EventColumns()
ALL_DEFAULT_ITEMS = ItemColumns()


def read(
    src: str,
    *,
    columns: EventColumns = ALL_DEFAULT_EVENTS,
    separator: str | None = None,
    time_unit: TimeUnit = "auto",
    event_types: dict[str, str] | None = None,
    default_event_type: str = "interaction",
    category_separator: str = ".",
    attribute_separator: str = "|",
    items: Path | None = None,
    item_columns: ItemColumns = ALL_DEFAULT_ITEMS,
    context: dict[str, ColumnKind] | None = None,
) -> Source:
    """Import a CSV, TSV or Parquet event log with a header, plain or gzipped, one file or several.

    In text files a record is one line: a quoted field may hold the separator but no line break. Lines with
    another number of fields than the header are rejected.

    Args:
        src: File, or a quoted pattern such as 'log/2019-*.csv.gz' for files with the same columns.
        columns: Which column is what.
        separator: What stands between fields; by default the one the header uses.
        time_unit: Unit of the times; auto goes by the first ones, and refuses where they are not clear.
        event_types: The source's event types in our words, e.g. '{"buy": "purchase"}'.
        default_event_type: The event type of all rows where no column holds one.
        category_separator: What stands between the levels of a category path.
        attribute_separator: What stands between the attributes of an item.
        items: Item table (CSV, TSV or Parquet); its facts go before those in the event log.
        item_columns: Which column of the item table is what.
        context: Columns that say something of the moment, which the ranker is to know, e.g.
            '{"device": "categorical", "basket": "numeric"}'.
    """
    context = context or {}
    for name in context:
        if name in EVENT_SCHEMA or name in ITEM_SCHEMA or name in RESERVED:
            raise ValueError(f"context names {name!r}; expected a column that is no other part of an event")
    files = matching_files(src)
    parts = [OpenTable.open(file, separator) for file in files]
    wanted = dataclasses.asdict(columns)
    chosen = parts[0].choose(wanted, required=("user_id", "item_id"), option="columns")
    chosen |= parts[0].choose(dict.fromkeys(context), required=tuple(context), option="context")
    for part in parts[1:]:
        if missing := sorted(set(chosen.values()) - set(part.columns)):
            raise ValueError(f"{part.path} has no column {missing[0]!r}, which {parts[0].path} has")
        if more := sorted(set(part.choose(wanted, required=()).values()) - set(chosen.values())):
            raise ValueError(
                f"{part.path} has the column {more[0]!r}, which {parts[0].path} has not; "
                "expected the same columns in all files"
            )
    return Source(
        name=stem(files[0]),
        files=files if items is None else [*files, items],
        events=pl.concat([part.select(chosen) for part in parts]),
        items=None if items is None else read_items(items, item_columns),
        time="unix" if "timestamp" in chosen else "order",
        time_unit=time_unit,
        event_types=event_types or {},
        default_event_type=default_event_type,
        context=context,
        category_separator=category_separator,
        attribute_separator=attribute_separator,
    )


def read_items(path: Path, columns: ItemColumns = ALL_DEFAULT_ITEMS) -> pl.LazyFrame:
    """Return an item table with our column names, as text."""
    table = OpenTable.open(path)
    chosen = table.choose(dataclasses.asdict(columns), required=("item_id",), option="item_columns")
    return table.select(chosen)


def matching_files(src: str) -> list[Path]:
    """Return the file `src`, or the files that match it as a pattern, sorted by name."""
    if Path(src).is_file():
        return [Path(src)]
    files = [Path(name) for name in sorted(glob.glob(src)) if Path(name).is_file()]
    if not files:
        pattern = f"; say which files, e.g. '{src.rstrip('/')}/*.csv'" if Path(src).is_dir() else ""
        raise ValueError(f"no file {src}{pattern}")
    return files


@dataclass(frozen=True)
class OpenTable:
    """A table, opened but not read. `columns` gives each column of the file as text (or a list of texts)."""

    path: Path
    frame: pl.LazyFrame
    columns: Mapping[str, pl.Expr]

    @classmethod
    def open(cls, path: Path, separator: str | None = None) -> OpenTable:
        """Open a file with a header: Parquet by its ending, anything else as text."""
        if not path.is_file():
            raise ValueError(f"no file {path}")
        if path.suffix in (".parquet", ".pq"):
            frame = pl.scan_parquet(path, glob=False)
            text = {name: _as_text(name, dtype) for name, dtype in frame.collect_schema().items()}
            return cls(path, frame, text)
        first = pl.read_lines(path, n_rows=1, glob=False).to_series()
        if first.is_empty():
            raise ValueError(f"{path} is empty; expected a header line")
        header_line = first[0].removeprefix("\ufeff")
        separator = separator or max("\t,;|", key=header_line.count)
        if len(separator) != 1 or separator in '"\r\n':
            raise ValueError(f"separator is {separator!r}; expected one character")
        header = next(csv.reader([header_line], delimiter=separator))
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise ValueError(f"{path} has the column {twice[0]!r} more than once")
        lines = pl.scan_lines(path, glob=False).slice(1).filter(pl.col("line") != "")
        frame = lines.with_columns(_fields(header, separator))
        return cls(path, frame, {name: pl.col("fields").struct.field(name) for name in header})

    def choose(
        self, wanted: Mapping[str, str | None], *, required: tuple[str, ...], option: str = ""
    ) -> dict[str, str]:
        """Return our name -> the file's column, for the columns the file has.

        Raises ValueError where a column that was asked for, or is required, is not there.
        """
        chosen: dict[str, str] = {}
        for ours, theirs in wanted.items():
            if (theirs or ours) in self.columns:
                chosen[ours] = theirs or ours
            elif theirs or ours in required:
                near = get_close_matches(theirs or ours, self.columns, n=1, cutoff=0.5)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                asked = f" for --{option}.{ours}" if option else ""
                raise ValueError(
                    f"{self.path} has no column {theirs or ours!r}{asked}{hint}; "
                    f"it has {', '.join(self.columns)}"
                )
        return chosen

    def select(self, chosen: Mapping[str, str]) -> pl.LazyFrame:
        """Return the chosen columns under our names, and `line` and `malformed` where the file is text."""
        kept = [name for name in ("line", "malformed") if self.path.suffix not in (".parquet", ".pq")]
        return self.frame.select(*kept, **{ours: self.columns[theirs] for ours, theirs in chosen.items()})


def _as_text(name: str, dtype: pl.DataType) -> pl.Expr:
    return pl.col(name).cast(pl.List(pl.String) if isinstance(dtype, pl.List) else pl.String)


def _fields(header: list[str], separator: str) -> pl.Expr:
    """Take `line` apart into `fields` (struct of texts) and `malformed`.

    Not polars' CSV reader: it fills up short lines without a word, and one stray quote stops it altogether.
    """
    num_fields = len(header)

    def split(lines: pl.Series) -> pl.Series:
        quoted = lines.str.contains('"', literal=True)
        plain = lines.filter(~quoted)
        fields = plain.str.split_exact(separator, num_fields - 1).struct.rename_fields(header)
        malformed = plain.str.count_matches(separator, literal=True) != num_fields - 1
        if quoted.any():
            rows = [_quoted_fields(line, separator, num_fields) for line in lines.filter(quoted)]
            parsed = pl.DataFrame([row or [None] * num_fields for row in rows], _text(header), orient="row")
            place = pl.concat([(~quoted).arg_true(), quoted.arg_true()]).arg_sort()
            fields = pl.concat([fields, parsed.to_struct()]).gather(place)
            malformed = pl.concat([malformed, pl.Series([row is None for row in rows])]).gather(place)
        return pl.DataFrame({"fields": fields, "malformed": malformed}).to_struct()

    dtype = pl.Struct({"fields": pl.Struct(_text(header)), "malformed": pl.Boolean})
    return pl.col("line").map_batches(split, return_dtype=dtype, is_elementwise=True).struct.unnest()


def _text(header: list[str]) -> dict[str, pl.DataType]:
    return {name: pl.String() for name in header}


def _quoted_fields(line: str, separator: str, num_fields: int) -> list[str] | None:
    try:
        row = next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        # Many tab-separated files know no quoting: there a stray quote is a letter like any other.
        row = line.split(separator) if separator == "\t" else []
    return row if len(row) == num_fields else None
