"""Against a real Redis that the tests start and stop; skipped where there is no redis-server."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("redis", reason="the extra `redis` is not installed")

import redis

from engine.client import RecommenderClient, visitor
from engine.event_log import EventLog
from engine.event_store import LocalEventStore, encode
from engine.events import Recorded, StoreUnavailableError, UserEvent
from engine.redis_events import RedisEventStore
from protos.trirank.v1 import recommender_pb2 as pb
from tests.engine.command import SERVE

SERVER = shutil.which("redis-server")
WAIT_S = 60
pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed (Debian: redis-server)")


class Server:
    """A Redis of the test's own."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert SERVER
        options = ["--port", str(self.port), "--dir", str(self.directory), "--appendonly", "yes"]
        self.process = subprocess.Popen([SERVER, *options, "--save", ""], stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        wait_until(lambda: answers(client))
        client.close()

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Iterator[RedisEventStore]:
    redis.Redis(port=server.port).flushall()
    # A starved test machine must not look like a Redis that is down.
    store = RedisEventStore(server.url, tmp_path, timeout_s=WAIT_S, clock=lambda: 1.0, max_per_user=4)
    yield store
    store.close()


# What takes several round trips to deliver, one for each of 20 users.
MUCH = [encode([UserEvent(f"e{n}", f"u{user}", "x", timestamp=1) for n in range(500)]) for user in range(20)]


def leave(directory: Path, *payloads: bytes) -> None:
    """Leave records on the disk, as a store does that Redis has not answered."""
    log = EventLog(directory)
    log.append(payloads)
    log.close()


def record(target: RedisEventStore, *events: UserEvent) -> Recorded:
    return target.record(events).result(WAIT_S)


def ids(events: Sequence[UserEvent]) -> list[str]:
    return [event.event_id for event in events]


def test_record_and_read(store: RedisEventStore) -> None:
    late = UserEvent("e 1", "ann", "emoji 🎉 with space", "purchase", 400)
    early = UserEvent("e2", "ann", "x", "view", 300)
    other = UserEvent("e2", "bob {x}", "y")
    assert record(store, late, other, early) == Recorded(3, 0)
    assert store.recent("ann") == [early, late]
    assert store.recent("bob {x}") == [other._replace(timestamp=1000)]
    assert store.recent("nobody") == []
    assert store.recent("") == ()
    assert record(store) == Recorded(0, 0)


def test_an_event_counts_once(store: RedisEventStore) -> None:
    event = UserEvent("e1", "ann", "x", timestamp=5)
    assert record(store, event, event) == Recorded(1, 1)
    assert record(store, event._replace(item_id="other")) == Recorded(0, 1)
    assert store.recent("ann") == [event]


def test_events_without_a_time_are_the_newest_of_their_user(store: RedisEventStore) -> None:
    record(store, UserEvent("future", "ann", "x", timestamp=20_000))
    record(store, UserEvent("b", "ann", "x"), UserEvent("a", "ann", "x"))
    found = [(event.event_id, event.timestamp) for event in store.recent("ann")]
    assert found == [("future", 20_000), ("b", 20_000), ("a", 20_000)]


def test_the_newest_are_kept(store: RedisEventStore, server: Server) -> None:
    for number in range(20):
        record(store, UserEvent(f"e{number}", "ann", "x", timestamp=100 - number))  # ever older
    assert ids(store.recent("ann")) == ["e3", "e2", "e1", "e0"]
    client = redis.Redis(port=server.port)
    assert client.hlen("trirank:events:ann") <= 5 + 2
    assert 0 < client.pttl("trirank:events:ann") <= 90 * 86_400_000


def test_two_servers_see_each_other_s_events(store: RedisEventStore, server: Server, tmp_path: Path) -> None:
    other = RedisEventStore(server.url, tmp_path / "other", timeout_s=WAIT_S)
    event = UserEvent("e1", "ann", "x", timestamp=5)
    record(other, event)
    assert store.recent("ann") == [event]
    assert record(store, event) == Recorded(0, 1)
    other.close()


def test_a_redis_that_is_full_is_still_read(store: RedisEventStore, server: Server) -> None:
    event = UserEvent("e1", "ann", "x", timestamp=5)
    record(store, event)
    client = redis.Redis(port=server.port)
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    try:
        for number in range(3):
            assert record(store, UserEvent(f"more {number}", "ann", "y", timestamp=6)).is_delayed
            assert store.recent("ann") == [event]
    finally:
        client.config_set("maxmemory", 0)
    wait_until(lambda: not store.has_undelivered)
    assert len(store.recent("ann")) == 4


def test_redis_goes_away_and_comes_back(tmp_path: Path) -> None:
    """Events are safe meanwhile, survive a restart of ours too, and arrive once."""
    server = Server(tmp_path)
    server.start()
    options: dict[str, Any] = {"retry_s": 0.05, "timeout_s": WAIT_S}
    store = RedisEventStore(server.url, tmp_path / "buffer", **options)
    before, during, later = (UserEvent(name, "ann", "x", "view", 5) for name in ("before", "during", "later"))
    assert record(store, before) == Recorded(1, 0)
    server.stop()
    assert record(store, during, before) == Recorded(2, 0, is_delayed=True)
    with pytest.raises(StoreUnavailableError, match=r"Redis (did|does) not answer"):
        store.recent("ann")
    assert store.has_undelivered
    store.close()

    store = RedisEventStore(server.url, tmp_path / "buffer", **options)
    assert store.has_undelivered
    assert record(store, later).is_delayed
    server.start()
    wait_until(lambda: not store.has_undelivered)
    assert sorted(ids(store.recent("ann"))) == ["before", "during", "later"]
    assert record(store, later) == Recorded(0, 1)
    store.close()
    server.stop()


def failure(store: RedisEventStore) -> str:
    try:
        store.recent("ann")
    except StoreUnavailableError as error:
        return str(error)
    return ""


def test_a_redis_that_hangs_is_left_alone_until_it_is_back(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    line = SlowLine(server.port)
    store = RedisEventStore(line.url, tmp_path / "buffer", timeout_s=0.2, retry_s=0.05)
    line.delay_s = 1000.0
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        store.recent("ann")
    # One thread finds out when it is back; requests do not wait for that.
    for _ in range(20):
        assert failure(store) == "Redis did not answer a moment ago"
        time.sleep(0.02)
    assert record(store, UserEvent("e", "ann", "x")).is_delayed
    line.delay_s = 0.0
    # On a starved machine it may be late again: what counts is that the answer comes.
    wait_until(lambda: not store.has_undelivered and failure(store) == "")
    direct = RedisEventStore(server.url, tmp_path / "direct", timeout_s=WAIT_S)
    assert ids(direct.recent("ann")) == ["e"]
    for one in (store, direct):
        one.close()
    line.close()
    server.stop()


def test_an_outage_costs_nothing_but_the_room_of_its_events(tmp_path: Path) -> None:
    store = RedisEventStore("redis://127.0.0.1:1/0", tmp_path, retry_s=0.01)
    for number in range(20):
        assert record(store, UserEvent(f"e{number}", "ann", "x")).is_delayed
        time.sleep(0.02)
    assert len(list(tmp_path.glob("*.log"))) == 1  # nothing was begun anew to ask whether Redis is back
    store.close()


def test_what_a_store_without_redis_has_left_is_delivered(server: Server, tmp_path: Path) -> None:
    client = redis.Redis(port=server.port)
    client.flushall()
    before = LocalEventStore(tmp_path, compact_bytes=1)
    for number in range(3):
        before.record([UserEvent(f"e{number}", "ann", "x", timestamp=1 + number)]).result(WAIT_S)
    before.close()
    assert list(tmp_path.glob("*.snapshot"))
    store = RedisEventStore(server.url, tmp_path, timeout_s=WAIT_S, retry_s=0.01)
    wait_until(lambda: not store.has_undelivered)
    assert ids(store.recent("ann")) == ["e0", "e1", "e2"]
    store.close()
    client.close()


def test_what_redis_will_never_take_keeps_nobody_waiting(server: Server, tmp_path: Path) -> None:
    client = redis.Redis(port=server.port)
    client.flushall()
    client.set("trirank:events:bob", "no hash")
    events = [UserEvent("e1", "ann", "x", timestamp=5), UserEvent("e2", "bob", "y")]
    leave(tmp_path, b"no events", encode(events))
    store = RedisEventStore(server.url, tmp_path, timeout_s=WAIT_S, retry_s=0.01)
    wait_until(lambda: not store.has_undelivered)
    assert ids(store.recent("ann")) == ["e1"]
    refused = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert refused[0]["payload"] == "no events"
    assert "WRONGTYPE" in refused[1]["why"]
    assert refused[1]["events"] == [["e2", "bob", "y", "interaction", 0]]
    store.close()
    client.close()


def test_a_delivery_keeps_nobody_from_asking(server: Server, tmp_path: Path) -> None:
    """Requests that have found Redis away are answered again while a long delivery is under way."""
    leave(tmp_path, *MUCH)
    client = redis.Redis(port=server.port)
    client.flushall()
    line = SlowLine(server.port)
    line.delay_s = 0.1
    store = RedisEventStore(line.url, tmp_path, timeout_s=WAIT_S, retry_s=0.01)
    wait_until(lambda: client.dbsize() >= 1)
    store._is_away = True
    wait_until(lambda: failure(store) == "")
    assert store.has_undelivered
    store.close()
    line.close()
    client.close()


def test_what_is_refused_is_kept_once(server: Server, tmp_path: Path) -> None:
    client = redis.Redis(port=server.port)
    client.flushall()
    client.hset("trirank:events:bob", mapping={"n": "no number", "t": "1"})
    events = [UserEvent("e1", "ann", "x", timestamp=5), UserEvent("e2", "bob", "y")]
    leave(tmp_path, b"no events", encode(events))
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    store = RedisEventStore(server.url, tmp_path, timeout_s=WAIT_S, retry_s=0.01)
    try:
        time.sleep(0.5)  # refused all the while
        assert not (tmp_path / "refused.jsonl").exists()
    finally:
        client.config_set("maxmemory", 0)
    wait_until(lambda: not store.has_undelivered)
    assert ids(store.recent("ann")) == ["e1"]
    refused = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert len(refused) == 2
    assert refused[1]["events"][0][:2] == ["e2", "bob"]
    store.close()
    client.close()


def test_a_delivery_does_not_hold_up_the_end(server: Server, tmp_path: Path) -> None:
    leave(tmp_path, *MUCH)
    client = redis.Redis(port=server.port)
    client.flushall()
    line = SlowLine(server.port)
    line.delay_s = 0.2
    store = RedisEventStore(line.url, tmp_path, timeout_s=WAIT_S, retry_s=0.01)
    wait_until(lambda: client.dbsize() >= 1)
    store.close()
    assert client.dbsize() < 20
    store = RedisEventStore(server.url, tmp_path, timeout_s=WAIT_S, retry_s=0.01)
    wait_until(lambda: not store.has_undelivered)
    assert client.dbsize() == 20
    store.close()
    line.close()
    client.close()


def test_a_cluster_is_named(tmp_path: Path) -> None:
    store = RedisEventStore("redis://127.0.0.1:1/0", tmp_path)

    def moved() -> None:
        raise redis.exceptions.MovedError("12928 127.0.0.1:16402")

    with pytest.raises(StoreUnavailableError, match=r"part of a cluster; expected one server .*: 12928"):
        store._asked(moved)
    store.close()


class SlowLine:
    """Between a client and a Redis: passes on what both say, late where it is told to."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
            except ConnectionRefusedError:
                client.close()
                continue
            except OSError:
                return
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay_s)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_who_has_little_time_does_not_wait_for_a_slow_redis(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    store = RedisEventStore(server.url, tmp_path / "buffer", timeout_s=WAIT_S)
    event = UserEvent("a", "ann", "x", "view", 1)
    record(store, event)
    assert store.recent("ann", 10.0) == [event]
    assert server.process
    server.process.send_signal(signal.SIGSTOP)  # whoever waited for its answer would wait for ever
    for _ in range(10):  # more than there are threads that ask
        with pytest.raises(StoreUnavailableError, match="did not answer in the time that a request had"):
            store.recent("ann", 0.01)
    server.process.send_signal(signal.SIGCONT)
    assert store.recent("ann") == [event]  # it was slow, not away, and gives no answer to an older question
    assert store.recent("nobody", 10.0) == []
    store.close()


def test_a_redis_that_is_slow_stopped_and_restarted_under_load(tmp_path: Path) -> None:
    """No acknowledged event is lost, each counts once, and who asks is answered or told at once."""
    server = Server(tmp_path)
    server.start()
    line = SlowLine(server.port)
    # Patient enough for a starved machine, and less than the line is slow.
    store = RedisEventStore(line.url, tmp_path / "buffer", timeout_s=2.0, retry_s=0.2, max_per_user=10_000)
    acknowledged: list[tuple[str, bool]] = []
    reads: list[str] = []
    is_over = threading.Event()

    def record_on(user: int) -> None:
        number = 0
        while not is_over.is_set():
            event_id = f"{user}-{number}"
            answer = record(store, UserEvent(event_id, f"u{user}", "x", timestamp=number + 1))
            assert (answer.num_new, answer.num_repeated) == (1, 0)
            acknowledged.append((event_id, answer.is_delayed))
            number += 1
            time.sleep(0.002)

    def read_on() -> None:
        while not is_over.is_set():
            reads.append(failure(store))
            time.sleep(0.002)

    def after(num_more: int, *, delayed: bool) -> None:
        """Wait until so many more events are acknowledged in one way or the other."""
        begin = len(acknowledged)
        wait_until(lambda: sum(late == delayed for _, late in acknowledged[begin:]) >= num_more)

    with ThreadPoolExecutor(4) as load:
        running = [*(load.submit(record_on, user) for user in range(3)), load.submit(read_on)]
        after(30, delayed=False)
        line.delay_s = 4.0  # each way
        after(30, delayed=True)
        line.delay_s = 0.0
        after(30, delayed=False)
        server.stop()  # kill -9; its own log survives
        after(30, delayed=True)
        server.start()
        after(30, delayed=False)
        assert server.process
        server.process.send_signal(signal.SIGSTOP)
        after(30, delayed=True)
        server.process.send_signal(signal.SIGCONT)
        after(30, delayed=False)
        is_over.set()
        for thread in running:
            thread.result(WAIT_S)
    wait_until(lambda: not store.has_undelivered)
    assert "" in reads  # answered, and
    assert set(reads) - {""}  # told that it could not be
    direct = RedisEventStore(server.url, tmp_path / "direct", timeout_s=WAIT_S, max_per_user=10_000)
    for user in range(3):
        expected = [event_id for event_id, _ in acknowledged if event_id.startswith(f"{user}-")]
        assert ids(direct.recent(f"u{user}")) == expected
    for one in (store, direct):
        one.close()
    line.close()
    server.stop()


def test_what_comes_while_redis_is_slow_shares_a_round_trip(
    server: Server, tmp_path: Path, held: Any
) -> None:
    """Of a batch that Redis refuses, another's events wait for nothing."""
    client = redis.Redis(port=server.port)
    client.flushall()
    client.set("trirank:events:theirs", "somebody else's")
    store = RedisEventStore(server.url, tmp_path, timeout_s=WAIT_S, retry_s=WAIT_S)
    trip = held(store, "_sent")
    first = store.record([UserEvent("first", "u", "x")])
    assert trip.begun.wait(WAIT_S)
    batches = [[UserEvent(f"e{n}", user, "x") for user in ("u", f"u{n}")] for n in range(100)]
    futures = [store.record(events) for events in batches]
    refused = store.record([UserEvent("e", "theirs", "x"), UserEvent("e", "ours", "x")])
    trip.may_end.set()
    assert [future.result(WAIT_S) for future in (first, *futures)] == [
        Recorded(1, 0),
        *[Recorded(2, 0)] * 100,
    ]
    assert refused.result(WAIT_S) == Recorded(2, 0, is_delayed=True)
    assert trip.num_calls == 2
    assert ids(store.recent("u")) == ["first", *(f"e{n}" for n in range(100))]
    store.close()


def test_a_full_buffer(tmp_path: Path) -> None:
    store = RedisEventStore("redis://127.0.0.1:1/0", tmp_path, max_buffer_bytes=100)
    results = []
    for number in range(4):
        future = store.record([UserEvent(f"e{number}", "ann", "x" * 20)])
        results.append("refused" if future.exception(WAIT_S) else "delayed")
    assert results == ["delayed", "delayed", "refused", "refused"]
    store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.record([])


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scheme"):
        RedisEventStore("http://x", tmp_path)


def test_a_server_whose_redis_goes_and_comes_back(
    server: Server, bundle_path: Path, start_process: Any, tmp_path: Path
) -> None:
    words = [
        "--address",
        "127.0.0.1:0",
        "--json",
        "--redis_url",
        server.url,
        "--events",
        str(tmp_path / "events"),
    ]
    command = [*SERVE, str(bundle_path), *words]
    log = tmp_path / "log.txt"
    stored = redis.Redis(port=server.port)
    with log.open("w") as errors, start_process(command, errors) as (process, ready):
        assert ready, log.read_text()
        with RecommenderClient(json.loads(ready)["address"], timeout_s=WAIT_S) as client:

            def record(event_id: str) -> pb.RecordEventsResponse:
                event = pb.RecordedEvent(event_id=event_id, user_id="zoe", item_id="item-9")
                return client.record_events([event])

            def trace() -> pb.Trace:
                return client.recommend(visitor("zoe")).trace

            record("e1")  # on a starved machine by way of the disk
            wait_until(lambda: bool(stored.hexists("trirank:events:zoe", "ee1")))
            wait_until(lambda: not trace().degraded_stages)
            assert trace().visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
            server.stop()
            wait_until(lambda: list(trace().degraded_stages) == ["history"])
            assert trace().visitor_kind == pb.VISITOR_KIND_ANONYMOUS
            assert record("e2").delayed
            server.start()
            wait_until(lambda: bool(stored.hexists("trirank:events:zoe", "ee2")))
            wait_until(lambda: not trace().degraded_stages)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    stored.close()
