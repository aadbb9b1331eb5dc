"""Withheld users are unknown to training, and are asked by their history alone."""

import json

import numpy as np
import pytest

from benchmarks import new_users
from engine.cli import main as trirank
from training.data.splits import SplitOptions, final_split, load_split


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("withheld")
    rng = np.random.default_rng(0)
    # Two tastes: users like either the first or the last 15 of 30 items.
    for name, part in (("train", slice(0, 8)), ("test", slice(8, 11))):
        rng = np.random.default_rng(0)
        lines = [f"{u} {' '.join(map(str, (rng.permutation(15) + 15 * (u % 2))[part]))}\n" for u in range(60)]
        (folder / f"{name}.txt").write_text("".join(lines))
    assert trirank(["import", "lightgcn", str(folder), "--out", str(folder / "data")]) == 0
    return folder / "data"


def test_training_never_sees_the_withheld(directory):
    split = final_split(load_split(directory, SplitOptions()))
    without, questions = new_users.withhold(split, 0.25, seed=1)
    assert len(questions) == 15
    assert not np.isin(without.train.users, questions.users).any()
    kept = ~np.isin(split.train.users, questions.users)
    assert len(without.train) == kept.sum() < len(split.train)
    assert without.train.num_users == split.train.num_users
    # Their histories are what they did before the test, all the same.
    assert all(len(questions.history(q)) == 8 for q in range(len(questions)))


@pytest.mark.parametrize("share", [0.0, 0.001, 1.0])
def test_a_share_of_nobody_or_everybody_is_refused(directory, share):
    split = final_split(load_split(directory, SplitOptions()))
    with pytest.raises(ValueError, match=f"share is {share}, of 60 users; expected some, and not all"):
        new_users.withhold(split, share, seed=0)


def test_folding_in_finds_what_the_withheld_like(directory, tmp_path, capsys):
    out = tmp_path / "figures.json"
    command = ["--data", str(directory), "--model", "lightgcn", "--share", "0.25", "--epochs", "3"]
    assert new_users.main([*command, "--precision", "32-true", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    # 20 places for the 7 items of the own taste that are not in the history, and 15 of the other.
    assert figures["rows"]["withheld, folded in"]["recall"] > 0.95
    assert figures["ratio"]["recall"] == pytest.approx(
        figures["rows"]["withheld, folded in"]["recall"] / figures["rows"]["trained"]["recall"]
    )
    assert "15 users withheld" in capsys.readouterr().out


def test_an_unknown_model_is_refused(directory, capsys):
    assert new_users.main(["--data", str(directory), "--model", "svd"]) == 2
    assert "model is 'svd'; expected one of mf, ngcf, lightgcn" in capsys.readouterr().err
