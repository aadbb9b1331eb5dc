"""An append-only log on disk: a record that `append` has returned from survives kill -9 and loss of power.

    events/
      lock                 held by the one process that has the log open
      00000007.snapshot    what the segments before 7 came to, written anew when they had grown
      00000007.log         segments of frames, in the order of their numbers
      00000008.log

A frame is MAGIC, the payload's length and a CRC-32 (little-endian uint32 each), then the payload. Reading
passes over whatever is no whole frame: the torn end that a crash leaves, and single records that the disk has
damaged.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

MAGIC = b"TRE\x01"
HEADER = struct.Struct("<4sII")
MAX_PAYLOAD_BYTES = 64 << 20
SEGMENT_NAME = re.compile(r"(\d{8})\.(log|snapshot)")
DRAFT_NAME = re.compile(r"\d{8}\.tmp")  # of a snapshot


class LogInUseError(ValueError):
    """Another process has this log open."""


class EventLog:
    """The records of one directory. One thread at a time may append or rotate."""

    def __init__(self, directory: str | Path, *, max_segment_bytes: int = 16 << 20) -> None:
        """Open a log, or make one.

        Args:
            directory: where its files stand; nothing else may.
            max_segment_bytes: a segment that has grown to this is followed by the next.

        Raises:
            LogInUseError: see there.
            OSError: the directory cannot be written.
        """
        self.directory = Path(directory)
        self.num_lost_bytes = 0  # of all that was read: not part of any whole frame
        self._max_segment_bytes = max_segment_bytes
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise LogInUseError(
                f"{self.directory} is in use by another process; expected one of this server's own (--events)"
            ) from error
        self._segment: int | None = None  # a file descriptor
        self._segment_path = self.directory
        self._segment_bytes = 0
        self._ended_bytes: dict[int, int] = {}  # of the other segments, by their numbers
        self._remove_leftovers()
        for number in self._numbers("log"):
            self._ended_bytes[number] = self._path(number, "log").stat().st_size
        # Never on from where another process stopped: what it left at the end may be torn.
        self._next_number = max([0, self._snapshot_number() - 1, *self._numbers("log")]) + 1

    @property
    def num_bytes(self) -> int:
        """Bytes of all segments, the snapshot left out."""
        ended = list(self._ended_bytes.values())  # at once: `replace_before` may run in another thread
        return sum(ended) + self._segment_bytes

    def replay(self) -> Iterator[bytes]:
        """Yield every record, the oldest first: those of the snapshot, then those of the segments."""
        for kind in ("snapshot", "log"):
            for number in self._numbers(kind):
                yield from self._read(number, kind)

    def ended_parts(self) -> Iterator[tuple[int, list[bytes]]]:
        """End the segment, and yield the records of each file apart, the oldest first.

        With each comes the number that `replace_before` takes once they are not needed any more. What is
        appended meanwhile is in none. The files may be read beside `append`.
        """
        end = self.rotate()
        parts = [(number, kind) for kind in ("snapshot", "log") for number in self._numbers(kind)]
        # A snapshot takes the place of the segments before its number: that of its number follows it.
        return ((min(end, number + (kind == "log")), self._read(number, kind)) for number, kind in parts)

    def _read(self, number: int, kind: str) -> list[bytes]:
        path = self._path(number, kind)
        payloads, num_lost = read_frames(path.read_bytes())
        if num_lost:
            # A warning, no error: after a crash a torn end is what is to be expected.
            logger.warning("%s: %d bytes are no whole record; passed over", path, num_lost)
            self.num_lost_bytes += num_lost
        return payloads

    def append(self, payloads: Sequence[bytes]) -> None:
        """Write records with one flush to the disk; they are safe when this returns.

        Raises OSError where they could not be made safe (no space, a failing disk). They may then be found by
        a later replay or not; the log can be written on.
        """
        if self._segment is None or self._segment_bytes >= self._max_segment_bytes:
            self._begin_segment()
        assert self._segment is not None
        begin = self._segment_bytes
        data = _frames(payloads, begin)
        try:
            _write(self._segment, data)
        except OSError:
            self._cut_segment(begin)
            raise
        try:
            os.fdatasync(self._segment)
        except OSError:
            # What reached the disk is unknown, and a second flush would report success (Rebello et al.,
            # "Can Applications Recover from fsync Failures?", USENIX ATC 2020): this file is done with.
            self._end_segment()
            raise
        self._segment_bytes += len(data)

    def rotate(self) -> int:
        """End the segment; return the number below which no segment will ever be written again."""
        self._end_segment()
        return self._next_number

    def replace_before(self, number: int, payloads: Iterable[bytes]) -> None:
        """Put one snapshot in the place of all that stands before segment `number` (see `rotate`).

        Atomic: a crash leaves either the old files or the snapshot. May run beside `append`.
        """
        path = self._path(number, "snapshot")
        draft = path.with_suffix(".tmp")
        try:
            with open(draft, "wb", opener=private) as stream:
                for payload in payloads:
                    stream.write(_frames([payload], stream.tell()))
                stream.flush()
                os.fsync(stream.fileno())
            draft.rename(path)
        except OSError:
            draft.unlink(missing_ok=True)  # a full disk needs its space back
            raise
        self._sync_directory()
        self._remove_leftovers()

    def close(self) -> None:
        """Let another process have the log."""
        self._end_segment()
        self._lock.close()

    def _begin_segment(self) -> None:
        self._end_segment()
        path = self._path(self._next_number, "log")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._segment, self._segment_path, self._segment_bytes = descriptor, path, 0
        self._next_number += 1
        try:
            self._sync_directory()
        except OSError:
            self._end_segment()  # or the next append would be safe in a file that may not be there
            raise

    def _end_segment(self) -> None:
        if self._segment is not None:
            # Forgotten first: `close` closes also where it fails, and the number may be another file's then.
            segment, self._segment = self._segment, None
            size, self._segment_bytes = self._segment_bytes, 0
            if size:
                self._ended_bytes[self._next_number - 1] = size
            os.close(segment)
            if not size:
                self._segment_path.unlink()

    def _cut_segment(self, length: int) -> None:
        """Take back what a failed write has left; where that fails too, the next write begins a segment."""
        assert self._segment is not None
        try:
            os.ftruncate(self._segment, length)
            os.lseek(self._segment, length, os.SEEK_SET)
        except OSError:
            self._end_segment()

    def _remove_leftovers(self) -> None:
        """Remove what the newest snapshot has replaced, and snapshots that were never finished."""
        newest = self._snapshot_number()
        for path in self.directory.iterdir():
            match = SEGMENT_NAME.fullmatch(path.name)
            if DRAFT_NAME.fullmatch(path.name) or (match and int(match[1]) < newest):
                path.unlink()
                if match and match[2] == "log":
                    self._ended_bytes.pop(int(match[1]), None)

    def _snapshot_number(self) -> int:
        return max(self._numbers("snapshot"), default=0)

    def _numbers(self, kind: str) -> list[int]:
        matches = (SEGMENT_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match and match[2] == kind)

    def _path(self, number: int, kind: str) -> Path:
        return self.directory / f"{number:08d}.{kind}"

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_frames(data: bytes) -> tuple[list[bytes], int]:
    """Return the payloads of all whole frames of a file, and how many of its bytes belong to none."""
    payloads, position, num_lost = [], 0, 0
    while position < len(data):
        payload = _payload_at(data, position)
        if payload is None:
            following = data.find(MAGIC, position + 1)
            following = len(data) if following < 0 else following
            num_lost += following - position
            position = following
        else:
            payloads.append(payload)
            position += HEADER.size + len(payload)
    return payloads, num_lost


def _payload_at(data: bytes, position: int) -> bytes | None:
    if position + HEADER.size > len(data):
        return None
    magic, length, checksum = HEADER.unpack_from(data, position)
    begin = position + HEADER.size
    if magic != MAGIC or length > min(MAX_PAYLOAD_BYTES, len(data) - begin):
        return None
    payload = data[begin : begin + length]
    return payload if _checksum(payload, position) == checksum else None


def _frames(payloads: Iterable[bytes], position: int) -> bytes:
    """Return frames as they stand in a file from `position` on."""
    parts = bytearray()
    for payload in payloads:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a record has {len(payload)} bytes; expected at most {MAX_PAYLOAD_BYTES}")
        parts += HEADER.pack(MAGIC, len(payload), _checksum(payload, position + len(parts)))
        parts += payload
    return bytes(parts)


def _checksum(payload: bytes, position: int) -> int:
    """Return a CRC-32 that holds for this place alone: a frame copied into a payload is no frame."""
    return zlib.crc32(payload, position & 0xFFFFFFFF)


def private(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=private)`: one that it makes is its owner's alone to read."""
    return os.open(path, flags, 0o600)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
