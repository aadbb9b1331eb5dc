"""The gRPC server: the event loop answers the wire, a pool of threads runs the pipeline.

A call goes through `RecommenderService._answer`: request id, API key, rate, a place among the requests under
way, a thread; and out again: status, metrics, span. Standard services beside our own, which need no key and
no place: grpc.health.v1 and server reflection.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine import messages
from engine.admission import ConcurrencyLimit, Permit, RateLimit, RateLimiter, RejectedError
from engine.auth import ApiKey, ApiKeys, KeyFile, presented_key
from engine.bundle import Bundle
from engine.deadline import Budget
from engine.events import EventStore, StoreBusyError, StoreUnavailableError
from engine.following import follow_bundles, follow_keys, follow_policies
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from engine.response_cache import ResponseCache
from engine.telemetry import LimitedLog, Metrics, StageTime, Tracing, read_request_id, request_id
from engine.tls import ServerTls
from engine.trace import Trace
from engine.variants import OTHER, SHADOW, Shadow, Split
from engine.watchdog import STUCK_S, watch_workers
from engine.workplaces import Workplaces, waiting_s
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc
from reranking.policy import Policies, PolicyError

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Metadata = Sequence[tuple[str, str | bytes]]

SERVICE = pb.DESCRIPTOR.services_by_name["RecommenderService"].full_name
STATUSES = health_pb2.HealthCheckResponse
# Requests for each worker that may be under way before the limit has measured anything: room for a burst.
INITIAL_LIMIT = 4
# Of a message that gRPC lets in, so that one that is too large for the service can be told so, and counted.
WIRE_BYTES = messages.MAX_MESSAGE_BYTES + (1 << 20)
CONNECTION_AGE_S = 120.0  # give or take a tenth; then it takes no new calls, and the client connects anew
CONNECTION_GRACE_S = 60.0  # for what is under way then; a Watch of the health ends with it
WATCHERS_S = 0.2  # for those who watch the health to be told of the end
BUSY_STORE_S = 1.0  # until a store that has too much to do may have done it
NUM_WAITING = 16  # requests that may wait for the events of their users beside those that are worked on
END_S = 2.0  # after draining, for a worker to come back from the stage that it is in
NO_OTHERS: Mapping[str, RecommendationPipeline] = MappingProxyType({})
ROLE_OF = {"RecordEvents": "client"}  # of an API key; all other calls are for readers


class AddressError(ValueError):
    """An address that the server cannot listen on, and why."""


class UnknownItemError(LookupError):
    """A request about an item that the catalog does not have."""


class UnknownCallerError(Exception):
    """A call without an API key that the server knows."""


class ForbiddenError(Exception):
    """A call that the caller's API key is not good for."""


class TooLateError(Exception):
    """A request whose deadline passed before anything was done for it."""


class StuckError(Exception):
    """A request when no worker comes back any more: another server may answer it."""


class Reply(NamedTuple, Generic[Response]):
    """An answer, and how it came about; None where no stage had a part in it."""

    response: Response
    trace: Trace | None = None


class Caller(NamedTuple):
    """Who calls, as logs and spans name it."""

    name: str
    key_id: str = ""  # of the API key; empty where nobody needs one


class Refusal(NamedTuple):
    """How a call ends that got no answer."""

    code: grpc.StatusCode
    message: str
    reason: str = ""  # of the metric trirank_rejected, where the call was refused without work
    metadata: tuple[tuple[str, str], ...] = ()


# Answers a request from a pipeline within a budget.
Call = Callable[[RecommendationPipeline, Request, Budget], Reply[Response]]


