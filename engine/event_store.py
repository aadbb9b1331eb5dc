"""What users did since the bundle was made: recorded once, kept safe, and merged into their histories.

`LocalEventStore` is for one process with a disk of its own; engine/redis_events.py is for several, and
`MemoryEventStore` for where a restart may forget. What a store is stands in engine/events.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import threading
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.catalog import Catalog
from engine.event_log import EventLog
from engine.events import Recorded, StoreUnavailableError, UserEvent
from engine.group_commit import MAX_WAITING, GroupCommit
from engine.history import EVENT_CODE, History
from engine.memory import PAUSE_S
from engine.telemetry import LimitedLog

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

JUST_NOW = np.iinfo(np.int64).max  # where an event without a time stands: after all others
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
USERS_MARK = b"{"  # a record of users begins with it; one of events does not
USERS_RECORD_BYTES = 1 << 16
COMPACT_AGAIN_S = 60.0  # after a compaction that failed
USERS_AT_ONCE = 2000  # are copied in 0.6 ms; a million in a second, with the pauses
MAX_BYTES = 512 << 20  # of all users' events and ids


class RecentEvents:
    """The newest events of each user, in memory. One thread may add while others read.

    A user has at most `max_per_user` events; all users have at most `max_events`, which with the users' ids
    take at most `max_bytes`. Past that the oldest of the user go, and the users who have done nothing for
    longest. An event id is known as long as its event stays.

    A user's events are one line of JSON (see `packed`), and are added to it as text. That takes a seventh of
    the memory that objects would, leaves nothing for the garbage collector to look at, and after a restart
    there is nothing to do but to find the ends of lines. Who reads pays: 1 us for each event of the one user.
    """

    def __init__(self, max_per_user: int, max_events: int, max_bytes: int = MAX_BYTES) -> None:
        if not 1 <= max_per_user <= max_events:
            raise ValueError(f"max_per_user is {max_per_user}; expected 1 to max_events, {max_events}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; expected at least 1")
        self.num_events = 0
        self.num_bytes = 0  # of the lines, and a byte for each character of the users' ids
        self._max_per_user = max_per_user
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._line_of: OrderedDict[str, bytes] = OrderedDict()  # longest idle first

    def user_ids(self) -> list[str]:
        """Return who has events."""
        return list(self._line_of)

    def users(self) -> Iterator[tuple[str, bytes]]:
        """Return each user with what `packed` makes of the events, as they are now; for the thread that adds.

        Loading them in this order makes an equal object. They are copied in pieces, with a pause after each
        in which others get the interpreter's lock, and a piece is freed once it has been read. The pieces are
        arrays, as the garbage collector looks into lists.
        """
        pieces: deque[tuple[NDArray[np.object_], NDArray[np.object_]]] = deque()
        ids, lines = iter(self._line_of), iter(self._line_of.values())
        for _ in range(0, len(self._line_of), USERS_AT_ONCE):
            pieces.append((_next_of(ids), _next_of(lines)))
            time.sleep(PAUSE_S)
        return _emptied(pieces)

    def get(self, user_id: str) -> tuple[UserEvent, ...]:
        """Return the user's events by time; those of one time as they were added."""
        line = self._line_of.get(user_id)
        return () if line is None else unpacked(user_id, line)

    def knows(self, event: UserEvent) -> bool:
        """Return whether the user has an event of this id."""
        return _beginning(event) in self._line_of.get(event.user_id, b"")

    def timed(self, event: UserEvent, now_ms: int) -> UserEvent:
        """Return the event with a time: where it has none, now, yet not before the user's newest event."""
        if event.timestamp:
            return event
        line = self._line_of.get(event.user_id)
        return event._replace(timestamp=now_ms if line is None else max(now_ms, _newest_time(line)))

    def add(self, event: UserEvent) -> bool:
        """Add an event that has a time; return False where its id is known."""
        line = self._line_of.get(event.user_id)
        if line is None:
            self._keep(event.user_id, packed([event]), 1)
            return True
        if _beginning(event) in line:
            return False
        num_before = num_packed(line)
        change = _with_newest if event.timestamp >= _newest_time(line) else _with_older
        line = change(line, event, self._max_per_user)
        self._keep(event.user_id, line, num_packed(line) - num_before)
        return True

    def load(self, user_id: str, line: bytes) -> None:
        """Add what `users` has returned, as the newest user."""
        num_events = num_packed(line)
        if num_events > self._max_per_user or user_id in self._line_of:
            for event in unpacked(user_id, line):
                self.add(event)
        else:
            self._keep(user_id, line, num_events)

    def _keep(self, user_id: str, line: bytes, num_more: int) -> None:
        before = self._line_of.get(user_id)
        self._line_of[user_id] = line
        self._line_of.move_to_end(user_id)
        self.num_events += num_more
        self.num_bytes += len(line) - (-len(user_id) if before is None else len(before))
        while self.num_events > self._max_events or self.num_bytes > self._max_bytes:
            idle, line = self._line_of.popitem(last=False)
            self.num_events -= num_packed(line)
            self.num_bytes -= len(idle) + len(line)


