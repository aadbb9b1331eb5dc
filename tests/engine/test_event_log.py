from __future__ import annotations

import errno
import os
import random
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.event_log import HEADER, MAGIC, EventLog, LogInUseError, read_frames


def replayed(directory: Path) -> list[bytes]:
    log = EventLog(directory)
    try:
        return list(log.replay())
    finally:
        log.close()


def write(directory: Path, *batches: list[bytes], max_segment_bytes: int = 1 << 20) -> None:
    log = EventLog(directory, max_segment_bytes=max_segment_bytes)
    for batch in batches:
        log.append(batch)
    log.close()


def test_what_was_appended_comes_back_in_order(tmp_path: Path) -> None:
    write(tmp_path, [b"a", b""], [b"b" * 1000])
    write(tmp_path, [MAGIC * 3])
    assert replayed(tmp_path) == [b"a", b"", b"b" * 1000, MAGIC * 3]
    assert replayed(tmp_path / "new") == []


def test_what_others_keep_there_stays(tmp_path: Path) -> None:
    for name in ("mine.tmp", "notes.txt", "00000001.tmp"):
        (tmp_path / name).touch()
    write(tmp_path, [b"a"])
    assert {path.name for path in tmp_path.iterdir()} == {"mine.tmp", "notes.txt", "00000001.log", "lock"}


def test_a_full_segment_is_followed_by_the_next(tmp_path: Path) -> None:
    records = [bytes([number]) * 30 for number in range(10)]
    write(tmp_path, *([record] for record in records), max_segment_bytes=100)
    assert [path.name for path in sorted(tmp_path.glob("*.log"))] == [
        f"0000000{number}.log" for number in (1, 2, 3, 4)
    ]
    assert replayed(tmp_path) == records


