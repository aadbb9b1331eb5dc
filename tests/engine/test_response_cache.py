from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.bundle import Bundle
from engine.client import visitor
from engine.deadline import Budget
from engine.event_store import MemoryEventStore
from engine.events import UserEvent
from engine.pipeline import RecommendationPipeline
from engine.response_cache import ENTRY_BYTES, ResponseCache
from engine.server import recommend
from protos.trirank.v1 import recommender_pb2 as pb
from reranking.policy import policies_from_config


class Asked:
    """A pipeline that answers through a cache, and how often it had to."""

    def __init__(self, pipeline: RecommendationPipeline, cache: ResponseCache) -> None:
        self.pipeline, self.cache = pipeline, cache

    def __call__(self, **changed: Any) -> tuple[bool, pb.RecommendResponse]:
        """Return whether the answer was made anew, and the answer."""
        request = pb.RecommendRequest(**{"visitor": visitor("loyal", context={"a": "1", "b": "2"})} | changed)
        response, trace = recommend(self.pipeline, request, Budget(None), self.cache)
        stages = [timing.stage for timing in response.trace.timings]
        assert stages == [timing.stage for timing in trace.timings]
        assert stages[0] == "history"
        assert ("cache" in stages) != ("ranking" in stages)
        return "cache" not in stages, response


@pytest.fixture
def asked(bundle_path: Path) -> Asked:
    pipeline = RecommendationPipeline(Bundle.load(bundle_path), None, MemoryEventStore())
    return Asked(pipeline, ResponseCache(60.0))


def test_the_same_question_gets_the_same_slate(asked: Asked) -> None:
    is_new, first = asked()
    assert is_new
    is_new, second = asked(visitor=visitor("loyal", context={"b": "2", "a": "1"}))
    assert not is_new
    for answer in (first, second):
        del answer.trace.timings[:]
        answer.trace.total_us = 0
    assert first == second
    assert list(first.trace.ignored_context_keys) == ["a", "b"]
    for changed in (
        {"limit": 3},
        {"visitor": visitor("reader")},
        {"visitor": visitor("loyal", ["null"])},
        {"seed": 4},
        {"now_ms": 7},
        {"filters": pb.Filters(seller_ids=["s1"])},
    ):
        assert asked(**changed)[0], changed
        assert not asked(**changed)[0], changed


def test_a_new_event_bundle_or_policy_makes_another(asked: Asked, make_bundle: Callable[..., Path]) -> None:
    asked()
    assert asked.pipeline.events is not None
    asked.pipeline.events.record([UserEvent("1", "reader", "item-9", "view", 5)]).result(60)
    assert not asked()[0]  # about somebody else
    asked.pipeline.events.record([UserEvent("1", "loyal", "item-9", "view", 5)]).result(60)
    is_new, answer = asked()
    assert is_new
    assert "item-9" not in [item.item_id for item in answer.items]
    assert not asked()[0]
    policies = policies_from_config({"policies": {"other": {"rules": []}}})
    asked.pipeline = asked.pipeline.with_policies(policies)
    is_new, answer = asked()
    assert (is_new, answer.arrangement.policy) == (True, "other")
    bundle = Bundle.load(make_bundle(num_items=30))
    asked.pipeline = RecommendationPipeline(bundle, policies, asked.pipeline.events)
    is_new, answer = asked()
    assert (is_new, answer.trace.bundle_version) == (True, bundle.version)


def test_what_is_explained_or_degraded_is_made_anew(asked: Asked) -> None:
    asked(explain=True)
    assert asked(explain=True)[0]

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no")

    ranked, asked.pipeline._scored = asked.pipeline._scored, fail  # type: ignore[method-assign]
    assert list(asked()[1].trace.degraded_stages) == ["ranking"]
    asked.pipeline._scored = ranked  # type: ignore[method-assign]
    is_new, answer = asked()
    assert (is_new, list(answer.trace.degraded_stages)) == (True, [])


def test_age_and_size() -> None:
    now = [0.0]
    answer = pb.RecommendResponse(trace=pb.Trace(bundle_version="x" * 40))
    cache = ResponseCache(5.0, 2 * (answer.ByteSize() + ENTRY_BYTES), clock=lambda: now[0])
    for key in "abc":
        cache.put(key, answer)
    assert [cache.get(key) == answer for key in "abcd"] == [False, True, True, False]
    found = cache.get("b")
    assert found is not None
    found.trace.bundle_version = "changed"
    assert cache.get("b") == answer
    now[0] = 4.9
    cache.put("b", answer)  # is the newest now
    now[0] = 5.0
    assert [cache.get(key) == answer for key in "bc"] == [True, False]
    cache.put("d", answer)
    assert [cache.get(key) == answer for key in "bcd"] == [True, False, True]
    cache.put("large", pb.RecommendResponse(trace=pb.Trace(bundle_version="x" * 4000)))
    assert not cache._answers  # no room for it, and room again
    cache.put("f", answer)
    now[0] = 20.0
    cache.put("e", answer)
    assert list(cache._answers) == ["e"]  # what is too old is not kept until there is no room
    assert cache._num_bytes == answer.ByteSize() + ENTRY_BYTES
    with pytest.raises(ValueError, match=r"max_age_s is 0.*expected above 0"):
        ResponseCache(0)


def test_in_the_server(bundle_path: Path, served: Any) -> None:
    async def scene() -> None:
        pipeline = RecommendationPipeline(Bundle.load(bundle_path), None, MemoryEventStore())
        async with served(pipeline, cache=ResponseCache(60.0)) as shop:
            shown = [[item.item_id for item in (await shop.recommend()).items] for _ in range(3)]
            assert shown[0] == shown[1] == shown[2]
            assert shop.value("stage_seconds_count", stage="ranking") == 1
            assert shop.value("stage_seconds_count", stage="cache") == 2

    asyncio.run(scene())
