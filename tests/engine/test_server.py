from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from engine.bundle import Bundle
from engine.client import RecommenderClient, visitor
from engine.deadline import Budget
from engine.following import follow_policies
from engine.pipeline import Event, RecommendationPipeline, Visitor
from engine.policy_files import PolicyFiles
from engine.server import RecommenderService, recommend
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc
from tests.engine.command import SERVE

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
    stages = ["history", *(timing.stage for timing in trace.timings)]  # the server also asks its event store
    assert [timing.stage for timing in response.trace.timings] == stages


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
        (lambda client: client.recommend(visitor(), policy="tyo"), "policy is 'tyo'; expected toy (did you"),
        (lambda client: client.similar_items("null", policy="x"), "policy is 'x'; expected toy"),
        (
            lambda client: client.recommend(visitor(), overrides={"mmr.relevance_weight": 0.5}),
            "policy 'toy': override 'mmr.relevance_weight'; expected none, as the policy has none",
        ),
        (lambda client: client.recommend(visitor(), now_ms=0), "now_ms is 0; expected milliseconds"),
        (
            lambda client: client.similar_items("null", context={"": "x"}),
            "key of context is ''; expected a non-empty string",
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


def test_a_request_chooses_its_policy_and_asks_why(
    client: RecommenderClient, pipeline: RecommendationPipeline
) -> None:
    ids = pipeline.bundle.catalog.ids
    expected, trace = pipeline.recommend(pipeline.resolve_visitor("loyal"), 7, seed=5, explain=True)
    response = client.recommend(visitor("loyal"), limit=7, policy="toy", seed=5, explain=True)
    assert [item.item_id for item in response.items] == [ids[row] for row in expected.rows]
    arrangement = response.arrangement
    assert (arrangement.policy, arrangement.seed, arrangement.now_ms) == ("toy", 5, 30_000)
    assert trace.arrangement is not None
    explanation = trace.arrangement.explanation
    assert explanation is not None
    assert [(one.rule, one.num_in, one.num_out) for one in arrangement.filters] == [("request", 40, 40)]
    assert [one.rule for one in arrangement.rules] == ["mmr", "cap:brand", "drop_seen"]
    for item, row in zip(response.items, expected.rows.tolist(), strict=True):
        reasons = explanation.items[row]
        assert item.reasons.ranking_place == reasons.ranking_place
        assert item.reasons.ranking_score == pytest.approx(item.score)
        assert item.reasons.HasField("transition_score")
        assert item.reasons.transition_score == reasons.transition_score
        assert item.reasons.retrieval_place == reasons.retrieval_place
        assert [
            (move.rule, move.from_place, move.to_place if move.HasField("to_place") else None)
            for move in item.reasons.moves
        ] == [(move.rule, move.from_place, move.to_place) for move in reasons.moves]
    assert [item.item_id for item in arrangement.displaced] == [ids[row] for row in explanation.displaced]

    silent = client.recommend(visitor("loyal"), limit=7, seed=5)
    assert [item.item_id for item in silent.items] == [item.item_id for item in response.items]
    assert not any(item.HasField("reasons") for item in silent.items)
    assert not silent.arrangement.filters
    assert not silent.arrangement.rules
    assert client.recommend(visitor("loyal"), now_ms=5_000).arrangement.now_ms == 5_000


def test_a_retry_has_the_same_seed(client: RecommenderClient) -> None:
    seeds = [
        client.recommend(visitor(user, history, context)).arrangement.seed
        for user, history, context in (
            ("loyal", ["null"], {"a": "1", "b": "2"}),
            ("loyal", ["null"], {"b": "2", "a": "1"}),
            ("reader", ["null"], {"a": "1", "b": "2"}),
            ("loyal", ["0042"], {"a": "1", "b": "2"}),
        )
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


def test_yielded_rules_are_counted(client: RecommenderClient) -> None:
    response = client.recommend(visitor(), limit=40)
    assert response.trace.relaxed_rules == ["cap:brand"]
    assert dict(response.arrangement.yielded) == {"cap:brand": 40 - 10 - 3 * 6}  # ten items have no brand


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
    def resolve_visitor(self, user_id, events=(), budget=None):
        if user_id == "broken":
            raise ValueError("a secret of the inside")
        if user_id == "slow":
            print("begun", flush=True)
            time.sleep(0.5)
        return super().resolve_visitor(user_id, events, budget)

pipeline = Misbehaving(Bundle.load(sys.argv[1]))
say = lambda address: print(address, flush=True)
asyncio.run(serve(pipeline, "127.0.0.1:0", num_workers=2, drain_s=3600, on_ready=say))
"""


def test_failure_and_drain(bundle_path: Path, start_process: Any, tmp_path: Path) -> None:
    log = tmp_path / "stderr.txt"
    command = [sys.executable, "-c", MISBEHAVING, str(bundle_path)]
    with (
        log.open("w") as errors,
        start_process(command, errors) as (process, ready),
        grpc.insecure_channel(ready.strip()) as channel,
    ):
        stub = pb_grpc.RecommenderServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
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
        assert len(under_way.result().items) == 10
        # Whoever watches the health keeps no server from ending: the drain is longer than the wait.
        assert process.wait(timeout=WAIT_S) == 0


# Policies that change while they are served

HOME = "policies: {home: {rules: [{rule: drop_seen}]}}"
CHEAP = "policies: {cheap: {rules: [{rule: price_range, max_price: 9}]}}"


def until(happens: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < ends
        assert process.poll() is None, "the server ended"
        time.sleep(0.05)


def test_policies_are_loaded_again(bundle_path: Path, start_process: Any, tmp_path: Path) -> None:
    file, log = tmp_path / "policies.yaml", tmp_path / "stderr.txt"
    file.write_text(HOME)
    address = ["--address", "127.0.0.1:0", "--json", "--policies", str(tmp_path)]
    command = [*SERVE, str(bundle_path), *address]
    with log.open("w") as errors, start_process(command, errors) as (process, ready):
        assert ready, log.read_text()
        with RecommenderClient(json.loads(ready)["address"], timeout_s=WAIT_S) as client:

            def policy() -> str:
                return client.recommend(visitor("loyal")).arrangement.policy

            assert policy() == "home"
            file.write_text(CHEAP)
            until(lambda: policy() == "cheap", process)
            for wrong, why in (
                ("policies: {cheap: {rules: [{rule: price_rang}]}}", "did you mean 'price_range'?"),
                ("policies: {cheap: {rules: [{rule: deny, brand: Acme}]}}", "deny: brand is 'Acme'"),
            ):
                file.write_text(wrong)
                process.send_signal(signal.SIGHUP)
                until(
                    lambda why=why: (
                        "the policies in use stay: " in log.read_text() and why in log.read_text()
                    ),
                    process,
                )  # type: ignore[misc]
                assert policy() == "cheap"
            assert len(client.recommend(visitor(), limit=500).items) == 8  # of the ten, two have no price
            file.write_text(HOME)
            until(lambda: policy() == "home", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WAIT_S) == 0
    assert "Traceback" not in log.read_text()


def test_a_request_keeps_the_policies_it_began_with(bundle_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(HOME)
    files = PolicyFiles(file)

    class Pipeline(RecommendationPipeline):
        """Waits in the middle of a request until it is let go."""

        begun, go = threading.Event(), threading.Event()

        def resolve_visitor(
            self, user_id: str, events: Sequence[Event] = (), budget: Budget | None = None
        ) -> Visitor:
            self.begun.set()
            assert self.go.wait(WAIT_S)
            return super().resolve_visitor(user_id, events, budget)

    async def scene() -> tuple[str, ...]:
        with ThreadPoolExecutor(2) as pool:
            pipeline = Pipeline(Bundle.load(bundle_path), files.load())
            service = RecommenderService(pipeline, pool)
            hangup = asyncio.Event()
            following = asyncio.create_task(follow_policies(service, files, hangup, poll_s=0.01))
            loop = asyncio.get_running_loop()
            request = pb.RecommendRequest()
            before = loop.run_in_executor(pool, recommend, service.pipeline, request, Budget(None))
            await asyncio.to_thread(pipeline.begun.wait, WAIT_S)
            file.write_text(CHEAP)
            async with asyncio.timeout(WAIT_S):
                while service.pipeline is pipeline:
                    await asyncio.sleep(0.01)
            pipeline.go.set()
            after = loop.run_in_executor(pool, recommend, service.pipeline, request, Budget(None))
            policies = tuple([(await reply).response.arrangement.policy for reply in (before, after)])
            following.cancel()
            return policies

    assert asyncio.run(scene()) == ("home", "cheap")


def test_a_newer_bundle_is_not_lost_to_newer_policies(bundle_path: Path, tmp_path: Path) -> None:
    """Policies that were bound to a bundle which is no longer served are bound again."""
    file = tmp_path / "policies.yaml"
    file.write_text(CHEAP)
    bundle = Bundle.load(bundle_path)
    newer = RecommendationPipeline(bundle)

    class Pipeline(RecommendationPipeline):
        def with_policies(self, policies: Any) -> RecommendationPipeline:
            service.pipeline = newer  # a bundle arrives while policies are being bound
            return super().with_policies(policies)

    older = Pipeline(bundle)
    service = RecommenderService(older, ThreadPoolExecutor(1))

    async def scene() -> None:
        following = asyncio.create_task(
            follow_policies(service, PolicyFiles(file), asyncio.Event(), poll_s=0.01)
        )
        async with asyncio.timeout(WAIT_S):
            while service.pipeline in (older, newer):
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(scene())
    assert type(service.pipeline) is RecommendationPipeline
    assert service.pipeline.policy().name == "cheap"


def test_serve_refuses_wrong_policies(bundle_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text("policies: {home: {rules: [{rule: drop_sen}]}}")
    command = [*SERVE, str(bundle_path), "--policies", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{file}: policy 'home': rules[0]: rule is 'drop_sen'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("given", ["", "no.such.host.invalid:1", "localhost"])
def test_an_address_that_cannot_be_used(bundle_path: Path, given: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = given or f"127.0.0.1:{listener.getsockname()[1]}"  # taken
        command = [*SERVE, str(bundle_path), "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    if given == "localhost":  # gRPC would take a port of its own choice
        assert "address is 'localhost'; expected host:port" in done.stderr
    else:
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


def test_random_bytes_and_mutated_requests(server_address: str) -> None:
    """Whatever comes in, each call gets a status that the contract has, and the server goes on."""
    rng = random.Random(11)
    event = pb.RecordedEvent(event_id="1", user_id="u", item_id="null")
    good: dict[str, Any] = {
        "Recommend": pb.RecommendRequest(visitor=visitor("loyal", ["null", "?"], {"a": "b"}), limit=3),
        "SimilarItems": pb.SimilarItemsRequest(item_id="null", limit=3),
        "Rank": pb.RankRequest(candidate_item_ids=["null", "0042"]),
        "RecordEvents": pb.RecordEventsRequest(events=[event]),
    }
    seen: dict[Any, bytes] = {}
    with grpc.insecure_channel(server_address) as channel:
        for method, request in good.items():
            call = channel.unary_unary(f"/{SERVICE}/{method}", None, None)
            for number in range(150):
                payload = bytearray(request.SerializeToString())
                if number % 3:
                    for _ in range(rng.randint(1, 4)):
                        payload[rng.randrange(len(payload))] = rng.randrange(256)
                else:
                    payload = bytearray(rng.randbytes(rng.randint(0, 60)))
                try:
                    call(bytes(payload), timeout=WAIT_S)
                except grpc.RpcError as error:
                    seen[error.code(), error.details()[:15]] = bytes(payload)
    assert {code for code, _ in seen} == {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}, seen
    assert (grpc.StatusCode.INVALID_ARGUMENT, "the request is ") in seen


def test_sigterm_before_it_serves(bundle_path: Path, tmp_path: Path) -> None:
    """The first process of a container would otherwise ignore it, and begin to serve."""
    waits = tmp_path / "policies.yaml"
    os.mkfifo(waits)  # who opens it waits for a writer
    command = [*SERVE, str(bundle_path), "--policies", str(waits)]
    process = subprocess.Popen([*command, "--address", "127.0.0.1:0", "--json"], stdout=subprocess.PIPE)

    def has_handler() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    ends = time.monotonic() + 60
    while not has_handler():
        assert time.monotonic() < ends
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")


def test_sigterm_while_a_directory_that_is_followed_hangs(
    make_bundle: Callable[..., Path], start_process: Any
) -> None:
    """As one of a network file system may."""
    bundles = make_bundle().parent
    command = [*SERVE, str(bundles), "--address", "127.0.0.1:0", "--json"]
    with start_process(command) as (process, _):
        pin = bundles / "pinned"
        os.mkfifo(pin)  # who reads it waits for as long as somebody may write
        ends = time.monotonic() + 60
        with contextlib.ExitStack() as closing:
            while True:
                with contextlib.suppress(OSError):  # nobody reads it yet
                    closing.callback(os.close, os.open(pin, os.O_WRONLY | os.O_NONBLOCK))
                    break
                assert time.monotonic() < ends
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_a_connection_ends_with_its_age_and_no_call_with_it(bundle_path: Path, start_process: Any) -> None:
    """So that clients look the name up anew, and find servers that were added."""
    script = "from engine import cli, server; server.CONNECTION_AGE_S = 0.2; raise SystemExit(cli.main())"
    command = [
        sys.executable,
        "-c",
        script,
        "serve",
        "--events",
        "memory",
        str(bundle_path),
        "--address",
        "127.0.0.1:0",
        "--json",
    ]
    with start_process(command) as (process, ready):
        address = json.loads(ready)["address"]
        port = int(address.rpartition(":")[2])
        own_ports: set[int] = set()
        ends = time.monotonic() + 60
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.RecommenderServiceStub(channel)
            while len(own_ports) < 4:
                stub.Recommend(pb.RecommendRequest(), timeout=60)
                found = psutil.Process().net_connections("tcp")
                own_ports |= {one.laddr.port for one in found if one.raddr and one.raddr.port == port}
                assert time.monotonic() < ends
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
