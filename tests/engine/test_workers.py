"""Several servers on one port, and the event store that they share."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import shared_events, workers
from engine.client import visitor
from engine.event_store import LocalEventStore, MemoryEventStore
from engine.events import Recorded, StoreBusyError, StoreUnavailableError, UserEvent
from engine.shared_events import MARKS_BYTES, EventServer, SharedEventStore
from engine.workers import WORKER, ListenError, Worker
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc
from tests.engine.command import SERVE

WAIT_S = 60
ROOT = Path(__file__).parents[2]


def until(happens: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.02)


# The store


def test_a_store_through_a_socket(tmp_path: Path) -> None:
    owned = MemoryEventStore(clock=lambda: 1.0)
    server = EventServer(owned, tmp_path / "events")
    first, second = SharedEventStore(tmp_path / "events"), SharedEventStore(tmp_path / "events")
    event = UserEvent("e 🎉", "ann\n", "x" * 100_000, "cart", 5)
    assert first.record([event, event]).result(WAIT_S) == Recorded(1, 1)
    assert second.record([event, UserEvent("e2", "ann\n", "y")]).result(WAIT_S) == Recorded(1, 1)
    assert list(second.recent("ann\n")) == [event, UserEvent("e2", "ann\n", "y", "interaction", 1000)]
    assert list(first.recent("bob")) == []
    assert owned.recent("ann\n")[0] == event
    for store in (first, second):
        store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        first.record([event])
    server.close()


def test_what_several_processes_record_meanwhile_shares_a_flush(tmp_path: Path, held: Any) -> None:
    owned = LocalEventStore(tmp_path / "log")
    server = EventServer(owned, tmp_path / "events")
    stores = [SharedEventStore(tmp_path / "events", timeout_s=WAIT_S) for _ in range(2)]
    flush = held(owned._log, "append")
    futures = [store.record([UserEvent("first", f"u{n}", "x")]) for n, store in enumerate(stores)]
    assert flush.begun.wait(WAIT_S)
    futures += [
        store.record([UserEvent(f"e{number}", f"u{n}", "x")])
        for number in range(50)
        for n, store in enumerate(stores)
    ]
    flush.may_end.set()
    assert [future.result(WAIT_S) for future in futures] == [Recorded(1, 0)] * 102
    assert flush.num_calls <= 20  # not one for each of 102; how they are grouped is a matter of luck
    assert len(owned.recent("u0")) == len(owned.recent("u1")) == 51
    for store in (*stores, server, owned):
        store.close()


def test_one_batch_of_many_may_fail(tmp_path: Path) -> None:
    class Choosy(MemoryEventStore):
        def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
            if events[0].user_id == "bad":
                raise StoreUnavailableError("not this one")
            if events[0].user_id == "late":
                raise StoreBusyError("too many")
            return super().record(events)

    server = EventServer(Choosy(), tmp_path / "events")
    store = SharedEventStore(tmp_path / "events", timeout_s=WAIT_S)
    good, bad, late = ([UserEvent("e", name, "x")] for name in ("good", "bad", "late"))
    outcomes = store._commit([good, bad, good, late])
    assert [repr(outcome) for outcome in outcomes] == [
        repr(Recorded(1, 0)),
        "StoreUnavailableError('not this one')",
        repr(Recorded(0, 1)),
        "StoreBusyError('too many')",
    ]
    with pytest.raises(StoreUnavailableError, match="not this one"):
        store.record(bad).result(WAIT_S)
    store.close()
    server.close()


def test_nobody_is_asked_about_who_has_no_events(tmp_path: Path) -> None:
    asked = []

    class Noting(MemoryEventStore):
        def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
            asked.append(user_id)
            return super().recent(user_id, timeout_s)

    owned = Noting()
    owned.record([UserEvent("1", "of old", "x")]).result(WAIT_S)
    server = EventServer(owned, tmp_path / "events")
    first, second = SharedEventStore(tmp_path / "events"), SharedEventStore(tmp_path / "events")
    users = ["new ü", *(f"user {number}" for number in range(1000))]
    assert not any(first.recent(user) for user in users)
    assert asked == []
    second.record([UserEvent("1", "new ü", "y")]).result(WAIT_S)
    for store in (first, second, SharedEventStore(tmp_path / "events")):
        assert [event.item_id for event in store.recent("new ü")] == ["y"]
        assert [event.item_id for event in store.recent("of old")] == ["x"]
        assert not any(store.recent(user) for user in users[1:])
        store.close()
    assert set(asked) == {"new ü", "of old"}
    server.close()


def test_the_room_for_marks_is_taken_at_once(tmp_path: Path) -> None:
    """A full disk must be an error at the start, and not the end of all processes at some later mark."""
    server = EventServer(MemoryEventStore(), tmp_path / "events")
    assert (tmp_path / "events.users").stat().st_blocks * 512 >= MARKS_BYTES
    server.close()


def test_a_shortage_of_descriptors_ends(tmp_path: Path) -> None:
    server = EventServer(MemoryEventStore(), tmp_path / "events")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            # The first has the descriptor that `accept` has taken in advance, the second none.
            first.connect(str(tmp_path / "events"))
            second.connect(str(tmp_path / "events"))
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for connection in (first, second):
            connection.settimeout(WAIT_S)
            shared_events._send(connection, {"recent": "ann"})
            assert shared_events._receive(connection) == {"events": []}
    server.close()


def test_a_store_that_others_record_in_is_always_asked(tmp_path: Path) -> None:
    class OfMany(MemoryEventStore):
        def user_ids(self) -> None:
            pass

    owned = OfMany()
    server, store = EventServer(owned, tmp_path / "events"), SharedEventStore(tmp_path / "events")
    assert store.recent("ann") == []
    owned.record([UserEvent("1", "ann", "x")]).result(WAIT_S)  # as another machine does
    assert [event.event_id for event in store.recent("ann")] == ["1"]
    store.close()
    server.close()


def test_a_store_that_is_not_there_and_comes_back(tmp_path: Path) -> None:
    store = SharedEventStore(tmp_path / "events", timeout_s=1.0)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="the event store does not answer"):
            store.recent("ann")
    with pytest.raises(StoreUnavailableError):
        store.record([UserEvent("1", "ann", "x")]).result(WAIT_S)

    class Slow(MemoryEventStore):
        def user_ids(self) -> None:  # so that everybody is asked about
            pass

        def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
            if user_id != "ann":
                time.sleep(2.0)
            return [UserEvent(user_id, user_id, "x")]

        def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
            raise StoreUnavailableError("the disk is full")

    server = EventServer(Slow(), tmp_path / "events")
    with pytest.raises(StoreUnavailableError, match="timed out"):
        store.recent("late")
    with pytest.raises(StoreUnavailableError, match="timed out"):
        store.recent("late too", 0.001)
    # The late answer is not taken for the next one.
    assert [event.event_id for event in store.recent("ann")] == ["ann"]
    with pytest.raises(StoreUnavailableError, match="the disk is full"):
        store.record([UserEvent("1", "ann", "x")]).result(WAIT_S)
    store.close()
    server.close()


# The servers


def ask(address: str, user: str) -> Any:
    """Ask over a connection of its own."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = pb_grpc.RecommenderServiceStub(channel)
        return stub.Recommend(pb.RecommendRequest(visitor=visitor(user)), timeout=WAIT_S, wait_for_ready=True)