class RecommenderService:
    """The calls, from the bytes of a request. `pipelines` may be replaced at any time: a request keeps those
    it began with.
    """

    def __init__(
        self,
        pipeline: RecommendationPipeline,
        pool: ThreadPoolExecutor,
        *,
        limit: ConcurrencyLimit | None = None,
        keys: ApiKeys | None = None,
        rate_limit: RateLimit | None = None,
        metrics: Metrics | None = None,
        policies: Policies | None = None,
        others: Mapping[str, RecommendationPipeline] = NO_OTHERS,
        share: float = 0.0,
        cache: ResponseCache | None = None,
        places: Workplaces | None = None,
    ) -> None:
        """Begin to answer.

        Args:
            pipeline: what answers.
            pool: where it runs.
            limit: of the requests in the pool; one with the default settings for None.
            keys: that callers must have; None where nobody needs one.
            rate_limit: of each caller who has none by the key; None for no limit.
            metrics: where calls are counted.
            policies: those that the pipeline has instead of its bundle's own; the next bundle gets them too.
            others: pipelines of other bundles, by their names in engine/variants.py.
            share: of the users whom the pipeline OTHER answers.
            cache: of slates; None to make each anew.
            places: of the pool's threads; None where each may always work.
        """
        self.pipelines: Mapping[str, RecommendationPipeline] = {"": pipeline, **others}
        self.keys = keys
        self.policies = policies
        self.limit = limit or ConcurrencyLimit(min_limit=1)
        self.metrics = metrics or Metrics()
        self._pool = pool
        self._cache = cache
        self._places = places
        self._rates = RateLimiter(rate_limit)
        self._tracing = Tracing()
        self._jobs: dict[Future[Any], float] = {}  # in the pool, and since when
        self.is_stuck = False  # whether no worker is left (engine/watchdog.py)
        self.metrics.in_flight.set_function(lambda: self.limit.in_flight)
        self.metrics.stuck_workers.set_function(lambda: self.num_stuck(STUCK_S))
        self.metrics.concurrency_limit.set_function(lambda: self.limit.limit)
        for name, one in self.pipelines.items():
            one.variant = name
            self.metrics.bundle_info.labels(one.bundle.version, name).set(1)
        self._split = Split(share, others[OTHER].bundle.version) if OTHER in others else None
        self._shadow = Shadow(self.metrics) if SHADOW in others else None

    @property
    def pipeline(self) -> RecommendationPipeline:
        """That of the bundle that is served."""
        return self.pipelines[""]

    @pipeline.setter
    def pipeline(self, pipeline: RecommendationPipeline) -> None:
        self.pipelines = {**self.pipelines, "": pipeline}

    def close(self) -> None:
        """Give back what the service has begun."""
        if self._shadow:
            self._shadow.close()

    @property
    def is_idle(self) -> bool:
        """Whether no thread has a request, the shadow's neither, and none waits for one."""
        return not self._jobs and not (self._shadow and self._shadow.is_asking)

    def num_stuck(self, stuck_s: float) -> int:
        """Return how many workers have been at one request for that long. Any thread may ask."""
        before = time.monotonic() - stuck_s
        num_stuck = sum(began <= before and job.running() for job, began in self._jobs.copy().items())
        # Behind one that is stuck others wait for its place, in threads of their own.
        return min(num_stuck, self._places.num_places) if self._places else num_stuck

    def use(self, pipeline: RecommendationPipeline) -> None:
        """Answer from another bundle from now on."""
        self.metrics.bundle_info.remove(self.pipeline.bundle.version, "")
        self.metrics.bundle_info.labels(pipeline.bundle.version, "").set(1)
        self.pipeline = pipeline

    async def Recommend(  # noqa: N802  # gRPC's spelling
        self, data: bytes, context: pb_grpc._ServicerContext
    ) -> pb.RecommendResponse:
        """See recommender.proto."""
        return await self._answer("Recommend", pb.RecommendRequest, data, context, self._recommend)

    async def SimilarItems(  # noqa: N802
        self, data: bytes, context: pb_grpc._ServicerContext
    ) -> pb.SimilarItemsResponse:
        """See recommender.proto."""
        return await self._answer("SimilarItems", pb.SimilarItemsRequest, data, context, self._similar)

    async def Rank(  # noqa: N802
        self, data: bytes, context: pb_grpc._ServicerContext
    ) -> pb.RankResponse:
        """See recommender.proto."""
        return await self._answer("Rank", pb.RankRequest, data, context, self._rank)

    async def RecordEvents(  # noqa: N802
        self, data: bytes, context: pb_grpc._ServicerContext
    ) -> pb.RecordEventsResponse:
        """See recommender.proto. Needs no thread of the pool, so it takes no place among the requests."""
        return await self._answer("RecordEvents", pb.RecordEventsRequest, data, context, self._record)

    async def _answer(
        self,
        method: str,
        kind: type[Request],
        data: bytes,
        context: pb_grpc._ServicerContext,
        work: Callable[[Request, pb_grpc._ServicerContext], Awaitable[Reply[Response]]],
    ) -> Response:
        """Let a caller in, do the work, and turn what it raises into the status of the contract."""
        began_s = time.perf_counter()
        metadata: Metadata = tuple(context.invocation_metadata() or ())
        request_id.set(read_request_id(metadata))
        named = (("x-request-id", request_id.get()),)
        context.set_trailing_metadata(named)
        caller = Caller(context.peer().rpartition(":")[0])  # the address, without the port
        try:
            key = self._key(metadata)
            if key is not None:
                caller = Caller(f"API key {key.id} ({key.name})", key.id)
            self._check(ROLE_OF.get(method, "reader"), key, caller)
            # Behind these: a message may take thirty times its bytes.
            response, trace = await work(messages.read_request(kind, data), context)
        except asyncio.CancelledError:
            is_late = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            self._observe(method, code, "", began_s, time.perf_counter(), None, metadata, caller)
            raise
        except Exception as error:  # noqa: BLE001  # the caller is told, and the log where nobody foresaw it
            code, message, reason, hints = _refusal(error, context.time_remaining(), caller)
        else:
            # Once the answer is on its way: gRPC sends it before the loop comes to this.
            ok, ended_s = grpc.StatusCode.OK, time.perf_counter()
            asyncio.get_running_loop().call_soon(
                self._observe, method, ok, "", began_s, ended_s, trace, metadata, caller
            )
            return response
        # Out of the handler: gRPC keeps what abort raises, and with it would keep the error, its frames and
        # their bundle, in a circle that only the garbage collector can break.
        self._observe(method, code, reason, began_s, time.perf_counter(), None, metadata, caller)
        context.set_trailing_metadata((*named, *hints))
        await context.abort(code, message)
        raise AssertionError("abort always raises")

    def _key(self, metadata: Metadata) -> ApiKey | None:
        """Return the caller's key; None where nobody needs one. UnknownCallerError without a good one."""
        if self.keys is None:
            return None
        presented = presented_key(metadata)
        key = self.keys.find(presented)
        if key is None:
            raise UnknownCallerError(
                "no API key; expected one in the metadata, as authorization: Bearer KEY or x-api-key: KEY"
                if presented is None
                else "the API key is not one of this server's"
            )
        return key

    def _check(self, role: str, key: ApiKey | None, caller: Caller) -> None:
        """Raise ForbiddenError where the key is not good for this, RejectedError above the caller's rate."""
        if key is None:
            self._rates.check(caller.name)
            return
        if not key.may(role):
            raise ForbiddenError(f"the API key has the role {key.role}; expected {role} for this call")
        self._rates.check(key.id, key.rate_limit)

    def _pipeline_for(self, visitor: pb.Visitor) -> RecommendationPipeline:
        """Return the pipeline that answers a visitor: always the same for a user, as long as it is there."""
        if self._split is None:
            return self.pipeline
        who = visitor.user_id or str(messages.visitor_number(visitor))
        return self.pipelines[OTHER if self._split.takes(who) else ""]

    async def _recommend(
        self, request: pb.RecommendRequest, context: pb_grpc._ServicerContext
    ) -> Reply[pb.RecommendResponse]:
        call = functools.partial(recommend, cache=self._cache)
        reply = await self._run(call, self._pipeline_for(request.visitor), request, context)
        if self._shadow:
            shadow = self.pipelines[SHADOW]
            self._shadow.offer(lambda: recommend(shadow, request, Budget(None)).response, reply.response)
        return reply

    async def _similar(
        self, request: pb.SimilarItemsRequest, context: pb_grpc._ServicerContext
    ) -> Reply[pb.SimilarItemsResponse]:
        return await self._run(similar_items, self.pipeline, request, context)

    async def _rank(
        self, request: pb.RankRequest, context: pb_grpc._ServicerContext
    ) -> Reply[pb.RankResponse]:
        return await self._run(rank, self._pipeline_for(request.visitor), request, context)

    async def _run(
        self,
        call: Call[Request, Response],
        pipeline: RecommendationPipeline,
        request: Request,
        context: pb_grpc._ServicerContext,
    ) -> Reply[Response]:
        """Run a call in the pool. Its place is free when the thread is done, not when the caller has gone."""
        if self.is_stuck:
            raise StuckError("no worker of this server comes back from a request; another one may answer")
        time_left_s = context.time_remaining()
        permit = self.limit.admit(time_left_s)
        budget = Budget(time_left_s)
        loop = asyncio.get_running_loop()
        scope = contextvars.copy_context()
        try:
            job = self._pool.submit(scope.run, _begin, call, pipeline, request, budget, self._places)
        except BaseException:  # such as no thread to be had; one that there is may take the job all the same
            permit.release(counts=False)
            raise
        self._jobs[job] = time.monotonic()
        # One call into the loop for both, as each wakes its thread, which the worker's then waits for.
        is_done = loop.create_future()
        job.add_done_callback(lambda done: loop.call_soon_threadsafe(self._give_back, permit, done, is_done))
        try:
            await is_done
        except asyncio.CancelledError:
            job.cancel()  # where it still waits for a thread
            budget.cancel()
            raise
        try:
            reply, _ = job.result()
            return reply
        finally:
            del job  # which has what it raises, which would have this frame

    def _give_back(self, permit: Permit, job: Future[Any], is_done: asyncio.Future[None]) -> None:
        """Only answers say what a request takes: what failed, or was cut off, would mislead the limit."""
        del self._jobs[job]
        is_answer = not job.cancelled() and job.exception() is None
        permit.release(counts=is_answer, waiting_s=job.result()[1] if is_answer else 0.0)
        if not is_done.done():
            is_done.set_result(None)

    async def _record(
        self, request: pb.RecordEventsRequest, context: pb_grpc._ServicerContext
    ) -> Reply[pb.RecordEventsResponse]:
        events = messages.read_events(request)
        store, count = self.pipeline.events, self.metrics.events.labels
        if store is None:
            raise StoreUnavailableError("this server records no events")
        try:
            recorded = await asyncio.wrap_future(store.record(events))
        except StoreUnavailableError as error:
            count("failed").inc(len(events))
            if isinstance(error, StoreBusyError):
                raise RejectedError(str(error), BUSY_STORE_S, is_from_limit=True) from error
            raise
        count("delayed" if recorded.is_delayed else "new").inc(recorded.num_new)
        count("repeated").inc(recorded.num_repeated)
        return Reply(messages.write_recorded(recorded))

    def _observe(
        self,
        method: str,
        code: grpc.StatusCode,
        reason: str,
        began_s: float,
        ended_s: float,
        trace: Trace | None,
        metadata: Metadata,
        caller: Caller,
    ) -> None:
        if caller.key_id:
            self.metrics.observe_key(caller.key_id, code.name)
        if reason:
            self.metrics.observe_refusal(method, code.name, reason)
            return
        stages = (
            []
            if trace is None
            else [
                StageTime(one.stage, one.began_s, one.ended_s, one.stage in trace.degraded_stages)
                for one in trace.timings
            ]
        )
        self.metrics.observe_request(method, code.name, ended_s - began_s, stages)
        attributes = {"request_id": request_id.get(), "code": code.name, "caller": caller.name}
        if trace:
            attributes |= {"bundle": trace.bundle_version, "variant": trace.variant}
        texts = {name: value for name, value in metadata if isinstance(value, str)}
        self._tracing.record(method, began_s, ended_s, stages, attributes=attributes, metadata=texts)


