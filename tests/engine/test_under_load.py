"""A service inside the test's own loop: deadlines, cancellation, limits, events and what is counted."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.admission import ConcurrencyLimit, RateLimit
from engine.auth import ApiKeys, create_key
from engine.bundle import Bundle
from engine.client import AsyncRecommenderClient, RecommenderClient, visitor
from engine.deadline import AbandonedError, Budget
from engine.event_store import MemoryEventStore
from engine.events import Recorded, StoreBusyError, StoreUnavailableError, UserEvent
from engine.pipeline import Event, RecommendationPipeline, Visitor
from engine.server import TooLateError, _begin, _pool, recommend
from engine.telemetry import JsonFormatter
from engine.trace import Trace
from engine.workplaces import Workplaces, waiting
from protos.trirank.v1 import recommender_pb2 as pb

WAIT_S = 60


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Bundle:
    return Bundle.load(make_bundle(policy=[{"rule": "drop_seen"}]))


class Gated(RecommendationPipeline):
    """Waits before the first stage of a user "slow" until it is let go, and notes who was ranked."""

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        super().__init__(bundle, **options)
        self.begun, self.go, self.num_ranked_requests = threading.Semaphore(0), threading.Event(), 0

    def resolve_visitor(
        self, user_id: str, events: Sequence[Event] = (), budget: Budget | None = None
    ) -> Visitor:
        if user_id == "slow":
            self.begun.release()
            assert self.go.wait(WAIT_S)
        return super().resolve_visitor(user_id, events, budget)

    def _scored(self, *arguments: Any) -> Any:
        self.num_ranked_requests += 1
        return super()._scored(*arguments)


# Deadlines


def still(total_s: float) -> Budget:
    """A budget on a clock that does not move."""
    return Budget(total_s, clock=lambda: 0.0)


def test_as_many_are_ranked_as_there_is_time_for(bundle: Bundle) -> None:
    """1.1 s in all, a fifth of it for the reply; at an estimated .1 s an item, time for 8."""
    pipeline = RecommendationPipeline(bundle)
    loyal = pipeline.resolve_visitor("loyal")
    whole, trace = pipeline.recommend(loyal, 20)
    assert trace.degraded_stages == []
    pipeline = RecommendationPipeline(bundle)
    found = pipeline._retrieve(
        pipeline.query(loyal), np.ones(41, np.bool_) & (np.arange(41) > 0), _seen(2, 3, 5), 20, trace
    ).in_turns(pipeline.quotas)
    pipeline.costs.observe("ranking", 1.0, 20)  # mean 1/20, deviation 1/40: an estimate of 2/20
    items, trace = pipeline.recommend(loyal, 20, budget=still(1.1))
    assert trace.degraded_stages == ["ranking"]
    score = dict(zip(whole.rows.tolist(), whole.scores.tolist(), strict=True))
    first, others = found.rows[:8].tolist(), found.rows[8:].tolist()
    assert items.rows.tolist() == [*sorted(first, key=lambda row: -score[row]), *others]
    assert items.scores[:8].tolist() == sorted((score[row] for row in first), reverse=True)
    assert set(items.scores[8:].tolist()) == {min(score[row] for row in first)}
    timing = next(timing for timing in trace.timings if timing.stage == "ranking")
    assert (timing.num_in, timing.num_out) == (20, 20)


def _seen(*rows: int) -> np.ndarray:
    seen = np.zeros(41, np.bool_)
    seen[list(rows)] = True
    return seen


def test_the_caller_s_own_candidates_all_come_back(bundle: Bundle) -> None:
    pipeline = RecommendationPipeline(bundle)
    rows = np.arange(1, 31, dtype=np.int32)
    pipeline.costs.observe("ranking", 1.0, 20)
    items, trace = pipeline.rank(pipeline.resolve_visitor("loyal"), rows, budget=still(1.1))
    assert trace.degraded_stages == ["ranking"]
    popularity = bundle.catalog.popularity
    by_popularity = sorted(rows.tolist(), key=lambda row: -popularity[row])
    assert set(items.rows[:8].tolist()) == set(by_popularity[:8])
    assert items.rows[8:].tolist() == by_popularity[8:]


def test_a_stage_that_would_overrun_is_not_begun_and_gets_another_chance(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = RecommendationPipeline(bundle)
    pipeline.costs.observe("reranking", 1.0, 1)
    loyal = pipeline.resolve_visitor("loyal")
    skipped = []
    for _ in range(100):
        _, trace = pipeline.recommend(loyal, 10, budget=still(1.0))
        skipped.append(trace.degraded_stages)
        if not skipped[-1]:
            break
    # 2 s, an eighth less each time, against .8 s: 2 * .875 ** 7 is the first to fit.
    assert skipped == [["reranking"]] * 7 + [[]]
    assert pipeline.recommend(loyal, 10).trace.degraded_stages == []  # without a deadline all is done


def test_no_stage_begins_once_nobody_waits(bundle: Bundle) -> None:
    budget = Budget(None)

    class Cancelling:
        name = "popular"

        def find(self, *arguments: Any) -> Any:
            budget.cancel()
            raise RuntimeError("the caller went while this source was asked")

    pipeline = Gated(bundle)
    pipeline.sources = [Cancelling(), *pipeline.sources]  # type: ignore[list-item]
    with pytest.raises(AbandonedError):
        pipeline.recommend(pipeline.resolve_visitor("loyal"), 10, budget=budget)
    assert pipeline.num_ranked_requests == 0
    with pytest.raises(AbandonedError):
        Trace("b", budget=budget).run("filtering", lambda: [], num_in=0)


def test_who_cancels_frees_the_place_when_the_thread_is_done(bundle: Bundle, served: Any) -> None:
    async def scene() -> None:
        pipeline = Gated(bundle)
        async with served(pipeline) as shop:
            call = shop.recommend("slow")
            await asyncio.to_thread(pipeline.begun.acquire)
            call.cancel()
            await shop.until(lambda: shop.value("requests_total", method="Recommend", code="CANCELLED") == 1)
            assert shop.service.limit.in_flight == 1  # its thread still runs
            pipeline.go.set()
            await shop.until(lambda: shop.service.limit.in_flight == 0)
            assert pipeline.num_ranked_requests == 0
            assert (await shop.recommend("loyal")).trace.degraded_stages == []
            assert pipeline.num_ranked_requests == 1

    asyncio.run(scene())


def test_a_request_that_waits_past_its_deadline_is_never_begun(
    bundle: Bundle, served: Any, refused: Any
) -> None:
    async def scene() -> None:
        pipeline = Gated(bundle)
        async with served(pipeline, num_threads=1) as shop:
            first = shop.recommend("slow")
            await asyncio.to_thread(pipeline.begun.acquire)
            error = await refused(shop.recommend("loyal", timeout=0.05))
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await shop.until(lambda: shop.service.limit.in_flight == 1)  # the place of the other is free
            pipeline.go.set()
            assert len((await first).items) == 10
            await shop.until(lambda: shop.service.limit.in_flight == 0)
            assert pipeline.num_ranked_requests == 1

    asyncio.run(scene())


def test_what_a_worker_takes_up_too_late_is_not_done(bundle: Bundle) -> None:
    with pytest.raises(TooLateError):
        _begin(recommend, RecommendationPipeline(bundle), pb.RecommendRequest(), Budget(0.0))


# Who may come in


def test_a_full_server_refuses_at_once_and_stays_healthy(bundle: Bundle, served: Any, refused: Any) -> None:
    async def scene() -> None:
        pipeline = Gated(bundle, events=MemoryEventStore())
        async with served(pipeline, limit=ConcurrencyLimit(min_limit=1, max_limit=1)) as shop:
            under_way = shop.recommend("slow")
            await asyncio.to_thread(pipeline.begun.acquire)
            assert shop.value("in_flight") == shop.value("concurrency_limit") == 1
            error = await refused(shop.recommend("loyal", metadata=(("x-request-id", "mine-1"),)))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (error.details() or "").startswith("the server is at its limit; try again in ")
            trailing = dict(error.trailing_metadata())  # type: ignore[arg-type]
            assert trailing["x-request-id"] == "mine-1"
            assert int(trailing["grpc-retry-pushback-ms"]) == int(trailing["retry-after-ms"]) > 0
            # Neither health nor events need a place.
            found = await health_pb2_grpc.HealthStub(shop.channel).Check(health_pb2.HealthCheckRequest())
            assert found.status == health_pb2.HealthCheckResponse.SERVING
            event = pb.RecordedEvent(event_id="1", user_id="loyal", item_id="null")
            assert (await shop.stub.RecordEvents(pb.RecordEventsRequest(events=[event]))).num_new == 1
            pipeline.go.set()
            await under_way
            await shop.recommend("loyal")
            assert shop.value("rejected_total", reason="limit") == 1
            assert shop.value("requests_total", method="Recommend", code="RESOURCE_EXHAUSTED") == 1
            assert shop.value("request_seconds_count", method="Recommend") == 2  # without the refusal

    asyncio.run(scene())


def test_a_client_of_the_service_config_comes_back_when_it_is_told_to(bundle: Bundle, served: Any) -> None:
    async def scene() -> None:
        pipeline = Gated(bundle)
        async with served(pipeline, limit=ConcurrencyLimit(min_limit=1, max_limit=1)) as shop:
            under_way = shop.recommend("slow")
            await asyncio.to_thread(pipeline.begun.acquire)
            async with AsyncRecommenderClient(shop.address, timeout_s=WAIT_S) as client:
                answer = asyncio.create_task(client.recommend(visitor("loyal")))
                await shop.until(lambda: shop.value("rejected_total", reason="limit") == 1)
                pipeline.go.set()
                await under_way
                assert len((await answer).items) == 10
            assert shop.value("rejected_total", reason="limit") == 1

    asyncio.run(scene())


def test_clients_of_the_service_config_make_no_overload_worse(
    bundle: Bundle, served: Any, refused: Any
) -> None:
    """A client may come back a few times; then it makes each call of a server that refuses all once."""

    async def scene() -> None:
        pipeline = Gated(bundle)
        async with served(pipeline, limit=ConcurrencyLimit(min_limit=1, max_limit=1, window_s=0.01)) as shop:
            under_way = shop.recommend("slow")
            await asyncio.to_thread(pipeline.begun.acquire)
            async with AsyncRecommenderClient(shop.address, timeout_s=WAIT_S) as client:
                for _ in range(40):
                    error = await refused(client.recommend(visitor("loyal")))
                    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert 40 < (shop.value("rejected_total", reason="limit") or 0) <= 45
            pipeline.go.set()
            await under_way

    asyncio.run(scene())


def test_who_could_only_come_back_too_late_is_told_at_once(bundle: Bundle, served: Any, refused: Any) -> None:
    async def scene() -> None:
        pipeline = Gated(bundle)
        limit = ConcurrencyLimit(min_limit=1, max_limit=1, window_s=10 * WAIT_S)
        async with served(pipeline, limit=limit) as shop:
            under_way = shop.recommend("slow")
            await asyncio.to_thread(pipeline.begun.acquire)
            async with AsyncRecommenderClient(shop.address, timeout_s=WAIT_S) as client:
                error = await refused(client.recommend(visitor("loyal")))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # and no deadline passed
            assert shop.value("rejected_total", reason="limit") == 1
            pipeline.go.set()
            await under_way

    asyncio.run(scene())


def test_a_caller_who_asks_too_often(bundle: Bundle, served: Any, refused: Any) -> None:
    async def scene() -> None:
        pipeline = RecommendationPipeline(bundle, events=MemoryEventStore())
        async with served(pipeline, rate_limit=RateLimit(per_s=0.001, burst=3)) as shop:
            event = pb.RecordedEvent(event_id="1", user_id="u", item_id="null")
            events = pb.RecordEventsRequest(events=[event])
            await shop.recommend()
            await shop.stub.RecordEvents(events)
            await shop.stub.Rank(pb.RankRequest(candidate_item_ids=["null"]))
            for call in (shop.recommend(), shop.stub.RecordEvents(events)):
                error = await refused(call)
                assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert (error.details() or "").startswith("more than 0.001 requests a second; try again in ")
            assert shop.value("rejected_total", reason="rate") == 2

    asyncio.run(scene())


def test_a_key_has_a_rate_of_its_own(bundle: Bundle, served: Any, refused: Any, tmp_path: Path) -> None:
    """Of two keys at one address."""
    file = tmp_path / "keys.json"
    slow = create_key(file, "slow", rate_limit=RateLimit(per_s=0.001, burst=1))
    quick = create_key(file, "quick")

    async def scene() -> None:
        async with (
            served(RecommendationPipeline(bundle), keys=ApiKeys.load(file)) as shop,
            AsyncRecommenderClient(shop.address, timeout_s=WAIT_S, api_key=slow) as limited,
            AsyncRecommenderClient(shop.address, timeout_s=WAIT_S, api_key=quick) as free,
        ):
            assert await limited.recommend(visitor("loyal"))
            error = await refused(limited.recommend(visitor("loyal")))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            for _ in range(5):
                assert await free.recommend(visitor("loyal"))

    asyncio.run(scene())


# Events


class Unavailable:
    """A store that is down."""

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        future: Future[Recorded] = Future()
        future.set_exception(StoreUnavailableError("the disk is full"))
        return future

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        raise StoreUnavailableError("down")

    def close(self) -> None:
        pass


def test_a_store_with_too_much_to_do_says_when_to_come_back(
    bundle: Bundle, served: Any, refused: Any
) -> None:
    class Busy(MemoryEventStore):
        def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
            raise StoreBusyError("too many events wait")

    async def scene() -> None:
        async with served(RecommendationPipeline(bundle, events=Busy())) as shop:
            events = [pb.RecordedEvent(event_id="e", user_id="u", item_id="x")]
            call = shop.stub.RecordEvents(pb.RecordEventsRequest(events=events))
            error = await refused(call)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "too many events wait" in error.details()
            assert dict(error.trailing_metadata())["retry-after-ms"] == "1000"
            assert shop.value("rejected_total", reason="limit") == 1

    asyncio.run(scene())


def test_who_waits_for_its_events_lets_another_work(bundle: Bundle, served: Any) -> None:
    """As where Redis is slow: the one worker is not waiting, its request is."""
    begun, go = threading.Event(), threading.Event()

    class Far(MemoryEventStore):
        waits = True

        def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
            if user_id == "slow":
                with waiting():
                    begun.set()
                    assert go.wait(WAIT_S)
            return super().recent(user_id)

    async def scene() -> None:
        store = Far()
        pool, places = _pool(1, store)
        assert places is not None
        pipeline = RecommendationPipeline(bundle, events=store)
        async with served(pipeline, num_threads=pool._max_workers, places=places) as shop:
            slow = asyncio.ensure_future(shop.recommend("slow"))
            assert await asyncio.to_thread(begun.wait, WAIT_S)
            for _ in range(3):
                assert (await shop.recommend("loyal")).items
            assert not slow.done()
            go.set()
            assert (await slow).items

    asyncio.run(scene())
    pool, places = _pool(3, MemoryEventStore())
    assert (pool._max_workers, places) == (3, None)


def test_no_more_threads_work_than_have_a_place() -> None:
    places = Workplaces(2)
    now, most, lock = [0], [0], threading.Lock()

    def at_work(change: int) -> None:
        with lock:
            now[0] += change
            most[0] = max(most[0], now[0])

    def work() -> None:
        with places.working():
            at_work(1)
            time.sleep(0.001)
            at_work(-1)
            with waiting():
                time.sleep(0.001)
            at_work(1)
            time.sleep(0.001)
            at_work(-1)
        with waiting():  # who has no place has none to leave
            pass

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work) for _ in range(40)]:
            done.result(WAIT_S)
        with pytest.raises(KeyError), places.working(), waiting():
            raise KeyError
    assert most[0] == 2
    assert places._num_free == 2


def test_a_place_goes_to_who_had_one_before_and_then_to_who_waits_longest() -> None:
    places = Workplaces(1)
    order: list[int] = []
    has_left, go = threading.Event(), threading.Event()

    def until(happens: Callable[[], bool]) -> None:
        ends = time.monotonic() + WAIT_S
        while not happens():
            assert time.monotonic() < ends
            time.sleep(0.001)

    def leave() -> None:
        with places.working():
            with waiting():
                has_left.set()
                assert go.wait(WAIT_S)
            order.append(-1)

    def work(number: int) -> None:
        with places.working():
            if not number:
                until(lambda: len(places._first) == 4)
                go.set()
                until(lambda: bool(places._again))
            order.append(number)

    with ThreadPoolExecutor(6) as threads:
        jobs = [threads.submit(leave)]
        assert has_left.wait(WAIT_S)
        for number in range(5):
            jobs.append(threads.submit(work, number))
            until(lambda number=number: not places._num_free and len(places._first) == number)  # type: ignore[misc]
        for job in jobs:
            job.result(WAIT_S)
    assert order == [0, -1, 1, 2, 3, 4]


def test_to_wait_for_a_place_again_is_not_what_the_store_takes(bundle: Bundle) -> None:
    """A server that is busy for a moment is not to be taken for a slow store, which would be left out."""
    places = Workplaces(1)
    is_busy = threading.Event()
    pipeline = RecommendationPipeline(bundle)

    def be_busy() -> None:
        with places.working():
            is_busy.set()
            while not places._again:
                time.sleep(0.001)
            time.sleep(0.3)

    with ThreadPoolExecutor(1) as threads:

        class Far(MemoryEventStore):
            waits = True

            def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
                with waiting():
                    threads.submit(be_busy)
                    assert is_busy.wait(WAIT_S)
                return super().recent(user_id)

        pipeline.events = Far()
        with places.working():
            found = pipeline.resolve_visitor("loyal")
    assert found.asked is not None
    assert found.resolving_s > 0.3
    assert found.asked.ended_s - found.asked.began_s < found.resolving_s - 0.29
    assert pipeline.costs.usual(["history"]) < found.resolving_s - 0.29


def test_without_the_store_answers_go_on_and_say_so(bundle: Bundle, served: Any, refused: Any) -> None:
    async def scene() -> None:
        async with served(RecommendationPipeline(bundle, events=Unavailable())) as shop:
            question = pb.RecommendRequest(visitor=visitor("loyal", ["null"]))
            answer = await shop.stub.Recommend(question)
            assert answer.trace.degraded_stages == ["history"]
            assert answer.trace.visitor_kind == pb.VISITOR_KIND_KNOWN_USER
            bare = RecommendationPipeline(bundle)
            expected, _ = bare.recommend(bare.resolve_visitor("loyal", [Event("null")]), 10)
            assert [item.item_id for item in answer.items] == [bundle.catalog.ids[r] for r in expected.rows]
            assert shop.value("degraded_total", stage="history") == 1
            # Nobody's history is asked for where there is no user.
            assert not (await shop.recommend()).trace.degraded_stages
            events = [pb.RecordedEvent(event_id=str(n), user_id="u", item_id="null") for n in range(3)]
            error = await refused(shop.stub.RecordEvents(pb.RecordEventsRequest(events=events)))
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the disk is full"
            assert shop.value("events_total", result="failed") == 3

    asyncio.run(scene())


def test_the_history_is_the_bundle_s_the_store_s_and_the_request_s(bundle: Bundle) -> None:
    # "loyal" holds 2, 3, 3, 5 at 100, 200, 300, 400; item-9 is row 10.
    store = MemoryEventStore(clock=lambda: 5.0)
    store.record(
        [
            UserEvent("a", "loyal", "item-9", "cart", 250),
            UserEvent("b", "loyal", "item-10", "view"),  # now: 5000
            UserEvent("c", "loyal", "of the next bundle", "view", 260),
            UserEvent("d", "loyal", bundle.catalog.ids[2], "view", 100),  # the bundle has it already
            UserEvent("e", "stranger", "item-9", "cart", 7),
        ]
    ).result(60)
    pipeline = RecommendationPipeline(bundle, events=store)
    found = pipeline.resolve_visitor(
        "loyal", [Event("item-11"), Event("no such"), Event("item-10", "view", 5000)]
    )
    assert found.history.items.tolist() == [2, 3, 10, 3, 5, 11, 12]
    assert found.history.event_types.tolist() == [1, 1, 4, 1, 1, 1, 0]
    assert found.num_unknown_items == 1  # of the request alone
    assert found.asked is not None
    assert (found.asked.stage, found.asked.num_in, found.asked.num_out) == ("history", 4, 6)
    stranger = pipeline.resolve_visitor("stranger")
    assert (stranger.kind.name, stranger.history.items.tolist(), stranger.is_unknown_user) == (
        "HISTORY_ONLY",
        [10],
        True,
    )
    assert pipeline.resolve_visitor("").asked is None


class Recording(MemoryEventStore):
    """Says what it was asked, and fails as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.failure: Exception | None = None
        self.takes_s = 0.0

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        self.waits.append(timeout_s)
        time.sleep(min(self.takes_s, timeout_s))
        if self.takes_s > timeout_s:
            raise StoreUnavailableError("too late")
        if self.failure:
            raise self.failure
        return super().recent(user_id)


