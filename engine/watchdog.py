"""Whether the workers still work.

A call into native code that never returns can be neither stopped nor left: Python has no way to end a thread.
Its caller gets DEADLINE_EXCEEDED in time, and the other workers go on; but it keeps its thread and its place
for good. So when no worker is left, health says so and requests are refused, for another server to answer. If
it stays so the process ends, for whoever watches it to start it anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

logger = logging.getLogger(__name__)

STUCK_S = 30.0  # no request takes so long
POLL_S = 1.0


class Service(Protocol):
    """Whose workers are watched: engine.server.RecommenderService."""

    def num_stuck(self, stuck_s: float) -> int:
        """Return how many workers have been at one request for that long."""


async def watch_workers(
    service: Service,
    num_workers: int,
    say: Callable[[bool], Awaitable[None]],
    *,
    give_up: Callable[[], None] | None = None,
    give_up_s: float = 0.0,
    stuck_s: float | None = None,
    poll_s: float = POLL_S,
) -> None:
    """Say whether a worker is left whenever that changes, for ever.

    Args:
        service: whose workers.
        num_workers: how many it has.
        say: called with False once none is left, with True once there is one again.
        give_up: called after it once none has been left for
        give_up_s: seconds.
        stuck_s: see STUCK_S, which None takes.
        poll_s: seconds between two looks.
    """
    before, since_s = 0, math.inf
    while True:
        await asyncio.sleep(poll_s)
        num_stuck = service.num_stuck(STUCK_S if stuck_s is None else stuck_s)
        if num_stuck > before:
            logger.error("%d of %d workers do not come back from a request", num_stuck, num_workers)
        if (num_stuck >= num_workers) != (before >= num_workers):
            await say(num_stuck < num_workers)
            since_s = time.monotonic() if num_stuck >= num_workers else math.inf
        if give_up is not None and time.monotonic() - since_s >= give_up_s:
            give_up()
        before = num_stuck
