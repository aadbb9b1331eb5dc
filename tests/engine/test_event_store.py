from __future__ import annotations

import asyncio
import errno
import itertools
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.catalog import Catalog
from engine.event_log import EventLog
from engine.event_store import (
    LocalEventStore,
    MemoryEventStore,
    RecentEvents,
    decode,
    decode_users,
    encode,
    encode_users,
    merge,
    num_packed,
    packed,
    unpacked,
)
from engine.events import Recorded, StoreUnavailableError, UserEvent
from engine.history import EMPTY_HISTORY, History

WAIT_S = 60


def ids(events: Sequence[UserEvent]) -> list[str]:
    return [event.event_id for event in events]


def store(directory: Path, **options: Any) -> LocalEventStore:
    return LocalEventStore(directory, **({"clock": lambda: 1.0} | options))


def record(target: LocalEventStore, *events: UserEvent) -> Recorded:
    return target.record(events).result(WAIT_S)


def test_events_are_seen_at_once_and_after_a_restart(tmp_path: Path) -> None:
    first = store(tmp_path)
    early = UserEvent("e1", "ann", "emoji 🎉", "view", 500)
    late = UserEvent("e2", "ann", 'quote " and \n', "purchase", 400)
    other = UserEvent("e1", "bob", "x")  # ids are the user's own
    assert record(first, early, late, other) == Recorded(3, 0)
    assert first.recent("ann") == (late, early)
    assert first.recent("bob") == (other._replace(timestamp=1000),)
    assert first.recent("nobody") == ()
    first.close()
    again = store(tmp_path)
    assert again.recent("ann") == (late, early)
    assert again.recent("bob") == (other._replace(timestamp=1000),)
    assert again.num_events == 3
    again.close()


def test_an_event_counts_once(tmp_path: Path) -> None:
    target = store(tmp_path)
    event = UserEvent("e1", "ann", "x", timestamp=5)
    assert record(target, event, event) == Recorded(1, 1)
    assert record(target, event._replace(item_id="other")) == Recorded(0, 1)
    target.close()
    target = store(tmp_path)
    assert record(target, event) == Recorded(0, 1)
    assert target.recent("ann") == (event,)
    assert record(target) == Recorded(0, 0)
    target.close()


def test_events_without_a_time_are_the_newest_of_their_user(tmp_path: Path) -> None:
    """Whatever the clock does: here it is behind an event's time, and then jumps back."""
    now = [10.0]
    target = store(tmp_path, clock=lambda: now[0])
    record(target, UserEvent("future", "ann", "x", timestamp=20_000), UserEvent("a", "ann", "x"))
    now[0] = 5.0
    record(target, UserEvent("b", "ann", "x"), UserEvent("c", "bob", "x"))
    assert [(event.event_id, event.timestamp) for event in target.recent("ann")] == [
        ("future", 20_000),
        ("a", 20_000),
        ("b", 20_000),
    ]
    assert target.recent("bob")[0].timestamp == 5000
    target.close()


def test_what_is_not_kept() -> None:
    recent = RecentEvents(max_per_user=2, max_events=3)
    for number, user in enumerate(["ann", "ann", "bob", "ann"]):
        recent.add(UserEvent(f"e{number}", user, "x", timestamp=10 + number))
    assert ids(recent.get("ann")) == ["e1", "e3"]
    recent.add(UserEvent("old", "ann", "x", timestamp=1))  # older than all that is kept
    assert ids(recent.get("ann")) == ["e1", "e3"]
    recent.add(UserEvent("e4", "cat", "x", timestamp=1))  # bob has done nothing for longest
    assert (recent.get("bob"), ids(recent.get("ann")), recent.num_events) == ((), ["e1", "e3"], 3)
    with pytest.raises(ValueError, match="max_per_user is 4; expected 1 to max_events, 3"):
        RecentEvents(4, 3)
    with pytest.raises(ValueError, match="max_bytes is 0; expected at least 1"):
        RecentEvents(2, 3, 0)


