"""What may change while it is served: bundles, policies and API keys, each followed by a task of its own.

What is new is read, checked and tried out beside the requests, and then takes over between two of them. What
is wrong replaces nothing, and the log says why. A request keeps what it began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np

from engine.auth import ApiKeys, KeyFile, KeyFileError
from engine.bundle import Bundle, BundleError, bundle_to_serve, bundles_in, pinned
from engine.deadline import StageCosts
from engine.events import EventStore
from engine.history import EMPTY_HISTORY, History
from engine.memory import give_back, leaves, let_go
from engine.pacing import paced
from engine.pipeline import RecommendationPipeline, Visitor
from engine.policy_files import PolicyFiles
from engine.telemetry import Metrics
from engine.variants import OTHER
from engine.watched import is_shortage
from reranking.policy import Policies, PolicyError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

POLL_S = 1.0  # how often files are looked at
TRIAL_HISTORIES = (0, 1, 2, 5, 20, 100)  # events
OPENING_SHARE = 0.15  # of a processor, that opening and trying out a bundle may use
OPENING_TIMEOUT_S = 900.0  # a million items take a minute
RETRY_S, MAX_RETRY_S = 5.0, 300.0  # until a bundle is tried again that was refused for what may pass
WAIT_S, NUM_WAITS = 0.1, 100  # for requests of a bundle that was replaced


class Service(Protocol):
    """What is followed for: engine.server.RecommenderService."""

    pipelines: Mapping[str, RecommendationPipeline]
    policies: Policies | None
    keys: ApiKeys | None
    metrics: Metrics

    @property
    def pipeline(self) -> RecommendationPipeline:
        """That of the bundle that is served."""

    def use(self, pipeline: RecommendationPipeline) -> None:
        """Answer from another bundle."""


async def follow_policies(
    service: Service, policies: PolicyFiles, hangup: asyncio.Event, poll_s: float = POLL_S
) -> None:
    """Load policies again whenever their files change, and at once when `hangup` is set, for ever.

    Those that are refused are tried again when another bundle has taken over, which they may fit.
    """
    refused_by: tuple[int, ...] | None = None
    said = ""

    def due() -> bool:
        return policies.changed() or refused_by not in (None, _numbers(service))

    async for _ in _changes(due, hangup, poll_s):
        refused_by, said = await _load_policies(service, policies, said)


async def _load_policies(
    service: Service, policies: PolicyFiles, said: str
) -> tuple[tuple[int, ...] | None, str]:
    """Use the policies of the files. Return the pipelines that refused them, and what was said of it.

    A function of its own, so that nothing holds a pipeline while the files stay as they are.
    """
    asked = _numbers(service)
    try:
        loaded = await _apart(policies.load)
        while True:
            before, asked = service.pipelines, _numbers(service)
            after = {name: await _apart(pipeline.with_policies, loaded) for name, pipeline in before.items()}
            if service.pipelines is before:  # no other bundle came meanwhile
                break
    except (PolicyError, OSError) as error:
        return asked, _say_once(f"the policies in use stay: {error}", said)
    except Exception as error:  # noqa: BLE001  # whatever it is, the policies in use stay
        said = _say_once(f"the policies in use stay: {error!r}", said, with_traceback=True)
        return () if _may_pass(error) else asked, said
    service.pipelines, service.policies = after, loaded
    log_policies(service.pipeline, str(policies.path))
    return None, ""


def _numbers(service: Service) -> tuple[int, ...]:
    """Return which pipelines answer."""
    return tuple(pipeline.number for pipeline in service.pipelines.values())


async def follow_keys(service: Service, keys: KeyFile, hangup: asyncio.Event, poll_s: float = POLL_S) -> None:
    """Load API keys again whenever their file changes, and at once when `hangup` is set, for ever."""
    said = ""
    async for _ in _changes(keys.changed, hangup, poll_s):
        try:
            service.keys = await _apart(keys.load)
        except KeyFileError as error:
            said = _say_once(f"the API keys in use stay: {error}", said)
        except Exception as error:  # noqa: BLE001  # likewise
            said = _say_once(f"the API keys in use stay: {error!r}", said, with_traceback=True)
        else:
            said = ""
            logger.info("API keys of %s: %d", keys.path, len(service.keys))


def _say_once(message: str, said: str, *, with_traceback: bool = False) -> str:
    """Log an error unless it was what was said last: what cannot be read is tried again every second."""
    if message != said:
        logger.error("%s", message, exc_info=with_traceback)
    return message


async def follow_bundles(
    service: Service,
    root: Path,
    open_bundle: Callable[[Path], Bundle],
    hangup: asyncio.Event,
    poll_s: float = POLL_S,
) -> None:
    """Serve whatever bundle of a directory is to be served (see bundle_to_serve), for ever.

    A bundle that is refused is tried again when a file of it, the choice or the policies change, or on
    `hangup`; also after a while where it could not be read, or there was no memory, which may pass. While a
    pin keeps a newer bundle out, the log and the metrics say so.
    """
    refused: object = None
    said, again_at, wait_s = "", math.inf, 0.0
    waiting: str | None = None

    def choose() -> tuple[Path, object]:
        nonlocal waiting
        waiting = _what_waits(service, root, waiting)
        path = bundle_to_serve(root)
        files = [(file.name, file.stat()) for file in sorted(path.iterdir())]
        stamps = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files]
        return path, (path, stamps, service.policies)

    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hangup.wait(), poll_s)
            hangup.clear()
            refused = None
        seen: object = None
        try:
            path, seen = await _apart(choose)
            if path == service.pipeline.bundle.path:
                refused = None
                continue
            if seen == refused and time.monotonic() < again_at:
                continue
            logger.info("bundle %s is found", path)
            replaced = await _swap(service, path, open_bundle)
            before, parts = weakref.ref(replaced), leaves(replaced, without=replaced.events)
            del replaced
            await _free(before, parts)
        except Exception as error:  # noqa: BLE001  # whatever it is, the bundle that is served stays
            is_again = refused == (seen or str(error))
            if not is_again:
                said = ""
                service.metrics.bundle_swaps.labels("refused").inc()
            is_foreseen = isinstance(error, (ValueError, OSError, MemoryError))  # such as a BundleError
            message = f"bundle {service.pipeline.bundle.version} stays: {error}"
            said = _say_once(message, said, with_traceback=not is_foreseen)
            refused = seen or str(error)
            wait_s = min(2 * wait_s, MAX_RETRY_S) if is_again else RETRY_S
            again_at = time.monotonic() + wait_s if _may_pass(error) else math.inf


def _may_pass(error: Exception) -> bool:
    """Return whether a bundle that was refused for this may be good: this machine was short of something.

    It could not be read, there was no memory, or (RuntimeError) no thread could be started. What a library
    says of a file it says in a RuntimeError too, but that is the cause of a BundleError.
    """
    return isinstance(error, RuntimeError) or is_shortage(error)


def _what_waits(service: Service, root: Path, said: str | None) -> str | None:
    """Return which bundle a pin keeps out, and say it unless it was what was said last."""
    name = pinned(root)
    newest = bundles_in(root)[-1].name
    waiting = newest if name not in (None, newest) else None
    service.metrics.bundle_waiting.set(waiting is not None)
    if waiting not in (None, said):
        logger.warning(
            "bundle %s waits, as %s is pinned; `trirank rollback %s --newest` ends that", waiting, name, root
        )
    return waiting


async def _swap(
    service: Service, path: Path, open_bundle: Callable[[Path], Bundle]
) -> RecommendationPipeline:
    """Serve another bundle, and return the pipeline of the one that was served."""
    try:
        async with asyncio.timeout(OPENING_TIMEOUT_S):
            bundle = await _beside_requests(open_bundle, path)
            while True:
                policies, events = service.policies, service.pipeline.events
                pipeline = await _beside_requests(prepared, bundle, policies, events)
                if service.policies is policies:  # no other policies came meanwhile
                    break
    except TimeoutError:
        raise BundleError(
            f"{path}: it was not opened and did not answer trial requests within {OPENING_TIMEOUT_S:g} s"
        ) from None  # not to be tried again: what hangs would hang beside it
    replaced = service.pipeline
    if missing := missing_policies(pipeline, replaced):
        logger.warning(
            "bundle %s has no policy %s, which %s had: requests that name one are invalid now",
            bundle.version, ", ".join(missing), replaced.bundle.version
        )  # fmt: skip
    if told := other_lacks(pipeline, service.pipelines):
        logger.warning("%s", told)
    service.use(pipeline)
    service.metrics.bundle_swaps.labels("swapped").inc()
    logger.info("bundle %s is served instead of %s", bundle.version, replaced.bundle.version)
    return replaced


async def _beside_requests(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do what takes most of a second with 100,000 items: in one go, requests would take thrice as long."""

    def slowly() -> R:
        with paced(OPENING_SHARE):
            return work(*args, **kwargs)

    return await _apart(slowly)


