"""One versioned directory with all that serving needs: written, verified and read in this file.

    bundles/20261121-080100-3f2a9c/
      manifest.json             what it is and where it came from; the sha256 of each other file, and its own
      catalog.parquet           the items, by row (engine/catalog.py)
      users.parquet             the users by row: user_id
      histories.safetensors     what they did, user after user: history_begins [U+1] int64, items [N] int32,
                                event_types [N] uint8, timestamps [N] int64 (engine/history.py)
      item_index.faiss          nearest items to a query vector (retrieval/item_index.py)
      embeddings.safetensors    item_vectors [I+1,D], user_vectors [U+1,D], item_degrees [I+1],
                                content_vectors [I+1,C] of texts and attributes; float32
      sources.safetensors       what other candidate sources know: neighbours of each item as a sparse matrix
                                (neighbour_offsets [I+2] int64, neighbour_rows [N] int32, neighbour_weights
                                [N] float32), recent_popularity [I+1] int64
      transitions.safetensors   what comes after each item (retrieval/transitions.py), as a sparse matrix of
                                probabilities: transition_offsets [I+2] int64, transition_rows [N] int32,
                                transition_weights [N] float32; return_rate [1] float32, and where there is
                                none 0; not there where the events have no order
    and, unless ranker.kind is "none",
      ranker_state.onnx         a history and a context -> the ranker's state (ranking/onnx_scorer.py)
      ranker_scores.onnx        a state and candidates -> scores
      ranker.weights            the large tables of both (ONNX external data)
      ranker_index.faiss        nearest items to the ranker's state

What is large is opened as a memory map, which all processes that serve the bundle share: nobody may write
into its files. Format 5 has no transitions; in format 4, users.parquet holds the histories as lists, and the
ONNX files their tables.

Writing is atomic: a bundle is a complete, verified directory or it is not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engine.catalog import Catalog
from engine.history import BundleHistoryStore, History, HistoryStore, flat_histories
from engine.ids import strings
from engine.mapped_arrays import map_arrays
from ranking.onnx_scorer import OnnxScorer, Provider
from retrieval.item_index import EXACT_KINDS, ItemIndex
from retrieval.sparse import SparseRows
from retrieval.transitions import Transitions

logger = logging.getLogger(__name__)

BUNDLE_FORMAT = 6
OLDEST_FORMAT = 4  # that can be read

MANIFEST = "manifest.json"
ITEM_INDEX = "item_index.faiss"
FILES = (
    "catalog.parquet",
    "users.parquet",
    ITEM_INDEX,
    "embeddings.safetensors",
    "sources.safetensors",
)
HISTORIES = "histories.safetensors"
TRANSITIONS = "transitions.safetensors"
RANKER_STATE, RANKER_SCORES, RANKER_INDEX = "ranker_state.onnx", "ranker_scores.onnx", "ranker_index.faiss"
RANKER_FILES = (RANKER_STATE, RANKER_SCORES, RANKER_INDEX)
RANKER_WEIGHTS = "ranker.weights"
RANKER_KINDS = ("ordered", "none")

T = TypeVar("T")

BUNDLE_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
DRAFT = ".tmp-"  # begins the name of a bundle that is being written
ABANDONED_S = 60.0  # a draft younger than this may lack its lock
PIN = "pinned"  # a file beside bundles that names the one to serve


class BundleError(ValueError):
    """A bundle that cannot be used: the message names the file and says why."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle, opened: I items, U users, vectors of D numbers."""

    path: Path
    manifest: dict[str, Any]
    catalog: Catalog
    index: ItemIndex
    item_vectors: NDArray[np.float32]  # [I+1, D], row 0 zeros
    user_vectors: NDArray[np.float32]  # [U+1, D], row 0 zeros
    item_degrees: NDArray[np.float32]  # [I+1] training users of each item
    content_vectors: NDArray[np.float32]  # [I+1, C] of texts and attributes; row 0 and what has none zeros
    neighbours: SparseRows  # [I+1, I+1]
    transitions: Transitions | None  # what may come next; None where nothing is known
    recent_popularity: NDArray[np.int64]  # [I+1] training users of each item in the recent window
    users: HistoryStore
    scorer: OnnxScorer | None
    ranker_index: ItemIndex | None  # over the vectors that the scorer scores with; None where scorer is

    @property
    def version(self) -> str:
        """The name the bundle was published under."""
        return str(self.manifest["version"])

    @classmethod
    def load(cls, path: str | Path, *, num_threads: int = 1, provider: Provider = "auto") -> Bundle:
        """Open a bundle directory, after the checksum of every file has been found right.

        Args:
            path: the bundle's own directory; see resolve_bundle for a directory of bundles.
            num_threads: threads that the ranker, and each index, uses for one call.
            provider: what runs the ranker; see OnnxScorer.

        Raises:
            BundleError: the directory is no bundle, is newer than this program, is damaged, holds files that
                the manifest does not name, or its files contradict each other.
        """
        path = Path(path)
        manifest = verify_files(path)
        catalog = _open(path / "catalog.parquet", Catalog.from_parquet)
        users = _users(path, catalog.num_items, has_histories=HISTORIES in manifest["files"])
        # A file of plain vectors serves two kinds; any other holds its own.
        wanted = manifest["pipeline"].get("index", {}).get("kind")
        open_index = functools.partial(
            ItemIndex.load, num_threads=num_threads, kind=wanted if wanted in EXACT_KINDS else None
        )
        index = _open(path / ITEM_INDEX, open_index)
        has_ranker = manifest["ranker"]["kind"] != "none"
        scorer = ranker_index = None
        if has_ranker:
            scorer = _open(
                path / RANKER_SCORES,
                lambda file: OnnxScorer(path / RANKER_STATE, file, num_threads, provider),
            )
            ranker_index = _open(path / RANKER_INDEX, open_index)

        num_items, dim = catalog.num_items, index.dim
        _expect(path / ITEM_INDEX, "number of items", index.num_items, num_items)
        vectors = _arrays(
            path / "embeddings.safetensors",
            {
                "item_vectors": ((num_items + 1, dim), "float32"),
                "user_vectors": ((len(users) + 1, dim), "float32"),
                "item_degrees": ((num_items + 1,), "float32"),
                "content_vectors": ((num_items + 1, None), "float32"),
            },
        )
        sources = _arrays(
            path / "sources.safetensors",
            {
                "neighbour_offsets": ((num_items + 2,), "int64"),
                "neighbour_rows": ((None,), "int32"),
                "neighbour_weights": ((None,), "float32"),
                "recent_popularity": ((num_items + 1,), "int64"),
            },
        )
        neighbours = _sparse_rows(path / "sources.safetensors", "neighbour", sources, num_items)
        transitions = None
        if TRANSITIONS in manifest["files"]:
            arrays = _arrays(
                path / TRANSITIONS,
                {
                    "transition_offsets": ((num_items + 2,), "int64"),
                    "transition_rows": ((None,), "int32"),
                    "transition_weights": ((None,), "float32"),
                },
            )
            after = _sparse_rows(path / TRANSITIONS, "transition", arrays, num_items)
            rates = arrays.get("return_rate", np.zeros(1, np.float32))  # older bundles have none
            _expect(path / TRANSITIONS, "shape of return_rate", rates.shape, (1,))
            for values in (after.values, rates):
                if len(values) and not 0 <= values.min() <= values.max() <= 1:
                    raise BundleError(
                        f"{path / TRANSITIONS}: transitions are no probabilities; expected 0 to 1"
                    )
            transitions = Transitions(after, float(rates[0]))
        if scorer and ranker_index:
            _expect(path / RANKER_SCORES, "number of items", scorer.num_items, num_items)
            _expect(path / RANKER_INDEX, "number of items", ranker_index.num_items, num_items)
            _expect(path / RANKER_INDEX, "dimension", ranker_index.dim, scorer.dim)
            length = manifest["ranker"]["history_length"]
            _expect(path / RANKER_STATE, "history_length", scorer.history_length, length)
        return cls(
            path,
            manifest,
            catalog,
            index,
            vectors["item_vectors"],
            vectors["user_vectors"],
            vectors["item_degrees"],
            vectors["content_vectors"],
            neighbours,
            transitions,
            sources["recent_popularity"],
            users,
            scorer,
            ranker_index,
        )