def test_large_events_are_kept_as_far_as_they_take_no_more_bytes_than_may_be() -> None:
    events = [UserEvent("e", user, "x" * 256, "view", 1) for user in ("ann", "bob", "cat")]
    num_bytes = sum(len(event.user_id) + len(packed([event])) for event in events)
    recent = RecentEvents(10, 100, num_bytes)
    for event in events:
        assert recent.add(event)
    assert (recent.user_ids(), recent.num_bytes) == (["ann", "bob", "cat"], num_bytes)
    assert not recent.add(events[0])  # what is known takes no room
    assert recent.user_ids() == ["ann", "bob", "cat"]
    recent.add(UserEvent("f", "ann", "y", "view", 2))
    assert recent.user_ids() == ["cat", "ann"]  # bob has done nothing for longest
    assert recent.num_events == 3
    assert recent.num_bytes == sum(len(user) + len(line) for user, line in recent.users())


@pytest.mark.parametrize("is_local", [True, False])
def test_a_store_bounds_the_bytes_of_its_events(is_local: bool, tmp_path: Path) -> None:
    large = [UserEvent("e", user, "x" * 256, timestamp=1) for user in "abc"]
    options = {"max_bytes": 2 * len(packed(large[:1])) + 2}
    target = store(tmp_path, **options) if is_local else MemoryEventStore(**options)
    assert target.record(large).result(WAIT_S) == Recorded(3, 0)
    assert target.user_ids() == ["b", "c"]
    target.close()
    if is_local:
        smaller = store(tmp_path, max_bytes=options["max_bytes"] - 1)
        assert smaller.user_ids() == ["c"]  # a restart is bounded too
        smaller.close()


def test_users_are_copied_with_pauses_and_freed_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("engine.event_store.USERS_AT_ONCE", 2)
    monkeypatch.setattr("engine.event_store.time", SimpleNamespace(sleep=pauses.append))
    recent = RecentEvents(max_per_user=5, max_events=100)
    for user in "abcde":
        recent.add(UserEvent("1", user, "x", timestamp=1))
    before = dict(recent._line_of)
    users = recent.users()
    assert len(pauses) == 3
    assert min(pauses) > 0  # others get the interpreter's lock
    for user in "abcde":  # what comes later is not in the copy
        recent.add(UserEvent("2", user, "x", timestamp=2))
    nums_held = [sys.getrefcount(before[user]) for user in "ae"]
    assert [line is before[user] for user, line in itertools.islice(users, 3)] == [True] * 3
    assert [sys.getrefcount(before[user]) for user in "ae"] == [nums_held[0] - 1, nums_held[1]]
    assert [user for user, _ in users] == ["d", "e"]


def test_records_round_trip() -> None:
    events = [UserEvent("1", "ü\x00", "[]", "cart", 2**53 + 1), UserEvent("2", "u", "i")]
    assert decode(encode(events)) == events


AWKWARD_EVENTS = (
    UserEvent("1", "ü\n{", '[]"\n', "cart", 2**53 + 1),
    UserEvent("2 \u2028", "ü\n{", "i", "view", 7),
)


def test_packed_events_round_trip() -> None:
    line = packed(AWKWARD_EVENTS)
    assert b"\n" not in line
    assert (num_packed(line), unpacked("ü\n{", line)) == (2, AWKWARD_EVENTS)
    users = [("ü\n{", line), *((f"u{number}", packed(AWKWARD_EVENTS[:1])) for number in range(3))]
    (record,) = encode_users(users)
    assert list(decode_users(record)) == users
    assert list(encode_users([])) == []


def test_a_record_holds_many_users_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.event_store.USERS_RECORD_BYTES", 100)
    users = [(f"u{number}", packed([UserEvent("e", f"u{number}", "x" * 40)])) for number in range(9)]
    records = list(encode_users(users))
    assert [len(list(decode_users(record))) for record in records] == [2, 2, 2, 2, 1]
    assert [user for record in records for user in decode_users(record)] == users


