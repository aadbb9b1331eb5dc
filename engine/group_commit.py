"""Batches of events made safe together: what arrives while one group is under way shares the next one.

Group commit (DeWitt et al., SIGMOD 1984): so that neither the flushes of a disk nor the round trips of a
network limit the calls per second, and a slow one makes calls wait for one group and not for each other.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from engine.events import Recorded, StoreBusyError, StoreUnavailableError, UserEvent
from engine.telemetry import LimitedLog

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

MAX_WAITING = 20_000  # events: what takes about a second


Batch = Sequence[UserEvent]
Outcome = Recorded | StoreUnavailableError


class GroupCommit:
    """A thread that commits batches in groups. Any thread may submit."""

    def __init__(
        self,
        name: str,
        commit: Callable[[list[Batch]], Sequence[Outcome]],
        *,
        max_waiting: int = MAX_WAITING,
        max_together: int = MAX_WAITING,
        afterwards: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin.

        Args:
            name: of the thread.
            commit: makes batches safe, in their order, and says of each what became of it; what it raises is
                the outcome of all.
            max_waiting: events that may wait; beyond them a batch is refused at once.
            max_together: events of a group; a batch of more is a group of its own.
            afterwards: called behind each group, when its callers have been told.
        """
        self._commit = commit
        self._max_waiting = max_waiting
        self._max_together = max_together
        self._afterwards = afterwards
        self._waiting: deque[tuple[Batch, Future[Recorded]]] = deque()
        self._num_waiting = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, events: Batch) -> Future[Recorded]:
        """Return a future of what becomes of a batch; see EventStore.record."""
        future: Future[Recorded] = Future()
        with self._changed:
            if self._is_closed:
                raise StoreUnavailableError("the event store is closed")
            if self._waiting and self._num_waiting + len(events) > self._max_waiting:
                raise StoreBusyError("too many events wait to be made safe")
            self._waiting.append((events, future))
            self._num_waiting += len(events)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Commit what waits, and take no more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while group := self._taken():
            batches = [batch for batch in group if batch[1].set_running_or_notify_cancel()]
            outcomes: Sequence[Outcome]
            try:
                outcomes = self._commit([events for events, _ in batches])
            except StoreUnavailableError as error:
                seldom.warning("events could not be made safe", f": {error}")
                outcomes = [error] * len(batches)
            except Exception as error:
                logger.exception("%d batches of events could not be made safe", len(batches))
                outcomes = [StoreUnavailableError(f"the event store failed: {error}")] * len(batches)
            for (_, future), outcome in zip(batches, outcomes, strict=True):
                if isinstance(outcome, Recorded):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)
            try:
                self._afterwards()
            except Exception:
                logger.exception("behind a group of events")

    def _taken(self) -> list[tuple[Batch, Future[Recorded]]]:
        """Return the next group; nothing where there is none to come."""
        group: list[tuple[Batch, Future[Recorded]]] = []
        num_events = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            while self._waiting:
                num_more = len(self._waiting[0][0])
                if group and num_events + num_more > self._max_together:
                    break
                group.append(self._waiting.popleft())
                num_events += num_more
            self._num_waiting -= num_events
        return group
