"""The benchmark of faults against a real server, at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.faults import _num_refused, copy_of, main
from engine.bundle import Bundle, bundles_in
from engine.telemetry import Metrics


def test_copies_are_bundles_each_newer_than_the_last(bundle_path: Path, tmp_path: Path) -> None:
    copies = [copy_of(bundle_path, tmp_path, number) for number in range(3)]
    assert bundles_in(tmp_path) == copies
    assert [Bundle.load(copy).version for copy in copies] == [copy.name for copy in copies]


def test_swaps(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["swaps", str(bundle_path), "--times", "1", "--seconds", "8", "--rate", "30", "--json"]
    assert main(ask) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["swaps"], result["failed"], result["refused_by_the_server"]) == (1, 0, 0)
    assert result["p50_ms_between"] > 0
    assert not list(bundle_path.parent.glob("bundles-*"))


def test_what_a_server_refused_is_counted_over_its_processes() -> None:
    first, second = Metrics(), Metrics()
    port, end_first = first.serve(0)
    try:
        _, end_second = second.serve(port + 1)
    except OSError:  # somebody else's port
        end_first()
        pytest.skip(f"port {port + 1} is taken")
    assert _num_refused(port) == 0
    for metrics, reason in ((first, "limit"), (first, "rate"), (second, "limit"), (second, "limit")):
        metrics.observe_refusal("Recommend", "RESOURCE_EXHAUSTED", reason)
    assert _num_refused(port) == 3
    end_first()
    end_second()


def test_swaps_at_a_share_of_what_the_server_can_do(
    bundle_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RATE_S", 0.5), ("GROWTH", 8.0), ("DRAIN_S", 0.1), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(f"benchmarks.faults.{name}", value)
    ask = ["swaps", str(bundle_path), "--times", "1", "--seconds", "8", "--share", "0.1", "--json"]
    assert main(ask) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["swaps"] == 1
    assert result["saturation_per_s"] > 10
    assert result["rate"] == pytest.approx(0.1 * result["saturation_per_s"])
    assert result["calls"] == pytest.approx(16 * result["rate"], abs=2)  # two parts of eight seconds
    assert main([*ask, "--share", "1.5"]) == 2
    assert "share is 1.5; expected above 0, up to 1" in capsys.readouterr().err


def test_crashes(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crashes", str(bundle_path), "--times", "2", "--seconds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kills"], result["lost"]) == (2, 0)
    assert result["acknowledged"] > 0
    assert result["calls_answered"] > 0
    assert result["calls_answered"] + result["calls_cut_short"] == pytest.approx(2 * 50, abs=50)
    assert result["ready_s_max"] > 0


def test_soak(bundle_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.faults.CHUNK_S", 1.5)
    ask = ["soak", str(bundle_path), "--minutes", "0.1", "--seconds", "2", "--rate", "30", "--json"]
    assert main(ask) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] == 0
    assert result["bundles_published"] >= 2
    assert result["bundles_that_answered"] >= 2
    assert result["events"] > 10
    assert set(result["answers_to_them"]) <= {"INVALID_ARGUMENT", "OK"}
    assert result["messages_that_are_none"] >= 3
    assert result["rss_mb_per_hour_standard_error"] > 0


def test_a_directory_without_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swaps", str(tmp_path)]) == 2
    assert "holds no bundle" in capsys.readouterr().err
