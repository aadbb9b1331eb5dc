"""A server whose ranker, clock or clients misbehave."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.admission import ConcurrencyLimit, RateLimit
from engine.bundle import Bundle
from engine.client import RecommenderClient, visitor
from engine.event_store import MemoryEventStore
from engine.pipeline import RecommendationPipeline
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc

WAIT_S = 60
ROOT = Path(__file__).parents[2]
Code = grpc.StatusCode

# Rankers


# `trirank serve` with a ranker that hangs, as native code would, throws or finds NaN for one who has touched
# item-39, item-38 or item-37, once the file in the first argument is there: trial requests go well.
BAD_RANKER = """
import os, sys, threading
import numpy as np
from engine import watchdog
from engine.cli import main
from ranking.onnx_scorer import OnnxScorer

watchdog.STUCK_S = 3.0
of_history = OnnxScorer.user_states

def user_states(self, history, *more):
    if not os.path.exists(sys.argv[1]):
        return of_history(self, history, *more)
    if 40 in history:
        threading.Event().wait()
    if 39 in history:
        raise RuntimeError("the ranker is broken")
    states = of_history(self, history, *more)
    return states * np.float32("nan") if 38 in history else states

OnnxScorer.user_states = user_states
sys.exit(main(sys.argv[2:]))
"""


@contextlib.contextmanager
def bad_ranker(start_process: Any, bundle: Path, log: Path) -> Iterator[tuple[Any, str]]:
    words = [
        "serve",
        str(bundle),
        "--events",
        "memory",
        "--address",
        "127.0.0.1:0",
        "--json",
        "--num_workers",
        "2",
    ]
    begin = log.with_name("begin")
    command = [sys.executable, "-c", BAD_RANKER, str(begin), *words, "--drain_s", "0.1"]
    with log.open("w") as errors, start_process(command, errors) as (process, ready):
        assert ready, log.read_text()
        begin.touch()
        yield process, json.loads(ready)["address"]


def until(happens: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_ranker_that_throws_finds_nan_and_hangs(
    make_bundle: Callable[..., Path], start_process: Any, tmp_path: Path
) -> None:
    bundle, log = make_bundle(policy=[{"rule": "drop_seen"}]), tmp_path / "log.txt"
    with bad_ranker(start_process, bundle, log) as (process, address):
        with (
            RecommenderClient(address, timeout_s=WAIT_S) as client,
            RecommenderClient(address, timeout_s=3.0) as hasty,
            grpc.insecure_channel(address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)

            def is_serving(service: str) -> bool:
                found = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
                return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

            def degraded(item: str) -> list[str]:
                answer = client.recommend(visitor(history=[item]))
                assert len(answer.items) == 10
                return [stage for stage in answer.trace.degraded_stages if stage != "reranking"]

            assert degraded("item-36") == []
            for broken in ("item-38", "item-37"):
                assert degraded(broken) == ["retrieval.sequence", "ranking"]

            def hang() -> None:
                with pytest.raises(grpc.RpcError) as caught:
                    hasty.recommend(visitor(history=["item-39"]))
                assert caught.value.code() == Code.DEADLINE_EXCEEDED

            # One worker hangs: the caller hears of it in time, the others are answered, all is well.
            hang()
            until(lambda: "1 of 2 workers do not come back" in log.read_text())
            for _ in range(20):
                assert degraded("item-36") == []
            assert is_serving("trirank.v1.RecommenderService")
            # None is left: nobody is answered, in time, and health says so for whoever restarts servers.
            hang()
            with pytest.raises(grpc.RpcError) as caught:
                hasty.recommend(visitor("loyal"))
            assert caught.value.code() == Code.DEADLINE_EXCEEDED
            until(lambda: not is_serving(""))
            assert not is_serving("trirank.v1.RecommenderService")
            # From now on nobody waits in vain. Clients with the service config do not ask any more.
            stub = pb_grpc.RecommenderServiceStub(channel)
            for ask, words in (
                (lambda: stub.Recommend(pb.RecommendRequest(), timeout=WAIT_S), "no worker of this server"),
                (lambda: hasty.recommend(visitor("loyal")), "backend unhealthy"),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    ask()
                assert caught.value.code() == Code.UNAVAILABLE
                assert words in caught.value.details()
            assert "2 of 2 workers do not come back" in log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 1
    assert "the process ends without it" in log.read_text()


def test_workers_that_come_back_are_told_of_too(bundle_path: Path) -> None:
    from engine.watchdog import watch_workers

    said: list[bool] = []

    class Service:
        stuck = iter([0, 1, 2, 2, 1, 2, 0])

        def num_stuck(self, stuck_s: float) -> int:
            assert stuck_s == 7
            return next(self.stuck)

    async def say(is_serving: bool) -> None:
        said.append(is_serving)

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(watch_workers(Service(), 2, say, stuck_s=7, poll_s=0))
    assert said == [False, True, False, True]

    def give_up() -> None:
        raise SystemExit("nobody is left")

    Service.stuck = iter([0, 1, 2])
    with pytest.raises(SystemExit, match="nobody is left"):
        asyncio.run(watch_workers(Service(), 2, say, give_up=give_up, stuck_s=7, poll_s=0))
    assert said[4:] == [False]

    # Not at once where that is not wanted, and not where one has come back.
    Service.stuck = iter([2, 2, 1, 2, 2])
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(watch_workers(Service(), 2, say, give_up=give_up, give_up_s=1e9, stuck_s=7, poll_s=0))
    assert said[5:] == [False, True, False]


# Clocks


WALL_CLOCK = {
    # Where the time of day is meant: the time of a request or an event, of a bundle, key, span or log line.
    "engine/server.py": 1,
    "engine/event_store.py": 2,
    "engine/redis_events.py": 1,
    "engine/telemetry.py": 1,
    "engine/bundle.py": 2,  # its name, and how old an abandoned draft is: files carry the time of day
    "engine/auth.py": 1,
}


def test_durations_are_measured_on_clocks_that_do_not_jump() -> None:
    """Every use of the time of day is known, with the reason for it."""
    found: Counter[str] = Counter()
    for folder in ("engine", "retrieval", "ranking", "reranking"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and (node.value.id, node.attr)
                    in {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "today")}
                    and not (path.name == "bundle.py" and node.attr == "time_ns")  # makes a name unique
                ):
                    found[path.relative_to(ROOT).as_posix()] += 1
    assert found == WALL_CLOCK


@pytest.mark.parametrize("hours", [-24 * 365 * 40, -5, 5, 24 * 365])
def test_a_clock_that_jumps(
    hours: float, make_bundle: Callable[..., Path], served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls under way and after the jump are answered in full; rates, deadlines and orders are as before.

    The engine's view alone jumps: gRPC takes the time left from the system's clock, which stays.
    """
    offset_s = [0.0]

    class Jumping:
        @staticmethod
        def time() -> float:
            return time.time() + offset_s[0]

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    clock = Jumping()
    for module in ("engine.server", "engine.telemetry"):
        monkeypatch.setattr(f"{module}.time", clock)

    async def scene() -> None:
        bundle = Bundle.load(make_bundle(policy=[{"rule": "available"}, {"rule": "drop_seen"}]))
        bundle.manifest["data"]["simulated"] = False  # goes by the server's clock
        store = MemoryEventStore(clock=clock.time)
        limit = RateLimit(per_s=1e-9, burst=13)
        async with served(
            RecommendationPipeline(bundle, events=store),
            rate_limit=limit,
            limit=ConcurrencyLimit(min_limit=64),
        ) as shop:

            async def record(event_id: str) -> None:
                event = pb.RecordedEvent(event_id=event_id, user_id="zoe", item_id="item-9")
                assert (await shop.stub.RecordEvents(pb.RecordEventsRequest(events=[event]))).num_new == 1

            await record("before")
            under_way = [shop.recommend("zoe", timeout=WAIT_S) for _ in range(4)]
            offset_s[0] = 3600 * hours
            for answer in await asyncio.gather(*under_way, *(shop.recommend("zoe") for _ in range(4))):
                assert answer.trace.degraded_stages == []
                assert answer.trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
                assert len(answer.items) == 10
            await record("after")
            # The event of now is the newest, wherever the clock went.
            assert [event.event_id for event in store.recent("zoe")] == ["before", "after"]
            times = [event.timestamp for event in store.recent("zoe")]
            assert times[1] >= times[0]
            assert (times[1] == times[0]) == (hours < 0)
            # What is on sale is a question of the time of day, which the answer tells.
            answer = await shop.recommend("zoe", timeout=WAIT_S)
            assert abs(answer.arrangement.now_ms - 1000 * clock.time()) < 1000 * WAIT_S
            # 1e-9 requests a second: a jump of the clock would have paid for more, or for none for years.
            for _ in range(2):
                await shop.recommend("zoe")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await shop.recommend("zoe")
            assert caught.value.code() == Code.RESOURCE_EXHAUSTED

    asyncio.run(scene())