def test_whatever_the_store_raises_costs_the_history_alone(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    store = Recording()
    store.failure = KeyError("newtype")
    found = RecommendationPipeline(bundle, events=store).resolve_visitor("loyal")
    assert (found.is_degraded, found.history.items.tolist()) == (True, [2, 3, 3, 5])
    assert "history failed; the answer is made without it" in caplog.text


def test_events_of_a_later_version_are_left_out(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryEventStore()
    kinds = ("gift", "view")
    store.record([UserEvent(kind, "new", "item-9", kind, 7) for kind in kinds]).result(60)
    found = RecommendationPipeline(bundle, events=store).resolve_visitor("new")
    assert (found.is_degraded, found.history.items.tolist()) == (False, [10])
    assert "types that this version does not know are left out" in caplog.text


def test_a_store_that_is_slow_takes_no_more_than_there_is_time_for(bundle: Bundle) -> None:
    """A page without the last clicks is better than none."""
    store = Recording()
    pipeline = RecommendationPipeline(bundle, events=store)
    assert not pipeline.resolve_visitor("loyal").is_degraded
    assert store.waits == [math.inf]
    pipeline.costs.observe("retrieval", 0.1, 1)
    assert not pipeline.resolve_visitor("loyal", budget=still(1.0)).is_degraded
    assert store.waits[1:] == [pytest.approx(1.0 - 0.2 - 0.1)]  # less the reply's share, and retrieval
    # Once it is known to be slow it is not asked, but for a try now and then.
    store.takes_s = 10.0
    assert pipeline.resolve_visitor("loyal", budget=still(0.3)).is_degraded
    num_asked = len(store.waits)
    assert pipeline.resolve_visitor("loyal", budget=still(0.15)).is_degraded
    assert len(store.waits) == num_asked
    store.takes_s = 0.0
    for _ in range(100):
        if not pipeline.resolve_visitor("loyal", budget=still(0.15)).is_degraded:
            break
    assert not pipeline.resolve_visitor("loyal", budget=still(0.15)).is_degraded


# What is counted


def test_metrics_logs_and_spans_of_real_requests(
    bundle: Bundle, served: Any, refused: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recorded: list[tuple[Any, ...]] = []

    class Broken(RecommendationPipeline):
        def rank(self, *arguments: Any, **options: Any) -> Any:
            logging.getLogger("test").warning("in a thread of the pool")
            raise RuntimeError("a secret")

    class Tracing:
        def record(self, *arguments: Any, **options: Any) -> None:
            recorded.append((*arguments, options))

    async def scene() -> None:
        async with served(Broken(bundle, events=MemoryEventStore())) as shop:
            shop.service._tracing = Tracing()  # type: ignore[assignment]
            for user in ("loyal", "reader"):
                call = shop.recommend(user, metadata=(("x-request-id", f"id-{user}"), ("traceparent", "t")))
                await call
                assert dict(await call.trailing_metadata()) == {"x-request-id": f"id-{user}"}
            await refused(shop.stub.Recommend(pb.RecommendRequest(limit=0)))
            await shop.stub.SimilarItems(pb.SimilarItemsRequest(item_id="null"))
            event = pb.RecordedEvent(event_id="1", user_id="loyal", item_id="null")
            await shop.stub.RecordEvents(pb.RecordEventsRequest(events=[event, event]))
            question = pb.RankRequest(candidate_item_ids=["null"])
            error = await refused(shop.stub.Rank(question, metadata=(("x-request-id", "id-broken"),)))
            assert error.details() == "internal error; the log names it id-broken"

            assert shop.value("requests_total", method="Recommend", code="OK") == 2
            assert shop.value("requests_total", method="Recommend", code="INVALID_ARGUMENT") == 1
            assert shop.value("requests_total", method="SimilarItems", code="OK") == 1
            assert shop.value("requests_total", method="Rank", code="INTERNAL") == 1
            assert shop.value("request_seconds_count", method="Recommend") == 3
            assert shop.value("stage_seconds_count", stage="ranking") == 2
            assert shop.value("stage_seconds_count", stage="retrieval") == 3
            assert shop.value("stage_seconds_count", stage="history") == 2
            assert shop.value("events_total", result="new") == 1
            assert shop.value("events_total", result="repeated") == 1
            assert shop.value("bundle_info", version=bundle.version, variant="") == 1
            assert shop.value("in_flight") == 0

    asyncio.run(scene())
    method, began_s, ended_s, stages, options = recorded[0]
    assert method == "Recommend"
    assert options["attributes"] == {
        "request_id": "id-loyal",
        "code": "OK",
        "caller": "ipv4:127.0.0.1",
        "bundle": bundle.version,
        "variant": "",
    }
    assert options["metadata"]["traceparent"] == "t"
    assert [stage.stage for stage in stages if "." not in stage.stage] == [
        "history",
        "filtering",
        "retrieval",
        "ranking",
        "reranking",
    ]
    moments = [began_s, *(stage.began_s for stage in stages if "." not in stage.stage), ended_s]
    assert moments == sorted(moments)
    assert "request id-broken failed" in caplog.text
    assert "a secret" in caplog.text


def test_the_request_s_id_reaches_the_threads_of_the_pool(bundle: Bundle, served: Any) -> None:
    lines: list[dict[str, Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    class Chatty(RecommendationPipeline):
        def resolve_visitor(
            self, user_id: str, events: Sequence[Event] = (), budget: Budget | None = None
        ) -> Visitor:
            logging.getLogger("chatty").warning("asked by %s", user_id)
            return super().resolve_visitor(user_id, events, budget)

    async def scene() -> None:
        async with served(Chatty(bundle)) as shop:
            metadata = [(("x-request-id", f"id-{user}"),) for user in ("loyal", "reader")]
            await asyncio.gather(
                *(
                    shop.recommend(user, metadata=m)
                    for user, m in zip(("loyal", "reader"), metadata, strict=True)
                )
            )

    logging.getLogger("chatty").addHandler(handler := Lines())
    try:
        asyncio.run(scene())
    finally:
        logging.getLogger("chatty").removeHandler(handler)
    assert {(line["message"], line["request_id"]) for line in lines} == {
        ("asked by loyal", "id-loyal"),
        ("asked by reader", "id-reader"),
    }


def test_the_client_asks_again_where_that_helps(bundle: Bundle, served: Any) -> None:
    class Hiccup(MemoryEventStore):
        num_asked = 0

        def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
            self.num_asked += 1
            if self.num_asked == 1:
                raise StoreUnavailableError("in a moment")
            return super().record(events)

    async def scene() -> None:
        store = Hiccup()
        async with served(RecommendationPipeline(bundle, events=store)) as shop:
            address = shop.address
            event = pb.RecordedEvent(event_id="1", user_id="loyal", item_id="null")

            def record() -> int:
                with RecommenderClient(address, timeout_s=WAIT_S) as client:
                    return client.record_events([event]).num_new

            assert await asyncio.to_thread(record) == 1
            assert store.num_asked == 2

    asyncio.run(scene())
