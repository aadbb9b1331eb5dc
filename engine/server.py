"""The gRPC server: the event loop answers the wire, a pool of threads runs the pipeline.

Standard services beside our own: grpc.health.v1 and server reflection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine import messages
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc
from reranking.policy import PolicyError

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

SERVICE = pb.DESCRIPTOR.services_by_name["RecommenderService"].full_name
STATUSES = health_pb2.HealthCheckResponse
# The share of a caller's deadline after which no new stage starts: the rest is for the way back.
DEADLINE_SHARE = 0.8
POLL_S = 1.0  # how often the files of policies are looked at


class AddressError(ValueError):
    """An address that the server cannot listen on, and why."""


class UnknownItemError(LookupError):
    """A request about an item that the catalog does not have."""


class RecommenderService(pb_grpc.RecommenderServiceServicer):
    """The three calls. `pipeline` may be replaced at any time: a request keeps the one it began with."""

    def __init__(self, pipeline: RecommendationPipeline, pool: ThreadPoolExecutor) -> None:
        self.pipeline = pipeline
        self._pool = pool

    async def Recommend(  # noqa: N802  # gRPC's spelling
        self, request: pb.RecommendRequest, context: pb_grpc._ServicerContext
    ) -> pb.RecommendResponse:
        """See recommender.proto."""
        return await self._answer(recommend, request, context)

    async def SimilarItems(  # noqa: N802
        self, request: pb.SimilarItemsRequest, context: pb_grpc._ServicerContext
    ) -> pb.SimilarItemsResponse:
        """See recommender.proto."""
        return await self._answer(similar_items, request, context)

    async def Rank(  # noqa: N802
        self, request: pb.RankRequest, context: pb_grpc._ServicerContext
    ) -> pb.RankResponse:
        """See recommender.proto."""
        return await self._answer(rank, request, context)

    async def _answer(
        self,
        call: Callable[[RecommendationPipeline, Request, float | None], Response],
        request: Request,
        context: pb_grpc._ServicerContext,
    ) -> Response:
        """Run a call in the pool, and turn what it raises into the status that the contract promises."""
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else time.perf_counter() + DEADLINE_SHARE * remaining_s
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, call, self.pipeline, request, deadline)
        except (messages.InvalidRequestError, PolicyError) as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except UnknownItemError as error:
            await _abort(context, grpc.StatusCode.NOT_FOUND, str(error))
        except Exception:
            request_id = uuid.uuid4().hex[:12]
            logger.exception("request %s failed", request_id)
            await _abort(context, grpc.StatusCode.INTERNAL, f"internal error; the log names it {request_id}")


def recommend(
    pipeline: RecommendationPipeline, request: pb.RecommendRequest, deadline: float | None
) -> pb.RecommendResponse:
    """Answer Recommend."""
    limit = messages.read_limit(request, pipeline.default_limit)
    user_id, events = messages.read_visitor(request.visitor)
    context = messages.read_context(request.visitor.context)
    filters = messages.read_filters(request.filters)
    excluded = messages.read_excluded(request)
    policy = pipeline.policy(messages.read_policy(request), messages.read_overrides(request))

    catalog = pipeline.bundle.catalog
    visitor = pipeline.resolve_visitor(user_id, events)
    items, trace = pipeline.recommend(
        visitor,
        limit,
        filters=filters,
        excluded=catalog.rows(excluded),
        deadline=deadline,
        now=_now(pipeline, request),
        policy=policy,
        seed=messages.read_seed(request),
        context=context,
        explain=request.explain,
        head_weights=messages.read_head_weights(request, pipeline.heads),
    )
    assert trace.arrangement is not None
    return pb.RecommendResponse(
        items=messages.write_items(items, catalog, trace.arrangement.explanation),
        trace=messages.write_trace(trace, context.keys() - policy.context_keys - pipeline.context_keys),
        arrangement=messages.write_arrangement(trace.arrangement, catalog),
    )


def similar_items(
    pipeline: RecommendationPipeline, request: pb.SimilarItemsRequest, deadline: float | None
) -> pb.SimilarItemsResponse:
    """Answer SimilarItems."""
    limit = messages.read_limit(request, pipeline.default_limit)
    item_id = messages.read_item_id(request)
    filters = messages.read_filters(request.filters)
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
        deadline=deadline,
        now=_now(pipeline, request),
        policy=policy,
        context=context,
    )
    return pb.SimilarItemsResponse(
        items=messages.write_items(items, catalog),
        trace=messages.write_trace(trace, context.keys() - policy.context_keys),
    )


def rank(
    pipeline: RecommendationPipeline, request: pb.RankRequest, deadline: float | None
) -> pb.RankResponse:
    """Answer Rank."""
    user_id, events = messages.read_visitor(request.visitor)
    context = messages.read_context(request.visitor.context)
    candidate_ids = messages.read_candidates(request)

    catalog = pipeline.bundle.catalog
    visitor = pipeline.resolve_visitor(user_id, events)
    rows = catalog.rows(candidate_ids)
    items, trace = pipeline.rank(
        visitor,
        rows[rows > 0],
        deadline=deadline,
        now=_now(pipeline, request),
        context=context,
        head_weights=messages.read_head_weights(request, pipeline.heads),
    )
    return pb.RankResponse(
        items=messages.write_items(items, catalog),
        unknown_item_ids=[item_id for item_id, row in zip(candidate_ids, rows, strict=True) if not row],
        trace=messages.write_trace(trace, context.keys() - pipeline.context_keys),
    )


def _now(
    pipeline: RecommendationPipeline,
    request: pb.RecommendRequest | pb.SimilarItemsRequest | pb.RankRequest,
) -> int | None:
    """Return the time of a request; None for that of the bundle's newest event, where a shop has no now."""
    now = messages.read_now(request)
    if not pipeline.has_clock or pipeline.bundle.manifest["data"]["simulated"]:
        return now if pipeline.has_clock else None
    return round(time.time() * 1000) if now is None else now