# Clients


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NOTHING_AT_A_TIME = (
    b"\x00\x00\x06\x04\x00\x00\x00\x00\x00" + b"\x00\x04\x00\x00\x00\x00"
)  # SETTINGS: window 0


def test_slow_clients_stop_nobody(bundle_path: Path, served: Any) -> None:
    """They connect and say nothing, say half, begin calls and send nothing, or do not read the answers."""

    async def scene() -> None:
        pipeline, limit = RecommendationPipeline(Bundle.load(bundle_path)), ConcurrencyLimit(min_limit=64)
        async with served(pipeline, limit=limit) as shop, contextlib.AsyncExitStack() as open_:
            host, _, port = shop.address.rpartition(":")
            for said in (b"", PREFACE[:10], PREFACE, PREFACE + NOTHING_AT_A_TIME, b"GET / HTTP/1.1\r\n"):
                for _ in range(20):
                    slow = open_.enter_context(socket.create_connection((host, int(port)), timeout=WAIT_S))
                    slow.sendall(said)
            channel = await open_.enter_async_context(
                grpc.aio.insecure_channel(shop.address, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            silent = channel.stream_unary("/trirank.v1.RecommenderService/Recommend")
            calls = [silent() for _ in range(50)]  # headers alone
            for call in calls:
                await call.wait_for_connection()
            assert shop.service.limit.in_flight == 0  # a request that is not there takes no place
            deaf = await open_.enter_async_context(
                grpc.aio.insecure_channel(
                    shop.address,
                    options=[("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 1)],
                )
            )
            unread = deaf.unary_unary("/trirank.v1.RecommenderService/Recommend")
            answers = [unread(pb.RecommendRequest().SerializeToString()) for _ in range(8)]
            for _ in range(20):
                answer = await shop.recommend("loyal", timeout=WAIT_S)
                assert not answer.trace.degraded_stages
            for call in (*calls, *answers):
                call.cancel()
            await shop.until(lambda: shop.service.limit.in_flight == 0)

    asyncio.run(scene())


METHODS: dict[str, Any] = {
    "Recommend": pb.RecommendRequest,
    "SimilarItems": pb.SimilarItemsRequest,
    "Rank": pb.RankRequest,
    "RecordEvents": pb.RecordEventsRequest,
}
EXPECTED_CODES = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND}


def valid_messages() -> list[tuple[str, Any]]:
    somebody = pb.Visitor(
        user_id="loyal",
        history=[pb.Event(item_id="item-9", event_type="cart", timestamp_ms=5), pb.Event(item_id="null")],
        context={"region": "DE", "age": "17"},
    )
    filters = pb.Filters(categories=["c1"], brands=["brand 1"], seller_ids=["s0"], min_price=1, max_price=30)
    return [
        ("Recommend", pb.RecommendRequest(visitor=somebody, limit=5, exclude_item_ids=["null"], now_ms=9)),
        ("Recommend", pb.RecommendRequest(filters=filters, policy="toy", seed=3, explain=True)),
        ("Recommend", pb.RecommendRequest(overrides={"mmr.relevance_weight": 0.5}, head_weights={"next": 1})),
        ("SimilarItems", pb.SimilarItemsRequest(item_id="item-9", filters=filters, context={"age": "17"})),
        ("Rank", pb.RankRequest(visitor=somebody, candidate_item_ids=["null", "item-9", "nowhere"])),
        (
            "RecordEvents",
            pb.RecordEventsRequest(
                events=[pb.RecordedEvent(event_id="e", user_id="u", item_id="i", timestamp_ms=7)]
            ),
        ),
    ]


NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 499, 501)
REALS = (0.0, -0.0, 1e308, -1e308, 1e-308, float("nan"), float("inf"), float("-inf"), 0.5)
TEXTS = (
    "",
    " ",
    "null",
    "item-9",
    "x" * 256,
    "x" * 257,
    "\x00",
    "🎉",
    "loyal",
    "toy",
    "mmr.relevance_weight",
)


def shuffled_fields(message: Any, rng: random.Random, depth: int = 0) -> None:
    """Fill some fields of a message with values of the right type and of odd sizes."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5 or depth > 3:
            continue
        kind = field.cpp_type

        def value(kind: int = kind, field: Any = field) -> Any:
            if kind == field.CPPTYPE_STRING:
                return rng.choice(TEXTS)
            if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
                return rng.choice(REALS)
            if kind == field.CPPTYPE_BOOL:
                return rng.random() < 0.5
            number = rng.choice(NUMBERS)
            if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32):
                number = max(-(2**31), min(2**31 - 1, number))
            return abs(number) if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else number

        if field.message_type and field.message_type.GetOptions().map_entry:
            of_value = field.message_type.fields_by_name["value"]
            for _ in range(rng.choice((0, 1, 3, 70))):
                getattr(message, field.name)[rng.choice(TEXTS) + str(rng.randrange(100))] = value(
                    of_value.cpp_type, of_value
                )
        elif field.is_repeated:
            for _ in range(rng.choice((0, 1, 2, 5, 30))):
                if field.message_type:
                    shuffled_fields(getattr(message, field.name).add(), rng, depth + 1)
                else:
                    getattr(message, field.name).append(value())
        elif field.message_type:
            shuffled_fields(getattr(message, field.name), rng, depth + 1)
        else:
            setattr(message, field.name, value())


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double, splice: what a broken client, or an evil one, makes of a message."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[place:place] = rng.randbytes(rng.choice((1, 3, 20)))
            case 2:
                del changed[place : place + rng.choice((1, 4, 1000))]
            case 3:
                changed[place:place] = changed[rng.randrange(len(changed) + 1) :]
            case 4:
                changed[place:place] = b"\xff" * rng.choice((1, 5, 10))
            case _:
                changed = changed[:place]
    return bytes(changed[:4096])


def messages(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    valid = valid_messages()
    while True:
        method, message = rng.choice(valid)
        match rng.randrange(4):
            case 0:
                yield rng.choice(list(METHODS)), rng.randbytes(rng.choice((0, 1, 2, 10, 300)))
            case 1:
                name = rng.choice(list(METHODS))
                odd = METHODS[name]()
                shuffled_fields(odd, rng)
                yield name, odd.SerializeToString()
            case 2:
                yield rng.choice(list(METHODS)), message.SerializeToString()  # perhaps of another method
            case _:
                yield method, mutated(message.SerializeToString(), rng)


def test_ten_thousand_malformed_messages(bundle_path: Path, served: Any) -> None:
    """Each is answered or refused with a reason: nothing unforeseen, and no stage that fails over it."""
    num_messages, at_once = 10_000, 16
    codes: Counter[Code] = Counter()
    surprises: list[tuple[str, bytes, str]] = []
    made = messages(random.Random(7))
    sent = [next(made) for _ in range(num_messages)]
    kinds = {
        "Recommend": pb.RecommendResponse,
        "SimilarItems": pb.SimilarItemsResponse,
        "Rank": pb.RankResponse,
    }

    async def scene() -> None:
        pipeline = RecommendationPipeline(Bundle.load(bundle_path), events=MemoryEventStore())
        async with served(pipeline, limit=ConcurrencyLimit(min_limit=64)) as shop:
            calls = {
                name: shop.channel.unary_unary(f"/trirank.v1.RecommenderService/{name}") for name in METHODS
            }
            work = iter(sent)

            async def send() -> None:
                for method, data in work:
                    try:
                        answer = await calls[method](data, timeout=WAIT_S)
                    except grpc.aio.AioRpcError as error:
                        codes[error.code()] += 1
                        if error.code() not in EXPECTED_CODES:
                            surprises.append((method, data, str(error.details())))
                        continue
                    codes[Code.OK] += 1
                    if method in kinds and (stages := kinds[method].FromString(answer).trace.degraded_stages):
                        surprises.append((method, data, f"degraded: {stages}"))

            before = psutil.Process().memory_info().rss
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(send())
            grown = psutil.Process().memory_info().rss - before
            assert shop.service.limit.in_flight == 0
            assert grown < 200 << 20

    asyncio.run(scene())
    assert surprises == []
    assert sum(codes.values()) == num_messages
    assert codes[Code.OK] > 1000
    assert codes[Code.INVALID_ARGUMENT] > 1000
    assert codes[Code.NOT_FOUND] > 10
