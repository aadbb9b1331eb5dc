"""How an answer came about: the one place where stages are timed, counted and allowed to fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from engine.policies import Arrangement

logger = logging.getLogger(__name__)

T = TypeVar("T")


class VisitorKind(Enum):
    """How well a visitor is known; decides where the candidates come from."""

    UNSPECIFIED = 0  # the question had no visitor
    KNOWN_USER = 1  # the user is in the bundle
    HISTORY_ONLY = 2  # no such user, but a history with at least one known item
    ANONYMOUS = 3  # nothing is known


@dataclass(frozen=True)
class StageTiming:
    """One stage: how long it took, and how many items entered and left it.

    A name with a dot is a part of the stage before the dot, whose time includes it: "retrieval.popular".
    """

    stage: str
    duration_us: int
    num_in: int
    num_out: int


@dataclass
class Trace:
    """What happened to one request, stage by stage."""

    bundle_version: str
    visitor_kind: VisitorKind = VisitorKind.UNSPECIFIED
    unknown_user: bool = False  # a user id was given, and the bundle does not know it
    num_unknown_history_items: int = 0
    deadline: float | None = None  # on the clock of time.perf_counter(); later stages are skipped
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
        otherwise: Callable[[], T] | None = None,
        size: Callable[[T], Any] = len,  # type: ignore[assignment]  # T is a list of items or a mask
    ) -> T:
        """Return work(), or otherwise() where work raises or the deadline has passed.

        A stage without an `otherwise` must not fail: what it raises goes to the caller. The parts of a stage
        (see StageTiming) may fail each for itself; the deadline is asked before the whole stage alone.
        """
        begin = time.perf_counter()
        if otherwise is None:
            result = work()
        elif self.deadline is not None and begin >= self.deadline and "." not in stage:
            logger.warning("%s was skipped: the deadline has passed", stage)
            result = self._degrade(stage, otherwise)
        else:
            try:
                result = work()
            except Exception:
                logger.exception("%s failed; the answer is made without it", stage)
                result = self._degrade(stage, otherwise)
        now = time.perf_counter()
        self.timings.append(StageTiming(stage, round((now - begin) * 1e6), num_in, int(size(result))))
        self.total_us = round((now - self.started) * 1e6)
        return result

    def _degrade(self, stage: str, otherwise: Callable[[], T]) -> T:
        self.degraded_stages.append(stage)
        return otherwise()
