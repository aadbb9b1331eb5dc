"""Who of a pool's threads may work: as many as are meant to, and not those that wait for somebody else.

A worker runs Python, and two of a process would wait for one lock; so there are few. But while one waits for
Redis it needs none of that, and another request may have its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_of_thread = threading.local()


class Workplaces:
    """Places for the threads of a pool that has more of them."""

    def __init__(self, num_places: int) -> None:
        self._free = threading.Semaphore(num_places)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have a place for as long as the block lasts, but for what it does within `waiting`."""
        with self._free:
            _of_thread.places = self
            try:
                yield
            finally:
                _of_thread.places = None


@contextmanager
def waiting() -> Iterator[None]:
    """Leave this thread's place, where it has one, to another for as long as the block lasts."""
    places: Workplaces | None = getattr(_of_thread, "places", None)
    if places is None:
        yield
        return
    places._free.release()
    try:
        yield
    finally:
        places._free.acquire()