@given(st.lists(st.binary(max_size=20), max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_a_file_cut_anywhere_gives_the_whole_records_before_the_cut(
    records: list[bytes], data: st.DataObject
) -> None:
    whole, ends = b"", [0]
    for record in records:
        whole += frame(record, len(whole))
        ends.append(len(whole))
    cut = data.draw(st.integers(0, len(whole)))
    num_whole = sum(end <= cut for end in ends) - 1
    assert read_frames(whole[:cut]) == (records[:num_whole], cut - ends[num_whole])


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_costs_the_record_it_is_in_and_no_other(
    records: list[bytes], data: st.DataObject
) -> None:
    whole, owner = b"", []
    for number, record in enumerate(records):
        framed = frame(record, len(whole))
        whole += framed
        owner += [number] * len(framed)
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    expected = [record for number, record in enumerate(records) if number != owner[place]]
    assert read_frames(bytes(damaged)) == (expected, owner.count(owner[place]))


def frame(payload: bytes, position: int) -> bytes:
    """A frame by the words of the module's docstring."""
    return HEADER.pack(MAGIC, len(payload), zlib.crc32(payload, position)) + payload


def test_a_frame_inside_a_damaged_payload_is_not_taken_for_one() -> None:
    inner = frame(b"forged", 0)
    whole = frame(b"x" + inner, 0)
    damaged = bytearray(whole)
    damaged[HEADER.size] ^= 1
    assert read_frames(bytes(damaged)) == ([], len(whole))


def test_garbage_is_passed_over() -> None:
    garbage = random.Random(1).randbytes(5000)
    assert read_frames(garbage) == ([], 5000)
    assert read_frames(garbage + frame(b"good", 5000)) == ([b"good"], 5000)


def test_a_torn_end_is_counted_and_never_written_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [b"first"])
    (segment,) = tmp_path.glob("*.log")
    segment.write_bytes(segment.read_bytes() + frame(b"torn", 17)[:-1])
    log = EventLog(tmp_path)
    log.append([b"second"])
    log.close()
    log = EventLog(tmp_path)
    assert list(log.replay()) == [b"first", b"second"]
    assert log.num_lost_bytes == HEADER.size + 3
    assert "00000001.log: 15 bytes are no whole record" in caplog.text
    log.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(LogInUseError, match="in use by another process"):
        EventLog(tmp_path)
    log.close()
    EventLog(tmp_path).close()


def test_a_snapshot_takes_the_place_of_what_was_before(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append([b"1", b"2"])
    number = log.rotate()
    log.append([b"3"])  # while the snapshot is written
    log.replace_before(number, [b"1+2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.log", "00000002.snapshot", "lock"]
    log.append([b"4"])
    log.close()
    assert replayed(tmp_path) == [b"1+2", b"3", b"4"]
    write(tmp_path, [b"5"])
    assert replayed(tmp_path) == [b"1+2", b"3", b"4", b"5"]


def test_a_snapshot_of_everything_and_then_more(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append([b"1"])
    log.replace_before(log.rotate(), [b"one"])
    log.close()
    assert replayed(tmp_path) == [b"one"]
    write(tmp_path, [b"2"])  # takes a number that the snapshot does not replace
    assert replayed(tmp_path) == [b"one", b"2"]


@pytest.mark.parametrize("step", ["draft", "renamed"])
def test_a_crash_in_the_middle_of_a_snapshot(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rename the old segments count, after it the snapshot does, although they are still there."""
    log = EventLog(tmp_path)
    log.append([b"1"])
    number = log.rotate()
    with monkeypatch.context() as patch:
        if step == "draft":
            patch.setattr(Path, "rename", crash)
        else:
            patch.setattr(EventLog, "_remove_leftovers", crash)
        with pytest.raises(KeyboardInterrupt):
            log.replace_before(number, [b"one"])
    assert (tmp_path / "00000001.log").exists()
    log.close()
    assert replayed(tmp_path) == ([b"1"] if step == "draft" else [b"one"])
    assert not list(tmp_path.glob("*.tmp"))


def crash(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_full_or_failing_disk(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed append says so and leaves nothing in the way of those before and after it."""
    log = EventLog(tmp_path)
    log.append([b"before"])
    real_write = os.write

    def fail(descriptor: int, data: bytes = b"") -> int:
        if call == "write" and len(data) > 10:
            return real_write(descriptor, data[:10])  # then there is no space left
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                log.append([b"lost" * 5])
    log.append([b"after"])
    log.close()
    found = replayed(tmp_path)
    assert [record for record in found if record != b"lost" * 5] == [b"before", b"after"]
    assert len(list(tmp_path.glob("*.log"))) <= 5


def test_a_record_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.event_log.MAX_PAYLOAD_BYTES", 10)
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="a record has 11 bytes; expected at most 10"):
        log.append([b"x" * 11])
    log.close()


def test_a_directory_that_could_not_be_synced_is_synced_before_the_next_record_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path)
    synced: list[bool] = []
    fsync = os.fsync

    def fails_once(descriptor: int) -> None:
        synced.append(bool(synced))
        if not synced[-1]:
            raise OSError(errno.EIO, "a failing disk")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OSError, match="a failing disk"):
        log.append([b"refused"])
    log.append([b"a"])
    assert synced == [False, True]
    log.close()
    assert replayed(tmp_path) == [b"a"]


@given(st.lists(st.sampled_from(["append", "part", "all", "snapshot", "reopen"]), max_size=25))
@settings(max_examples=60, deadline=None)
def test_what_is_taken_part_by_part_is_taken_once_and_in_order(steps: list[str]) -> None:
    """Whatever comes between: no record is left out, none that was not yet taken is lost."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        log = EventLog(directory, max_segment_bytes=60)
        expected: list[bytes] = []
        for number, step in enumerate(steps):
            if step == "append":
                expected.append(b"record %d" % number)
                log.append([expected[-1]])
            elif step == "snapshot":
                log.replace_before(log.rotate(), list(log.replay()))
            elif step == "reopen":
                log.close()
                log = EventLog(directory, max_segment_bytes=60)
            else:
                parts = log.ended_parts()
                expected.append(b"meanwhile %d" % number)
                log.append([expected[-1]])
                for end, payloads in parts:
                    assert payloads == expected[: len(payloads)]
                    del expected[: len(payloads)]
                    log.replace_before(end, [])
                    if step == "part":
                        break
            assert list(log.replay()) == expected
            assert log.num_bytes == sum(path.stat().st_size for path in directory.glob("*.log"))
        log.close()
