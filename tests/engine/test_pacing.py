"""Paced work leaves the processor to others, wherever in it the time goes, and ends as it would otherwise."""

import sys
import time

import pytest

from engine.pacing import paced


def work(seconds: float) -> int:
    """Use a processor for so long, in many small calls."""
    num_calls, end = 0, time.thread_time() + seconds
    while time.thread_time() < end:
        num_calls += len(sorted(range(100))) > 0
    return num_calls


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_time_is_shared(share):
    begin, used = time.perf_counter(), time.thread_time()
    with paced(share):
        assert work(0.1) > 10
    wall, used = time.perf_counter() - begin, time.thread_time() - used
    # The last piece has no pause behind it. However slow the machine is, it only takes longer.
    assert wall >= (used - 0.02) / share


def test_who_takes_a_whole_processor_never_sleeps(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with paced(1.0):
        work(0.02)
    assert set(slept) == {0.0}


def test_what_watched_the_thread_before_goes_on():
    def watcher(frame, event, argument):
        return None

    sys.setprofile(watcher)
    try:
        with pytest.raises(ValueError, match="invalid literal"), paced(0.5):
            int("of the work")
        assert sys.getprofile() is watcher
    finally:
        sys.setprofile(None)