async def _apart(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do what may block, in a thread that nobody waits for when the process ends.

    The work of a bad bundle may hang, and so may a file system; asyncio.to_thread would keep the process.
    """
    done: Future[R] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001  # it is raised again where it is waited for
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name="following", daemon=True).start()
    return await asyncio.wrap_future(done)


async def _free(before: weakref.ref[RecommendationPipeline], parts: list[Any]) -> None:
    """Wait for the last request of a pipeline, then let its parts go beside the requests of the next one."""
    for _ in range(NUM_WAITS):
        if before() is None:
            break
        await asyncio.sleep(WAIT_S)
    await _apart(let_go, parts)
    await _apart(give_back)


def first_to_serve(
    paths: Sequence[Path],
    open_bundle: Callable[[Path], Bundle],
    policies: Policies | None = None,
    events: EventStore | None = None,
) -> RecommendationPipeline:
    """Return the pipeline of the first of some bundles (bundles_to_serve) that can be served.

    A server that starts beside a bad bundle, or one that the policies do not fit, serves what one that was
    running would have stayed with. Raises what is wrong with the first where none of them can be served.
    """
    failure: ValueError | OSError | None = None
    for path in paths:
        try:
            pipeline = prepared(open_bundle(path), policies, events)
        except (ValueError, OSError) as error:  # such as a BundleError, a PolicyError
            logger.error("bundle %s is refused: %s", path, error)
            failure = failure or error.with_traceback(None)  # whose frames hold what was opened
        else:
            if failure:
                logger.error("bundle %s is served instead", path)
            return pipeline
    assert failure is not None
    raise failure


def prepared(
    bundle: Bundle, policies: Policies | None = None, events: EventStore | None = None
) -> RecommendationPipeline:
    """Return a pipeline that has answered some requests of nobody: what is lazy is done, pages are in memory.

    Raises BundleError where one of them was answered without a stage: so would be all others.
    """
    pipeline = RecommendationPipeline(bundle, policies, events)
    rng = np.random.default_rng(0)
    num_items = bundle.catalog.num_items
    for name in pipeline.reranker.policies.by_name:
        policy = pipeline.policy(name)
        for length in TRIAL_HISTORIES:
            visitor = Visitor(_history(rng, num_items, length))
            _, trace = pipeline.recommend(visitor, pipeline.default_limit, policy=policy)
            if trace.degraded_stages:
                stages = ", ".join(trace.degraded_stages)
                raise BundleError(f"{bundle.path}: policy {name!r}: a trial request went without {stages}")
    if num_items:
        pipeline.similar(1, pipeline.default_limit)
    pipeline.costs = StageCosts()  # the first requests of all are no measure
    return pipeline


def _history(rng: np.random.Generator, num_items: int, length: int) -> History:
    if not num_items:
        return EMPTY_HISTORY
    items = rng.integers(1, num_items + 1, length).astype(np.int32)
    return History(items, np.zeros(length, np.uint8), np.zeros(length, np.int64))


def missing_policies(pipeline: RecommendationPipeline, other: RecommendationPipeline) -> list[str]:
    """Return the names of policies that only the other pipeline has."""
    return sorted(other.reranker.policies.by_name.keys() - pipeline.reranker.policies.by_name.keys())


def other_lacks(pipeline: RecommendationPipeline, others: Mapping[str, RecommendationPipeline]) -> str:
    """Return what to say where a request would be invalid for the other bundle's users alone; else ""."""
    missing = missing_policies(others[OTHER], pipeline) if OTHER in others else []
    if not missing:
        return ""
    return (
        f"other is {others[OTHER].bundle.path}, which has no policy {', '.join(missing)}: a request that "
        "names one is invalid for its share of the users; expected a bundle with all policies of "
        f"{pipeline.bundle.path}, or policies for both (--policies)"
    )


def log_policies(pipeline: RecommendationPipeline, source: str) -> None:
    """Tell which policies are in use, and what the catalog lacks that they read."""
    policies = pipeline.reranker.policies
    logger.info("policies of %s: %s; default %s", source, ", ".join(policies.by_name), policies.default)
    for warning in pipeline.reranker.warnings:
        logger.warning("%s", warning)


async def _changes(changed: Callable[[], bool], hangup: asyncio.Event, poll_s: float) -> AsyncIterator[None]:
    """Yield whenever something has changed, and at once when `hangup` is set, for ever."""
    said = ""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hangup.wait(), poll_s)
        try:
            is_due = hangup.is_set() or await _apart(changed)
        except Exception as error:  # noqa: BLE001  # such as no thread that could be started: it may pass
            said = _say_once(f"files could not be looked at: {error}", said, with_traceback=True)
            continue
        said = ""
        if is_due:
            hangup.clear()
            yield
