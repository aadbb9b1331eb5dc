"""What is let go is freed in parts, and only what nobody else has."""

import asyncio
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import yaml

from benchmarks.reranking_latency import FULL_POLICY, NOW_MS, policies, simulated_funnel, simulated_shop
from engine.admission import ConcurrencyLimit
from engine.bundle import Bundle
from engine.deadline import Budget
from engine.following import follow_policies
from engine.ids import AT_ONCE
from engine.memory import leaves, let_go
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from engine.server import RecommenderService, recommend
from protos.trirank.v1 import recommender_pb2 as pb
from reranking.items import Request
from reranking.policy import single_policy
from reranking.reranker import Reranker

SHOP = simulated_shop(400)


class Holder:
    """Something of ours, as far as `leaves` can tell."""

    __module__ = "engine.tests"


class Refusing:
    """A call's context that keeps what abort raises, as gRPC's does."""

    def __init__(self) -> None:
        self.raised: Exception | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    async def abort(self, code: grpc.StatusCode, message: str) -> None:
        self.raised = RuntimeError(code, message)
        raise self.raised


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def bundle(bundle_path):
    return Bundle.load(bundle_path)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.RecommendRequest(), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (pb.RecommendRequest(limit=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.SimilarItemsRequest(item_id="nobody's"), grpc.StatusCode.NOT_FOUND),
    ],
)
def test_who_was_refused_keeps_no_bundle(bundle, request_, code):
    limit = ConcurrencyLimit(min_limit=1, max_limit=1)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        limit.admit()  # and is never given back
    with ThreadPoolExecutor(1) as pool:
        service = RecommenderService(RecommendationPipeline(bundle), pool, limit=limit)
        context, data = Refusing(), request_.SerializeToString()
        is_similar = isinstance(request_, pb.SimilarItemsRequest)
        with pytest.raises(RuntimeError) as refused:
            asyncio.run((service.SimilarItems if is_similar else service.Recommend)(data, context))
        assert refused.value.args[0] is code
        before = weakref.ref(service.pipeline)
        service.use(RecommendationPipeline(bundle))
        pool.submit(int).result()  # the thread has something else now
        assert before() is None


@pytest.mark.usefixtures("no_collector")
def test_policies_that_were_loaded_keep_no_bundle(bundle, tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("policies: {plain: {rules: []}}\ndefault: plain\n", encoding="utf-8")

    async def scene() -> None:
        service = RecommenderService(RecommendationPipeline(bundle), ThreadPoolExecutor(1))
        hangup = asyncio.Event()
        files = PolicyFiles(file)
        files.load()
        following = asyncio.create_task(follow_policies(service, files, hangup, poll_s=0.01))
        first = service.pipelines
        while service.pipelines is first:
            hangup.set()
            await asyncio.sleep(0.01)
        del first
        before = weakref.ref(service.pipeline)
        service.use(RecommendationPipeline(bundle))
        async with asyncio.timeout(60):
            while before() is not None:
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(scene())


def test_leaves_are_what_is_no_object_of_ours(bundle):
    pipeline = RecommendationPipeline(bundle, events=SimpleNamespace(secret=object()))
    found = leaves(pipeline, without=pipeline.events)
    assert {id(pipeline.norms), id(bundle.catalog.ids), id(bundle.item_vectors)} <= {id(one) for one in found}
    assert not any(type(one).__module__.startswith("engine.") for one in found)
    assert id(pipeline.events) not in {id(one) for one in found}


@pytest.mark.usefixtures("no_collector")
def test_a_pipeline_does_not_wait_for_the_collector(bundle):
    pipeline = RecommendationPipeline(bundle)
    pipeline.recommend(pipeline.resolve_visitor("loyal"), 5)
    before, parts = weakref.ref(pipeline), leaves(pipeline)
    del pipeline
    assert before() is None
    let_go(parts)
    assert parts == []


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("explain", [False, True])
def test_requests_leave_nothing_to_the_collector(bundle, explain):
    """What is in a circle stays until it runs: with arrays in it tens of megabytes, and then tens of ms."""
    pipeline = RecommendationPipeline(bundle)
    request = pb.RecommendRequest(visitor=pb.Visitor(user_id="loyal"), limit=10, explain=explain)
    for _ in range(2):  # the first one makes what is kept
        gc.collect()
        recommend(pipeline, request, Budget(None))
    assert gc.collect() == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "rules", policies(yaml.safe_load(FULL_POLICY)["policies"]["home"]["rules"]).values(), ids=str
)
def test_rules_leave_nothing_to_the_collector(rules):
    reranker = Reranker(single_policy(rules), SHOP)
    funnel = simulated_funnel(SHOP, np.random.default_rng(0), 100, 100)
    for _ in range(2):
        gc.collect()
        reranker.slate(reranker.policy(), funnel, 50, Request(now_ms=NOW_MS))
    assert gc.collect() == 0


def test_what_others_have_stays_whole():
    shared, names = {n: str(n) for n in range(3)}, np.array(["a", "b"], np.object_)
    things = [shared, names, names[:1]]
    let_go(things)
    assert (things, shared, names.tolist()) == ([], {0: "0", 1: "1", 2: "2"}, ["a", "b"])


def test_what_is_small_is_not_worth_a_pause():
    """A policy may name a hundred thousand items, and each pause is a millisecond."""
    holder = Holder()
    holder.names, holder.array, holder.rate, holder.nothing = ("a", "b", 3), np.zeros(3), 0.5, None
    assert leaves(holder) == [holder.array]


def test_tables_of_tables_go_in_parts():
    inner = {"a": {1: 2}, "b": {}}
    holder = Holder()
    holder.table, holder.rows = inner, np.zeros(3)
    found = leaves(holder)
    assert found.index(inner) > max(found.index(inner["a"]), found.index(inner["b"]))


class Thing:
    """Something that tells when it is freed."""

    def __init__(self, freed: list[int]) -> None:
        self.freed = freed

    def __del__(self) -> None:
        self.freed.append(1)


@pytest.mark.parametrize("kind", ["dict", "array"])
def test_what_nobody_has_goes_in_parts(kind, monkeypatch):
    freed: list[int] = []
    pauses: list[int] = []
    monkeypatch.setattr("engine.memory.time", SimpleNamespace(sleep=lambda _: pauses.append(len(freed))))
    things = [{n: Thing(freed) for n in range(2 * AT_ONCE + 1)}]
    if kind == "array":
        array = np.empty(2 * AT_ONCE + 1, np.object_)
        array[:] = list(things.pop().values())
        things = [array]
        del array
    let_go(things)
    assert pauses == [AT_ONCE, 2 * AT_ONCE, 2 * AT_ONCE + 1, 2 * AT_ONCE + 1]