def _next_of(things: Iterator[object]) -> NDArray[np.object_]:
    return np.fromiter(itertools.islice(things, USERS_AT_ONCE), np.object_)


def _emptied(
    pieces: deque[tuple[NDArray[np.object_], NDArray[np.object_]]],
) -> Iterator[tuple[str, bytes]]:
    while pieces:
        ids, lines = pieces.popleft()
        yield from zip(ids, lines, strict=True)


class MemoryEventStore:
    """Events in this process's memory alone: the end of the process is the end of them."""

    waits = False

    def __init__(
        self,
        *,
        max_per_user: int = 200,
        max_events: int = 1_000_000,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin with nothing; the arguments are those of LocalEventStore."""
        self._recent = RecentEvents(max_per_user, max_events, max_bytes)
        self._clock = clock
        self._group = GroupCommit("events", self._add)  # a back-fill takes long: not on the event loop

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        """See EventStore."""
        return self._group.submit(list(events))

    def _add(self, batches: Sequence[Sequence[UserEvent]]) -> list[Recorded]:
        now_ms = round(self._clock() * 1000)
        nums_new = [
            sum(self._recent.add(self._recent.timed(event, now_ms)) for event in events) for events in batches
        ]
        return [
            Recorded(num_new, len(events) - num_new)
            for num_new, events in zip(nums_new, batches, strict=True)
        ]

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        """See EventStore; never raises, never waits."""
        return self._recent.get(user_id)

    def user_ids(self) -> Iterable[str]:
        """See EventStore."""
        return self._recent.user_ids()

    def close(self) -> None:
        """See EventStore."""
        self._group.close()


class LocalEventStore:
    """Events in memory, and in a log on disk that they are read back from at the start.

    Batches that arrive while the disk is flushed share the next flush (engine/group_commit.py).
    """

    waits = False

    def __init__(
        self,
        directory: str | Path,
        *,
        max_per_user: int = 200,
        max_events: int = 1_000_000,
        max_bytes: int = MAX_BYTES,
        max_waiting: int = MAX_WAITING,
        compact_bytes: int = 16 << 20,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the store and read back what it had acknowledged.

        Args:
            directory: of the log; made where it is missing.
            max_per_user: events of one user that are kept.
            max_events: events of all users that are kept.
            max_bytes: that those events and their users' ids may take, as text; an event has up to 3 KB.
            max_waiting: events that may wait for the disk; more are refused at once.
            compact_bytes: the log is written anew, without what is not kept, when it has grown by this much:
                what a restart has to read event by event.
            clock: seconds since 1970.
            monotonic: seconds, for how long to wait after a failure.

        Raises:
            LogInUseError: another process has it open.
            OSError: the directory cannot be read and written.
        """
        self._recent = RecentEvents(max_per_user, max_events, max_bytes)
        self._log = EventLog(directory)
        self._clock = clock
        self._monotonic = monotonic
        self._compact_bytes = compact_bytes
        self._compacts_again_at = float("-inf")
        for payload in self._log.replay():
            if payload.startswith(USERS_MARK):
                for user_id, line in decode_users(payload):
                    self._recent.load(user_id, line)
            else:
                for event in decode(payload):
                    self._recent.add(event)
        self._compaction: threading.Thread | None = None
        self._group = GroupCommit(
            "event-log", self._commit, max_waiting=max_waiting, afterwards=self._compact_where_due
        )

    @property
    def num_events(self) -> int:
        """Events that are kept."""
        return self._recent.num_events

    @property
    def num_lost_bytes(self) -> int:
        """Bytes of the log that were no whole record when it was read back."""
        return self._log.num_lost_bytes

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        """See EventStore."""
        return self._group.submit(events)

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        """See EventStore; never raises, never waits."""
        return self._recent.get(user_id)

    def user_ids(self) -> Iterable[str]:
        """See EventStore; for before the first event is recorded."""
        return self._recent.user_ids()

    def close(self) -> None:
        """See EventStore."""
        self._group.close()
        if self._compaction:
            self._compaction.join()
        self._log.close()

    def _commit(self, batches: Sequence[Sequence[UserEvent]]) -> list[Recorded]:
        """Make batches safe with one flush, then let them be seen."""
        now_ms = round(self._clock() * 1000)
        # A time is given before the event is added, so that what is read back is what was seen.
        latest: dict[str, int] = {}
        known: set[tuple[str, str]] = set()
        fresh_batches: list[list[UserEvent]] = []
        for events in batches:
            fresh: list[UserEvent] = []
            for event in events:
                key = (event.user_id, event.event_id)
                if key in known or self._recent.knows(event):
                    continue
                known.add(key)
                timed = self._recent.timed(event, max(now_ms, latest.get(event.user_id, 0)))
                latest[event.user_id] = max(timed.timestamp, latest.get(event.user_id, 0))
                fresh.append(timed)
            fresh_batches.append(fresh)
        payloads = [encode(fresh) for fresh in fresh_batches if fresh]
        if payloads:
            try:
                self._log.append(payloads)
            except OSError as error:
                raise StoreUnavailableError(f"the event log cannot be written: {error}") from error
        for event in itertools.chain.from_iterable(fresh_batches):
            self._recent.add(event)
        return [
            Recorded(len(fresh), len(events) - len(fresh))
            for events, fresh in zip(batches, fresh_batches, strict=True)
        ]

    def _compact_where_due(self) -> None:
        if self._compaction and self._compaction.is_alive():
            return
        try:
            if self._log.num_bytes < self._compact_bytes or self._monotonic() < self._compacts_again_at:
                return
            compaction = threading.Thread(
                target=self._compact,
                args=(self._log.rotate(), self._recent.users()),
                name="event-log-compaction",
                daemon=True,
            )
            compaction.start()
        except Exception:  # noqa: BLE001  # such as no descriptor left
            self._compact_later()
        else:
            self._compaction = compaction  # started: close() and others may join it at any time

    def _compact(self, number: int, users: Iterable[tuple[str, bytes]]) -> None:
        try:
            self._log.replace_before(number, encode_users(users))
        except OSError:
            self._compact_later()

    def _compact_later(self) -> None:
        """Log what went wrong, and wait: on a full disk nothing else would be done."""
        self._compacts_again_at = self._monotonic() + COMPACT_AGAIN_S
        logger.exception("the event log could not be compacted; it goes on growing")


def encode(events: Sequence[UserEvent]) -> bytes:
    """Return events as one record of a log: JSON, so that a person can read it."""
    return JSON.encode(events).encode()


def decode(payload: bytes) -> list[UserEvent]:
    """Return the events of a record."""
    return [UserEvent(*fields) for fields in json.loads(payload)]


def events_of(payload: bytes) -> list[UserEvent]:
    """Return the events of a record of either kind, that of `encode` or that of `encode_users`."""
    if not payload.startswith(USERS_MARK):
        return decode(payload)
    return [event for user_id, line in decode_users(payload) for event in unpacked(user_id, line)]


def packed(events: Sequence[UserEvent]) -> bytes:
    """Return the events of one user, at least one, as a line of text: how many they are, and JSON.

    2 [["event id","item id","view",1000],["event id","item id","cart",2000]]

    Within a string `[` is written \\u005b, and JSON has no quotation mark without a backslash before it. So
    `["` begins an event, wherever it stands, and the functions below need not read the line to change it.
    """
    return b"%d [%b]" % (len(events), b",".join(map(_text, events)))


def _text(event: UserEvent) -> bytes:
    item_id, event_type = _quoted(event.item_id), _quoted(event.event_type)
    return b"%b%b,%b,%d]" % (_beginning(event), item_id, event_type, event.timestamp)


def _beginning(event: UserEvent) -> bytes:
    """Return what stands in a line that has an event of this id, and in no other."""
    return b"[%b," % _quoted(event.event_id)


def _quoted(text: str) -> bytes:
    return JSON.encode(text).replace("[", "\\u005b").encode()


def _newest_time(line: bytes) -> int:
    return int(line[line.rindex(b",") + 1 : -2])


def _with_newest(line: bytes, event: UserEvent, max_events: int) -> bytes:
    """Return a line with one more event at its end; without its first one where there would be too many."""
    num_events = num_packed(line)
    if num_events >= max_events:
        if max_events == 1:
            return packed([event])
        begin = line.index(b'],["') + 2
    else:
        num_events += 1
        begin = line.index(b" ") + 2
    return b"%d [%b,%b]" % (num_events, line[begin:-1], _text(event))


def _with_older(line: bytes, event: UserEvent, max_events: int) -> bytes:
    """Return a line with one more event at its place in time, without its first ones past max_events."""
    begin = b',["'
    texts = line[line.index(b" ") + 4 : -1].split(begin)
    place = bisect_right(texts, event.timestamp, key=lambda text: int(text[text.rindex(b",") + 1 : -1]))
    texts.insert(place, _text(event)[2:])
    del texts[:-max_events]
    return b'%d [["%b]' % (len(texts), begin.join(texts))


@functools.lru_cache(maxsize=1024)  # one who has come back asks more than once
def unpacked(user_id: str, line: bytes) -> tuple[UserEvent, ...]:
    """Return the events of a line of `packed`."""
    return tuple(
        UserEvent(event_id, user_id, item_id, event_type, timestamp)
        for event_id, item_id, event_type, timestamp in json.loads(line[line.index(b" ") :])
    )


def num_packed(line: bytes) -> int:
    """Return how many events a line of `packed` holds."""
    return int(line[: line.index(b" ")])


def encode_users(users: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield users and their lines as records: a line that names the users, then theirs.

    Many users share a record, or reading a million of them would take seconds; not too many, because a
    damaged record is lost as a whole.
    """
    ids: list[str] = []
    lines: list[bytes] = []
    num_bytes = 0
    for user_id, line in users:
        ids.append(user_id)
        lines.append(line)
        num_bytes += len(line)
        if num_bytes >= USERS_RECORD_BYTES:
            yield _users_record(ids, lines)
            ids, lines, num_bytes = [], [], 0
    if ids:
        yield _users_record(ids, lines)


def _users_record(ids: list[str], lines: list[bytes]) -> bytes:
    names = JSON.encode({"users": ids}).encode()
    return b"\n".join([names, *lines])


def decode_users(payload: bytes) -> Iterator[tuple[str, bytes]]:
    """Return the users of a record of `encode_users`, and their lines."""
    names, *lines = payload.split(b"\n")
    return zip(json.loads(names)["users"], lines, strict=True)


class _Event(Protocol):
    @property
    def item_id(self) -> str: ...

    @property
    def event_type(self) -> str: ...

    @property
    def timestamp(self) -> int: ...


def merge(history: History, events: Sequence[_Event], catalog: Catalog) -> tuple[History, int]:
    """Return a history with more events at their places in time, and how many of unknown items it leaves out.

    Events that share a time stay as they are, those of the history first; events without a time come last, in
    the order given. An event whose item, type and time stand in the history already is the same event: it was
    recorded first and is in the training data now, or the caller sends what was recorded.
    """
    known = [event for event in events if event.event_type in EVENT_CODE]
    if len(known) < len(events):  # a later version recorded them; requests were checked
        seldom.warning("recorded events of types that this version does not know are left out")
        events = known
    if not events:
        return history, 0
    rows = catalog.rows(event.item_id for event in events)
    types = np.fromiter((EVENT_CODE[event.event_type] for event in events), np.uint8)
    times = np.fromiter((event.timestamp or JUST_NOW for event in events), np.int64)
    added = (rows > 0) & ~_repeats(history, rows, types, times)

    all_times = np.concatenate([history.timestamps, times[added]])
    order = np.argsort(all_times, kind="stable")
    merged = History(
        items=np.concatenate([history.items, rows[added]])[order],
        event_types=np.concatenate([history.event_types, types[added]])[order],
        timestamps=np.where(all_times == JUST_NOW, 0, all_times)[order],
    )
    return merged, int(np.count_nonzero(rows == 0))


def _repeats(
    history: History, rows: NDArray[np.int32], types: NDArray[np.uint8], times: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which events stand in the history: [N] bool. Only those of a shared time are compared."""
    repeats = np.isin(times, history.timestamps)
    if repeats.any():
        shared = np.isin(history.timestamps, times)
        columns = (history.items[shared], history.event_types[shared], history.timestamps[shared])
        there = set(zip(*(column.tolist() for column in columns), strict=True))
        events = zip(rows.tolist(), types.tolist(), times.tolist(), strict=True)
        repeats = np.fromiter((event in there for event in events), np.bool_)
    return repeats