async def serve(
    pipeline: RecommendationPipeline,
    address: str,
    *,
    num_workers: int,
    drain_s: float,
    on_ready: Callable[[str], None],
    policies: PolicyFiles | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish what is under way and return.

    Args:
        pipeline: what answers.
        address: "host:port"; port 0 takes a free one.
        num_workers: requests that are worked on at once.
        drain_s: how long requests under way may take after the signal.
        on_ready: called with the address in use once requests are answered.
        policies: where the pipeline's policies came from; they are loaded again when they change, and on
            SIGHUP. None where they are the bundle's own.

    Raises:
        AddressError: the address is taken, or is none.
    """
    with ThreadPoolExecutor(num_workers, thread_name_prefix="pipeline") as pool:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", messages.MAX_MESSAGE_BYTES),
                # Without this two servers may share a port on Linux, each with a part of the requests.
                ("grpc.so_reuseport", 0),
            ]
        )
        service = RecommenderService(pipeline, pool)
        pb_grpc.add_RecommenderServiceServicer_to_server(service, server)
        servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressError(
                f"cannot listen on {address!r}: the port is taken or this is no host:port"
            ) from error

        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stop.set)
        following = None
        if policies is not None:
            hangup = asyncio.Event()
            loop.add_signal_handler(signal.SIGHUP, hangup.set)
            following = asyncio.create_task(follow_policies(service, policies, hangup))
        await server.start()
        for name in (health.OVERALL_HEALTH, SERVICE):
            await servicer.set(name, STATUSES.SERVING)
        on_ready(f"{address.rpartition(':')[0]}:{port}")

        await stop.wait()
        logger.info("draining: no new requests, up to %g s for those under way", drain_s)
        await servicer.enter_graceful_shutdown()
        await server.stop(drain_s)
        if following is not None:
            following.cancel()


async def follow_policies(
    service: RecommenderService, policies: PolicyFiles, hangup: asyncio.Event, poll_s: float = POLL_S
) -> None:
    """Load policies again whenever their files change, and at once when `hangup` is set, for ever.

    Policies that are wrong, or do not fit the bundle, replace nothing; the log says why. A request keeps the
    policies that it began with.
    """
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hangup.wait(), poll_s)
        if not (hangup.is_set() or await asyncio.to_thread(policies.changed)):
            continue
        hangup.clear()
        try:
            loaded = await asyncio.to_thread(policies.load)
            while True:
                before = service.pipeline
                pipeline = await asyncio.to_thread(before.with_policies, loaded)
                if service.pipeline is before:  # no other bundle came meanwhile
                    break
            service.pipeline = pipeline
        except (PolicyError, OSError) as error:
            logger.error("the policies in use stay: %s", error)
        except Exception:
            logger.exception("the policies in use stay")
        else:
            log_policies(pipeline, str(policies.path))


def log_policies(pipeline: RecommendationPipeline, source: str) -> None:
    """Tell which policies are in use, and what the catalog lacks that they read."""
    policies = pipeline.reranker.policies
    logger.info("policies of %s: %s; default %s", source, ", ".join(policies.by_name), policies.default)
    for warning in pipeline.reranker.warnings:
        logger.warning("%s", warning)


async def _abort(context: pb_grpc._ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
    raise AssertionError("abort always raises")
