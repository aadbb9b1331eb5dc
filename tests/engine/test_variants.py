"""Two bundles side by side: a stable share of the users, and a shadow that nobody sees."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bundle import Bundle
from engine.following import follow_policies, prepared
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from engine.telemetry import Metrics
from engine.variants import MAX_WAITING, OTHER, SHADOW, Shadow, Split, overlap
from protos.trirank.v1 import recommender_pb2 as pb


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_who_is_in_a_share_stays_when_it_grows(user: str, one: float, two: float) -> None:
    smaller, larger = Split(min(one, two), "x"), Split(max(one, two), "x")
    assert smaller.takes(user) <= larger.takes(user)
    assert not Split(0, "x").takes(user)
    assert Split(1, "x").takes(user)


def test_a_share_is_as_large_as_it_says_and_another_salt_deals_anew() -> None:
    users = [str(number) for number in range(20_000)]
    first, second = ({user for user in users if Split(0.3, salt).takes(user)} for salt in ("one", "two"))
    assert len(first) == pytest.approx(6000, abs=250)  # four standard deviations of 65
    assert len(first & second) == pytest.approx(1800, abs=170)
    with pytest.raises(ValueError, match=r"share is 1\.5; expected 0 to 1"):
        Split(1.5, "x")


def slate(*items: str) -> pb.RecommendResponse:
    return pb.RecommendResponse(items=[pb.ScoredItem(item_id=item) for item in items])


def test_overlap_by_hand() -> None:
    assert overlap(slate("a", "b", "c", "d"), slate("d", "x", "a")) == 0.5
    assert overlap(slate(), slate("a")) == 1.0


@pytest.fixture(scope="module")
def bundles(make_bundle: Callable[..., Path]) -> tuple[Bundle, Bundle]:
    return Bundle.load(make_bundle(num_items=40)), Bundle.load(make_bundle(num_items=30))


def test_a_b(bundles: tuple[Bundle, Bundle], served: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        main, other = map(prepared, bundles)
        split = Split(0.5, other.bundle.version)
        users = ["loyal", "reader", "new", *(f"user {number}" for number in range(9))]
        assert {split.takes(user) for user in users} == {True, False}
        (tmp_path / "policies.yaml").write_text("policies: {home: {rules: []}}")
        files = PolicyFiles(tmp_path / "policies.yaml")
        async with served(main, others={OTHER: other}, share=0.5) as shop:
            for _ in range(2):
                for user in users:
                    trace = (await shop.recommend(user)).trace
                    expected = (other, "other") if split.takes(user) else (main, "")
                    assert (trace.bundle_version, trace.variant) == (expected[0].bundle.version, expected[1])
                    question = pb.RankRequest(visitor=pb.Visitor(user_id=user), candidate_item_ids=["null"])
                    assert (await shop.stub.Rank(question)).trace.variant == trace.variant
            similar = await shop.stub.SimilarItems(pb.SimilarItemsRequest(item_id="null"))
            assert similar.trace.variant == ""
            assert shop.value("bundle_info", version=other.bundle.version, variant="other") == 1
            # New policies are for both.
            following = asyncio.create_task(
                follow_policies(shop.service, files, asyncio.Event(), poll_s=0.01)
            )
            await shop.until(lambda: shop.service.policies is not None)
            for user in users:
                answer = await shop.recommend(user)
                assert answer.arrangement.policy == "home"
                assert answer.trace.variant == ("other" if split.takes(user) else "")
            following.cancel()

    asyncio.run(scene())


def test_the_shadow_is_asked_and_not_heard(bundles: tuple[Bundle, Bundle], served: Any) -> None:
    class Broken(RecommendationPipeline):
        def policy(self, *arguments: Any) -> Any:
            raise RuntimeError("no")

    async def scene() -> None:
        main, shadow = map(prepared, bundles)
        async with served(main, others={SHADOW: shadow}) as shop:
            for number in (1, 2):
                trace = (await shop.recommend("loyal")).trace
                assert (trace.bundle_version, trace.variant) == (main.bundle.version, "")
                await shop.until(
                    lambda number=number: shop.value("shadow_total", result="answered") == number
                )
            assert shop.value("shadow_overlap_count") == 2
            assert 0 < shop.value("shadow_overlap_sum") < 2
            assert shop.value("shadow_seconds_count") == 2
        async with served(main, others={SHADOW: Broken(bundles[1])}) as shop:
            assert len((await shop.recommend("loyal")).items) == 10
            await shop.until(lambda: shop.value("shadow_total", result="failed") == 1)

    asyncio.run(scene())


def test_the_shadow_is_no_queue() -> None:
    metrics, go = Metrics(), threading.Event()
    shadow = Shadow(metrics)

    def ask() -> pb.RecommendResponse:
        assert go.wait(60)
        return slate("a")

    for _ in range(MAX_WAITING + 3):
        shadow.offer(ask, slate("a"))
    assert metrics.registry.get_sample_value("trirank_shadow_total", {"result": "left out"}) == 3
    go.set()
    shadow.close()


def test_a_shadow_that_hangs_keeps_nobody(bundles: tuple[Bundle, Bundle], served: Any) -> None:
    metrics, begun, go = Metrics(), threading.Event(), threading.Event()
    shadow = Shadow(metrics)

    def hang() -> pb.RecommendResponse:
        begun.set()
        assert go.wait(60)
        return slate("a")

    shadow.offer(hang, slate("a"))
    assert begun.wait(60)
    shadow.close()  # comes back
    assert shadow.is_asking  # so that the process does not wait for the interpreter's end
    go.set()
