"""The latency table at a tiny size, with real servers; nothing here is bound to be quick."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import engine.pipeline
from benchmarks import kernels, latency, load
from benchmarks.simulated_bundle import SimulatedShop, simulated_bundle, simulated_events
from engine.bundle import Bundle
from engine.pipeline import RecommendationPipeline
from retrieval.transitions import next_items

SHOP = SimulatedShop(num_items=600, num_candidates=60, num_users=200, dim=16)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def bundle(bundles: Path) -> Bundle:
    return Bundle.load(simulated_bundle(bundles, SHOP))


def test_a_simulated_bundle_is_made_once_and_answers(bundles: Path, bundle: Bundle) -> None:
    assert simulated_bundle(bundles, SHOP) == bundle.path
    assert (bundle.catalog.num_items, bundle.index.dim) == (600, 16)
    assert bundle.manifest["data"]["simulated"]
    assert (bundle.catalog.stock == 0).any()
    pipeline = RecommendationPipeline(bundle)
    items, trace = pipeline.recommend(pipeline.resolve_visitor("user-1"), 20)
    assert len(items) == 20
    assert not trace.degraded_stages
    assert [timing.num_out for timing in trace.timings if timing.stage == "retrieval"] == [60]


def test_simulated_users_keep_to_a_few_clusters() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 50, 2_000)
    events = simulated_events(300, cluster, 1 + rng.pareto(2.5, 2_000), rng).log.events
    counts = np.bincount(events.users)[1:]
    assert counts.min() >= 2
    assert 5 <= np.median(counts) <= 11
    liked = [len(np.unique(cluster[events.history(user).items - 1])) for user in range(1, 301)]
    assert max(liked) <= 4


def test_kernels_are_played_back_as_a_request_called_them(bundle: Bundle) -> None:
    requests = load.recommend_requests(bundle.path, 20, num_requests=3)
    recordings = kernels.record(RecommendationPipeline(bundle), requests)
    called = [call.kernel for call in recordings[0].calls]
    searches = ["search ranker vectors", "transitions", "neighbours"]
    assert sorted(called) == sorted(["ONNX state", *searches, "ONNX scores", "rules"])
    assert bundle.ranker_index
    assert "rough_search" not in vars(bundle.ranker_index)  # nothing is left behind
    assert engine.pipeline.next_items is next_items
    times = kernels.play(recordings, 0.0)
    assert set(times) == set(called)
    assert all(len(values) == 1 and values[0] > 0 for values in times.values())
    assert kernels.summed({"a": [1.0, 2.0], "b": [0.5, 0.0]}).tolist() == [1.5, 2.0]


def test_the_table(bundles: Path, bundle: Bundle, tmp_path: Path) -> None:
    settings = latency.Settings(limit=20, turns=1, turn_s=0.2, rate_s=0.5, growth=8, dim=16)
    cell = latency.Cell(600, 60, 1)
    found = latency.measure_cell(bundle.path, cell, settings)
    assert set(found["kernels"]) >= {"ONNX state", "ONNX scores", "rules", kernels.ECHO_KERNEL}
    assert 0 < found["kernels"][kernels.ECHO_KERNEL]["p50"] < found["whole"]["p50"]
    assert found["ratio"] == pytest.approx(found["whole"]["p50"] / found["sum_of_kernels"]["p50"])
    assert found["kernels"][kernels.ECHO_KERNEL]["p50"] < found["bare_server"]["p50"]
    assert found["stages"]["all stages"]["p50"] < found["whole"]["p50"]
    assert found["server_rss_mb"] > 10
    assert found["load"]

    # A finished cell is not measured again, and other settings do not mix.
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{cell.name}.json").write_text(json.dumps(found))
    table = latency.run_table(bundles, out, [cell], settings)
    assert table["cells"] == [json.loads(json.dumps(found))]
    assert [shown.row_count for shown in latency.tables(table)] == [1, 1]
    with pytest.raises(ValueError, match="limit 20; expected the same"):
        latency.run_table(bundles, out, [cell], replace(settings, limit=30))
    pytest.importorskip("matplotlib")
    latency.plot(table, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").read_bytes()[:4] == b"\x89PNG"
    # Rates too short for a p99 are left out, were it all of them.
    for rate in found["load"]:
        rate["latency_ms"]["p99"] = None
    latency.plot({"cells": [found], "settings": table["settings"]}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes()[:4] == b"\x89PNG"


def result_at(rate: float, ok: int, rejected: int, p99: float) -> load.Result:
    figures: dict[str, float | None] = {"p50": 3.0, "p90": 4.0, "p99": p99, "p99.9": None}
    codes = {"OK": ok} | ({"RESOURCE_EXHAUSTED": rejected} if rejected else {})
    goodput = rate * ok / (ok + rejected)
    return load.Result(
        rate, rate, ok + rejected, goodput, goodput, 0, codes, figures, figures, 0.1, 0.3, 1.5, 400.0
    )


def test_what_a_load_comes_to() -> None:
    rising = [result_at(100, 400, 0, 9.0), result_at(200, 800, 0, 30.0), result_at(300, 750, 450, 45.0)]
    overload = replace(result_at(600, 600, 1800, 49.0), recovery_s=0.3)
    found = latency.summary([*rising, overload], 50.0)
    assert (found["sustained_per_s"], found["p99_ms"], found["cores"]) == (200, 30.0, 1.8)
    assert found["peak_per_s"] == 200
    assert found["overload_goodput"] == pytest.approx(150 / 200)
    assert (found["overload_p99_ms"], found["recovery_s"]) == (49.0, 0.3)
    # Without saturation nothing is an overload.
    found = latency.summary(rising[:2], 50.0)
    assert found["sustained_per_s"] == 200
    assert "recovery_s" not in found
    assert latency.summary([], 50.0)["sustained_per_s"] is None


def test_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert latency.main(["--num_items", "0", "--out", str(tmp_path)]) == 2
    assert "expected numbers of at least 1" in capsys.readouterr().err
    assert latency.main([str(tmp_path / "nothing")]) == 2
    assert "is not a directory" in capsys.readouterr().err
