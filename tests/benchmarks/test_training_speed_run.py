"""How long a run took: read from what `trirank train` left, and refused where that does not tell."""

import json

import pytest

from benchmarks import training_speed
from benchmarks.training_speed_run import Fit, started
from engine.cli import main as trirank


@pytest.fixture(scope="module")
def run(pairs_directory, tmp_path_factory):
    root = tmp_path_factory.mktemp("timed")
    small = [
        *("--retrieval.model.encoder.dim", "4", "--retrieval.trainer.max_epochs", "2"),
        *("--ranking.model.encoder.dim", "4", "--ranking.trainer.max_epochs", "3"),
        *("--out", str(root / "bundles"), "--runs", str(root / "runs")),
    ]
    assert trirank(["train", str(pairs_directory), *small]) == 0
    return next((root / "runs").iterdir())


def _asked(capsys, *arguments):
    code = training_speed.main(["run", *map(str, arguments)])
    return code, capsys.readouterr()


def test_a_run_tells_its_times(run, capsys):
    code, told = _asked(capsys, run, "--ndcg", "0", "--json")
    found = json.loads(told.out)
    assert code == 0
    assert [fit["name"] for fit in found["fits"]] == [
        "retrieval",
        "ranking",
        "refit/retrieval",
        "refit/ranking",
    ]
    first, ranking, *refits = found["fits"]
    assert (len(first["epoch_ends"]), len(ranking["epoch_ends"]), len(ranking["metric"])) == (2, 3, 3)
    assert [fit["metric"] for fit in refits] == [[], []]
    # The clock runs from the start of the command, stage one included.
    assert found["reached_epochs"] == 1
    assert found["reached_s"] == ranking["epoch_ends"][0] - started(run) > first["epoch_s"] > 0
    assert found["total_s"] > found["reached_s"]


def test_what_was_never_reached_is_said(run, capsys):
    code, told = _asked(capsys, run, "--ndcg", "1.1")
    assert code == 1
    assert "NDCG@10 1.1 on validation: never" in told.out
    assert "refit/ranking" in told.out


def test_a_resumed_run_and_no_run_are_refused(run, tmp_path, capsys):
    code, told = _asked(capsys, tmp_path)
    assert code == 2
    assert "it has no run.json" in told.err
    second = run / "ranking" / "tensorboard" / "version_1"
    second.mkdir()
    try:
        code, told = _asked(capsys, run)
    finally:
        second.rmdir()
    assert code == 2
    assert "the fit ranking was resumed" in told.err


def test_epochs_and_the_first_that_is_good_enough():
    fit = Fit(name="ranking", start=10.0, epoch_ends=[14.0, 16.0, 19.0], metric=[0.1, 0.3, 0.2])
    assert fit.epoch_s == 3.0
    assert [fit.reached(metric) for metric in (0.05, 0.2, 0.31)] == [1, 2, None]
