from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from engine.bundle import (
    BUNDLE_NAME,
    FILES,
    HISTORIES,
    MANIFEST,
    RANKER_FILES,
    RANKER_SCORES,
    RANKER_STATE,
    RANKER_WEIGHTS,
    TRANSITIONS,
    Bundle,
    BundleError,
    bundles_in,
    manifest_checksum,
    resolve_bundle,
    write_bundle,
)
from engine.history import USERS_SCHEMA
from retrieval.item_index import ItemIndex

Fill = Callable[..., dict[str, Any]]


@pytest.fixture
def copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / bundle_path.name))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    edit(manifest)
    if "checksum" in manifest:
        manifest["checksum"] = manifest_checksum(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_round_trip(bundle_path: Path) -> None:
    bundle = Bundle.load(bundle_path)
    assert BUNDLE_NAME.fullmatch(bundle_path.name)
    assert bundle.version == bundle_path.name
    assert bundle.manifest["created"].endswith("+00:00")
    assert bundle.catalog.num_items == bundle.index.num_items == 40
    assert bundle.item_vectors.shape == (41, 8)
    assert bundle.user_vectors.shape == (6, 8)
    assert bundle.item_degrees.shape == (41,)
    assert bundle.users.row("loyal") == 1
    assert bundle.scorer is not None
    assert bundle.scorer.history_length == 6
    assert bundle.ranker_index is not None
    assert (bundle.ranker_index.num_items, bundle.ranker_index.dim) == (40, bundle.scorer.dim)
    assert bundle.neighbours.row(5)[0].tolist() == [6, 4, 8]
    assert bundle.recent_popularity.shape == (41,)
    products = bundle.item_vectors[1] @ bundle.item_vectors[1:].T
    np.testing.assert_allclose(bundle.index.scores(bundle.item_vectors[1:2])[0, 1:], products, rtol=1e-5)


def test_format_4_has_histories_in_the_table_and_weights_in_the_graphs(
    copy: Path, bundle_path: Path, tmp_path: Path
) -> None:
    new = Bundle.load(bundle_path)
    users = pl.read_parquet(copy / "users.parquet")["user_id"].to_list()
    histories = [new.users.get(user) for user in users]
    table = {
        "user_id": users,
        "items": [history.items.tolist() for history in histories],
        "event_types": [history.event_types.tolist() for history in histories],
        "timestamps": [history.timestamps.tolist() for history in histories],
    }
    pl.DataFrame(table, schema=USERS_SCHEMA).write_parquet(copy / "users.parquet")
    for name in (RANKER_STATE, RANKER_SCORES):
        model = onnx.load(copy / name)  # with what stands outside
        onnx.save(model, copy / name)
    for name in (HISTORIES, TRANSITIONS, RANKER_WEIGHTS):
        (copy / name).unlink()
    manifest = json.loads((copy / MANIFEST).read_text())
    files = [file for file in copy.iterdir() if file.name != MANIFEST]
    del manifest["checksum"]
    manifest |= {"format_version": 4, "files": {file.name: described(file) for file in files}}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    old = Bundle.load(copy)
    for user in (*users, "nobody"):
        for field in ("items", "event_types", "timestamps"):
            expected, found = getattr(new.users.get(user), field), getattr(old.users.get(user), field)
            assert (found.tolist(), found.dtype) == (expected.tolist(), expected.dtype)
    history, candidates = np.array([[2, 3, 5]]), np.arange(41)[np.newaxis]
    assert old.scorer
    assert new.scorer
    np.testing.assert_array_equal(
        old.scorer.score(history, candidates), new.scorer.score(history, candidates)
    )


def described(file: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}


def test_what_is_large_is_mapped_and_read_only(bundle_path: Path) -> None:
    bundle = Bundle.load(bundle_path)
    history = bundle.users.get("loyal")
    mapped = [
        bundle.item_vectors,
        bundle.user_vectors,
        bundle.content_vectors,
        bundle.neighbours.values,
        history.items,
        history.timestamps,
    ]
    for array in mapped:
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
        assert array.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_who_serves_may_be_another_user_than_who_trains(bundle_path: Path) -> None:
    assert stat.S_IMODE(bundle_path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in bundle_path.iterdir()} == {0o644}


def test_histories_that_contradict_the_users(tmp_path: Path, fill: Fill) -> None:
    def other(**arrays: Any) -> Callable[[Path], dict[str, Any]]:
        def change(directory: Path) -> dict[str, Any]:
            fields = fill(directory)
            save_file(load_file(directory / HISTORIES) | arrays, directory / HISTORIES)
            return fields

        return change

    def with_lists(directory: Path) -> dict[str, Any]:
        fields = fill(directory)
        pl.DataFrame({"user_id": ["a"], "items": [[1]]}).write_parquet(directory / "users.parquet")
        return fields

    begins = np.array([0, 4, 4, 5, 45, 47])
    for damaged, message in [
        (other(history_begins=begins[1:]), "shape of history_begins"),
        (other(history_begins=begins[::-1].copy()), "do not end where their events end"),
        (other(history_begins=begins * (begins != 4) + 46 * (begins == 4)), "ends before it begins"),
        (other(history_begins=np.maximum(begins, 1)), "do not begin at 0"),
        (other(items=np.full(47, 41, np.int32)), "item rows run from 41 to 41; expected 1 to 40"),
        (other(timestamps=np.zeros(46, np.int64)), "do not end where their events end"),
        (other(timestamps=np.zeros(47)), "type of timestamps is float64"),
        (with_lists, r"users\.parquet: columns are"),
    ]:
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path, damaged)


