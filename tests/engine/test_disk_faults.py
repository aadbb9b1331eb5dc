"""Bundles and events on a disk that fills up, is damaged, or whose writer is killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.bundle import MANIFEST, Bundle, BundleError, bundles_in, write_bundle
from engine.client import RecommenderClient, visitor
from engine.event_store import LocalEventStore
from protos.trirank.v1 import recommender_pb2 as pb
from tests.engine.command import SERVE

WAIT_S = 60
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prlimit and fork as Linux has them")

# Exports again and again, as `trirank train` does at its end, and is cut off each time: killed at the n-th
# file that it opens, makes, renames or gives a mode, or with a largest file size, as on a full disk. Forks,
# so that what it imports is imported once; each attempt has a directory of its own that holds one bundle.
EXPORTER = """
import json, os, resource, runpy, shutil, signal, sys
from pathlib import Path
from engine.bundle import bundles_in, verify_files, write_bundle

mode, source, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
fill_bundle = runpy.run_path("tests/engine/conftest.py")["fill_bundle"]

def copied(draft):
    for file in source.iterdir():
        if file.name != "manifest.json":
            shutil.copyfile(file, draft / file.name)
    manifest = json.loads((source / "manifest.json").read_text())
    return {key: manifest[key] for key in ("data", "ranker", "pipeline", "policies")}

def attempt(root, cut):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = [0]
    def count(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.chmod") and str(root) in str(arguments[0]):
            seen[0] += 1
            if seen[0] == cut:
                os.kill(os.getpid(), signal.SIGKILL)
    if mode == "killed":
        sys.addaudithook(count)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (cut, cut))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)  # FAISS complains there
    try:
        write_bundle(root, fill_bundle if mode == "full" else copied)
    except Exception:
        os._exit(3)
    os._exit(0)

for cut in json.loads(sys.argv[4]):
    root = work / str(cut)
    shutil.copytree(source.parent, root)
    code = attempt(root, cut)
    print(json.dumps({"cut": cut, "code": code, "bundles": [b.name for b in bundles_in(root)]}), flush=True)
    if mode == "killed" and code == 0:
        break
