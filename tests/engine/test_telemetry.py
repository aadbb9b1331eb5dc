from __future__ import annotations

import contextvars
import io
import json
import logging
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.telemetry import (
    BUCKETS,
    JsonFormatter,
    LimitedLog,
    Metrics,
    StageTime,
    Tracing,
    log_as_json,
    read_request_id,
    request_id,
)

RPC = {"rpc.system": "grpc", "rpc.service": "trirank.v1.RecommenderService", "rpc.method": "Recommend"}
STAGES = [StageTime("retrieval", 10.0, 10.004), StageTime("ranking", 10.004, 10.005, is_degraded=True)]


def test_a_request_in_the_metrics() -> None:
    metrics = Metrics()
    metrics.observe_request("Recommend", "OK", 0.006, STAGES)
    metrics.observe_request("Recommend", "INTERNAL", 0.001)
    value = metrics.registry.get_sample_value
    assert value("trirank_requests_total", {"method": "Recommend", "code": "OK"}) == 1
    assert value("trirank_requests_total", {"method": "Recommend", "code": "INTERNAL"}) == 1
    assert value("trirank_request_seconds_sum", {"method": "Recommend"}) == pytest.approx(0.007)
    assert value("trirank_request_seconds_bucket", {"method": "Recommend", "le": "0.005"}) == 1
    assert value("trirank_request_seconds_bucket", {"method": "Recommend", "le": "0.0075"}) == 2
    assert value("trirank_stage_seconds_sum", {"stage": "retrieval"}) == pytest.approx(0.004)
    assert value("trirank_degraded_total", {"stage": "ranking"}) == 1
    assert value("trirank_degraded_total", {"stage": "retrieval"}) is None
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_metrics_over_http() -> None:
    metrics = Metrics()
    metrics.in_flight.set(3)
    metrics.rejected.labels("limit").inc()
    port, stop = metrics.serve(0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            text = response.read().decode()
    finally:
        stop()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["trirank_in_flight"].samples[0].value == 3
    assert families["trirank_rejected"].samples[0].labels == {"reason": "limit"}
    assert "process_resident_memory_bytes" in families
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)


def test_two_servers_in_one_process_do_not_mix() -> None:
    first, second = Metrics(), Metrics()
    first.in_flight.inc()
    assert second.registry.get_sample_value("trirank_in_flight") == 0


class FakeTracer:
    """Keeps what a tracer is asked for."""

    def __init__(self, is_recording: bool = True) -> None:
        self.spans: list[dict[str, Any]] = []
        self.is_recording = is_recording

    def start_span(
        self, name: str, context: Any = None, kind: Any = None, attributes: Any = None, start_time: int = 0
    ) -> Any:
        tracer, entry = self, {"name": name, "context": context, "start": start_time}
        entry["attributes"] = dict(attributes or {})

        class Span:
            def is_recording(self) -> bool:
                return tracer.is_recording

            def set_attribute(self, key: str, value: Any) -> None:
                entry["attributes"][key] = value

            def end(self, end_time: int) -> None:
                entry["end"] = end_time
                tracer.spans.append(entry)

        return Span()


def test_spans_of_a_request() -> None:
    tracer = FakeTracer()
    began = time.perf_counter()
    stages = [
        StageTime("retrieval", began + 0.001, began + 0.003),
        StageTime("ranking", began + 0.003, began + 0.004, is_degraded=True),
    ]
    Tracing(tracer).record("Recommend", began, began + 0.005, stages, attributes={"bundle": "b1"})
    retrieval, ranking, request = tracer.spans
    assert [span["name"] for span in tracer.spans] == ["retrieval", "ranking", "Recommend"]
    assert request["attributes"] == RPC | {"trirank.bundle": "b1"}
    assert ranking["attributes"] == {"trirank.degraded": True}
    assert retrieval["context"] is not None
    for span, begin_ms, end_ms in ((request, 0, 5), (retrieval, 1, 3), (ranking, 3, 4)):
        assert span["start"] - request["start"] == pytest.approx(begin_ms * 1e6, abs=1000)
        assert span["end"] - request["start"] == pytest.approx(end_ms * 1e6, abs=1000)
    assert abs(request["start"] / 1e9 - time.time()) < 3600


def test_of_a_request_that_nobody_records_there_are_no_parts() -> None:
    tracer = FakeTracer(is_recording=False)
    Tracing(tracer).record("Recommend", 0.0, 1.0, STAGES, attributes={"bundle": "b1"})
    assert [(span["name"], span["attributes"]) for span in tracer.spans] == [("Recommend", RPC)]


def test_without_a_tracer_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    Tracing().record("Recommend", 0.0, 1.0, STAGES)


