from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from engine.bundle import Bundle
from engine.client import RecommenderClient, visitor
from engine.pipeline import Event, RecommendationPipeline
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc

SERVICE = "trirank.v1.RecommenderService"
WAIT_S = 60  # far beyond what any call here takes


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[RecommenderClient]:
    with RecommenderClient(server_address, timeout_s=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(bundle_path: Path) -> RecommendationPipeline:
    return RecommendationPipeline(Bundle.load(bundle_path))


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_recommend_answers_as_the_pipeline_does(
    client: RecommenderClient, pipeline: RecommendationPipeline
) -> None:
    catalog = pipeline.bundle.catalog
    events = [Event("emoji 🎉🛒"), Event("no such item")]
    expected, trace = pipeline.recommend(pipeline.resolve_visitor("loyal", events), 7)
    response = client.recommend(visitor("loyal", ["emoji 🎉🛒", "no such item"], {"hour": "9"}), limit=7)
    assert [item.item_id for item in response.items] == [catalog.ids[row] for row in expected.rows]
    assert [item.title for item in response.items] == [catalog.titles[row] for row in expected.rows]
    assert [item.score for item in response.items] == expected.scores.tolist()
    assert [item.source for item in response.items] == expected.sources.tolist()
    assert response.trace.bundle_version == pipeline.bundle.version
    assert response.trace.visitor_kind == pb.VISITOR_KIND_KNOWN_USER
    assert response.trace.num_unknown_history_items == 1
    assert response.trace.ignored_context_keys == ["hour"]
    assert [timing.stage for timing in response.trace.timings] == [timing.stage for timing in trace.timings]


def test_awkward_ids_make_the_round_trip(client: RecommenderClient, pipeline: RecommendationPipeline) -> None:
    ids = pipeline.bundle.catalog.ids[1:8]
    assert {"with space", "emoji 🎉🛒", "null"} <= set(ids)
    response = client.rank(visitor("user with spaces 🎉"), ["not known", *ids, "nor 🤷 this"])
    assert sorted(item.item_id for item in response.items) == sorted(ids)
    assert response.unknown_item_ids == ["not known", "nor 🤷 this"]
    assert response.trace.visitor_kind == pb.VISITOR_KIND_KNOWN_USER

    everything = client.recommend(visitor(), limit=500)
    assert sorted(item.item_id for item in everything.items) == sorted(pipeline.bundle.catalog.ids[1:])
    assert everything.trace.visitor_kind == pb.VISITOR_KIND_ANONYMOUS


def test_filters_and_exclusions(client: RecommenderClient, pipeline: RecommendationPipeline) -> None:
    filters = pb.Filters(seller_ids=["s1"], max_price=20)
    mask = pipeline.bundle.catalog.matching(seller_ids=["s1"], max_price=20)
    allowed = {item_id for item_id, ok in zip(pipeline.bundle.catalog.ids, mask, strict=True) if ok}
    excluded = sorted(allowed)[0]
    response = client.recommend(
        visitor("loyal"), limit=500, filters=filters, exclude_item_ids=[excluded, "unknown", excluded]
    )
    assert {item.item_id for item in response.items} == allowed - {excluded}
    nothing = client.recommend(visitor("loyal"), filters=pb.Filters(brands=["none such"]))
    assert list(nothing.items) == []
    assert nothing.trace.degraded_stages == []


def test_similar_items(client: RecommenderClient) -> None:
    response = client.similar_items("emoji 🎉🛒", limit=5)
    assert len(response.items) == 5
    assert "emoji 🎉🛒" not in [item.item_id for item in response.items]
    assert response.trace.visitor_kind == pb.VISITOR_KIND_UNSPECIFIED
    code, details = refusal(lambda: client.similar_items("🤷"))
    assert (code, details) == (
        grpc.StatusCode.NOT_FOUND,
        "item_id is '🤷'; expected an item of the catalog",
    )


def test_the_limit_where_it_is_absent(client: RecommenderClient) -> None:
    assert len(client.recommend(visitor("loyal")).items) == 10
    assert len(client.similar_items("null").items) == 10


def test_no_deadline(server_address: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        response = pb_grpc.RecommenderServiceStub(channel).Recommend(pb.RecommendRequest())
    assert len(response.items) == 10


def test_a_history_of_100_000_events(client: RecommenderClient) -> None:
    history = [f"item-{number % 60}" for number in range(100_000)]
    response = client.recommend(visitor("loyal", history))
    assert len(response.items) == 10
    assert response.trace.num_unknown_history_items == sum(
        not 7 <= number % 60 < 40 for number in range(100_000)
    )
    assert response.trace.degraded_stages == []


@pytest.mark.parametrize(
    ("call", "details"),
    [
        (lambda client: client.recommend(visitor(), limit=0), "limit is 0; expected 1 to 500"),
        (lambda client: client.recommend(visitor(), limit=-1), "limit is -1; expected 1 to 500"),
        (lambda client: client.recommend(visitor(), limit=501), "limit is 501; expected 1 to 500"),
        (lambda client: client.similar_items("null", limit=0), "limit is 0; expected 1 to 500"),
        (lambda client: client.recommend(visitor("", [""])), "visitor.history[0].item_id is ''"),
        (lambda client: client.recommend(visitor(" ")), "visitor.user_id is ' '"),
        (
            lambda client: client.recommend(visitor(), filters=pb.Filters(min_price=math.nan)),
            "filters.min_price is nan",
        ),
        (lambda client: client.rank(visitor(), []), "candidate_item_ids is []"),
        (lambda client: client.rank(visitor(), ["🎉", "🎉"]), "candidate_item_ids[1] is '🎉'"),
    ],
)
def test_invalid_arguments(
    client: RecommenderClient, call: Callable[[RecommenderClient], object], details: str
) -> None:
    code, message = refusal(lambda: call(client))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith(details)


def test_health_and_reflection(server_address: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        code, _ = refusal(lambda: stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=WAIT_S))
        assert code == grpc.StatusCode.NOT_FOUND
        assert {SERVICE, "grpc.health.v1.Health"} <= set(
            ProtoReflectionDescriptorDatabase(channel).get_services()
        )


# A server whose pipeline fails or takes its time, as the user id says.
MISBEHAVING = """
import asyncio, sys, time
from engine.bundle import Bundle
from engine.pipeline import RecommendationPipeline
from engine.server import serve

class Misbehaving(RecommendationPipeline):
    def resolve_visitor(self, user_id, events=()):
        if user_id == "broken":
            raise ValueError("a secret of the inside")
        if user_id == "slow":
            print("begun", flush=True)
            time.sleep(0.5)
        return super().resolve_visitor(user_id, events)

pipeline = Misbehaving(Bundle.load(sys.argv[1]))
say = lambda address: print(address, flush=True)
asyncio.run(serve(pipeline, "127.0.0.1:0", num_workers=2, drain_s=30, on_ready=say))
"""


def test_failure_and_drain(bundle_path: Path, start_process: Any, tmp_path: Path) -> None:
    log = tmp_path / "stderr.txt"
    command = [sys.executable, "-c", MISBEHAVING, str(bundle_path)]
    with log.open("w") as errors, start_process(command, errors) as (process, ready):
        with grpc.insecure_channel(ready.strip()) as channel:
            stub = pb_grpc.RecommenderServiceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=WAIT_S
            )
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING

            code, details = refusal(lambda: stub.Recommend(pb.RecommendRequest(visitor=visitor("broken"))))
            assert code == grpc.StatusCode.INTERNAL
            assert "secret" not in details
            request_id = details.split()[-1]
            assert f"request {request_id} failed" in log.read_text()
            assert "a secret of the inside" in log.read_text()

            under_way = stub.Recommend.future(pb.RecommendRequest(visitor=visitor("slow")), timeout=WAIT_S)
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            assert len(under_way.result().items) == 10
        assert process.wait(timeout=WAIT_S) == 0


@pytest.mark.parametrize("taken", [True, False])
def test_an_address_that_cannot_be_used(bundle_path: Path, taken: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}" if taken else "nonsense"
        command = [sys.executable, "-m", "engine.cli", "serve", str(bundle_path), "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"cannot listen on {address!r}" in done.stderr
    assert "Traceback" not in done.stderr


def test_serving_never_loads_torch(bundle_path: Path) -> None:
    program = (
        "import sys; import engine.cli, engine.commands, engine.server; from engine.bundle import Bundle; "
        "from engine.pipeline import RecommendationPipeline as P; pipeline = P(Bundle.load(sys.argv[1])); "
        "pipeline.recommend(pipeline.resolve_visitor('loyal'), 5); "
        "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