def record(address: str, number: int, user: str) -> Any:
    event = pb.RecordedEvent(event_id=str(number), user_id=user, item_id="item-9")
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = pb_grpc.RecommenderServiceStub(channel)
        return stub.RecordEvents(pb.RecordEventsRequest(events=[event]), timeout=WAIT_S)


def num_requests(metrics: str) -> float:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "trirank_requests_total")


def has_ended(server: psutil.Process) -> bool:
    try:
        return not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="SO_REUSEPORT deals connections on Linux")
def test_two_servers_on_one_port(bundle_path: Path, start_process: Any, tmp_path: Path) -> None:
    words = ["--address", "127.0.0.1:0", "--json", "--num_processes", "2", "--num_workers", "1"]
    words += ["--metrics", "127.0.0.1:0", "--events", str(tmp_path / "events"), "--json_logs", "true"]
    command = [*SERVE, str(bundle_path), *words]
    log = tmp_path / "log.txt"
    with log.open("w") as errors, start_process(command, errors) as (process, ready):
        assert ready, log.read_text()
        said = json.loads(ready)
        address, metrics = said["address"], said["metrics"]
        assert record(address, 1, "somebody").num_new == 1
        for _ in range(24):  # connections are dealt by chance
            assert ask(address, "somebody").trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
        assert all(num_requests(one) > 0 for one in metrics)
        assert sum(map(num_requests, metrics)) == 25
        assert record(address, 1, "somebody").num_repeated == 1

        servers = psutil.Process(process.pid).children()
        assert len(servers) == 2
        for one in servers:  # nobody reads what they print, which goes to the log
            until(lambda one=one: os.readlink(f"/proc/{one.pid}/fd/1") == str(log))
        servers[0].kill()
        until(lambda: "is started again" in log.read_text())
        until(lambda: log.read_text().count("listening on") == 4)  # two, the parent, and the new one
        for _ in range(8):
            assert ask(address, "somebody").trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
        servers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert all(map(has_ended, servers))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    who = {line.get("worker") for line in lines if line["message"].startswith("listening on")}
    assert who == {0, 1, None}  # None: the parent
    store = LocalEventStore(tmp_path / "events")
    assert [event.event_id for event in store.recent("somebody")] == ["1"]
    store.close()