class Health(health.aio.HealthServicer):  # type: ignore[misc,name-defined]  # missing in the stubs
    """The standard health service, but that who watches it keeps no server from ending.

    A watch has no end of its own, and each would make a shutdown take the whole drain.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_ending = asyncio.Event()

    async def Watch(  # noqa: N802  # gRPC's spelling
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> None:
        """Tell of every change, until the server ends."""
        watching = asyncio.ensure_future(super().Watch(request, context))
        ending = asyncio.ensure_future(self._is_ending.wait())
        try:
            await asyncio.wait([watching, ending], return_when=asyncio.FIRST_COMPLETED)
            if not watching.done():
                await asyncio.wait([watching], timeout=WATCHERS_S)
        finally:
            watching.cancel()
            ending.cancel()

    async def enter_graceful_shutdown(self) -> None:
        """Say NOT_SERVING from now on, and end those who watch."""
        await super().enter_graceful_shutdown()
        self._is_ending.set()


def add_to_server(service: RecommenderService, server: grpc.aio.Server) -> None:
    """Have a server answer with a service.

    As the generated function does, but that the service gets the bytes and reads them itself: gRPC would
    build every message, of whatever size, before the service could ask for a key or count it.
    """
    handlers = {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(service, method.name),
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
        for method in pb.DESCRIPTOR.services_by_name["RecommenderService"].methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _begin(
    call: Call[Request, Response],
    pipeline: RecommendationPipeline,
    request: Request,
    budget: Budget,
    places: Workplaces | None = None,
) -> tuple[Reply[Response], float]:
    """Make a call, unless its time was up before a worker was free. Also return how long it has waited."""
    with places.working() if places else contextlib.nullcontext():
        if budget.expired():
            raise TooLateError("the deadline passed before a worker was free")
        begin_s = waiting_s()
        return call(pipeline, request, budget), waiting_s() - begin_s


def _refusal(error: Exception, time_left_s: float | None, caller: Caller) -> Refusal:
    """Return how the contract words an error; one that nobody foresaw goes to the log.

    So does, once a second, one that a caller can be asked about.
    """
    code = grpc.StatusCode
    match error:
        case messages.InvalidRequestError() | PolicyError():
            seldom.warning("an invalid request", f" of {caller.name}: {error}")
            return Refusal(code.INVALID_ARGUMENT, str(error))
        case UnknownItemError():
            return Refusal(code.NOT_FOUND, str(error))
        case RejectedError():
            seldom.warning(f"refused: {error.reason}", f"; {caller.name}")
            kind = "limit" if error.is_from_limit else "rate"
            return Refusal(code.RESOURCE_EXHAUSTED, str(error), kind, error.metadata(time_left_s))
        case UnknownCallerError():
            seldom.warning(f"refused: {error}", f"; {caller.name}")
            return Refusal(code.UNAUTHENTICATED, str(error), "key")
        case ForbiddenError():
            seldom.warning(f"refused: {error}", f"; {caller.name}")
            return Refusal(code.PERMISSION_DENIED, str(error), "key")
        case TooLateError():
            return Refusal(code.DEADLINE_EXCEEDED, str(error))
        case StuckError():
            seldom.warning(f"refused: {error}")
            return Refusal(code.UNAVAILABLE, str(error), "stuck")
        case StoreUnavailableError():
            return Refusal(code.UNAVAILABLE, str(error))
    name = request_id.get()
    logger.error("request %s failed: %r", name, error)
    seldom.exception("a request failed", error)
    return Refusal(code.INTERNAL, f"internal error; the log names it {name}")


def recommend(
    pipeline: RecommendationPipeline,
    request: pb.RecommendRequest,
    budget: Budget,
    cache: ResponseCache | None = None,
) -> Reply[pb.RecommendResponse]:
    """Answer Recommend, from the cache where it has the answer."""
    limit = messages.read_limit(request, pipeline.default_limit)
    user_id, events = messages.read_visitor(request.visitor)
    context = messages.read_context(request.visitor.context)
    filters = messages.read_filters(request)
    excluded = messages.read_excluded(request)
    policy = pipeline.policy(messages.read_policy(request), messages.read_overrides(request))

    catalog = pipeline.bundle.catalog
    visitor = pipeline.resolve_visitor(user_id, events, budget)
    key = None
    if cache and not (visitor.is_degraded or request.explain):
        key = cache.key(pipeline, request, visitor)
        if found := cache.get(key):
            return _again(found, pipeline.begin_trace(visitor, budget))
    items, trace = pipeline.recommend(
        visitor,
        limit,
        filters=filters,
        excluded=catalog.rows(excluded),
        budget=budget,
        now=_now(pipeline, request),
        policy=policy,
        seed=messages.read_seed(request),
        context=context,
        explain=request.explain,
        head_weights=messages.read_head_weights(request, pipeline.heads),
    )
    assert trace.arrangement is not None
    response = pb.RecommendResponse()
    unread = context.keys() - policy.context_keys - pipeline.context_keys
    messages.write_trace(response.trace, trace, unread)
    messages.write_arrangement(response.arrangement, trace.arrangement, catalog)
    messages.write_items(response.items, items, catalog, trace.arrangement.explanation)
    if cache and key and not trace.degraded_stages:
        cache.put(key, response)
    return Reply(response, trace)


def _again(found: pb.RecommendResponse, trace: Trace) -> Reply[pb.RecommendResponse]:
    """Return an answer of the cache, with the times of this request."""
    trace.run("cache", lambda: found.items, num_in=len(found.items))
    del found.trace.timings[:]
    messages.write_times(found.trace, trace)
    return Reply(found, trace)


def similar_items(
    pipeline: RecommendationPipeline, request: pb.SimilarItemsRequest, budget: Budget
) -> Reply[pb.SimilarItemsResponse]:
    """Answer SimilarItems."""
    limit = messages.read_limit(request, pipeline.default_limit)
    item_id = messages.read_item_id(request)
    filters = messages.read_filters(request)
    excluded = messages.read_excluded(request)
    context = messages.read_context(request.context, "context")
    policy = pipeline.policy(messages.read_policy(request))

    catalog = pipeline.bundle.catalog
    row = int(catalog.rows([item_id])[0])
    if not row:
        raise UnknownItemError(f"item_id is {item_id!r}; expected an item of the catalog")
    items, trace = pipeline.similar(
        row,
        limit,
        filters=filters,
        excluded=catalog.rows(excluded),
        budget=budget,
        now=_now(pipeline, request),
        policy=policy,
        context=context,
    )
    response = pb.SimilarItemsResponse()
    messages.write_trace(response.trace, trace, context.keys() - policy.context_keys)
    messages.write_items(response.items, items, catalog)
    return Reply(response, trace)


def rank(pipeline: RecommendationPipeline, request: pb.RankRequest, budget: Budget) -> Reply[pb.RankResponse]:
    """Answer Rank."""
    user_id, events = messages.read_visitor(request.visitor)
    context = messages.read_context(request.visitor.context)
    candidate_ids = messages.read_candidates(request)

    catalog = pipeline.bundle.catalog
    visitor = pipeline.resolve_visitor(user_id, events, budget)
    rows = catalog.rows(candidate_ids)
    items, trace = pipeline.rank(
        visitor,
        rows[rows > 0],
        budget=budget,
        now=_now(pipeline, request),
        context=context,
        head_weights=messages.read_head_weights(request, pipeline.heads),
    )
    response = pb.RankResponse(
        unknown_item_ids=[item_id for item_id, row in zip(candidate_ids, rows, strict=True) if not row]
    )
    messages.write_trace(response.trace, trace, context.keys() - pipeline.context_keys)
    messages.write_items(response.items, items, catalog)
    return Reply(response, trace)


def _now(
    pipeline: RecommendationPipeline,
    request: pb.RecommendRequest | pb.SimilarItemsRequest | pb.RankRequest,
) -> int | None:
    """Return the time of a request; None for that of the bundle's newest event, where a shop has no now."""
    now = messages.read_now(request)
    if not pipeline.has_clock or pipeline.bundle.manifest["data"]["simulated"]:
        return now if pipeline.has_clock else None
    return round(time.time() * 1000) if now is None else now


