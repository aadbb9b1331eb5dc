"""Slates that were made a moment ago, for requests that ask the same: a page that every new visitor opens."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from engine.pipeline import RecommendationPipeline, Visitor
from protos.trirank.v1 import recommender_pb2 as pb

ENTRY_BYTES = 600  # of memory beside an answer's own


class ResponseCache:
    """The newest answers, for a short while. Any thread may use it.

    An answer is found only by a request of the same bytes, about a visitor of the same history, of the same
    pipeline: a new event, a new bundle and new policies each make other answers. What changes by the clock
    alone (freshness, sales that end) is as old as `max_age_s` at most.

    Answers are kept as bytes, a seventh of what messages take: 64 MB are 30,000 slates of 50 items.
    """

    def __init__(
        self, max_age_s: float, max_bytes: int = 64 << 20, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_age_s <= 0 or max_bytes < 1:
            raise ValueError(
                f"max_age_s is {max_age_s}, max_bytes {max_bytes}; expected above 0 and at least 1"
            )
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._answers: OrderedDict[Hashable, tuple[float, bytes]] = OrderedDict()  # oldest first

    @staticmethod
    def key(
        pipeline: RecommendationPipeline, request: pb.RecommendRequest, visitor: Visitor
    ) -> tuple[Hashable, ...]:
        """Return what an answer depends on, but for the clock: as digests, as a history may be megabytes."""
        history = visitor.history
        parts = (
            request.SerializeToString(deterministic=True),
            history.items.tobytes(),
            history.event_types.tobytes(),
            history.timestamps.tobytes(),
        )
        return (pipeline.number, *(hashlib.blake2b(part, digest_size=16).digest() for part in parts))

    def get(self, key: Hashable) -> pb.RecommendResponse | None:
        """Return an answer; None where there is none, or it is too old."""
        with self._lock:
            made_at, answer = self._answers.get(key, (float("-inf"), b""))
        return pb.RecommendResponse.FromString(answer) if self._clock() - made_at < self._max_age_s else None

    def put(self, key: Hashable, answer: pb.RecommendResponse) -> None:
        """Keep an answer."""
        content = answer.SerializeToString()
        with self._lock:
            now = self._clock()
            if key in self._answers:
                self._num_bytes -= len(self._answers.pop(key)[1]) + ENTRY_BYTES
            self._answers[key] = (now, content)
            self._num_bytes += len(content) + ENTRY_BYTES
            while self._answers and (self._num_bytes > self._max_bytes or self._is_too_old(now)):
                self._num_bytes -= len(self._answers.popitem(last=False)[1][1]) + ENTRY_BYTES

    def _is_too_old(self, now: float) -> bool:
        """Return whether the oldest answer is."""
        made_at, _ = next(iter(self._answers.values()))
        return now - made_at >= self._max_age_s
