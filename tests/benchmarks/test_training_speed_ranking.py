"""The speed table of the ranker: the same work for all, and a table without those that are missing."""

import json

import numpy as np
import pytest

from benchmarks import training_speed
from benchmarks.peers import rectools_sasrec
from benchmarks.training_speed_ranking import CONTENDERS, Work, measure_rectools, training_split

WORK = Work(epochs=2, batch_size=8, dim=4, num_negatives=8, history_length=5, threads=1)


@pytest.mark.parametrize("name", ["trirank", "trirank-fusion"])
def test_ours_gives_a_time_for_each_epoch(name, pairs_directory):
    split = training_split(pairs_directory)
    assert len(split.train) == 20 * 5
    times = CONTENDERS[name](pairs_directory, split, WORK)
    assert len(times) == 2
    assert all(time_s > 0 for time_s in times)


def test_rectools_gets_the_same_work(pairs_directory, monkeypatch, tmp_path):
    asked = []

    def run(python, settings, train, histories):
        asked.append((python, settings, train, histories))
        return rectools_sasrec.Result({}, [3.0, 2.0], 7, {"rectools": "0"})

    monkeypatch.setattr(rectools_sasrec, "run", run)
    split = training_split(pairs_directory)
    found = measure_rectools(tmp_path, split, WORK)
    assert found["epoch_s"] == [3.0, 2.0]
    ((python, settings, train, histories),) = asked
    assert (python, histories) == (tmp_path, None)
    assert (settings.dim, settings.batch_size, settings.num_negatives, settings.epochs) == (4, 8, 8, 2)
    np.testing.assert_array_equal(train[1], split.train.items)


def test_the_table_leaves_out_what_is_missing_and_says_so(pairs_directory, monkeypatch, tmp_path, capsys):
    """Each of ours is measured in a process of its own; here the processes are made up."""

    def run(command, **options):
        assert command[2:4] == ["benchmarks.training_speed", "ranking"]
        times = {"trirank": [3.0, 1.0], "trirank-fusion": [2.0, 4.0]}[
            command[command.index("--contender") + 1]
        ]
        text = "noise\n" + json.dumps({"epoch_s": times, "peak_memory_bytes": 5_000_000})
        return type("Done", (), {"returncode": 0, "stdout": text})

    monkeypatch.setattr(training_speed.subprocess, "run", run)
    command = ["ranking", "--data", str(pairs_directory), "--rectools_python", str(tmp_path / "none")]
    monkeypatch.setattr(rectools_sasrec, "check_python", _missing)
    assert training_speed.main(command) == 0
    shown = capsys.readouterr()
    assert "rectools: left out. install it" in " ".join(shown.err.split())
    assert "1.00" in shown.out

    monkeypatch.setattr(rectools_sasrec, "check_python", lambda python: None)
    result = rectools_sasrec.Result({}, [20.0, 30.0], 7, {"rectools": "0"})
    monkeypatch.setattr(rectools_sasrec, "run", lambda *args, **options: result)
    assert training_speed.main([*command, "--json"]) == 0
    contenders = json.loads(capsys.readouterr().out)["contenders"]
    assert {name: row["times_faster"] for name, row in contenders.items()} == {
        "trirank": 20.0,
        "trirank-fusion": 10.0,
        "rectools": 1.0,
    }


def _missing(python):
    raise ValueError("install it")


def test_wrong_input(pairs_directory, capsys):
    command = ["ranking", "--data", str(pairs_directory)]
    assert training_speed.main([*command, "--contenders", "pyg"]) == 2
    assert "contender is 'pyg'; expected one of trirank, trirank-fusion, rectools" in capsys.readouterr().err
    assert training_speed.main([*command, "--dim", "0"]) == 2
    assert "dim is 0; expected 1 or more" in capsys.readouterr().err