def test_what_was_packed_is_loaded_as_it_was_and_cut_to_new_limits() -> None:
    recent = RecentEvents(max_per_user=5, max_events=100)
    for number in range(20):
        recent.add(UserEvent(f"e{number}", f"u{number % 4}", "x", timestamp=number + 1))
    again, smaller = RecentEvents(5, 100), RecentEvents(2, 5)
    for user, line in recent.users():
        assert line == packed(recent.get(user))
        again.load(user, line)
        again.load(user, line)  # what is known already changes nothing
        smaller.load(user, line)
    assert list(again.users()) == list(recent.users())
    assert again.num_events == 20
    assert [ids(smaller.get(f"u{user}")) for user in range(4)] == [[], [], ["e14", "e18"], ["e15", "e19"]]
    assert smaller.num_events == 4


@given(
    st.lists(
        st.tuples(st.text('a"\\[],\n ü{', max_size=6), st.text('"\\[],0', max_size=6), st.integers(1, 4)),
        max_size=12,
    ),
    st.integers(1, 4),
)
@example(drawn=[("[", ",", 1), (",", "", 1)], max_per_user=1)  # an id that ends like an event begins
@example(drawn=[("a],[", "x", 1), ("b", "],[", 2), ("c", "", 3)], max_per_user=2)
@settings(max_examples=300, deadline=None)
def test_lines_are_changed_as_lists_would_be(drawn: list[tuple[str, str, int]], max_per_user: int) -> None:
    """Whatever looks like JSON in an id: added, known by its id, cut, in order of time."""
    recent = RecentEvents(max_per_user, 1000)
    expected: list[UserEvent] = []
    for event_id, item_id, timestamp in drawn:
        event = UserEvent(event_id, "u", item_id, "view", timestamp)
        is_known = event_id in ids(expected)
        assert recent.knows(event) == is_known
        assert recent.add(event) == (not is_known)
        if not is_known:
            expected = sorted([*expected, event], key=lambda other: other.timestamp)[-max_per_user:]
        assert list(recent.get("u")) == expected
        assert recent.num_events == len(expected)
        assert list(recent.users()) == [("u", packed(expected))]
        assert recent.num_bytes == len("u") + len(packed(expected))
        now = UserEvent("now", "u", "x")
        assert recent.timed(now, 3).timestamp == max(3, expected[-1].timestamp)


def test_many_threads_share_flushes(tmp_path: Path, held: Any) -> None:
    """While one flush is under way all that arrives waits for the next one, which serves it all."""
    target = store(tmp_path)
    flush = held(target._log, "append")
    first = target.record([UserEvent("first", "u", "x")])
    assert flush.begun.wait(WAIT_S)
    futures = [target.record([UserEvent(f"e{number}", "u", "x")]) for number in range(100)]
    assert not first.done()
    assert target.recent("u") == ()  # what is not safe is not seen
    flush.may_end.set()
    assert [future.result(WAIT_S) for future in futures] == [Recorded(1, 0)] * 100
    assert flush.num_calls == 2
    assert ids(target.recent("u")) == ["first", *(f"e{number}" for number in range(100))]
    target.close()


def test_from_asyncio_and_a_cancelled_call(tmp_path: Path) -> None:
    target = store(tmp_path)

    async def ask() -> list[Recorded]:
        futures = [target.record([UserEvent(f"e{number}", "u", "x")]) for number in range(5)]
        gone = asyncio.wrap_future(target.record([UserEvent("gone", "u", "x")]))
        gone.cancel()
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    assert asyncio.run(ask()) == [Recorded(1, 0)] * 5
    assert record(target, UserEvent("after", "u", "x")) == Recorded(1, 0)
    target.close()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = store(tmp_path, max_waiting=1)
    event = UserEvent("e", "u", "x")
    begun, may_end = threading.Event(), threading.Event()
    append = target._log.append

    def fail(payloads: Sequence[bytes]) -> None:
        begun.set()
        assert may_end.wait(WAIT_S)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target._log, "append", fail)
    failing = target.record([event])
    assert begun.wait(WAIT_S)
    waiting = target.record([event])
    with pytest.raises(StoreUnavailableError, match="too many events wait"):
        target.record([event])
    may_end.set()
    for future in (failing, waiting):
        with pytest.raises(StoreUnavailableError, match="No space left"):
            future.result(WAIT_S)
    assert target.recent("u") == ()
    monkeypatch.setattr(target._log, "append", append)
    assert record(target, event) == Recorded(1, 0)  # the disk has space again
    target.close()
    target.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        target.record([event])