def test_without_ranker(make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.load(make_bundle(ranker="none"))
    assert bundle.scorer is None
    assert bundle.ranker_index is None


@pytest.mark.parametrize("num_items", [0, 1])
def test_tiny_catalogs(make_bundle: Callable[..., Path], num_items: int) -> None:
    bundle = Bundle.load(make_bundle(num_items=num_items, ranker="none"))
    assert bundle.catalog.num_items == num_items


@pytest.mark.parametrize("name", [*FILES, HISTORIES, *RANKER_FILES, RANKER_WEIGHTS])
def test_damage_is_refused_by_name(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        Bundle.load(copy)
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        Bundle.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.load(copy)
    (copy / name).symlink_to(copy.parent / "elsewhere")
    with pytest.raises(BundleError, match=f"{name} is not a plain file"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest.update(format_version=7), "has format 7, newer than 6"),
        (
            lambda manifest: manifest.update(format_version=1),
            "has format 1; this trirank reads formats 4 to 6.*train",
        ),
        (lambda manifest: manifest.pop("format_version"), "format_version is missing"),
        (lambda manifest: manifest.pop("policies"), "policies is missing"),
        (lambda manifest: manifest.update(files=[]), "files is missing or is no dict"),
        (lambda manifest: manifest["files"].update({"../secret": {}}), "files names"),
        (lambda manifest: manifest["files"].pop("users.parquet"), "files names"),
        (lambda manifest: manifest["ranker"].update(kind="magic"), "ranker.kind is 'magic'"),
        (lambda manifest: manifest["ranker"].update(kind="none"), "files names"),
        (lambda manifest: manifest["ranker"].update(history_length=7), "history_length is 6; expected 7"),
        (lambda manifest: manifest["pipeline"].update(num_ranked=0), "pipeline.num_ranked is 0"),
        (lambda manifest: manifest["pipeline"].pop("sources"), "pipeline.sources is missing"),
        (lambda manifest: manifest["pipeline"].update(index=[]), "pipeline.index is no dict"),
        (lambda manifest: manifest["data"].pop("clock"), "data.clock is missing"),
    ],
)
def test_foreign_manifests(copy: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


def test_a_manifest_that_was_edited(copy: Path) -> None:
    """Not even its layout counts, but every word does, and the word checksum."""
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(json.dumps(json.loads(text)))
    Bundle.load(copy)
    for old, new in (('"num_ranked": 10', '"num_ranked": 11'), ('"checksum"', '"checksun"')):
        assert old in text
        (copy / MANIFEST).write_text(text.replace(old, new))
        with pytest.raises(BundleError, match=r"manifest\.json is damaged, or was edited"):
            Bundle.load(copy)


def test_a_manifest_that_is_no_manifest(copy: Path) -> None:
    for content in (b"{", b"\xff", b"[]"):
        (copy / MANIFEST).write_bytes(content)
        with pytest.raises(BundleError, match=MANIFEST):
            Bundle.load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(BundleError, match=f"not a bundle: {MANIFEST} is missing"):
        Bundle.load(copy)


def test_a_file_that_nobody_named(copy: Path) -> None:
    (copy / "weights.bin").write_bytes(b"external data")
    with pytest.raises(BundleError, match=r"weights\.bin does not belong to the bundle"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("index", "kind"), [({}, "flat"), ({"kind": "auto"}, "flat"), ({"kind": "exact"}, "exact")]
)
def test_plain_vectors_are_searched_as_the_recipe_says(make_bundle, index: dict, kind: str) -> None:
    bundle = Bundle.load(make_bundle(index=index), num_threads=2)
    assert bundle.ranker_index is not None
    for found in (bundle.index, bundle.ranker_index):
        assert (found.kind, found.num_threads) == (kind, 2)


def test_parts_that_contradict_each_other(tmp_path: Path, fill: Fill) -> None:
    def other_index(directory: Path) -> dict[str, Any]:
        fields = fill(directory)
        ItemIndex.build(np.ones((3, 8), np.float32)).save(directory / "item_index.faiss")
        return fields

    def other_ranker_index(directory: Path) -> dict[str, Any]:
        fields = fill(directory)
        ItemIndex.build(np.ones((41, 9), np.float32)).save(directory / "ranker_index.faiss")
        return fields

    def other_vectors(
        key: str, value: np.ndarray | None, file: str = "embeddings.safetensors"
    ) -> Callable[[Path], dict[str, Any]]:
        def change(directory: Path) -> dict[str, Any]:
            fields = fill(directory)
            vectors = load_file(directory / file) | {key: value}
            save_file({name: array for name, array in vectors.items() if array is not None}, directory / file)
            return fields

        return change

    def other_sources(key: str, value: np.ndarray | None) -> Callable[[Path], dict[str, Any]]:
        return other_vectors(key, value, "sources.safetensors")

    def not_faiss(directory: Path) -> dict[str, Any]:
        fields = fill(directory)
        (directory / "item_index.faiss").write_bytes(b"not an index")
        return fields

    for damaged, message in [
        (other_index, "item_index.faiss: number of items is 2; expected 40"),
        (not_faiss, "item_index.faiss cannot be opened"),
        (other_vectors("user_vectors", np.zeros((2, 8), np.float32)), "shape of user_vectors"),
        (other_vectors("item_degrees", np.zeros(41, np.float64)), "type of item_degrees is float64"),
        (other_vectors("item_degrees", None), "shape of item_degrees"),
        (other_vectors("item_vectors", np.full((41, 8), np.nan, np.float32)), "NaN"),
        (other_ranker_index, "ranker_index.faiss: dimension is 9; expected 8"),
        (other_sources("recent_popularity", np.zeros(3, np.int64)), "shape of recent_popularity"),
        (
            other_sources("neighbour_rows", np.full(115, 41, np.int32)),
            "neighbours: columns run from 41 to 41",
        ),
        (
            other_vectors("transition_weights", np.full(115, 1.5, np.float32), "transitions.safetensors"),
            "transitions are no probabilities",
        ),
        *(
            (other_vectors("return_rate", np.array(rates, np.float32), "transitions.safetensors"), message)
            for rates, message in (
                ([1.5], "transitions are no probabilities"),
                ([np.nan], "transitions are no probabilities"),
                ([], r"shape of return_rate is \(0,\); expected \(1,\)"),
            )
        ),
        (
            other_vectors("transition_rows", np.full(115, 41, np.int32), "transitions.safetensors"),
            "transitions: columns run from 41 to 41",
        ),
        (other_sources("neighbour_weights", np.ones(3, np.float32)), "neighbours: 3 values for 115 columns"),
        (other_sources("neighbour_offsets", np.ones(42, np.int64)), "neighbours: offsets do not rise"),
    ]:
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path, damaged)
        assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(tmp_path: Path, fill: Fill) -> None:
    def failing_fill(directory: Path) -> dict[str, Any]:
        fill(directory)
        raise KeyboardInterrupt

    def failing_verify(bundle: Bundle) -> None:
        raise RuntimeError("not good enough")

    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path, failing_fill)
    with pytest.raises(RuntimeError, match="not good enough"):
        write_bundle(tmp_path, fill, failing_verify)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_exports_left_is_removed_once_nobody_can_be_writing_it(
    tmp_path: Path, fill: Fill
) -> None:
    for name, age_s in (("abandoned", 61), ("just-made", 0), ("at-work", 61)):
        draft = tmp_path / f".tmp-{name}"
        draft.mkdir()
        (draft / "catalog.parquet").touch()
        moment = time.time() - age_s
        os.utime(draft, (moment, moment))
    at_work = os.open(tmp_path / ".tmp-at-work", os.O_RDONLY)
    fcntl.flock(at_work, fcntl.LOCK_EX)

    def slow(directory: Path) -> dict[str, Any]:
        """Another export begins while this one has been at work for long."""
        os.utime(directory, (0, 0))
        write_bundle(tmp_path, fill)
        return fill(directory)

    write_bundle(tmp_path, slow)
    os.close(at_work)
    drafts = {path.name for path in tmp_path.iterdir() if not BUNDLE_NAME.fullmatch(path.name)}
    assert drafts == {".tmp-just-made", ".tmp-at-work"}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_clock_that_was_set_back_does_not_make_a_new_bundle_an_old_one(tmp_path: Path, fill: Fill) -> None:
    first = write_bundle(tmp_path, fill)
    ahead = first.rename(tmp_path / "29991231-235959-abcdef")
    (tmp_path / "29999999-999999-abcdef").mkdir()  # the name of no time
    second, third = write_bundle(tmp_path, fill), write_bundle(tmp_path, fill)
    assert (second.name[:15], third.name[:15]) == ("30000101-000000", "30000101-000001")
    assert bundles_in(tmp_path) == [ahead, second, third]


def test_equal_exports_do_not_collide(tmp_path: Path, fill: Fill) -> None:
    seen: list[Path] = []
    written = [write_bundle(tmp_path, fill, lambda bundle: seen.append(bundle.path)) for _ in range(3)]
    assert len(set(written)) == len(list(tmp_path.iterdir())) == 3
    assert all(path.name.startswith(".tmp-") for path in seen)
    assert resolve_bundle(tmp_path) == written[-1]


def test_resolve(tmp_path: Path, bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a directory"):
        resolve_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="holds no bundle"):
        resolve_bundle(tmp_path)
    for name in ("20250101-000000-aaaaaa", "20260101-000000-000000", ".tmp-x", "20270101-000000-unfini"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).touch()
    (tmp_path / "20280101-000000-abcdef").mkdir()  # no manifest: no bundle
    os.utime(tmp_path / "20250101-000000-aaaaaa" / MANIFEST, (2**40, 2**40))
    assert resolve_bundle(tmp_path).name == "20260101-000000-000000"
    assert resolve_bundle(str(bundle_path)) == bundle_path
