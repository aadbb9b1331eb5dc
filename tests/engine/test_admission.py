"""All in simulated time: a queue with workers, and the limit in front of it."""

from __future__ import annotations

import contextlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.admission import BURST, ConcurrencyLimit, Permit, RateLimit, RateLimiter, RejectedError

SERVICE_S = 0.008
NUM_WORKERS = 2
CAPACITY = NUM_WORKERS / SERVICE_S  # 250 requests/s


@dataclass
class Shop:
    """Workers that take requests in order; each request takes a random time around the mean."""

    limit: ConcurrencyLimit
    clock: list[float]
    rng: random.Random
    service_s: Callable[[float], float] = lambda now: SERVICE_S
    answers: list[tuple[float, float]] = field(default_factory=list)  # arrived, latency
    rejected: list[float] = field(default_factory=list)
    limits: list[tuple[float, int]] = field(default_factory=list)
    deadline_s: float | None = None  # of each request; what is late is no answer

    def run(self, rate: Callable[[float], float], until: float) -> None:
        queue: deque[tuple[float, Permit]] = deque()
        busy: list[tuple[float, float, int, Permit]] = []
        arrival = self.clock[0]
        while True:
            end = busy[0][0] if busy else float("inf")
            self.clock[0] = now = min(arrival, end)
            if now >= until:
                break
            if end <= arrival:
                _, arrived, _, permit = heapq.heappop(busy)
                permit.release(counts=not self._is_late(arrived))
                if not self._is_late(arrived):
                    self.answers.append((arrived, now - arrived))
                self.limits.append((now, self.limit.limit))
            else:
                arrival = now + self.rng.expovariate(rate(now))
                try:
                    queue.append((now, self.limit.admit(self.deadline_s)))
                except RejectedError:
                    self.rejected.append(now)
            while queue and len(busy) < NUM_WORKERS:
                arrived, permit = queue.popleft()
                if self._is_late(arrived):
                    permit.release(counts=False)
                    continue
                took = self.service_s(now) * self.rng.lognormvariate(-0.08, 0.4)
                heapq.heappush(busy, (now + took, arrived, len(self.answers), permit))
        for arrived, permit in [*queue, *((arrived, permit) for _, arrived, _, permit in busy)]:
            permit.release(counts=False)
            assert arrived <= until

    def _is_late(self, arrived: float) -> bool:
        return self.deadline_s is not None and self.clock[0] > arrived + self.deadline_s

    def between(self, begin: float, end: float) -> tuple[float, float, int]:
        """Answers a second, p99 of their latency, and refusals, of requests that arrived then."""
        latencies = sorted(latency for arrived, latency in self.answers if begin <= arrived < end)
        refused = sum(begin <= arrived < end for arrived in self.rejected)
        return len(latencies) / (end - begin), latencies[int(len(latencies) * 0.99)], refused


def shop(seed: int = 0, service_s: Callable[[float], float] = lambda now: SERVICE_S) -> Shop:
    clock = [0.0]
    rng = random.Random(seed)
    limit = ConcurrencyLimit(min_limit=NUM_WORKERS, clock=lambda: clock[0], rng=rng)
    return Shop(limit, clock, rng, service_s)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_times_the_capacity(seed: int) -> None:
    """The overload comes at once, with nothing known yet: full throughput, short waits, and an end of it."""
    busy = shop(seed)
    busy.run(lambda now: 3 * CAPACITY if now < 20 else 0.5 * CAPACITY, 30)
    goodput, p99, refused = busy.between(0, 20)
    assert goodput >= 0.95 * CAPACITY
    assert p99 <= 0.05
    assert refused == pytest.approx(2 * CAPACITY * 20, rel=0.1)
    assert busy.between(20.5, 30)[2] <= 0.01 * 0.5 * CAPACITY * 9.5
    assert busy.limit.in_flight == 0


def test_without_the_limit_the_simulated_queue_does_overflow() -> None:
    """That the test above can fail."""
    busy = shop()
    busy.limit = ConcurrencyLimit(min_limit=10_000, max_limit=10_000, clock=lambda: busy.clock[0])
    busy.run(lambda now: 3 * CAPACITY, 5)
    assert busy.between(0, 1)[1] > 1