def verify_files(path: Path) -> dict[str, Any]:
    """Return the manifest of a bundle whose every file is there, plain, and has the stated checksum.

    No file but the manifest is opened for anything except its checksum. Raises BundleError.
    """
    manifest = _read_manifest(path)
    # Only known names pass, so that no name in a manifest can lead out of the directory.
    has_ranker = manifest["ranker"]["kind"] != "none"
    expected = {*FILES, *RANKER_FILES} if has_ranker else {*FILES}
    named = set(manifest["files"])
    expected |= named & ({HISTORIES, TRANSITIONS, RANKER_WEIGHTS} if has_ranker else {HISTORIES, TRANSITIONS})
    if named != expected:
        raise BundleError(f"{path / MANIFEST}: files names {sorted(named)}; expected {sorted(expected)}")
    present = {entry.name for entry in path.iterdir()}
    for name in sorted(expected - present):
        raise BundleError(f"{path / name} is missing")
    for name in sorted(present - expected - {MANIFEST}):
        raise BundleError(f"{path / name} does not belong to the bundle; its manifest does not name it")
    for name in sorted(expected):
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{file} is not a plain file")
        if _describe(file) != manifest["files"][name]:
            raise BundleError(f"{file} is damaged: its size or sha256 differs from {MANIFEST}")
    return manifest