def test_spans_by_the_real_api() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    began = time.perf_counter()
    stages = [StageTime("ranking", began + 0.001, began + 0.002)]
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    Tracing(provider.get_tracer("test")).record("Recommend", began, began + 0.003, stages, metadata=parent)
    ranking, request = exporter.get_finished_spans()
    assert (ranking.name, request.name) == ("ranking", "Recommend")
    assert ranking.parent.span_id == request.context.span_id
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert f"{ranking.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("code", "number", "is_error"),
    [
        ("OK", 0, False),
        ("CANCELLED", 1, False),
        ("UNKNOWN", 2, True),
        ("INVALID_ARGUMENT", 3, False),
        ("DEADLINE_EXCEEDED", 4, True),
        ("NOT_FOUND", 5, False),
        ("UNIMPLEMENTED", 12, True),
        ("INTERNAL", 13, True),
        ("UNAVAILABLE", 14, True),
        ("DATA_LOSS", 15, True),
    ],
)
def test_a_span_says_whose_fault_it_was(code: str, number: int, is_error: bool) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import SpanKind, StatusCode

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracing(provider.get_tracer("test")).record("Recommend", 0.0, 1.0, STAGES[:1], attributes={"code": code})
    stage, request = exporter.get_finished_spans()
    assert (stage.kind, request.kind) == (SpanKind.INTERNAL, SpanKind.SERVER)
    assert stage.status.status_code == StatusCode.UNSET
    expected = (StatusCode.ERROR, code) if is_error else (StatusCode.UNSET, None)
    assert (request.status.status_code, request.status.description) == expected
    assert request.attributes == RPC | {"trirank.code": code, "rpc.grpc.status_code": number}


def test_log_lines_are_json_with_the_request_s_id() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.info("outside %d", 1)
    token = request_id.set("r-1")
    try:
        try:
            raise ValueError("a\nb")
        except ValueError:
            logger.exception("line\nbreak", extra={"fields": {"user": "🎉"}})
        with ThreadPoolExecutor(1) as pool:
            pool.submit(contextvars.copy_context().run, logger.info, "in a thread").result()
    finally:
        request_id.reset(token)
    outside, inside, threaded = map(json.loads, stream.getvalue().splitlines())
    assert (outside["message"], outside["level"], "request_id" in outside) == ("outside 1", "INFO", False)
    assert (inside["message"], inside["user"], inside["request_id"]) == ("line\nbreak", "🎉", "r-1")
    assert "ValueError: a\nb" in inside["exception"]
    assert threaded["request_id"] == "r-1"
    assert time.strptime(outside["time"][:19], "%Y-%m-%dT%H:%M:%S")


def test_log_as_json_takes_the_root_logger() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        root.handlers = []
        log_as_json(stream, fields={"worker": 1})
        logging.getLogger("engine.x").warning("seen")
    finally:
        root.handlers, root.level = before, level
    line = json.loads(stream.getvalue())
    assert (line["message"], line["worker"]) == ("seen", 1)


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ([("x-request-id", "abc-1.2:3")], True),
        ([("X-Request-Id", "a" * 64)], True),
        ([("x-request-id", "a" * 65)], False),
        ([("x-request-id", "two lines\nforged")], False),
        ([("x-request-id", "")], False),
        ([("x-request-id", b"abc")], False),
        ([], False),
    ],
)
def test_request_ids(metadata: list[tuple[str, str | bytes]], kept: bool) -> None:
    found = read_request_id(metadata)
    assert (found == metadata[0][1] if metadata else False) == kept
    assert kept or len(found) == 32
    assert kept or found != read_request_id(metadata)


def test_a_flood_of_one_message(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = LimitedLog(logging.getLogger("flood"), clock=lambda: now[0])
    for _ in range(100):
        log.warning("refused")
    log.warning("other")
    now[0] = 1.0
    log.warning("refused")
    assert [record.getMessage() for record in caplog.records] == [
        "refused",
        "other",
        "refused (99 more in between)",
    ]


def test_tracebacks_by_the_hundred(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = LimitedLog(logging.getLogger("flood"), clock=lambda: now[0])
    for number in range(100):
        log.exception("ranking failed", ValueError(f"row {number}"))
    log.exception("ranking failed", OSError("another kind"))
    now[0] = 1.0
    log.exception("ranking failed", ValueError("row 100"))
    assert [record.getMessage() for record in caplog.records] == [
        "ranking failed",
        "ranking failed",
        "ranking failed (99 more in between)",
    ]
    assert all(text in caplog.text for text in ("ValueError: row 0", "OSError: another kind", "row 100"))
