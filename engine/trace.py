"""How an answer came about: the one place where stages are timed, counted and allowed to fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from engine.deadline import AbandonedError, Budget, StageCosts
from engine.policies import Arrangement
from engine.telemetry import LimitedLog

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

T = TypeVar("T")


class VisitorKind(Enum):
    """How well a visitor is known; decides where the candidates come from."""

    UNSPECIFIED = 0  # the question had no visitor
    KNOWN_USER = 1  # the user is in the bundle
    HISTORY_ONLY = 2  # no such user, but a history with at least one known item
    ANONYMOUS = 3  # nothing is known


class StageTiming(NamedTuple):
    """One stage: how long it took, and how many items entered and left it.

    A name with a dot is a part of the stage before the dot, whose time includes it: "retrieval.popular".
    """

    stage: str
    began_s: float  # on the clock of time.perf_counter()
    ended_s: float
    num_in: int
    num_out: int

    @property
    def duration_us(self) -> int:
        """How long it took."""
        return round((self.ended_s - self.began_s) * 1e6)


@dataclass
class Trace:
    """What happened to one request, stage by stage."""

    bundle_version: str
    visitor_kind: VisitorKind = VisitorKind.UNSPECIFIED
    unknown_user: bool = False  # a user id was given, and the bundle does not know it
    num_unknown_history_items: int = 0
    variant: str = ""  # of the pipeline (engine/variants.py)
    budget: Budget = field(default_factory=lambda: Budget(None))
    costs: StageCosts = field(default_factory=StageCosts)  # of requests before this one
    timings: list[StageTiming] = field(default_factory=list)
    degraded_stages: list[str] = field(default_factory=list)
    relaxed_rules: list[str] = field(default_factory=list)
    arrangement: Arrangement | None = None  # of a slate
    started: float = field(default_factory=time.perf_counter)
    total_us: int = 0  # so far

    def run(
        self,
        stage: str,
        work: Callable[[], T],
        *,
        num_in: int,
        num_affordable: int | None = None,
        otherwise: Callable[[], T] | None = None,
        size: Callable[[T], Any] = len,  # type: ignore[assignment]  # T is a list of items or a mask
    ) -> T:
        """Return work(), or otherwise() where work raises or would take more time than the stage has.

        A stage without an `otherwise` must not fail: what it raises goes to the caller. The parts of a stage
        (see StageTiming) may fail each for itself; the time is asked about before the whole stage alone.

        Args:
            stage: its name.
            work: makes the result; AbandonedError, too, goes to the caller.
            num_in: items that enter.
            num_affordable: of those, the items that `work` limits itself to (see `affordable`), where it can;
                fewer than num_in is a degraded stage.
            otherwise: makes a result that costs less.
            size: how many items a result has.
        """
        self.budget.check()
        begin = time.perf_counter()
        if otherwise is None or "." in stage:
            result = self._attempt(stage, work, otherwise)
        elif not self.affordable(stage, 1):
            seldom.warning(f"{stage} was skipped: too little time")
            self.costs.ease(stage)
            result = self._degrade(stage, otherwise)
        else:
            num_degraded = len(self.degraded_stages)
            result = self._attempt(stage, work, otherwise)
            if len(self.degraded_stages) == num_degraded:
                units = 1 if num_affordable is None else num_affordable
                self.costs.observe(stage, time.perf_counter() - begin, units)
                if num_affordable is not None and num_affordable < num_in:
                    seldom.warning(f"{stage} was cut short: too little time")
                    self.degraded_stages.append(stage)
        now = time.perf_counter()
        self.timings.append(StageTiming(stage, begin, now, num_in, int(size(result))))
        self.total_us = round((now - self.started) * 1e6)
        return result

    def affordable(self, stage: str, num_wanted: int) -> int:
        """Return how many items a stage that begins now has time for, 0 to num_wanted."""
        later_s = self.costs.usual(self.budget.later(stage))
        return self.budget.affordable(stage, num_wanted, self.costs.per_item(stage), later_s)

    def _attempt(self, stage: str, work: Callable[[], T], otherwise: Callable[[], T] | None) -> T:
        if otherwise is None:
            return work()
        try:
            return work()
        except AbandonedError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this stage's alone
            seldom.exception(f"{stage} failed; the answer is made without it", error)
            return self._degrade(stage, otherwise)

    def _degrade(self, stage: str, otherwise: Callable[[], T]) -> T:
        self.degraded_stages.append(stage)
        return otherwise()