def test_compaction_keeps_what_is_kept_and_forgets_the_rest(tmp_path: Path) -> None:
    target = store(tmp_path, max_per_user=3, compact_bytes=2000)
    for number in range(120):
        record(target, UserEvent(f"e{number}", f"u{number % 4}", "x" * 20, timestamp=number + 1))
    target.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5000
    assert list(tmp_path.glob("*.snapshot"))
    again = store(tmp_path, max_per_user=3)
    assert ids(again.recent("u3")) == ["e111", "e115", "e119"]
    assert ids(again.recent("u2")) == ["e110", "e114", "e118"]
    assert again.num_events == 12
    again.close()


def test_a_damaged_snapshot_costs_the_users_of_a_record_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.event_store.USERS_RECORD_BYTES", 100)
    target = store(tmp_path, compact_bytes=1)
    record(target, *(UserEvent(f"e{number}", f"u{number}", "x" * 40) for number in range(9)))
    target.close()
    (snapshot,) = tmp_path.glob("*.snapshot")
    content = bytearray(snapshot.read_bytes())
    content[content.index(b'"u4"') + 1] ^= 1
    snapshot.write_bytes(content)
    again = store(tmp_path)
    assert [number for number in range(9) if not again.recent(f"u{number}")] == [4, 5]
    assert again.num_lost_bytes > 0
    again.close()


def test_a_snapshot_that_does_not_fit_is_left_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its draft gives the space back, events are recorded meanwhile, and later it is tried again."""
    now, num_tried = [0.0], [0]
    target = store(tmp_path, compact_bytes=1, monotonic=lambda: now[0])
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # segments get fdatasync
            num_tried[0] += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    def compacted() -> None:
        while not target._compaction:
            time.sleep(0.001)
        target._compaction.join(WAIT_S)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        record(target, UserEvent("e0", "u", "x"))
        compacted()
        for number in range(1, 5):
            record(target, UserEvent(f"e{number}", "u", "x"))
            now[0] += 14
        assert num_tried[0] == 1
        assert not list(tmp_path.glob("*.tmp"))
        assert not list(tmp_path.glob("*.snapshot"))
    now[0] = 61
    record(target, UserEvent("e5", "u", "x"))
    target.close()
    assert list(tmp_path.glob("*.snapshot"))
    again = store(tmp_path)
    assert ids(again.recent("u")) == [f"e{number}" for number in range(6)]
    again.close()


def test_a_compaction_that_cannot_begin_does_not_end_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_descriptors(log: EventLog) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    target = store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "num_bytes", property(no_descriptors))
        for number in range(3):
            assert record(target, UserEvent(f"e{number}", "u", "x")) == Recorded(1, 0)
    assert "Too many open files" in caplog.text
    target.close()


def test_a_descriptor_that_fails_to_close_is_not_written_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    log.append([b"one"])
    with monkeypatch.context() as patch:

        def closed_and_fails(descriptor: int, close: Callable[[int], None] = os.close) -> None:
            close(descriptor)
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "close", closed_and_fails)
        with pytest.raises(OSError, match="Input/output"):
            log.rotate()
    with (tmp_path / "other").open("wb", buffering=0) as other:  # takes the number of the descriptor
        log.append([b"two"])
        other.write(b"other")
    assert (tmp_path / "other").read_bytes() == b"other"
    log.close()
    again = EventLog(tmp_path)
    assert list(again.replay()) == [b"one", b"two"]
    again.close()


class AgainstAList(RuleBasedStateMachine):
    """Whatever is recorded, repeated, compacted and reopened: the state is what a plain list says."""

    MAX_PER_USER, MAX_EVENTS = 4, 9

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.accepted: list[UserEvent] = []
        self.now = 1
        self.open()

    def open(self) -> None:
        self.store = store(
            Path(self.directory.name),
            max_per_user=self.MAX_PER_USER,
            max_events=self.MAX_EVENTS,
            compact_bytes=300,
            clock=lambda: self.now / 1000,
        )

    def expected(self) -> dict[str, list[UserEvent]]:
        """Add the accepted events one by one, by the words of RecentEvents' docstring."""
        kept: dict[str, list[UserEvent]] = {}
        for event in self.accepted:
            events = [*kept.pop(event.user_id, []), event]
            kept[event.user_id] = sorted(events, key=lambda e: e.timestamp)[-self.MAX_PER_USER :]
            while sum(map(len, kept.values())) > self.MAX_EVENTS:
                kept.pop(next(iter(kept)))
        return kept

    @rule(
        batch=st.lists(
            st.tuples(st.sampled_from("abcd"), st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=4
        )
    )
    def send(self, batch: list[tuple[str, int, int]]) -> None:
        events = [UserEvent(f"e{number}", user, "item", "view", time) for user, number, time in batch]
        known = {(user, event.event_id) for user, kept in self.expected().items() for event in kept}
        new = []
        newest = {user: kept[-1].timestamp for user, kept in self.expected().items()}
        for event in events:
            if (event.user_id, event.event_id) not in known:
                known.add((event.user_id, event.event_id))
                if not event.timestamp:
                    event = event._replace(timestamp=max(self.now, newest.get(event.user_id, 0)))
                newest[event.user_id] = max(event.timestamp, newest.get(event.user_id, 0))
                new.append(event)
        assert self.store.record(events).result(WAIT_S) == Recorded(len(new), len(events) - len(new))
        self.accepted += new

    @rule(step=st.integers(-3, 5))
    def clock(self, step: int) -> None:
        self.now = max(1, self.now + step)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule()
    def crash(self) -> None:
        """A copy of the directory, torn, as another process would find it after kill -9."""
        if self.store._compaction:
            self.store._compaction.join()
        self.store.close()
        segments = sorted(Path(self.directory.name).glob("*.log"))
        if segments:
            with segments[-1].open("ab") as segment:
                segment.write(b"TRE\x01\xff\x00\x00\x00torn")
        self.open()

    @invariant()
    def same(self) -> None:
        if hasattr(self, "store"):
            expected = self.expected()
            for user in "abcd":
                assert list(self.store.recent(user)) == expected.get(user, [])
            assert self.store.num_events == sum(map(len, expected.values()))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)


