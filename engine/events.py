"""What users do, as it is recorded, and what every store of it does.

Events carry the shop's ids, not rows: the next bundle gives its items other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol


class UserEvent(NamedTuple):
    """Something a user did, as it is recorded."""

    event_id: str  # the caller's; one user has no two events of one id
    user_id: str
    item_id: str
    event_type: str = "interaction"  # one of engine.history.EVENT_TYPES
    timestamp: int = 0  # ms since 1970 UTC; 0 means just now: after all that is recorded of the user


class Recorded(NamedTuple):
    """What became of a batch of events, all of which are safe."""

    num_new: int
    num_repeated: int  # known by their id, and left out
    is_delayed: bool = False  # safe on this machine's disk, and not yet seen by the next request


class StoreUnavailableError(RuntimeError):
    """The store cannot answer, or cannot make events safe, right now."""


class StoreBusyError(StoreUnavailableError):
    """More events wait to be made safe than can be in a reasonable time."""


class EventStore(Protocol):
    """Records events and gives back the newest of a user. Any thread may call it."""

    waits: bool  # whether `recent` asks somebody who may be slow; it does so within workplaces.waiting

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        """Return a future that is done when the events are safe.

        It, or the call, raises StoreUnavailableError where they are not; then the same events may be sent
        again, whatever became of them.
        """

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        """Return the newest events of a user, oldest first. Raises StoreUnavailableError.

        Args:
            user_id: the shop's own.
            timeout_s: how long the caller can wait, if that is less than the store would.
        """

    def user_ids(self) -> Iterable[str] | None:
        """Return who has events now; None where others record too, and nobody can be ruled out."""

    def close(self) -> None:
        """Finish what was begun, and give everything back."""