def test_a_worker_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "RESTART_S", 0.0)
    monkeypatch.setattr(workers, "POLL_S", 0.01)
    ended = subprocess.Popen([sys.executable, "-c", ""], text=True)
    ended.wait()
    running, signals, tries = [ended], [], []

    def start(number: int) -> subprocess.Popen[str]:
        tries.append(number)
        if len(tries) < 3:
            raise BlockingIOError(11, "no process is left")
        signals.append(signal.SIGTERM)
        return subprocess.Popen([sys.executable, "-c", ""], text=True)

    workers._watch(running, start, signals)
    assert tries == [0, 0, 0]
    assert running[0] is not ended
    assert caplog.text.count("could not be started, and will be tried again") == 2
    running[0].wait()


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    program = "import time; from engine.workers import told; print(told(), flush=True); time.sleep(60)"
    worker = Worker("127.0.0.1:1", None, "events", False, 0)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, WORKER: json.dumps(worker._asdict())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == f"{worker}\n"
    process.stdin.close()  # as the system does when its owner is killed
    assert process.wait(WAIT_S) == -signal.SIGTERM
    process.stdout.close()


def test_the_end_may_come_before_the_servers_are_ready(tmp_path: Path) -> None:
    """As where they hang in opening their bundle."""
    program = """
import subprocess
from engine import workers
from engine.event_store import MemoryEventStore
start = subprocess.Popen

def hang(command, **options):
    print("begun", flush=True)
    return start(["sleep", "600"], **options)

workers.subprocess.Popen = hang
workers.supervise([], ("127.0.0.1", 0), None, 2, MemoryEventStore(), print, 60)
print("ended", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["begun\n", "begun\n"]
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ended\n"
    assert process.wait(WAIT_S) == 0
    process.stdout.close()


def test_a_worker_that_does_not_end_is_killed() -> None:
    program = """
import subprocess, sys
from engine import workers
from engine.event_store import MemoryEventStore
start = subprocess.Popen
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('{}', flush=True); time.sleep(600)"
workers.subprocess.Popen = lambda command, **options: start([sys.executable, "-c", deaf], **options)
ready = lambda said: print("ready", flush=True)
workers.supervise([], ("127.0.0.1", 0), None, 2, MemoryEventStore(), ready, 0.1)
print("ended", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said, log = process.communicate(timeout=WAIT_S)
    assert (process.returncode, said) == (0, "ended\n")
    assert "worker 1 has not ended within 0.1 s; it is killed" in log


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ListenError, match=r"^address: cannot listen on '192\.0\.2\.1:0': Cannot assign"):
        workers._reserved("192.0.2.1", 0)


def test_a_port_that_is_taken_and_a_bundle_that_is_none(
    server_address: str, bundle_path: Path, start_process: Any, tmp_path: Path
) -> None:
    for words, message in (
        (
            [str(bundle_path), "--address", server_address],
            f"address: cannot listen on {server_address!r}: Address already in use",
        ),
        ([str(tmp_path), "--address", "127.0.0.1:0"], "a worker could not start; it ended with 2"),
    ):
        log = tmp_path / "log.txt"
        command = [*SERVE, *words, "--num_processes", "2"]
        with log.open("w") as errors, start_process(command, errors) as (process, ready):
            assert not ready
            assert process.wait(WAIT_S) == 2
        assert message in log.read_text()
        assert "Traceback" not in log.read_text()