def _pool(num_workers: int, events: EventStore | None) -> tuple[ThreadPoolExecutor, Workplaces | None]:
    """Return threads for workers; more of them where a request may have to wait for its user's events."""
    places = Workplaces(num_workers) if events and events.waits else None
    num_threads = num_workers + NUM_WAITING if places else num_workers
    return ThreadPoolExecutor(num_threads, thread_name_prefix="pipeline"), places


async def serve(
    pipeline: RecommendationPipeline,
    address: str,
    *,
    num_workers: int,
    drain_s: float,
    on_ready: Callable[[str], None],
    policies: PolicyFiles | None = None,
    bundles: Path | None = None,
    open_bundle: Callable[[Path], Bundle] = Bundle.load,
    keys: KeyFile | None = None,
    rate_limit: RateLimit | None = None,
    tls: ServerTls | None = None,
    metrics: Metrics | None = None,
    others: Mapping[str, RecommendationPipeline] = NO_OTHERS,
    share: float = 0.0,
    cache: ResponseCache | None = None,
    reuse_port: bool = False,
    give_up: Callable[[], None] | None = None,
    give_up_s: float = 0.0,
) -> bool:
    """Answer requests until SIGTERM or SIGINT, then finish what is under way.

    Returns whether all workers have come back. One that has not (see engine/watchdog.py) would keep the
    interpreter from ending.

    What can change while it is served is looked at every second, and at once on SIGHUP.

    Args:
        pipeline: what answers.
        address: "host:port"; port 0 takes a free one.
        num_workers: requests that are worked on at once.
        drain_s: how long requests under way may take after the signal.
        on_ready: called with the address in use once requests are answered.
        policies: where the pipeline's policies came from, in which case every bundle is served with them.
            None where they are the bundle's own.
        bundles: a directory whose newest or pinned bundle is to be served; None to stay with this one.
        open_bundle: opens a bundle of that directory.
        keys: that callers must have; None where nobody needs one.
        rate_limit: of each caller who has none by the key; None for no limit.
        tls: None for a connection in the clear.
        metrics: where calls are counted.
        others: pipelines of other bundles, by their names in engine/variants.py.
        share: of the users whom the pipeline OTHER answers.
        cache: of slates; None to make each anew.
        reuse_port: whether other servers may listen on the same port.
        give_up: called when no worker comes back any more; None to say so to those who ask for the health.
        give_up_s: seconds for which it has to be so.

    Raises:
        AddressError: the address is taken, or is none.
        ValueError: the files of `keys` or `tls` are wrong.
    """
    pool, places = _pool(num_workers, pipeline.events)
    with contextlib.ExitStack() as ending:
        ending.callback(pool.shutdown, wait=False, cancel_futures=True)
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", WIRE_BYTES),
                # Two servers that share a port by mistake would each get a part of the requests.
                ("grpc.so_reuseport", int(reuse_port)),
                # Clients look a name up anew when a connection ends: so they find servers that were added.
                ("grpc.max_connection_age_ms", round(1000 * CONNECTION_AGE_S)),
                ("grpc.max_connection_age_grace_ms", round(1000 * CONNECTION_GRACE_S)),
            ]
        )
        service = RecommenderService(
            pipeline,
            pool,
            limit=ConcurrencyLimit(min_limit=num_workers, initial=INITIAL_LIMIT * num_workers),
            keys=keys.load() if keys else None,
            rate_limit=rate_limit,
            metrics=metrics,
            policies=policies.current if policies else None,
            others=others,
            share=share,
            cache=cache,
            places=places,
        )
        del pipeline  # or it would stay in memory when another has replaced it
        add_to_server(service, server)
        servicer = Health()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            if tls:
                port = server.add_secure_port(address, tls.credentials())
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressError(
                f"cannot listen on {address!r}: the port is taken or this is no host:port"
            ) from error

        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stop.set)
        hangups: list[asyncio.Event] = []
        followers: list[asyncio.Task[None]] = []

        def follow(begin: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
            hangups.append(asyncio.Event())
            followers.append(asyncio.create_task(begin(hangups[-1])))

        if policies is not None:
            follow(lambda hangup: follow_policies(service, policies, hangup))
        if keys is not None:
            follow(lambda hangup: follow_keys(service, keys, hangup))
        if bundles is not None:
            follow(lambda hangup: follow_bundles(service, bundles, open_bundle, hangup))

        async def say(is_serving: bool) -> None:
            service.is_stuck = not is_serving
            for name in (health.OVERALL_HEALTH, SERVICE):
                await servicer.set(name, STATUSES.SERVING if is_serving else STATUSES.NOT_SERVING)

        watching = watch_workers(service, num_workers, say, give_up=give_up, give_up_s=give_up_s)
        followers.append(asyncio.create_task(watching))

        def hang_up() -> None:
            for hangup in hangups:
                hangup.set()

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        await server.start()
        await say(True)
        on_ready(f"{address.rpartition(':')[0]}:{port}")

        await stop.wait()
        logger.info("draining: no new requests, up to %g s for those under way", drain_s)
        await servicer.enter_graceful_shutdown()
        await server.stop(drain_s)
        service.close()
        for follower in followers:
            follower.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                while not service.is_idle:
                    await asyncio.sleep(0.01)
        return service.is_idle
