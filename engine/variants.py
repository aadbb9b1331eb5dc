"""Other bundles beside the one that is served: for a share of the users (A/B), or asked in its shadow.

In the shadow a bundle gets real requests, after they are answered, and nobody sees what it says: its slates
are compared with those that were shown, and its failures and its time are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.telemetry import LimitedLog, Metrics
from protos.trirank.v1 import recommender_pb2 as pb

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

# The names of pipelines; that of the bundle that is served is empty.
OTHER, SHADOW = "other", "shadow"
MAX_WAITING = 4  # requests; more are left out, so that the shadow never becomes a queue
NICENESS = 10


@dataclass(frozen=True)
class Split:
    """A stable share of the users: who is in it stays in it, also when the share grows."""

    share: float  # 0 to 1
    salt: str  # another one deals the users anew, so that one experiment does not bias the next

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; expected 0 to 1")

    def takes(self, user: str) -> bool:
        """Return whether a user is in the share."""
        digest = hashlib.blake2b(f"{self.salt}\0{user}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.share * 2.0**64


class Shadow:
    """A thread that asks a pipeline what was asked of another, and compares."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shadow", initializer=_yield_to_others)
        self._room = threading.Semaphore(MAX_WAITING)
        self.is_asking = False  # whether the thread is at a request now

    def offer(self, ask: Callable[[], pb.RecommendResponse], shown: pb.RecommendResponse) -> None:
        """Ask later, and compare with what was shown; leave it out where too many wait."""
        if not self._room.acquire(blocking=False):
            self._metrics.shadow.labels("left out").inc()
            return
        self._pool.submit(self._compare, ask, shown)

    def close(self) -> None:
        """Leave out what waits, and do not wait for what is under way, which may hang (see is_asking)."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compare(self, ask: Callable[[], pb.RecommendResponse], shown: pb.RecommendResponse) -> None:
        began_s = time.perf_counter()
        self.is_asking = True
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the shadow's alone
            seldom.warning("the shadow failed", f": {error!r}")
            self._metrics.shadow.labels("failed").inc()
            return
        finally:
            self.is_asking = False
            self._room.release()
        self._metrics.shadow.labels("degraded" if answer.trace.degraded_stages else "answered").inc()
        self._metrics.shadow_seconds.observe(time.perf_counter() - began_s)
        self._metrics.shadow_overlap.observe(overlap(shown, answer))


def overlap(shown: pb.RecommendResponse, other: pb.RecommendResponse) -> float:
    """Return the share of the shown items that another slate has as well; 1 where nothing was shown."""
    items = {item.item_id for item in shown.items}
    return len(items & {item.item_id for item in other.items}) / len(items) if items else 1.0


def _yield_to_others() -> None:
    """Have this thread run when no other wants to, where the system can do that (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
