"""Both Python clients against a real server: the same calls, the same answers, the same errors."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import grpc
import pytest

from engine.auth import KeyFile, create_key
from engine.bundle import Bundle
from engine.client import AsyncRecommenderClient, RecommenderClient, visitor
from engine.event_store import MemoryEventStore
from engine.events import Recorded, StoreUnavailableError, UserEvent
from engine.pipeline import RecommendationPipeline
from protos.trirank.v1 import recommender_pb2 as pb

WAIT_S = 60
CALLS = ("recommend", "similar_items", "rank", "record_events")


def without_times(answer: Any) -> Any:
    answer.trace.ClearField("timings")
    answer.trace.ClearField("total_us")
    return answer


def test_the_same_api() -> None:
    for name in ("__init__", *CALLS):
        one, other = (
            inspect.signature(getattr(client, name)) for client in (RecommenderClient, AsyncRecommenderClient)
        )
        assert one == other
        assert inspect.iscoroutinefunction(getattr(AsyncRecommenderClient, name)) == (name in CALLS)


def test_the_same_answers_from_a_server_in_its_own_process(server_address: str) -> None:
    loyal, events = visitor("loyal", ["item-9"]), [pb.RecordedEvent(event_id="c1", user_id="x", item_id="y")]
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("recommend", (loyal,), {"limit": 7, "exclude_item_ids": ["item-8"], "now_ms": 9, "explain": True}),
        ("recommend", (loyal,), {"filters": pb.Filters(max_price=20), "seed": 3, "policy": "toy"}),
        ("similar_items", ("null",), {"limit": 3}),
        ("rank", (loyal, ["null", "item-20", "nowhere"]), {}),
    ]
    with RecommenderClient(server_address, timeout_s=WAIT_S, num_channels=2) as client:
        expected = [without_times(getattr(client, name)(*words, **more)) for name, words, more in asked]
        assert client.record_events(events).num_new == 1

    async def scene() -> None:
        async with AsyncRecommenderClient(server_address, timeout_s=WAIT_S, num_channels=3) as client:
            for _ in range(2):  # some over each connection
                found = await asyncio.gather(*(getattr(client, n)(*w, **more) for n, w, more in asked))
                assert [without_times(answer) for answer in found] == expected
            assert (await client.record_events(events)).num_repeated == 1
            with pytest.raises(grpc.RpcError) as caught:
                await client.recommend(loyal, limit=0)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "limit is 0; expected 1 to 500" in (caught.value.details() or "")

    asyncio.run(scene())


def test_each_call_may_have_a_deadline_of_its_own(server_address: str) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("recommend", (visitor("loyal"),)),
        ("similar_items", ("null",)),
        ("rank", (visitor("loyal"), ["null"])),
        ("record_events", ([pb.RecordedEvent(event_id="d1", user_id="x", item_id="y")],)),
    ]

    def is_late(caught: pytest.ExceptionInfo[Any]) -> bool:
        return bool(caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED)

    with RecommenderClient(server_address, timeout_s=WAIT_S) as client:
        for name, words in calls:
            with pytest.raises(grpc.RpcError) as caught:
                getattr(client, name)(*words, timeout_s=-1.0)
            assert is_late(caught), name

    async def scene() -> None:
        async with AsyncRecommenderClient(server_address, timeout_s=-1.0) as client:
            for name, words in calls:
                with pytest.raises(grpc.RpcError) as caught:
                    await getattr(client, name)(*words)
                assert is_late(caught), name
                assert await getattr(client, name)(*words, timeout_s=WAIT_S)

    asyncio.run(scene())


def test_no_channels() -> None:
    for client in (RecommenderClient, AsyncRecommenderClient):
        with pytest.raises(ValueError, match="num_channels is 0; expected at least 1"):
            client("127.0.0.1:1", num_channels=0)


class Hiccup(MemoryEventStore):
    """Unavailable the first time; and asked by a user "slow", it takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        self.num_asked += 1
        if events[0].user_id == "slow":
            return Future()
        if self.num_asked == 1:
            raise StoreUnavailableError("in a moment")
        return super().record(events)


def test_retries_deadlines_keys_and_cancellation(bundle_path: Any, served: Any, tmp_path: Any) -> None:
    async def scene() -> None:
        store = Hiccup()
        key = create_key(tmp_path / "keys.json", "shop")
        keys = KeyFile(tmp_path / "keys.json").load()
        pipeline = RecommendationPipeline(Bundle.load(bundle_path), events=store)
        async with served(pipeline, keys=keys) as shop:

            def events(user: str) -> list[pb.RecordedEvent]:
                return [pb.RecordedEvent(event_id="1", user_id=user, item_id="null")]

            async with AsyncRecommenderClient(shop.address, timeout_s=WAIT_S, api_key=key) as client:
                assert (await client.record_events(events("loyal"))).num_new == 1
                assert store.num_asked == 2
                # A task that is cancelled takes its call along.
                task = asyncio.create_task(client.record_events(events("slow")))
                await shop.until(lambda: store.num_asked == 3)
                task.cancel()
                counted = {"method": "RecordEvents", "code": "CANCELLED"}
                await shop.until(lambda: shop.value("requests_total", **counted) == 1)
            async with AsyncRecommenderClient(shop.address, timeout_s=0.1, api_key=key) as client:
                with pytest.raises(grpc.RpcError) as caught:
                    await client.record_events(events("slow"))
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            async with AsyncRecommenderClient(shop.address, timeout_s=WAIT_S) as client:
                with pytest.raises(grpc.RpcError) as caught:
                    await client.recommend(visitor("loyal"))
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scene())