# Records one event after another and prints each id once it is acknowledged.
RECORDER = """
import sys
from engine.event_store import LocalEventStore
from engine.events import UserEvent
store = LocalEventStore(sys.argv[1], compact_bytes=3000, max_per_user=20)
for number in range(int(sys.argv[2]), 10**9):
    store.record([UserEvent(f"e{number}", f"u{number % 10}", "x")]).result()
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Killed in the midst of writing and compacting, three times on one directory."""
    last = -1
    for _ in range(3):
        begin = last + 1
        command = [sys.executable, "-c", RECORDER, str(tmp_path), str(begin)]
        root = Path(__file__).parents[2]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert process.stdout is not None
        for line in process.stdout:
            last = int(line)
            if last >= begin + 100:
                process.kill()
        process.wait(timeout=WAIT_S)
        target = LocalEventStore(tmp_path, max_per_user=20)
        recent = {user: ids(target.recent(f"u{user}")) for user in range(10)}
        target.close()
        for number in range(max(0, last - 150), last + 1):
            assert f"e{number}" in recent[number % 10], (number, last)
        for user, found in recent.items():
            numbers = [int(name[1:]) for name in found]
            assert numbers == sorted(set(numbers)), user
            assert max(numbers) <= last + 1  # one at most was on its way
        last = max(int(name[1:]) for found in recent.values() for name in found)


def catalog() -> Catalog:
    return Catalog(pl.DataFrame({"item_id": ["A", "B", "C"]}, schema_overrides={"item_id": pl.String()}))


def history(*events: tuple[int, int, int]) -> History:
    items, types, times = zip(*events, strict=True)
    return History(np.array(items, np.int32), np.array(types, np.uint8), np.array(times, np.int64))


