"""Files that may change while what was read from them is in use: API keys, policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def is_shortage(error: Exception) -> bool:
    """Return whether it could not be read, or there was no memory for it: it may be good all the same."""
    short = (OSError, MemoryError)
    return isinstance(error, short) or isinstance(error.__cause__, short)


class Watched(Generic[T]):
    """Reads something, and tells when it is to be read again."""

    def __init__(self, read: Callable[[], T], stamp: Callable[[], object]) -> None:
        """Take what to do.

        Args:
            read: returns what the files say.
            stamp: returns what differs once they have changed.
        """
        self._read = read
        self._stamp = stamp
        self._loaded: object = None

    def load(self) -> T:
        """Return what the files say. Raises what reading them raises."""
        self._loaded = self._stamp()  # before reading: what changes meanwhile counts as a change
        try:
            return self._read()
        except Exception as error:
            if is_shortage(error):
                self._loaded = None  # what cannot be read now may be later
            raise

    def changed(self) -> bool:
        """Return whether the files have changed since the last load, or could not be read then."""
        return self._stamp() != self._loaded
