"""Who of a pool's threads may work: as many as are meant to, and not those that wait for somebody else.

A worker runs Python, and two of a process would wait for one lock; so there are few. But while one waits for
Redis it needs none of that, and another request may have its place.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class _OfThread(threading.local):
    places: Workplaces | None = None  # where this thread has a place
    waiting_s = 0.0  # all that it has ever spent within `waiting`,
    returning_s = 0.0  # and of that, until it had its place again


_of_thread = _OfThread()


class Workplaces:
    """Places for the threads of a pool that has more of them.

    Those who had one before are next, and of them, and of the others, who has waited longest.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._num_free = num_places
        # Of those who wait for a place, again or for their first, each locked until it is theirs.
        self._again: deque[threading.Lock] = deque()
        self._first: deque[threading.Lock] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have a place for as long as the block lasts, but for what it does within `waiting`."""
        self._take(self._first)
        _of_thread.places = self
        try:
            yield
        finally:
            _of_thread.places = None
            self._give()

    def _take(self, turns: deque[threading.Lock]) -> None:
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            turns.append(turn)
        turn.acquire()

    def _give(self) -> None:
        with self._lock:
            if turns := self._again or self._first:  # a free place could be taken by who comes just now
                turns.popleft().release()
            else:
                self._num_free += 1


@contextmanager
def waiting() -> Iterator[None]:
    """Leave this thread's place, where it has one, to another for as long as the block lasts."""
    places, begin = _of_thread.places, time.perf_counter()
    if places is not None:
        places._give()
    try:
        yield
    finally:
        end = time.perf_counter()
        if places is not None:
            places._take(places._again)
        now = time.perf_counter()
        _of_thread.waiting_s += now - begin
        _of_thread.returning_s += now - end


def waiting_s() -> float:
    """Return how long this thread has been within `waiting`, all in all."""
    return _of_thread.waiting_s


def clock() -> float:
    """Return time.perf_counter(), standing still while this thread waits to have its place again."""
    return time.perf_counter() - _of_thread.returning_s
