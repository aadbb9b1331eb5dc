"""Who may come in: no more requests at once than the server can answer quickly, and no caller too often.

What is refused is refused at once, so that the answer costs next to nothing and the caller can go elsewhere.
Everything here runs on the event loop's thread and never waits.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


class RejectedError(Exception):
    """A request that must not come in now."""

    def __init__(self, reason: str, retry_after_s: float, *, is_from_limit: bool = False) -> None:
        super().__init__(f"{reason}; try again in {retry_after_s:.2f} s")
        self.reason = reason
        self.is_from_limit = is_from_limit  # the server is full; otherwise the caller asks too often
        self.retry_after_s = retry_after_s

    def metadata(self, time_left_s: float | None) -> tuple[tuple[str, str], ...]:
        """Return what tells a client when to try again, to be sent as trailing metadata.

        `retry-after-ms` is for whoever reads it. A gRPC client whose service config retries this status obeys
        `grpc-retry-pushback-ms` by itself (gRFC A6); -1 says not to where its deadline would be over by then
        or soon after, so that it does not wait for nothing.

        Args:
            time_left_s: until the caller's deadline; None where it has none.
        """
        after_ms = str(math.ceil(self.retry_after_s * 1000))
        # With as much time again for the answer, so that nobody waits to be too late.
        in_time = time_left_s is None or 2 * self.retry_after_s <= time_left_s
        return (("retry-after-ms", after_ms), ("grpc-retry-pushback-ms", after_ms if in_time else "-1"))


BURST = 2  # times the limit
FEW = 3  # requests without a queue that tell what they take, where nothing is known yet
OVERLOAD = 0.25  # share of a window's requests, or of window_requests; more refusals are an overload


class ConcurrencyLimit:
    """A limit on the requests under way that follows the latency measured.

    A gradient limit, as in Netflix's concurrency-limits (2018), after TCP Vegas (Brakmo and Peterson, 1994):
    when requests take longer than `tolerance` times what they take without a queue, they queue, and the limit
    falls in proportion; otherwise it rises by half its square root, the room for a burst. With limit L,
    latency t and the latency without a queue t0, once per window:

        L <- (1 - smoothing) L + smoothing (L clip(tolerance t0 / t, 1/2, 1) + sqrt(L) / 2)

    Three things differ. t is the window's median, so that a few dear requests move nothing. t0 is no all-time
    minimum but what requests take while at most `min_limit` are under way, in a window of which half were so
    (FEW will do until it is known: a server that has just started is to refuse nobody for not knowing). When
    the load has allowed no such window for `probe_s`, or none ever, the limit stands at `min_limit` for one
    (BBR's ProbeRTT; Cardwell et al., 2016). The workers still have work then, so that a probe costs no
    throughput where min_limit is their number. And half the root: with all of it the limit of a single worker
    could never fall below 4, however long requests take, and those of an overloaded machine take twice as
    long.

    Arrivals come in bursts, and a server that has no queue now and then is not overloaded: for `burst_s`
    after such a moment BURST times the limit may come in. An overloaded one has such moments too, by chance,
    but it refuses many: there are no bursts for `calm_s` after a refusal that made more than OVERLOAD of the
    window under way.
    """

    def __init__(
        self,
        *,
        min_limit: int,
        initial: int | None = None,
        max_limit: int = 1000,
        tolerance: float = 2.0,
        smoothing: float = 0.5,
        window_s: float = 0.1,
        window_requests: int = 20,
        probe_s: float = 30.0,
        burst_s: float = 0.5,
        calm_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Begin to limit.

        Args:
            min_limit: requests that are worked on at once without a queue: the number of workers.
            initial: the limit before anything was measured; twice min_limit where None.
            max_limit: the limit never exceeds this.
            tolerance: how many times its queue-free latency a request may take.
            smoothing: how far one window moves the limit, 0 to 1.
            window_s: a window lasts at least this long,
            window_requests: and until this many requests have ended.
            probe_s: see above,
            burst_s: too,
            calm_s: too.
            clock: seconds.
            rng: of the retry hints.
        """
        if not 1 <= min_limit <= max_limit:
            raise ValueError(f"min_limit is {min_limit}; expected 1 to max_limit, {max_limit}")
        if tolerance <= 1:
            raise ValueError(f"tolerance is {tolerance}; expected more than 1")
        self.in_flight = 0
        self._limit = float(min(initial or 2 * min_limit, max_limit))
        self._min_limit = min_limit
        self._max_limit = max_limit
        self._tolerance = tolerance
        self._smoothing = smoothing
        self._window_s = window_s
        self._window_requests = window_requests
        self._probe_s = probe_s
        self._clock = clock
        self._rng = rng or random.Random()  # spreads retries, guards nothing
        self._unqueued_s: float | None = None  # t0,
        self._unqueued_waiting_s = 0.0  # and how much of it nobody works
        self._measured_at = clock()  # when t0 was
        self._is_probing = False
        self._burst_s, self._calm_s = burst_s, calm_s
        self._no_queue_at = clock()
        self._overloaded_at = -math.inf
        self._num_admitted = self._num_rejected = self._num_late = self._peak = 0  # of this window
        self._begin_window()

    @property
    def limit(self) -> int:
        """Requests that may be under way at once, now."""
        return self._min_limit if self._is_probing else int(self._limit)

    def admit(self, time_left_s: float | None = None) -> Permit:
        """Let a request in, whose place is to be given back.

        Raises RejectedError where there is no room, or where those before it leave it no time: it would take
        a worker's time and be late, and a server full of such requests would answer nobody.

        Args:
            time_left_s: until its deadline; None where it has none.
        """
        now = self._clock()
        if self.in_flight < self._min_limit and not self._is_probing:
            self._no_queue_at = now
        is_burst = now - self._no_queue_at < self._burst_s and now - self._overloaded_at >= self._calm_s
        is_burst = is_burst and not self._is_probing
        if self.in_flight >= min(self.limit * (BURST if is_burst else 1), self._max_limit):
            self._num_rejected += 1
            num_asked = self._num_admitted + self._num_rejected
            if self._num_rejected > OVERLOAD * max(num_asked, self._window_requests):
                self._overloaded_at = now
            raise RejectedError("the server is at its limit", self._retry_after_s(), is_from_limit=True)
        if self.in_flight >= self._answered_within(time_left_s):
            self._num_late += 1
            reason = "those under way leave no time before the deadline"
            raise RejectedError(reason, self._retry_after_s(), is_from_limit=True)
        self.in_flight += 1
        self._num_admitted += 1
        self._peak = max(self._peak, self.in_flight)
        return Permit(self, now, queued=self.in_flight > self._min_limit)

    def _answered_within(self, time_left_s: float | None) -> float:
        """Return how many requests are answered in so much time; at least those that need not wait.

        Who has less time than a request takes is answered too, without some stages.
        """
        if time_left_s is None or self._unqueued_s is None:
            return math.inf
        work_s = max(self._unqueued_s - self._unqueued_waiting_s, 1e-9)
        num_in_turn = (time_left_s - self._unqueued_waiting_s) / work_s
        return max(self._min_limit, math.floor(self._min_limit * num_in_turn))

    def _release(self, began: float, queued: bool, counts: bool, waiting_s: float) -> None:
        self.in_flight -= 1
        now = self._clock()
        if counts:
            self._latencies.append(now - began)
            if not queued:
                self._unqueued.append(now - began)
                self._unqueued_waits.append(waiting_s)
        if len(self._latencies) >= self._window_requests and now - self._window_began >= self._window_s:
            self._end_window(now)

    def _begin_window(self) -> None:
        self._window_began = self._clock()
        self._latencies: list[float] = []
        self._unqueued: list[float] = []  # of requests that came in while there was no queue
        self._unqueued_waits: list[float] = []
        self._peak = self.in_flight
        self._num_admitted = self._num_rejected = self._num_late = 0

    def _end_window(self, now: float) -> None:
        half = self._window_requests / 2
        if len(self._unqueued) >= (min(FEW, half) if self._unqueued_s is None else half):
            self._unqueued_s = statistics.median(self._unqueued)
            self._unqueued_waiting_s = statistics.median(self._unqueued_waits)
            self._measured_at = now
            self._is_probing = False
        elif self._unqueued_s is None or now - self._measured_at >= self._probe_s:
            self._is_probing = True
        if self._unqueued_s is not None and not self._is_probing:
            median = statistics.median(self._latencies)
            gradient = min(1.0, max(0.5, self._tolerance * self._unqueued_s / max(median, 1e-9)))
            wanted = self._limit * gradient + math.sqrt(self._limit) / 2
            # A limit that nobody comes near says nothing about what lies beyond it.
            if wanted < self._limit or self._peak * 2 >= self._limit:
                self._limit += self._smoothing * (wanted - self._limit)
                self._limit = min(float(self._max_limit), max(float(self._min_limit), self._limit))
        self._begin_window()

    def _retry_after_s(self) -> float:
        """Return a hint that grows with the share of refused requests, spread so that they do not all return
        at once.
        """
        overload = 1 + (self._num_rejected + self._num_late) / max(1, self._num_admitted)
        return self._window_s * min(overload, 50.0) * self._rng.uniform(0.5, 1.5)


class Permit:
    """A place among the requests under way."""

    def __init__(self, limit: ConcurrencyLimit, began: float, queued: bool) -> None:
        self._limit = limit
        self._began = began
        self._queued = queued

    def release(self, *, counts: bool, waiting_s: float = 0.0) -> None:
        """Give the place back, once.

        Args:
            counts: whether to measure what it took: what was cancelled or failed says nothing of latency.
            waiting_s: how much of that another could work (engine/workplaces.py).
        """
        self._limit._release(self._began, self._queued, counts, waiting_s)


@dataclass(frozen=True)
class RateLimit:
    """How often one caller may ask."""

    per_s: float  # in the long run
    burst: float  # at once

    def __post_init__(self) -> None:
        for name, value in (("per_s", self.per_s), ("burst", self.burst)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; expected a finite number above 0")


class RateLimiter:
    """A token bucket for each caller: it holds `burst` tokens at most and gains `per_s` a second."""

    def __init__(
        self,
        default: RateLimit | None,
        *,
        max_callers: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the limit of callers who have none of their own; None for no limit.

        A caller beyond `max_callers` takes the place of the one who was idle longest, whose bucket is full
        again by then unless this is far too small.
        """
        self._default = default
        self._max_callers = max_callers
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when that was

    def check(self, caller: str, limit: RateLimit | None = None) -> None:
        """Take a token of a caller. Raises RejectedError where there is none.

        Args:
            caller: who asks, such as the id of an API key.
            limit: the caller's own.
        """
        limit = limit or self._default
        if limit is None:
            return
        now = self._clock()
        tokens, then = self._buckets.pop(caller, (limit.burst, now))
        tokens = min(limit.burst, tokens + limit.per_s * max(0.0, now - then))
        missing = min(1.0, limit.burst) - tokens  # a burst of less than one lets in what fills it
        self._buckets[caller] = (tokens if missing > 0 else -missing, now)
        if len(self._buckets) > self._max_callers:
            self._buckets.popitem(last=False)
        if missing > 0:
            raise RejectedError(f"more than {limit.per_s:g} requests a second", missing / limit.per_s)