def write_bundle(
    root: str | Path,
    fill: Callable[[Path], dict[str, Any]],
    verify: Callable[[Bundle], None] = lambda bundle: None,
) -> Path:
    """Write a bundle below `root` and return its directory; on any error nothing is left behind.

    Args:
        root: where the bundles stand; made where it is missing.
        fill: writes the files of FILES (and RANKER_FILES) into the directory it is given (write_users and
            ranking.onnx_scorer.write_models write some of them), and returns the manifest's fields: data,
            ranker, pipeline, policies, and whatever else should be recorded.
        verify: raises where the opened bundle is not fit to be published.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=root))
    held = os.open(draft, os.O_RDONLY)  # so that nobody takes it for abandoned
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        fields = fill(draft)
        now = _now(root)
        files = {file.name: _describe(file) for file in sorted(draft.iterdir())}
        # The exact time is part of what is hashed: equal exports get names of their own.
        digest = hashlib.sha256(json.dumps([time.time_ns(), files]).encode()).hexdigest()
        version = f"{now:%Y%m%d-%H%M%S}-{digest[:6]}"
        manifest = fields | {
            "format_version": BUNDLE_FORMAT,
            "version": version,
            "created": now.isoformat(),
            "trirank_version": _program_version(),
            "files": files,
        }
        manifest["checksum"] = manifest_checksum(manifest)
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
        verify(Bundle.load(draft))
        # Who serves may be another user than who trains; mkdtemp and safetensors write for their owner alone.
        for entry in draft.iterdir():
            entry.chmod(0o644)
            _sync(entry)
        draft.chmod(0o755)
        _sync(draft)
        draft.rename(root / version)  # refused by the system where that name is taken
        _sync(root)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        os.close(held)
    return root / version


def _remove_abandoned(root: Path) -> None:
    """Remove what exports have left that were killed: the lock of such a draft is free."""
    for draft in root.glob(f"{DRAFT}*/"):
        try:
            if time.time() - draft.stat().st_mtime < ABANDONED_S:
                continue  # perhaps just made, and not yet locked
            descriptor = os.open(draft, os.O_RDONLY)
        except OSError:
            continue  # it has been published meanwhile
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # somebody writes it
        else:
            logger.warning("%s was left by an export that did not end; it is removed", draft)
            shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(descriptor)


def _now(root: Path) -> datetime:
    """Return the time, or where a bundle of `root` is of the future, a second later than the last one.

    Servers take the latest for the newest, and a clock may have been set back.
    """
    now = datetime.now(UTC)
    latest = now
    for entry in root.iterdir():
        if BUNDLE_NAME.fullmatch(entry.name):
            with contextlib.suppress(ValueError):  # 20269999-... is the name of no time
                latest = max(latest, datetime.strptime(f"{entry.name[:15]}+0000", "%Y%m%d-%H%M%S%z"))
    return now if latest == now else latest + timedelta(seconds=1)


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the sha256 of what a manifest says, "checksum" left out, however it is laid out."""
    told = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def write_users(users: pl.DataFrame, directory: Path) -> None:
    """Write the files of a bundle that hold its users.

    Args:
        users: the columns of USERS_SCHEMA, a line for each user row from 1 on.
        directory: gets the files.
    """
    begins, events = flat_histories(users)
    users.select("user_id").write_parquet(directory / "users.parquet")
    arrays = {
        "history_begins": begins,
        "items": events.items,
        "event_types": events.event_types,
        "timestamps": events.timestamps,
    }
    save_file(arrays, directory / HISTORIES)


