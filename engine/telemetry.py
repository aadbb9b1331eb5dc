"""What an operator sees: Prometheus metrics, OpenTelemetry spans, and one JSON line per log record.

Spans need the extra `otel` and a tracer provider that the program around us has set up; else there are none.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, TextIO

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from protos.trirank.v1 import recommender_pb2 as pb

# Seconds. Finer where a request should be (1 to 50 ms), as a quantile is read between two bounds.
BUCKETS = (
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075,
    0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0
)  # fmt: skip
# Codes that are the server's fault, by OpenTelemetry's conventions for gRPC; for the others the caller is.
SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
SERVICE = pb.DESCRIPTOR.services_by_name["RecommenderService"].full_name
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")

# The request that this thread or task works on; copied into the pool's threads by contextvars.copy_context().
request_id: ContextVar[str] = ContextVar("request_id", default="")


class StageTime(NamedTuple):
    """When a stage ran, on the clock of time.perf_counter()."""

    stage: str
    began_s: float
    ended_s: float
    is_degraded: bool = False


class Metrics:
    """The server's numbers, in a registry of their own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "trirank", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests that were answered, by status code", ["method", "code"], **options
        )
        self.request_seconds = Histogram(
            "request_seconds",
            "From a request's arrival to its answer",
            ["method"],
            buckets=BUCKETS,
            **options,
        )
        self.stage_seconds = Histogram(
            "stage_seconds", "One stage of a request", ["stage"], buckets=BUCKETS, **options
        )
        self.degraded = Counter(
            "degraded",
            "Stages that failed or were skipped in a request that was answered",
            ["stage"],
            **options,
        )
        self.rejected = Counter(
            "rejected", "Requests refused without work: limit, rate, key", ["reason"], **options
        )
        self.key_requests = Counter(
            "key_requests",
            "Requests by API key and status code, refused ones too",
            ["key", "code"],
            **options,
        )
        self.in_flight = Gauge("in_flight", "Requests let in and not answered yet", **options)
        self.stuck_workers = Gauge("stuck_workers", "Workers that do not come back from a request", **options)
        self.concurrency_limit = Gauge("concurrency_limit", "Requests that may be at once, now", **options)
        self.events = Counter(
            "events",
            "Events recorded: new, repeated, delayed (on disk until Redis is back), failed",
            ["result"],
            **options,
        )
        self.bundle_info = Gauge("bundle_info", "1 for each bundle in use", ["version", "variant"], **options)
        self.bundle_waiting = Gauge(
            "bundle_waiting", "1 while a pin (trirank rollback) keeps a newer bundle out", **options
        )
        self.bundle_swaps = Counter("bundle_swaps", "New bundles: swapped or refused", ["result"], **options)
        self.shadow = Counter(
            "shadow",
            "Requests offered to the shadow: answered, degraded, failed, left out",
            ["result"],
            **options,
        )
        self.shadow_seconds = Histogram(
            "shadow_seconds", "An answer of the shadow", buckets=BUCKETS, **options
        )
        self.shadow_overlap = Histogram(
            "shadow_overlap",
            "Share of the shown items that the shadow's slate has too",
            buckets=[tenths / 10 for tenths in range(11)],
            **options,
        )
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        # A request looks up a dozen series by their labels: as long as it takes to count in them.
        self._requests_of = functools.cache(self.requests.labels)
        self._seconds_of = functools.cache(self.request_seconds.labels)
        self._stage_seconds_of = functools.cache(self.stage_seconds.labels)

    def observe_request(
        self,
        method: str,
        code: str,
        duration_s: float,
        stages: Iterable[StageTime] = (),
    ) -> None:
        """Note a request that was answered, and its stages."""
        self._requests_of(method, code).inc()
        self._seconds_of(method).observe(duration_s)
        for stage in stages:
            self._stage_seconds_of(stage.stage).observe(stage.ended_s - stage.began_s)
            if stage.is_degraded:
                self.degraded.labels(stage.stage).inc()

    def observe_refusal(self, method: str, code: str, reason: str) -> None:
        """Note a request that was refused without work; its latency would only hide that of the others."""
        self._requests_of(method, code).inc()
        self.rejected.labels(reason).inc()

    def observe_key(self, key_id: str, code: str) -> None:
        """Note how a request with an API key ended."""
        self.key_requests.labels(key_id, code).inc()

    def serve(self, port: int, address: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
        """Answer GET /metrics in a thread of its own; return the port, and what ends it.

        An IPv6 address may stand in brackets. Raises OSError where the port is taken.
        """
        server, thread = start_http_server(port, address.strip("[]"), self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return int(server.server_address[1]), stop


class _Span(Protocol):
    def end(self, end_time: int | None = None) -> None: ...

    def is_recording(self) -> bool: ...

    def set_attribute(self, key: str, value: Any) -> None: ...

    def set_status(self, status: Any, description: str | None = None) -> None: ...


class Tracing:
    """Spans of requests and their stages, made once the request is over, so that no stage knows of them."""

    def __init__(self, tracer: Any | None = None) -> None:
        """Take a tracer, or ask the OpenTelemetry API for one; without the API there are no spans."""
        self._api: Any | None = None
        try:
            from opentelemetry import propagate, trace
        except ModuleNotFoundError:
            return
        self._api = trace
        self._extract = propagate.extract
        self._tracer = tracer or trace.get_tracer("trirank")

    def record(
        self,
        method: str,
        began_s: float,
        ended_s: float,
        stages: Iterable[StageTime],
        *,
        attributes: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Make one span for a request and one below it for each stage.

        Args:
            method: the call, the name of the request's span.
            began_s: on the clock of time.perf_counter(), as are all times here.
            ended_s: likewise.
            stages: of the request.
            attributes: of the request's span, such as the request id and the bundle's version. `code`, the
                name of the gRPC status, also says whether the span is an error.
            metadata: of the call; a `traceparent` in it makes the span part of the caller's trace.
        """
        if self._api is None:
            return
        offset = time.time() - time.perf_counter()  # spans are on the wall clock, in ns

        def at(moment_s: float) -> int:
            return round((moment_s + offset) * 1e9)

        parent = self._extract(dict(metadata or {}))
        span: _Span = self._tracer.start_span(
            method,
            context=parent,
            kind=self._api.SpanKind.SERVER,
            # The names that tools know. OpenTelemetry is about to replace them by others.
            attributes={"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": method},
            start_time=at(began_s),
        )
        if not span.is_recording():  # nobody listens: its parts need not be told either
            span.end(at(ended_s))
            return
        attributes = attributes or {}
        for key, value in attributes.items():
            span.set_attribute(f"trirank.{key}", value)
        if code := attributes.get("code"):
            span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
            if code in SERVER_FAULTS:
                span.set_status(self._api.StatusCode.ERROR, code)
        below = self._api.set_span_in_context(span, parent)
        for stage in stages:
            part: _Span = self._tracer.start_span(stage.stage, context=below, start_time=at(stage.began_s))
            if stage.is_degraded:
                part.set_attribute("trirank.degraded", True)
            part.end(at(stage.ended_s))
        span.end(at(ended_s))


def read_request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the caller's `x-request-id` where it is a harmless one, else a new id."""
    for name, value in metadata:
        if name.lower() == "x-request-id" and isinstance(value, str) and REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON, with the request it belongs to.

    What is given as `extra={"fields": {...}}` becomes fields of the line.
    """

    def __init__(self, fields: Mapping[str, Any] | None = None) -> None:
        """Take fields that every line has, such as which of several processes writes it."""
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        milliseconds = int(record.msecs)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{milliseconds:03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        } | self._fields
        if found := request_id.get():
            line["request_id"] = found
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json(
    stream: TextIO | None = None, level: int = logging.INFO, fields: Mapping[str, Any] | None = None
) -> None:
    """Send all log records to a stream (stderr where none is given) as lines of JSON, each with `fields`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(fields))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class LimitedLog:
    """Lets a message through at most once a second, and counts the others: refusals come by the thousand."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._next_at: dict[str, float] = {}
        self._num_left_out: dict[str, int] = {}

    def warning(self, message: str, detail: str = "") -> None:
        """Log a message, with the number of equal ones that were left out before it.

        Args:
            message: what counts as equal.
            detail: of this one, said behind it.
        """
        more = self._let_through(message)
        if more is not None:
            self._logger.warning("%s%s%s", message, detail, more)

    def exception(self, message: str, error: BaseException) -> None:
        """Log an error with its traceback; a message and a kind of error count as equal."""
        more = self._let_through(f"{message}: {type(error).__name__}")
        if more is not None:
            self._logger.error("%s%s", message, more, exc_info=error)

    def _let_through(self, key: str) -> str | None:
        """Return what to say of those that were left out; None where this one is to be."""
        with self._lock:
            now = self._clock()
            if now < self._next_at.get(key, float("-inf")):
                self._num_left_out[key] = self._num_left_out.get(key, 0) + 1
                return None
            self._next_at[key] = now + 1.0
            left_out = self._num_left_out.pop(key, 0)
        return f" ({left_out} more in between)" if left_out else ""
