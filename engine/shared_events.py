"""One event store for several processes of one machine: its owner answers the others over a Unix socket.

A message is its length (little-endian uint32) and JSON. One connection has one question under way.

Most users have done nothing since the bundle was made, and to ask about them would cost a request a quarter
of a millisecond. So the owner marks those who have in a file beside the socket, which all map into memory: a
Bloom filter of one hash (Bloom, CACM 1970). Who is not marked has no events; who is may have none.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import mmap
import socket
import struct
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from engine.events import EventStore, Recorded, StoreBusyError, StoreUnavailableError, UserEvent
from engine.group_commit import GroupCommit, Outcome
from engine.telemetry import LimitedLog
from engine.workplaces import waiting

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

LENGTH = struct.Struct("<I")
ACCEPT_AGAIN_S = 0.1
SHORTEST_WAIT_S = 0.001
EVENTS_AT_ONCE = 5000  # of a question, about
MARKS_BYTES = 1 << 20  # with a million users with events, one in nine without any is asked about in vain


class _Marks:
    """Which users may have events: a bit for each hash, in a file that processes share."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        """Map the file at a path, made where `create`; FileNotFoundError where it is not there."""
        with open(path, "x+b" if create else "r+b") as file:
            if create:
                # Written, not only made long: where the disk is full this fails, and no mark does later.
                file.write(bytes(MARKS_BYTES))
                file.flush()
            self._bits = mmap.mmap(file.fileno(), MARKS_BYTES)

    def add(self, user_id: str) -> None:
        """Mark a user; for one thread at a time."""
        byte, bit = _byte_and_bit(user_id)
        self._bits[byte] |= 1 << bit

    def __contains__(self, user_id: str) -> bool:
        byte, bit = _byte_and_bit(user_id)
        return bool(self._bits[byte] >> bit & 1)


def _byte_and_bit(user_id: str) -> tuple[int, int]:
    return divmod(zlib.crc32(user_id.encode()) % (8 * MARKS_BYTES), 8)


def _marks_path(path: str | Path) -> str:
    return f"{path}.users"


class EventServer:
    """Lets other processes use a store, each connection in a thread of its own."""

    def __init__(self, store: EventStore, path: str | Path) -> None:
        """Begin to answer at a path that does not exist yet; whoever may open it may ask.

        From now on nobody else may record in the store, unless it says itself that others do (user_ids).
        """
        self._store = store
        self._marks: _Marks | None = None
        self._marking = threading.Lock()
        users = store.user_ids()
        if users is not None:
            self._marks = _Marks(_marks_path(path), create=True)
            for user_id in users:
                self._marks.add(user_id)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._is_closed = threading.Event()
        threading.Thread(target=self._accept, name="event-server", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those there are end with their processes."""
        self._is_closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                connection, _ = self._listener.accept()
                thread = threading.Thread(
                    target=self._answer, args=(connection,), name="event-server", daemon=True
                )
                thread.start()
            except (OSError, RuntimeError):  # closed; or no descriptor or thread is left, for now
                if not self._is_closed.wait(ACCEPT_AGAIN_S):
                    seldom.warning("a connection to the event store could not be taken; trying again")

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while (question := _receive(connection)) is not None:
                try:
                    answer = self._answer_to(question)
                except StoreUnavailableError as error:
                    answer = {"unavailable": str(error)}
                except Exception:
                    logger.exception("a question to the event store failed")
                    answer = {"unavailable": "the event store failed; the log says why"}
                _send(connection, answer)

    def _answer_to(self, question: dict[str, Any]) -> dict[str, Any]:
        if "recent" in question:
            return {"events": self._store.recent(question["recent"])}
        batches = [[UserEvent(*fields) for fields in events] for events in question["record"]]
        if self._marks is not None:  # before they can be seen
            with self._marking:
                for event in itertools.chain.from_iterable(batches):
                    self._marks.add(event.user_id)
        futures = [self._future(events) for events in batches]  # which share a flush
        return {"recorded": [_outcome(future) for future in futures]}

    def _future(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        try:
            return self._store.record(events)
        except StoreUnavailableError as error:
            refused: Future[Recorded] = Future()
            refused.set_exception(error)
            return refused


def _outcome(future: Future[Recorded]) -> Recorded | dict[str, str]:
    try:
        return future.result()
    except StoreUnavailableError as error:
        return {"busy" if isinstance(error, StoreBusyError) else "unavailable": str(error)}


def _received(found: Any) -> Outcome:
    if not isinstance(found, dict):
        return Recorded(*found)
    ((kind, text),) = found.items()
    return StoreBusyError(text) if kind == "busy" else StoreUnavailableError(text)


class SharedEventStore:
    """An EventStore that asks an EventServer."""

    def __init__(self, path: str | Path, *, timeout_s: float = 5.0, waits: bool = False) -> None:
        """Begin.

        Args:
            path: of the server. One that is not there is an error of each call, not of this one.
            timeout_s: how long an answer may take.
            waits: of the server's store.
        """
        self.waits = waits
        self._path = str(path)
        self._marks: _Marks | None = None
        with contextlib.suppress(FileNotFoundError):
            self._marks = _Marks(_marks_path(path))
        self._timeout_s = timeout_s
        self._of_thread = threading.local()
        self._group = GroupCommit("shared-events", self._commit, max_together=EVENTS_AT_ONCE)

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        """See EventStore."""
        return self._group.submit(list(events))

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        """See EventStore."""
        if self._marks is not None and user_id not in self._marks:
            return ()
        with waiting():
            found = self._ask({"recent": user_id}, timeout_s)["events"]
        return [UserEvent(*fields) for fields in found]

    def user_ids(self) -> None:
        """See EventStore."""

    def close(self) -> None:
        """See EventStore."""
        self._group.close()

    def _commit(self, batches: Sequence[Sequence[UserEvent]]) -> list[Outcome]:
        return [_received(found) for found in self._ask({"record": batches})["recorded"]]

    def _ask(self, question: dict[str, Any], timeout_s: float = math.inf) -> dict[str, Any]:
        connection: socket.socket | None = getattr(self._of_thread, "connection", None)
        is_new = connection is None
        try:
            if connection is None:
                connection = socket.socket(socket.AF_UNIX)
            # One that does not wait at all would be another kind of socket.
            connection.settimeout(max(SHORTEST_WAIT_S, min(self._timeout_s, timeout_s)))
            if is_new:
                connection.connect(self._path)
                self._of_thread.connection = connection
            _send(connection, question)
            answer = _receive(connection)
            if answer is None:
                raise ConnectionResetError("its process has ended")
        except OSError as error:
            # What comes late must not be taken for the answer to the next question.
            self._of_thread.connection = None
            if connection is not None:
                connection.close()
            raise StoreUnavailableError(f"the event store does not answer: {error}") from error
        if "unavailable" in answer:
            raise StoreUnavailableError(answer["unavailable"])
        return answer


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    payload = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()
    connection.sendall(LENGTH.pack(len(payload)) + payload)


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None where the other side has ended."""
    header = _exactly(connection, LENGTH.size)
    payload = _exactly(connection, LENGTH.unpack(header)[0]) if header else None
    return None if payload is None else dict(json.loads(payload))


def _exactly(connection: socket.socket, num_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(num_bytes - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