def resolve_bundle(path: str | Path) -> Path:
    """Return the bundle at `path`: the directory itself, or the newest bundle that stands in it."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    return bundles_in(path)[-1]


def bundles_in(root: str | Path) -> list[Path]:
    """Return the bundles of a directory, the newest last. Raises BundleError where there is none."""
    root = Path(root)
    if not root.is_dir():
        raise BundleError(f"{root} is not a directory; expected a bundle, or a directory of bundles")
    found = [
        entry
        for entry in root.iterdir()
        if BUNDLE_NAME.fullmatch(entry.name) and (entry / MANIFEST).is_file()
    ]
    if not found:
        raise BundleError(f"{root} holds no bundle; make one with `trirank train`")
    # The name tells the second; within one second the files' own times decide.
    return sorted(found, key=lambda entry: (entry.name[:15], (entry / MANIFEST).stat().st_mtime_ns))


def bundle_to_serve(path: str | Path) -> Path:
    """Return the bundle at `path`: the directory itself, or of a directory of bundles the pinned one (see
    `pin_bundle`), else the newest.

    Raises BundleError where there is none, or not the pinned one.
    """
    found = bundles_to_serve(path)[0]
    if gone := pinned_but_gone(path):
        raise BundleError(
            f"{Path(path) / PIN} names {gone!r}, which is gone; expected a bundle of {path} "
            f"(`trirank rollback {path} --newest` takes the newest again)"
        )
    return found


def bundles_to_serve(path: str | Path) -> list[Path]:
    """Return what `bundle_to_serve` does, and behind it what may stand in for it: all that are older, the
    newest first. Never what is newer than a pinned one: that is what the pin keeps out.

    Where the pinned one is gone (removed by age, say) the older ones are left. Raises BundleError where there
    is nothing to serve.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return [path]
    found = bundles_in(path)
    name = pinned(path)
    names = [bundle.name for bundle in found]
    if name is None:
        return found[::-1]
    # A name begins with its time, so that what is gone has its place among those there are.
    if name in names:
        last = names.index(name) + 1
    else:
        is_gone = BUNDLE_NAME.fullmatch(name)
        last = bisect_left(names, name[:15], key=lambda one: one[:15]) if is_gone else 0
    if not last:
        raise BundleError(f"{path / PIN} names {name!r}; expected one of {', '.join(names)}")
    return found[:last][::-1]


def pinned_but_gone(path: str | Path) -> str | None:
    """Return the name of the pinned bundle of a directory that does not have it any more; else None."""
    path = Path(path)
    name = pinned(path)
    if name is None or (path / MANIFEST).is_file() or (path / name / MANIFEST).is_file():
        return None
    return name


def pinned(root: str | Path) -> str | None:
    """Return the name of the bundle that is pinned in a directory of bundles; None where none is."""
    file = Path(root) / PIN
    try:
        return file.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from error


