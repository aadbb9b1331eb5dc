"""The benchmark of faults against a real server, at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.faults import copy_of, main
from engine.bundle import Bundle, bundles_in


def test_copies_are_bundles_each_newer_than_the_last(bundle_path: Path, tmp_path: Path) -> None:
    copies = [copy_of(bundle_path, tmp_path, number) for number in range(3)]
    assert bundles_in(tmp_path) == copies
    assert [Bundle.load(copy).version for copy in copies] == [copy.name for copy in copies]


def test_swaps(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["swaps", str(bundle_path), "--times", "1", "--seconds", "2", "--rate", "30", "--json"]
    assert main(ask) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["swaps"], result["failed"]) == (1, 0)
    assert result["p50_ms_between"] > 0
    assert not list(bundle_path.parent.glob("bundles-*"))


def test_crashes(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crashes", str(bundle_path), "--times", "1", "--seconds", "0.3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kills"], result["lost"]) == (1, 0)
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