def events_of(merged: History) -> list[tuple[int, int, int]]:
    columns = (merged.items, merged.event_types, merged.timestamps)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_merging_puts_events_in_order_of_time() -> None:
    stored = history((1, 1, 10), (2, 1, 20), (3, 6, 30))
    recent = [
        UserEvent("1", "u", "C", "view", 15),
        UserEvent("2", "u", "A", "cart", 20),  # shares a time: behind what is stored
        UserEvent("3", "u", "gone", "view", 21),  # not in the catalog
        UserEvent("4", "u", "B", "view", 0),  # just now
        UserEvent("5", "u", "A", "view", 99),
    ]
    merged, num_unknown = merge(stored, recent, catalog())
    assert num_unknown == 1
    assert events_of(merged) == [
        (1, 1, 10),
        (3, 1, 15),
        (2, 1, 20),
        (1, 4, 20),
        (3, 6, 30),
        (1, 1, 99),
        (2, 1, 0),
    ]


def test_merging_knows_what_the_bundle_has_learned_since() -> None:
    """The same item, type and time is the same event; a repeat at another time is not."""
    stored = history((1, 1, 10), (2, 6, 20))
    recent = [
        UserEvent("1", "u", "A", "view", 10),
        UserEvent("2", "u", "A", "cart", 10),
        UserEvent("3", "u", "B", "purchase", 20),
        UserEvent("4", "u", "B", "purchase", 21),
    ]
    assert events_of(merge(stored, recent, catalog())[0]) == [(1, 1, 10), (1, 4, 10), (2, 6, 20), (2, 6, 21)]


def test_merging_nothing() -> None:
    stored = history((1, 1, 10))
    assert merge(stored, [], catalog()) == (stored, 0)
    merged, num_unknown = merge(EMPTY_HISTORY, [UserEvent("1", "u", "A")], catalog())
    assert (events_of(merged), num_unknown) == ([(1, 0, 0)], 0)
    assert (merged.items.dtype, merged.event_types.dtype, merged.timestamps.dtype) == (
        np.int32,
        np.uint8,
        np.int64,
    )
    merged, num_unknown = merge(EMPTY_HISTORY, [UserEvent("1", "u", "gone")], catalog())
    assert (len(merged), num_unknown) == (0, 1)


@pytest.mark.parametrize("seed", range(20))
def test_merging_is_what_a_loop_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.integers((1, 1, 1), (4, 3, 6), (5, 3)).tolist()
    stored = history(*sorted(map(tuple, drawn), key=lambda event: event[2]))
    names = ["view", "click"]
    recent = [
        UserEvent(str(number), "u", "?ABC"[item], names[kind - 1], int(time))
        for number, (item, kind, time) in enumerate(rng.integers((0, 1, 0), (4, 3, 6), (6, 3)).tolist())
    ]
    expected = events_of(stored)
    there = set(expected)
    just_now = []
    for event in recent:
        row, code = "?ABC".index(event.item_id), names.index(event.event_type) + 1
        if not row or (row, code, event.timestamp) in there:
            continue
        if not event.timestamp:
            just_now.append((row, code, 0))
            continue
        place = sum(time <= event.timestamp for _, _, time in expected)
        expected.insert(place, (row, code, event.timestamp))
    merged, num_unknown = merge(stored, recent, catalog())
    assert events_of(merged) == [*expected, *just_now]
    assert num_unknown == sum(event.item_id == "?" for event in recent)


def test_events_in_memory_alone() -> None:
    target = MemoryEventStore(max_per_user=2, clock=lambda: 1.0)
    late, early = UserEvent("e1", "ann", "x", "view", 2000), UserEvent("e2", "ann", "y", "view", 500)
    assert target.record([late, early, late]).result(WAIT_S) == Recorded(2, 1)
    assert target.recent("ann") == (early, late)
    assert target.recent("bob") == ()
    now = UserEvent("e3", "ann", "z")  # not before her newest
    assert target.record([now]).result(WAIT_S) == Recorded(1, 0)
    assert target.recent("ann") == (late, now._replace(timestamp=2000))
    target.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        target.record([now])
