"""Bundles, policies and keys that change while they are served."""

from __future__ import annotations

import asyncio
import errno
import gc
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.following
from engine.auth import KeyFile, create_key, remove_key
from engine.bundle import (
    PIN,
    Bundle,
    BundleError,
    bundle_to_serve,
    bundles_in,
    bundles_to_serve,
    pin_bundle,
    pinned_but_gone,
    write_bundle,
)
from engine.event_store import MemoryEventStore
from engine.events import UserEvent
from engine.following import first_to_serve, follow_bundles, follow_keys, follow_policies, prepared
from engine.pacing import paced
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from engine.variants import OTHER
from protos.trirank.v1 import recommender_pb2 as pb
from ranking.context import ContextTable
from reranking.policy import PolicyError

Publish = Callable[..., Path]
POLICIES = "policies: {home: {rules: [{rule: drop_seen}, {rule: deny, brand: [brand 5]}]}}"


@pytest.fixture
def publish(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> Publish:
    """Write a toy bundle into one directory of bundles."""
    return lambda **options: write_bundle(tmp_path / "bundles", lambda draft: fill(draft, **options))


@asynccontextmanager
async def following(follow: Callable[..., Any], shop: Any, *arguments: Any) -> Any:
    """Follow something in the background, and look at it often."""
    task = asyncio.create_task(follow(shop.service, *arguments, asyncio.Event(), poll_s=0.01))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()


@asynccontextmanager
async def serving_policies(served: Any, first: Path, files: PolicyFiles) -> Any:
    """Serve a bundle with policies, and follow both."""
    pipeline = prepared(Bundle.load(first), files.load())
    async with (
        served(pipeline, policies=files.current) as shop,
        following(follow_bundles, shop, first.parent, Bundle.load),
        following(follow_policies, shop, files),
    ):
        yield shop


def test_a_new_bundle_takes_over_and_the_old_one_is_freed(publish: Publish, served: Any) -> None:
    """Its policies go with it, recorded events stay, and items that only the new one has are known."""

    async def scene() -> None:
        first = publish(num_items=40)
        store = MemoryEventStore()
        store.record([UserEvent("1", "stranger", "item-44", "view", 7)]).result(60)
        gone = []

        def opened() -> RecommendationPipeline:
            made = prepared(Bundle.load(first), None, store)
            gone.extend([weakref.ref(made), weakref.ref(made.bundle), weakref.ref(made.bundle.index)])
            return made

        async with served(opened()) as shop, following(follow_bundles, shop, first.parent, Bundle.load):
            answer = await shop.recommend("stranger")
            assert answer.trace.bundle_version == first.name
            assert answer.trace.visitor_kind == pb.VISITOR_KIND_ANONYMOUS
            assert answer.arrangement.policy == "toy"
            second = publish(num_items=50, policies={"policies": {"new": {"rules": []}}})
            await shop.until(lambda: shop.service.pipeline.bundle.version == second.name)
            answer = await shop.recommend("stranger")
            assert answer.trace.bundle_version == second.name
            assert answer.trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
            assert answer.arrangement.policy == "new"
            assert shop.value("bundle_swaps_total", result="swapped") == 1
            assert shop.value("bundle_info", version=second.name, variant="") == 1
            assert shop.value("bundle_info", version=first.name, variant="") is None
            # By counting references alone: a full collection would stop the requests of a large catalog.
            gc.disable()
            try:
                await shop.until(lambda: not any(ref() for ref in gone))
            finally:
                gc.enable()

    asyncio.run(scene())


def test_a_bundle_is_opened_and_tried_out_with_pauses(
    publish: Publish, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    @contextmanager
    def noted(share: float) -> Iterator[None]:
        shares.append(share)
        with paced(share):
            yield

    def opened(path: Path) -> Bundle:
        assert sys.getprofile() is not None
        return Bundle.load(path)

    monkeypatch.setattr(engine.following, "paced", noted)

    async def scene() -> None:
        first = publish(num_items=40)
        pipeline = RecommendationPipeline(Bundle.load(first))
        async with served(pipeline) as shop, following(follow_bundles, shop, first.parent, opened):
            second = publish(num_items=50)
            await shop.until(lambda: shop.service.pipeline.bundle.version == second.name)

    asyncio.run(scene())
    assert shares == [engine.following.OPENING_SHARE] * 2
    assert sys.getprofile() is None


def test_a_bundle_that_hangs_is_refused_and_the_next_one_is_served(
    publish: Publish, served: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.following, "OPENING_TIMEOUT_S", 0.5)
    let_go = threading.Event()
    is_bad = threading.Event()

    def opened(path: Path) -> Bundle:
        if is_bad.is_set():
            let_go.wait()
        return Bundle.load(path)

    async def scene() -> None:
        first = publish(num_items=40)
        pipeline = RecommendationPipeline(Bundle.load(first))
        async with served(pipeline) as shop, following(follow_bundles, shop, first.parent, opened):
            is_bad.set()
            publish(num_items=50)
            await shop.until(lambda: shop.value("bundle_swaps_total", result="refused") == 1)
            assert (await shop.recommend()).trace.bundle_version == first.name
            is_bad.clear()
            monkeypatch.setattr(engine.following, "OPENING_TIMEOUT_S", 60.0)
            good = publish(num_items=60)
            await shop.until(lambda: shop.service.pipeline.bundle.version == good.name)
            let_go.set()
            await asyncio.sleep(0.3)
            assert shop.service.pipeline.bundle.version == good.name

    asyncio.run(scene())
    assert "was not opened and did not answer trial requests within 0.5 s" in caplog.text


def damage(path: Path) -> None:
    file = path / "embeddings.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_bad_bundle_is_refused_once_and_the_old_one_stays(
    publish: Publish, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        first = publish()
        async with (
            served(prepared(Bundle.load(first))) as shop,
            following(follow_bundles, shop, first.parent, Bundle.load),
        ):
            bad = publish()
            damage(bad)
            (bad / "manifest.json").touch()
            await shop.until(lambda: shop.value("bundle_swaps_total", result="refused") == 1)
            await asyncio.sleep(0.1)  # ten more looks at it
            assert (await shop.recommend()).trace.bundle_version == first.name
            assert shop.value("bundle_swaps_total", result="refused") == 1
            good = publish()
            await shop.until(lambda: shop.service.pipeline.bundle.version == good.name)

    asyncio.run(scene())
    assert caplog.text.count("embeddings.safetensors is damaged") == 1


@pytest.mark.parametrize(
    ("failure", "is_cause"),
    [
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.EIO, "Input/output error"), True),
        (MemoryError("out of memory"), False),
        (MemoryError("out of memory"), True),
        (RuntimeError("can't start new thread"), False),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again_and_what_is_damaged_is_not(
    failure: Exception,
    is_cause: bool,
    publish: Publish,
    served: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine.following, "RETRY_S", 0.01)
    num_opened, num_failures = [0], 3

    def opened(path: Path) -> Bundle:
        num_opened[0] += 1
        if num_opened[0] <= num_failures:
            if not is_cause:
                raise failure
            raise BundleError(f"it cannot be opened: {failure}") from failure
        return Bundle.load(path)

    async def scene() -> None:
        first = publish()
        async with (
            served(prepared(Bundle.load(first))) as shop,
            following(follow_bundles, shop, first.parent, opened),
        ):
            second = publish()
            await shop.until(lambda: shop.service.pipeline.bundle.version == second.name)
            assert num_opened[0] == num_failures + 1
            assert shop.value("bundle_swaps_total", result="refused") == 1
            damage(publish())
            await shop.until(lambda: shop.value("bundle_swaps_total", result="refused") == 2)
            await asyncio.sleep(0.2)
            assert num_opened[0] == num_failures + 2

    asyncio.run(scene())
    assert caplog.text.count(f"stays: {'it cannot be opened: ' if is_cause else ''}{failure}") == 1
    ours = [record for record in caplog.records if record.name == "engine.following"]
    with_traceback = [record for record in ours if record.exc_info]
    assert len(with_traceback) == isinstance(failure, RuntimeError)  # what nobody foresaw


@pytest.mark.parametrize(
    "failure", [BundleError("wrong"), TypeError("wrong"), RuntimeError("wrong")], ids=repr
)
def test_what_is_wrong_with_the_bundle_itself_is_not_tried_again(
    failure: Exception,
    publish: Publish,
    served: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A library's RuntimeError about a file is the cause of a BundleError."""
    monkeypatch.setattr(engine.following, "RETRY_S", 0.01)
    num_opened = [0]

    def opened(path: Path) -> Bundle:
        num_opened[0] += 1
        if isinstance(failure, RuntimeError):
            raise BundleError("it cannot be opened") from failure
        raise failure

    async def scene() -> None:
        first = publish()
        async with (
            served(prepared(Bundle.load(first))) as shop,
            following(follow_bundles, shop, first.parent, opened),
        ):
            publish()
            await shop.until(lambda: shop.value("bundle_swaps_total", result="refused") == 1)
            await asyncio.sleep(0.2)
            assert (num_opened[0], shop.value("bundle_swaps_total", result="refused")) == (1, 1)

    asyncio.run(scene())


def test_a_bundle_that_is_still_being_copied_is_served_once_it_is_whole(
    publish: Publish, served: Any, tmp_path: Path
) -> None:
    async def scene() -> None:
        first = publish()
        whole = publish()
        elsewhere = tmp_path / "elsewhere" / whole.name
        shutil.move(whole, elsewhere)
        async with (
            served(prepared(Bundle.load(first))) as shop,
            following(follow_bundles, shop, first.parent, Bundle.load),
        ):
            copy = first.parent / whole.name
            copy.mkdir()
            for name in ("manifest.json", "catalog.parquet"):
                shutil.copy2(elsewhere / name, copy)
            await shop.until(lambda: (shop.value("bundle_swaps_total", result="refused") or 0) >= 1)
            for file in elsewhere.iterdir():
                if not (copy / file.name).exists():
                    shutil.copy2(file, copy)
            await shop.until(lambda: shop.service.pipeline.bundle.version == whole.name)

    asyncio.run(scene())


def test_a_start_beside_a_bad_bundle_serves_the_one_before(
    publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    oldest, older, bad = publish(), publish(), publish()
    root = oldest.parent

    def served_at_start() -> str:
        return first_to_serve(bundles_to_serve(root), Bundle.load).bundle.version

    damage(bad)
    assert served_at_start() == older.name
    assert f"bundle {bad} is refused: {bad}/embeddings.safetensors is damaged" in caplog.text
    assert f"bundle {older} is served instead" in caplog.text
    pin_bundle(root, older.name)
    newest = publish()
    assert served_at_start() == older.name
    damage(older)
    assert served_at_start() == oldest.name  # not what the pin keeps out
    damage(oldest)
    with pytest.raises(BundleError, match=f"{older.name}/embeddings.safetensors is damaged"):
        served_at_start()
    pin_bundle(root, None)
    assert served_at_start() == newest.name


def test_a_start_beside_what_cannot_be_read(publish: Publish) -> None:
    older, newest = publish(), publish()

    def opened(path: Path) -> Bundle:
        if path == newest:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return Bundle.load(path)

    assert first_to_serve([newest, older], opened).bundle.version == older.name
    with pytest.raises(PermissionError):
        first_to_serve([newest], opened)


def test_a_start_when_the_pinned_bundle_is_gone_serves_an_older_one(publish: Publish) -> None:
    bundles = []
    for number in range(3):  # whose names tell their order
        bundle = publish()
        bundles.append(bundle.rename(bundle.with_name(f"2026010{number + 1}-000000-{bundle.name[-6:]}")))
    oldest, pinned, _ = bundles
    root = oldest.parent
    pin_bundle(root, pinned.name)
    shutil.rmtree(pinned)
    assert bundles_to_serve(root) == [oldest]
    assert pinned_but_gone(root) == pinned.name
    with pytest.raises(BundleError, match=f"names '{pinned.name}', which is gone"):
        bundle_to_serve(root)  # one that runs stays with what it has
    shutil.rmtree(oldest)
    with pytest.raises(BundleError, match=f"names '{pinned.name}'; expected one of"):
        bundles_to_serve(root)  # not what the pin keeps out
    assert pinned_but_gone(bundles[2]) is None


def test_a_start_serves_what_the_policies_fit(publish: Publish, tmp_path: Path) -> None:
    older, tiny = publish(num_items=40), publish(num_items=5)  # has no brand 5
    (tmp_path / "policies.yaml").write_text(POLICIES)
    policies = PolicyFiles(tmp_path / "policies.yaml").load()
    bundles = bundles_to_serve(older.parent)
    assert first_to_serve(bundles, Bundle.load, policies).bundle.version == older.name
    with pytest.raises(PolicyError, match="deny: brand is 'brand 5'"):
        first_to_serve([tiny], Bundle.load, policies)


def test_a_bundle_without_a_policy_of_the_one_before_is_served_and_the_log_says_so(
    publish: Publish, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        first = publish(policies={"default": "a", "policies": {name: {"rules": []} for name in "abc"}})
        async with (
            served(prepared(Bundle.load(first))) as shop,
            following(follow_bundles, shop, first.parent, Bundle.load),
        ):
            second = publish(policies={"policies": {"b": {"rules": []}}})
            await shop.until(lambda: shop.service.pipeline.bundle.version == second.name)
            assert f"bundle {second.name} has no policy a, c, which {first.name} had" in caplog.text
            assert "other is" not in caplog.text
            shop.service.pipelines = {**shop.service.pipelines, OTHER: prepared(Bundle.load(second))}
            third = publish(policies={"default": "b", "policies": {name: {"rules": []} for name in "bd"}})
            await shop.until(lambda: shop.service.pipeline.bundle.version == third.name)
            assert f"other is {second}, which has no policy d: a request" in caplog.text

    asyncio.run(scene())


def test_a_bundle_whose_answers_lack_a_stage_is_refused(publish: Publish) -> None:
    bundle = Bundle.load(publish())

    class Nan:
        history_length, num_items, dim = 6, 40, 8
        context, heads = ContextTable(), ()

        def user_states(self, history: Any, context: Any, head_weights: Any) -> Any:
            return np.full((len(history), 8), np.nan, np.float32)

        def score_states(self, states: Any, candidates: Any) -> Any:
            return np.full(candidates.shape, np.nan, np.float32)

    object.__setattr__(bundle, "scorer", Nan())
    with pytest.raises(BundleError, match=r"a trial request went without .*ranking"):
        prepared(bundle)


def test_served_policies_go_along_and_refuse_what_they_do_not_fit(
    publish: Publish, served: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        first = publish(num_items=40)
        (tmp_path / "policies.yaml").write_text(POLICIES)
        files = PolicyFiles(tmp_path / "policies.yaml")
        async with serving_policies(served, first, files) as shop:
            second = publish(num_items=30)
            await shop.until(lambda: shop.service.pipeline.bundle.version == second.name)
            assert (await shop.recommend()).arrangement.policy == "home"
            tiny = publish(num_items=5)  # has no brand 5
            await shop.until(lambda: shop.value("bundle_swaps_total", result="refused") == 1)
            assert (await shop.recommend()).trace.bundle_version == second.name
            # Policies that fit both let it in.
            files.path.write_text("policies: {any: {rules: []}}")
            await shop.until(lambda: shop.service.pipeline.bundle.version == tiny.name)
            assert (await shop.recommend()).arrangement.policy == "any"

    asyncio.run(scene())
    assert "deny: brand is 'brand 5'" in caplog.text


def test_policies_that_fit_the_next_bundle_alone_wait_for_it(
    publish: Publish, served: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        first = publish(num_items=5)  # has no brand 5
        (tmp_path / "policies.yaml").write_text("policies: {any: {rules: []}}")
        files = PolicyFiles(tmp_path / "policies.yaml")
        async with serving_policies(served, first, files) as shop:
            files.path.write_text(POLICIES)
            await shop.until(lambda: "the policies in use stay" in caplog.text)
            second = publish(num_items=40)
            await shop.until(lambda: "home" in shop.service.policies.by_name)
            answer = await shop.recommend()
            assert (answer.trace.bundle_version, answer.arrangement.policy) == (second.name, "home")

    asyncio.run(scene())
    assert caplog.text.count("the policies in use stay") == 1


def test_the_pinned_bundle_is_served_until_it_is_not(
    publish: Publish, served: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        first, second = publish(), publish()
        root = first.parent
        async with (
            served(prepared(Bundle.load(second))) as shop,
            following(follow_bundles, shop, root, Bundle.load),
        ):

            def version() -> str:
                return str(shop.service.pipeline.bundle.version)

            pin_bundle(root, first.name)
            await shop.until(lambda: version() == first.name)
            third = publish()
            await asyncio.sleep(0.1)
            assert version() == first.name
            assert shop.value("bundle_waiting") == 1
            pin_bundle(root, None)
            await shop.until(lambda: version() == third.name)
            await shop.until(lambda: shop.value("bundle_waiting") == 0)  # perhaps at the next look
            shutil.rmtree(third)
            await shop.until(lambda: version() == second.name)
            assert caplog.text.count(f"bundle {third.name} waits, as {first.name} is pinned") == 1

    asyncio.run(scene())


def test_pins(publish: Publish) -> None:
    first, second = publish(), publish()
    root = first.parent
    assert bundles_in(root) == [first, second]
    assert bundle_to_serve(root) == second
    assert bundle_to_serve(first) == first
    pin_bundle(root, first.name)
    assert bundle_to_serve(root) == first
    with pytest.raises(BundleError, match=f"bundle is 'x'; expected one of {first.name}, {second.name}"):
        pin_bundle(root, "x")
    assert bundle_to_serve(root) == first
    (root / PIN).write_text("../elsewhere")
    with pytest.raises(BundleError, match=r"pinned names '../elsewhere'; expected one of"):
        bundle_to_serve(root)
    pin_bundle(root, None)
    pin_bundle(root, None)
    assert bundle_to_serve(root) == second


def test_keys_are_loaded_again(bundle_path: Path, served: Any, tmp_path: Path) -> None:
    async def scene() -> None:
        file = tmp_path / "keys.json"
        key = create_key(file, "a")
        keys = KeyFile(file)
        pipeline = RecommendationPipeline(Bundle.load(bundle_path))
        async with served(pipeline, keys=keys.load()) as shop, following(follow_keys, shop, keys):
            other = create_key(file, "b")
            await shop.until(lambda: shop.service.keys.find(other) is not None)
            remove_key(file, key.split("_")[1])
            await shop.until(lambda: shop.service.keys.find(key) is None)
            file.write_text("{")
            await asyncio.sleep(0.1)
            assert shop.service.keys.find(other) is not None

    asyncio.run(scene())


def test_keys_are_followed_on_after_a_look_that_failed(
    bundle_path: Path,
    served: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_failures = [0]

    async def scene() -> None:
        file = tmp_path / "keys.json"
        create_key(file, "a")
        keys = KeyFile(file)
        pipeline = RecommendationPipeline(Bundle.load(bundle_path))
        changed = keys.changed

        def fails() -> bool:
            if num_failures[0] < 3:
                num_failures[0] += 1
                raise RuntimeError("can't start new thread")
            return changed()

        monkeypatch.setattr(keys, "changed", fails)
        async with served(pipeline, keys=keys.load()) as shop, following(follow_keys, shop, keys):
            other = create_key(file, "b")
            await shop.until(lambda: shop.service.keys.find(other) is not None)

    asyncio.run(scene())
    assert num_failures[0] == 3
    assert caplog.text.count("files could not be looked at: can't start new thread") == 1