def pin_bundle(root: str | Path, name: str | None) -> None:
    """Have servers of a directory of bundles serve this one, whatever is newer; the newest again for None.

    Raises BundleError where the directory has no such bundle, OSError where it cannot be written.
    """
    root = Path(root)
    known = [bundle.name for bundle in bundles_in(root)]
    if name is None:
        (root / PIN).unlink(missing_ok=True)
        return
    if name not in known:
        raise BundleError(f"bundle is {name!r}; expected one of {', '.join(known)}")
    draft = root / f".tmp-{PIN}"
    draft.write_text(f"{name}\n", encoding="utf-8")
    draft.replace(root / PIN)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: {MANIFEST} is missing")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise BundleError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        raise BundleError(f"{file} is not the manifest of a bundle: format_version is missing")
    found = manifest["format_version"]
    if found > BUNDLE_FORMAT:
        raise BundleError(
            f"{file}: the bundle has format {found}, newer than {BUNDLE_FORMAT}, which this trirank reads; "
            "serve it with a newer trirank"
        )
    if found < OLDEST_FORMAT:
        raise BundleError(
            f"{file}: the bundle has format {found}; this trirank reads formats {OLDEST_FORMAT} to "
            f"{BUNDLE_FORMAT}, which hold more (a ranker that knows its context): train it again with "
            "`trirank train`"
        )
    has_checksum = found > 4 or "checksum" in manifest
    if has_checksum and manifest.get("checksum") != manifest_checksum(manifest):
        raise BundleError(f"{file} is damaged, or was edited: it differs from its checksum")
    for key, kind in {
        "version": str,
        "data": dict,
        "ranker": dict,
        "pipeline": dict,
        "policies": dict,
        "files": dict,
    }.items():
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{file}: {key} is missing or is no {kind.__name__}")
    if manifest["ranker"].get("kind") not in RANKER_KINDS:
        allowed = ", ".join(RANKER_KINDS)
        raise BundleError(
            f"{file}: ranker.kind is {manifest['ranker'].get('kind')!r}; expected one of {allowed}"
        )
    for section, key in (
        ("pipeline", "num_candidates"),
        ("pipeline", "num_ranked"),
        ("pipeline", "default_limit"),
        *([("ranker", "history_length")] if manifest["ranker"]["kind"] != "none" else []),
    ):
        value = manifest[section].get(key)
        if not isinstance(value, int) or value < 1:
            raise BundleError(f"{file}: {section}.{key} is {value!r}; expected a whole number of at least 1")
    types: dict[tuple[str, str], type] = {
        ("pipeline", "sources"): list,
        ("pipeline", "event_weights"): dict,
        ("data", "time"): str,
        ("data", "clock"): int,
    }
    for (section, key), kind_of in types.items():
        if not isinstance(manifest[section].get(key), kind_of):
            raise BundleError(f"{file}: {section}.{key} is missing or is no {kind_of.__name__}")
    if not isinstance(manifest["pipeline"].get("index", {}), dict):
        raise BundleError(f"{file}: pipeline.index is no dict")
    return manifest


def _open(file: Path, opener: Callable[[Path], T]) -> T:
    """Open one file, with its name in whatever goes wrong."""
    try:
        return opener(file)
    except Exception as error:
        raise BundleError(f"{file} cannot be opened: {error}") from error


def _users(path: Path, num_items: int, *, has_histories: bool) -> BundleHistoryStore:
    table = _open(path / "users.parquet", pl.read_parquet)
    if not has_histories:
        return _open(path / "users.parquet", lambda file: BundleHistoryStore.from_table(table, num_items))
    if table.columns != ["user_id"] or table.schema["user_id"] != pl.String():
        raise BundleError(
            f"{path / 'users.parquet'}: columns are {dict(table.schema)}; expected user_id alone"
        )
    arrays = _arrays(
        path / HISTORIES,
        {
            "history_begins": ((table.height + 1,), "int64"),
            "items": ((None,), "int32"),
            "event_types": ((None,), "uint8"),
            "timestamps": ((None,), "int64"),
        },
    )
    events = History(arrays["items"], arrays["event_types"], arrays["timestamps"])
    ids = strings(table["user_id"])
    return _open(
        path / HISTORIES,
        lambda file: BundleHistoryStore(ids, arrays["history_begins"], events, num_items),
    )


def _arrays(file: Path, expected: dict[str, tuple[tuple[int | None, ...], str]]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file, each of its shape (None: any length), type, and finite."""
    arrays: dict[str, NDArray[Any]] = _open(file, map_arrays)
    for name, (shape, dtype) in expected.items():
        found = arrays.get(name, np.zeros(()))
        lengths = tuple(
            length if wanted is None else wanted for length, wanted in zip(found.shape, shape, strict=False)
        )
        if len(found.shape) != len(shape) or found.shape != lengths:
            raise BundleError(f"{file}: shape of {name} is {found.shape}; expected {shape}")
        _expect(file, f"type of {name}", str(found.dtype), dtype)
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise BundleError(f"{file}: {name} holds NaN or infinite values")
    return arrays


def _sparse_rows(file: Path, name: str, arrays: dict[str, NDArray[Any]], num_items: int) -> SparseRows:
    """Return the matrix [I+1, I+1] that three arrays of a file are. Raises BundleError."""
    offsets, columns, values = (arrays[f"{name}_{part}"] for part in ("offsets", "rows", "weights"))
    rows = SparseRows(offsets, columns, values, num_items + 1)
    try:
        rows.check()
    except ValueError as error:
        raise BundleError(f"{file}: {name}s: {error}") from error
    return rows


def _expect(file: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise BundleError(f"{file}: {what} is {found}; expected {expected}")


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}


def _sync(path: Path) -> None:
    """Have the system write a file or a directory to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _program_version() -> str:
    try:
        return importlib.metadata.version("trirank")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"