@pytest.mark.parametrize(
    ("times", "least", "most_without"), [(1.5, 0.6, 0.2), (2, 0.6, 0.2), (4, 0.95, None)]
)
def test_three_times_the_capacity_of_those_who_cannot_wait(
    times: float, least: float, most_without: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at the deadline those who are let in wait in vain, and as only answers are measured,
    which are all in time, ever more of them are let in.
    """

    def goodput() -> float:
        busy = shop()
        busy.deadline_s = times * SERVICE_S
        busy.run(lambda now: 3 * CAPACITY, 20)
        return busy.between(1, 20)[0]

    assert goodput() >= least * CAPACITY
    if most_without is not None:  # with more time nobody waits in vain anyway
        monkeypatch.setattr(ConcurrencyLimit, "_answered_within", lambda limit, time_left_s: float("inf"))
        assert goodput() <= most_without * CAPACITY


def test_who_has_little_time_is_refused_where_it_would_have_to_wait() -> None:
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=2, initial=100, clock=lambda: now[0])
    for _ in range(20):
        permit = limit.admit(0.001)  # nothing is known yet
        now[0] += 0.01
        permit.release(counts=True)
    permits = [limit.admit(0.001), limit.admit(0.001), limit.admit(0.016)]  # nobody need wait for long
    for time_left_s in (0.001, 0.016):
        with pytest.raises(RejectedError, match="leave no time before the deadline") as caught:
            limit.admit(time_left_s)
        assert caught.value.is_from_limit
    permits += [limit.admit(0.021), limit.admit(None), limit.admit(1.0)]
    assert limit.in_flight == len(permits)


def test_who_only_waits_is_in_nobody_s_way() -> None:
    """Of 34 ms 30 are spent waiting, for Redis say: in 60 ms seven are answered one after the other."""
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=1, initial=100, clock=lambda: now[0], rng=random.Random(0))
    for _ in range(20):
        permit = limit.admit(0.06)
        now[0] += 0.034
        permit.release(counts=True, waiting_s=0.03)
    for _ in range(7):
        limit.admit(0.0601)
    hints = []
    for _ in range(300):
        with pytest.raises(RejectedError, match="leave no time before the deadline") as caught:
            limit.admit(0.0601)
        hints.append(caught.value.retry_after_s)
    assert sum(hints[:50]) < sum(hints[-50:])


def test_a_quiet_server_refuses_nobody() -> None:
    quiet = shop()
    quiet.run(lambda now: 0.3 * CAPACITY, 30)
    assert quiet.between(0, 30)[2] <= 0.005 * 0.3 * CAPACITY * 30


@pytest.mark.parametrize("factor", [0.25, 4])
def test_what_requests_take_is_measured_again_under_load(factor: float) -> None:
    """A bundle that is slower or faster by four: after a probe all is as if it had always been so."""
    changed = shop(service_s=lambda now: SERVICE_S * (factor if now >= 10 else 1))
    changed.run(lambda now: 3 * CAPACITY / (factor if now >= 10 else 1), 120)
    goodput, p99, _ = changed.between(60, 120)
    assert goodput >= 0.95 * CAPACITY / factor
    assert p99 <= 0.05 * factor
    before = [limit for now, limit in changed.limits if 5 <= now < 10]
    after = [limit for now, limit in changed.limits if now >= 60]
    # So few at once that one more or less is a third.
    assert 0.75 <= (sum(after) / len(after)) / (sum(before) / len(before)) <= 2


def test_a_few_dear_requests_move_nothing() -> None:
    """Of a hundred one takes fifty times as long: the limit is what it is without them."""
    plain, mixed = shop(), shop()
    draw = random.Random(3)
    mixed.service_s = lambda now: SERVICE_S * (50 if draw.random() < 0.01 else 1)
    for busy in (plain, mixed):
        busy.run(lambda now: 3 * CAPACITY, 20)
    means = [sum(limit for _, limit in busy.limits) / len(busy.limits) for busy in (plain, mixed)]
    assert means[1] == pytest.approx(means[0], rel=0.25)


@pytest.mark.parametrize(
    ("took_s", "then"),
    [
        (2.5, 4 + 0.5 * (4 * 2 / 2.5 + 1 - 4)),  # it may take 2 s: less than it wants, more than it has
        (3, 4 - 0.5 * (4 - (4 * 2 / 3 + 1))),
        (20, 4 - 0.5 * (4 - (4 / 2 + 1))),  # no faster than this, whatever a window says
    ],
)
def test_one_window_by_hand(took_s: float, then: float) -> None:
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=2, window_requests=2, clock=lambda: now[0])
    for begin in (0.0, 1.0):  # measures t0, 1 s; nobody came near the limit, which stays
        now[0] = begin
        permit = limit.admit()
        now[0] = begin + 1
        permit.release(counts=True)
    assert limit._limit == 4
    permits = [limit.admit() for _ in range(4)]
    now[0] = 2.0 + took_s
    for permit in permits[2:]:
        permit.release(counts=True)
    assert limit._limit == pytest.approx(then)


def test_the_limit_of_one_worker_falls_as_far_as_it_has_to() -> None:
    """An overloaded machine: every request takes ten times what it took alone."""
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=1, initial=8, clock=lambda: now[0])
    lowest = limit.limit
    for number in range(140):
        permits = [limit.admit() for _ in range(1 if number < 20 else limit.limit)]
        now[0] += 0.01 if number < 20 else 0.1
        for permit in permits:
            permit.release(counts=True)
        lowest = min(lowest, limit.limit)
    assert lowest <= 2


def test_a_full_server() -> None:
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=1, clock=lambda: now[0], rng=random.Random(0))
    permits = [limit.admit(), limit.admit()]
    now[0] = 1.0  # not a burst any more
    hints = []
    for _ in range(200):
        with pytest.raises(RejectedError, match="the server is at its limit") as caught:
            limit.admit()
        hints.append(caught.value.retry_after_s)
    assert limit.in_flight == 2
    for permit in permits:
        permit.release(counts=True)
    assert limit.in_flight == 0
    assert 0.05 <= min(hints) < max(hints) <= 7.5
    assert sum(hints[:50]) < sum(hints[-50:])  # the more are refused, the later they should come back


def test_who_has_no_time_left_is_not_told_to_wait() -> None:
    error = RejectedError("full", 0.0501)
    for time_left_s, expected in ((None, "51"), (0.1002, "51"), (0.1, "-1"), (0.0, "-1")):
        hints = dict(error.metadata(time_left_s))
        assert hints == {"retry-after-ms": "51", "grpc-retry-pushback-ms": expected}


def admitted_to(limit: ConcurrencyLimit, num_asked: int) -> list[Permit]:
    permits = []
    for _ in range(num_asked):
        with contextlib.suppress(RejectedError):
            permits.append(limit.admit())
    return permits


def test_who_is_overloaded_takes_no_bursts() -> None:
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=1, initial=3, burst_s=0.1, calm_s=1.0, clock=lambda: now[0])
    # Of a window of twenty requests five may be refused; the sixth is at 5.5.
    for at_s, num_asked, expected in ((5.0, 11, 6), (5.5, 10, 6), (6.4, 10, 3), (7.3, 10, 3), (8.4, 10, 6)):
        now[0] = at_s  # nobody is here: the queue is empty
        permits = admitted_to(limit, num_asked)
        assert len(permits) == expected
        for permit in permits:
            permit.release(counts=False)


@pytest.mark.parametrize("seed", range(5))
def test_a_server_that_has_just_started_refuses_nobody_for_not_knowing(seed: int) -> None:
    started = shop(seed)
    started.run(lambda now: 0.6 * CAPACITY, 2)
    assert started.between(0, 2)[2] == 0


def test_a_burst_may_exceed_the_limit_for_a_moment() -> None:
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=1, initial=3, burst_s=0.1, calm_s=0.0, clock=lambda: now[0])

    def admitted(num_asked: int) -> list[Permit]:
        return admitted_to(limit, num_asked)

    now[0] = 5.0  # nobody was here
    burst = admitted(10)
    assert len(burst) == BURST * 3
    for permit in burst[2:]:
        permit.release(counts=False)
    now[0] = 5.09
    burst = burst[:2] + admitted(2)
    assert len(burst) == 4
    now[0] = 5.11  # the queue has been there for too long
    assert not admitted(1)
    burst.pop().release(counts=False)
    assert not admitted(1)
    burst.pop().release(counts=False)
    burst += admitted(1)
    assert len(burst) == 3
    for permit in burst:
        permit.release(counts=False)
    assert len(admitted(10)) == BURST * 3  # there was no queue for a moment

    limit = ConcurrencyLimit(min_limit=1, initial=3, max_limit=4, clock=lambda: now[0])
    assert len(admitted(10)) == 4


def test_what_was_cancelled_is_not_measured() -> None:
    now = [0.0]
    limit = ConcurrencyLimit(min_limit=2, window_requests=1, window_s=0.0, clock=lambda: now[0])
    permit = limit.admit()
    now[0] = 100.0
    permit.release(counts=False)
    assert limit.in_flight == 0
    assert limit._unqueued_s is None


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="min_limit is 0; expected 1 to max_limit, 1000"):
        ConcurrencyLimit(min_limit=0)
    with pytest.raises(ValueError, match="tolerance is 1; expected more than 1"):
        ConcurrencyLimit(min_limit=1, tolerance=1)
    with pytest.raises(ValueError, match="burst is 0; expected a finite number above 0"):
        RateLimit(1, 0)


def test_a_bucket_by_hand() -> None:
    now = [0.0]
    limiter = RateLimiter(RateLimit(per_s=2, burst=3), clock=lambda: now[0])
    for _ in range(3):
        limiter.check("ann")
    with pytest.raises(RejectedError, match=r"more than 2 requests a second; try again in 0\.50 s"):
        limiter.check("ann")
    limiter.check("bob")  # has a bucket of his own
    now[0] = 0.25
    with pytest.raises(RejectedError) as caught:
        limiter.check("ann")
    assert caught.value.retry_after_s == pytest.approx(0.25)
    now[0] = 0.5
    limiter.check("ann")
    now[0] = 100.0
    for _ in range(3):
        limiter.check("ann")
    now[0] = 50.0  # a clock that goes back gives and takes nothing
    with pytest.raises(RejectedError):
        limiter.check("ann")
    now[0] = 100.0
    seldom = RateLimit(per_s=0.1, burst=0.5)
    limiter.check("cat", seldom)  # a full bucket lets it in, however small
    with pytest.raises(RejectedError, match=r"try again in 5\.00 s"):
        limiter.check("cat", seldom)


def test_a_caller_s_own_limit_and_none() -> None:
    limiter = RateLimiter(None, clock=lambda: 0.0)
    for _ in range(1000):
        limiter.check("ann")
    limiter.check("bob", RateLimit(1, 1))
    with pytest.raises(RejectedError):
        limiter.check("bob", RateLimit(1, 1))


def test_no_more_buckets_than_allowed() -> None:
    limiter = RateLimiter(RateLimit(1, 1), max_callers=2, clock=lambda: 0.0)
    for caller in ("a", "b", "c"):
        limiter.check(caller)
    assert list(limiter._buckets) == ["b", "c"]


@given(st.floats(0.1, 50), st.floats(1, 20), st.lists(st.floats(0, 2), min_size=1, max_size=60))
def test_no_stretch_of_time_lets_more_in_than_burst_and_rate(
    per_s: float, burst: float, gaps: list[float]
) -> None:
    now = [0.0]
    limiter = RateLimiter(RateLimit(per_s, burst), clock=lambda: now[0])
    admitted: list[float] = []
    for gap in gaps:
        now[0] += gap
        try:
            limiter.check("x")
            admitted.append(now[0])
        except RejectedError as error:
            now[0] += error.retry_after_s + 1e-9
            limiter.check("x")  # the hint is right
            admitted.append(now[0])
    for first, begin in enumerate(admitted):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= burst + per_s * (admitted[last] - begin) + 1e-6
