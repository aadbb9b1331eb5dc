"""The load benchmark against a real server, at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.load import Load, main, measure, recommend_requests


def test_a_real_server_answers_what_is_offered(server_address: str, bundle_path: Path) -> None:
    load = Load(seconds=1.0, warm_up_s=0.2, timeout_s=60.0, objective_ms=60_000.0, num_channels=2)
    result = measure(server_address, recommend_requests(bundle_path, 5, 10), 30, load)
    assert set(result.codes) == {"OK"}
    assert result.num_degraded == 0
    assert result.num_calls >= 15
    assert result.latency_ms["p50"] is not None
    assert result.latency_ms["p50"] > 0
    assert result.server_cores is None


def test_the_command_starts_a_server_and_writes_its_figures(bundle_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "load.json", tmp_path / "load.png"
    options = ["--start_rate", "20", "--max_rate", "20", "--load.seconds", "1", "--load.warm_up_s", "0.1"]
    options += ["--load.timeout_s", "60", "--load.objective_ms", "60000"]  # a starved machine is no failure
    assert main([str(bundle_path), *options, "--out", str(out), "--plot", str(picture)]) == 0
    content = json.loads(out.read_text())
    (result,) = content["results"]
    assert content["bundle"] == bundle_path.name
    assert result["codes"] == {"OK": result["num_calls"]}
    assert result["server_cores"] > 0
    assert result["server_rss_mb"] > 10
    assert picture.stat().st_size > 1000


def test_a_directory_without_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no bundle" in capsys.readouterr().err