"""


def cut_off(mode: str, source: Path, work: Path, cuts: list[int]) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", EXPORTER, mode, str(source), str(work), json.dumps(cuts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_export_that_is_killed_leaves_no_half_bundle(
    make_bundle: Callable[..., Path], fill: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Killed at each step in turn: servers see the old bundle, or the new one whole. The next one works."""
    source = make_bundle()
    outcomes = cut_off("killed", source, tmp_path, list(range(1, 300)))
    *killed, last = outcomes
    assert last["code"] == 0
    assert len(killed) >= 20  # each file is at least made, given a mode, and flushed
    assert {one["code"] for one in killed} == {-signal.SIGKILL}
    num_whole = 0
    for one in killed:
        root = tmp_path / str(one["cut"])
        assert source.name in one["bundles"]
        for name in one["bundles"]:
            Bundle.load(root / name)
        num_whole += len(one["bundles"]) == 2
        assert len(list(root.glob(".tmp-*"))) <= (len(one["bundles"]) == 1)
    assert num_whole <= 2  # from the rename on
    # The next export, a minute later, clears up.
    root = tmp_path / str(killed[len(killed) // 2]["cut"])
    for draft in root.glob(".tmp-*"):
        os.utime(draft, (0, 0))
    assert bundles_in(root)[-1] != write_bundle(root, fill)
    assert not list(root.glob(".tmp-*"))
    assert len(bundles_in(root)) == 2


def test_an_export_on_a_full_disk_leaves_nothing(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Whichever of its writers runs out of space: NumPy's, FAISS's, polars', safetensors' or Python's."""
    source = make_bundle()
    sizes = sorted({file.stat().st_size for file in source.iterdir()})
    cuts = sorted({0, 1, *(size - 1 for size in sizes), *(size // 2 for size in sizes), sizes[-1]})
    outcomes = cut_off("full", source, tmp_path, cuts)
    assert {one["code"] for one in outcomes[:-1]} == {3}
    for one in outcomes[:-1]:
        assert [entry.name for entry in (tmp_path / str(one["cut"])).iterdir()] == [source.name]
    assert outcomes[-1]["code"] == 0  # all fits


# Damage


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_anywhere_is_served(bundle_path: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    """A flipped bit or a cut at any byte of any file, the manifest's own too."""
    copy = tmp_path_factory.getbasetemp() / "damaged-bundle"
    if not copy.exists():
        copy.mkdir()
        for file in bundle_path.iterdir():
            os.link(file, copy / file.name)
    file = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = file.read_bytes()
    # Every region alike: the beginning, the end, and anywhere between.
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 64).map(lambda n: n % len(content)))
    if data.draw(st.booleans()):
        damaged = bytearray(content)
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged = bytearray(content[:place])
    if file.name == MANIFEST and damaged == content.rstrip():
        return  # lacks the last line's end alone
    file.unlink()  # the original shares these bytes
    file.write_bytes(damaged)
    try:
        with pytest.raises(BundleError, match=f"{file.name}|{MANIFEST}"):
            Bundle.load(copy)
    finally:
        file.unlink()
        os.link(bundle_path / file.name, file)


def test_undamaged_it_is_served(bundle_path: Path) -> None:
    Bundle.load(bundle_path)


# A server


@contextlib.contextmanager
def running(start_process: Any, log: Path, *words: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    command = [*SERVE, *words, "--address", "127.0.0.1:0", "--json"]
    with (
        log.open("a") as errors,
        start_process([*command, "--metrics", "127.0.0.1:0"], errors) as (process, ready),
    ):
        assert ready, log.read_text()
        yield psutil.Process(process.pid), json.loads(ready)


def metric(address: str, line: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as response:
        text = response.read().decode()
    return sum(float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line))


def until(happens: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_full_disk_acknowledges_nothing_and_stops_no_answer(
    bundle_path: Path, start_process: Any, tmp_path: Path
) -> None:
    """No file of the server's may grow: as ENOSPC, for its log of events. Then there is room again."""
    log, events = tmp_path / "log.txt", tmp_path / "events"
    acknowledged, refused = [], []
    with running(start_process, log, str(bundle_path), "--events", str(events)) as (process, ready):
        with RecommenderClient(ready["address"], timeout_s=WAIT_S) as client:

            def record(number: int) -> None:
                event = pb.RecordedEvent(event_id=str(number), user_id="zoe", item_id="item-9")
                try:
                    client.record_events([event])
                    acknowledged.append(number)
                except grpc.RpcError as error:
                    refused.append((number, error.code(), error.details()))

            for number in range(5):
                record(number)
            # So that the text of the log, which the limit is for too, is shorter than the log of events.
            others = [pb.RecordedEvent(event_id=f"{n:0200}", user_id="x", item_id="y") for n in range(400)]
            client.record_events(others)
            size = sum(file.stat().st_size for file in events.glob("*.log"))
            limits = process.rlimit(resource.RLIMIT_FSIZE)
            process.rlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))  # one more fits, the next in part
            for number in range(5, 10):
                record(number)
                answer = client.recommend(visitor("zoe"))
                assert len(answer.items) == 10
                assert not answer.trace.degraded_stages
                assert answer.trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
            assert acknowledged == [0, 1, 2, 3, 4, 5]
            assert {code for _, code, _ in refused} == {grpc.StatusCode.UNAVAILABLE}
            assert all("the event log cannot be written" in details for *_, details in refused)
            assert metric(ready["metrics"], 'trirank_events_total{result="failed"}') >= 4
            assert "could not be made safe" in log.read_text()
            process.rlimit(resource.RLIMIT_FSIZE, limits)
            for number in (*range(6, 10), *range(10, 13)):  # sent again, and new ones
                record(number)
        process.kill()
        process.wait(WAIT_S)
    assert acknowledged == list(range(13))
    store = LocalEventStore(events)
    assert [event.event_id for event in store.recent("zoe")] == [str(number) for number in range(13)]
    assert store.num_lost_bytes == 0
    store.close()


def test_bundles_published_killed_and_damaged_while_it_is_served(
    make_bundle: Callable[..., Path],
    fill: Callable[..., dict[str, Any]],
    start_process: Any,
    tmp_path: Path,
) -> None:
    """Not one call fails; and a server that is killed during a swap starts with the new bundle."""
    first = make_bundle()
    root, log = first.parent, tmp_path / "log.txt"
    failures: list[str] = []
    versions: list[str] = []
    is_over = threading.Event()

    def ask(address: str) -> None:
        with RecommenderClient(address, timeout_s=WAIT_S) as client:
            while not is_over.is_set():
                try:
                    versions.append(client.recommend(visitor("loyal")).trace.bundle_version)
                except grpc.RpcError as error:
                    failures.append(str(error))

    with running(start_process, log, str(root)) as (process, ready):
        asker = threading.Thread(target=ask, args=(ready["address"],))
        asker.start()
        until(lambda: first.name in versions)
        # An exporter dies amid writing: what it leaves is no bundle.
        draft = root / ".tmp-abandoned"
        draft.mkdir()
        (draft / MANIFEST).write_text((first / MANIFEST).read_text())
        # Another one's disk has flipped a bit.
        bad = write_bundle(tmp_path / "elsewhere", fill)
        damaged = bytearray((bad / "ranker_scores.onnx").read_bytes())
        damaged[100] ^= 1
        (bad / "ranker_scores.onnx").write_bytes(damaged)
        bad.rename(root / bad.name)
        until(lambda: metric(ready["metrics"], "trirank_bundle_swaps_total") > 0)
        good = write_bundle(root, fill)
        until(lambda: good.name in versions)
        is_over.set()
        asker.join()
        assert failures == []
        assert set(versions) == {first.name, good.name}
        newest = write_bundle(root, fill)
        time.sleep(0.5)  # somewhere around the second in which it is found
        process.kill()
        process.wait(WAIT_S)
    with (
        running(start_process, log, str(root)) as (process, ready),
        RecommenderClient(ready["address"], timeout_s=WAIT_S) as client,
    ):
        assert client.recommend(visitor("loyal")).trace.bundle_version == newest.name
