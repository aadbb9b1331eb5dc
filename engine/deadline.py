"""The time that a request has, and how its stages share it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping

# What each stage may take of the time that is left for it and all after it. The reply's part is the way back:
# to write the answer, and the network. Time that a stage does not use is shared by those after it.
STAGE_SHARES = {
    "history": 0.1, "filtering": 0.05, "retrieval": 0.3, "ranking": 0.25, "reranking": 0.1, "reply": 0.2
}  # fmt: skip


def _parts_of(shares: Mapping[str, float]) -> dict[str, float]:
    """Return, of what is left when a stage begins, the part that is its own."""
    if not shares or min(shares.values()) <= 0:
        raise ValueError(f"shares are {dict(shares)}; expected a number above 0 for each stage")
    stages = list(shares)
    return {
        stage: shares[stage] / sum(shares[later] for later in stages[place:])
        for place, stage in enumerate(stages)
    }


PARTS = _parts_of(STAGE_SHARES)


class AbandonedError(Exception):
    """Nobody waits for the answer any more: no further stage begins."""


class Budget:
    """The time left to one request. Any thread may ask; without a deadline there is no end of it."""

    def __init__(
        self,
        total_s: float | None,
        shares: Mapping[str, float] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin to count.

        Args:
            total_s: until the caller gives up; None for a caller who waits for ever.
            shares: of each stage, in their order, all above 0, the last one the reply's; STAGE_SHARES where
                None.
            clock: seconds.
        """
        self._clock = clock
        self._ends = math.inf if total_s is None else clock() + total_s
        self._is_cancelled = False
        shares = STAGE_SHARES if shares is None else shares
        self._parts = PARTS if shares is STAGE_SHARES else _parts_of(shares)
        self._stages = list(shares)
        self._reply_s = 0.0
        if total_s is not None:
            self._reply_s = total_s * shares[self._stages[-1]] / sum(shares.values())

    def cancel(self) -> None:
        """Note that nobody waits for the answer any more: all time is up."""
        self._is_cancelled = True

    def check(self) -> None:
        """Raise AbandonedError where `cancel` was called."""
        if self._is_cancelled:
            raise AbandonedError("the caller has gone")

    def remaining(self) -> float:
        """Return the seconds that are left, at least 0; infinity without a deadline."""
        return 0.0 if self._is_cancelled else max(0.0, self._ends - self._clock())

    def expired(self) -> bool:
        """Return whether no time is left."""
        return self.remaining() <= 0

    def allowance(self, stage: str, later_s: float = math.inf) -> float:
        """Return the seconds that a stage may take if it begins now.

        All that is left but the reply's share of the whole and what the stages in between will take; at
        least its own share among those not yet over. Shares alone would leave out a stage of 5 ms with 20
        left that nobody else needs.

        Args:
            stage: one of the shares; KeyError for another.
            later_s: what the stages behind it, but for the reply, are foreseen to take together.
        """
        left = self.remaining()
        share = left * self._parts[stage]
        return share if math.isinf(left) else max(share, left - self._reply_s - later_s)

    def later(self, stage: str) -> list[str]:
        """Return the stages between one and the reply."""
        return self._stages[self._stages.index(stage) + 1 : -1]

    def affordable(self, stage: str, num_wanted: int, cost_s: float, later_s: float = math.inf) -> int:
        """Return how many of the items a stage can work on within its allowance, 0 to num_wanted.

        Args:
            stage: one that begins now.
            num_wanted: items that it would like to work on.
            cost_s: what one item costs, at least 0 (StageCosts.per_item).
            later_s: see allowance.
        """
        allowance = self.allowance(stage, later_s)
        if not allowance:
            return 0
        return num_wanted if num_wanted * cost_s <= allowance else int(allowance / cost_s)


class StageCosts:
    """What stages cost of late, so that one that would overrun is not begun. Any thread may ask and tell.

    Mean plus two mean deviations, both smoothed exponentially, as TCP foretells a round trip (Jacobson and
    Karels, SIGCOMM 1988; RFC 6298), which takes four: too early a retransmission harms all. Here four leave
    out what there is time for, and hardly more answers are in time (benchmarks/results/README.md).
    """

    MEAN_GAIN, DEVIATION_GAIN, NUM_DEVIATIONS = 1 / 8, 1 / 4, 2

    def __init__(self) -> None:
        self._estimates: dict[str, tuple[float, float]] = {}  # mean and deviation of s per item
        self._means: dict[str, float] = {}  # of a whole stage's s
        self._lock = threading.Lock()

    def observe(self, stage: str, duration_s: float, num_items: int) -> None:
        """Note what a stage took for this many items; for none it says nothing."""
        if num_items < 1:
            return
        cost = duration_s / num_items
        with self._lock:
            usual_s = self._means.get(stage, duration_s)
            self._means[stage] = usual_s + self.MEAN_GAIN * (duration_s - usual_s)
            if stage not in self._estimates:
                self._estimates[stage] = (cost, cost / 2)
                return
            mean, deviation = self._estimates[stage]
            deviation += self.DEVIATION_GAIN * (abs(cost - mean) - deviation)
            self._estimates[stage] = (mean + self.MEAN_GAIN * (cost - mean), deviation)

    def ease(self, stage: str) -> None:
        """Note that a stage was passed over for its cost, which shrinks by an eighth.

        What is not begun is not measured; without this one slow moment could keep a stage out for ever.
        """
        with self._lock:
            if stage in self._estimates:
                mean, deviation = self._estimates[stage]
                keep = 1 - self.MEAN_GAIN
                self._estimates[stage] = (keep * mean, keep * deviation)
                self._means[stage] *= keep

    def usual(self, stages: Iterable[str]) -> float:
        """Return the seconds that stages take together on average; one that was never seen counts as none."""
        return sum(self._means.get(stage, 0.0) for stage in stages)

    def per_item(self, stage: str) -> float:
        """Return the seconds that an item may cost in a stage; 0 for a stage that was never seen."""
        mean, deviation = self._estimates.get(stage, (0.0, 0.0))
        return mean + self.NUM_DEVIATIONS * deviation
