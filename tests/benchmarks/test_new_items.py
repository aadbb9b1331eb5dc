"""Withheld items are unknown to training, and are found by what they are."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from benchmarks import new_items
from training.data.dataset import DatasetInfo, write_info
from training.data.splits import SplitOptions, load_split

TINY = [
    "ranking.trainer.max_epochs=30",
    "ranking.model.learning_rate=0.01",
    "retrieval.trainer.max_epochs=1",
    "ranking.model.encoder.dim=16",
    "ranking.model.id_dropout=0.2",
    "retrieval.model.encoder.dim=8",
    "retrieval.model.loss=SampledSoftmax",
    "retrieval.model.loss.num_negatives=16",
    "content.encoder=lsa",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a shop of four colours, 20 items of each: whoever likes a colour touches nothing else."""
    return shop(tmp_path_factory.mktemp("colours") / "data")


def shop(folder, by_time=False):
    """Write the shop; by_time: with times that go across the users, not each user's order alone."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = ["red", "blue", "green", "black"]
    items = [f"{colour} {number}" for number in range(20) for colour in colours]
    events = [
        (f"u{user}", f"{colours[user % 4]} {number}")
        for user in range(240)
        for number in rng.permutation(20)[:8]
    ]
    times = rng.permutation(len(events)) if by_time else np.arange(len(events))
    pl.DataFrame(
        {
            "user_id": [user for user, _ in events],
            "item_id": [item for _, item in events],
            "timestamp": times,
            "event_type": ["view"] * len(events),
        }
    ).write_parquet(folder / "events.parquet")
    titles = [f"thing in {item.split()[0]}" for item in items]
    pl.DataFrame({"item_id": items, "title": titles}).write_parquet(folder / "items.parquet")
    write_info(folder, DatasetInfo(name="colours", source={}, time="unix" if by_time else "order"))
    return folder


def test_training_never_sees_the_withheld(directory):
    split = load_split(directory, SplitOptions()).split
    without, withheld = new_items.withhold(split, 0.1, seed=1)
    assert withheld.sum() == 8
    assert not withheld[0]
    assert not withheld[without.train.items].any()
    assert len(without.train) == (~withheld[split.train.items]).sum() < len(split.train)
    assert not withheld[without.validation.targets].any()
    assert len(without.validation) == (~withheld[split.validation.targets]).sum()
    assert without.test is split.test
    asked = new_items.asking_for(split.test, withheld)
    assert withheld[asked.targets].all()
    assert len(asked) == withheld[split.test.targets].sum()


@pytest.mark.parametrize("share", [0.0, 0.001, 1.0])
def test_a_share_of_nothing_or_everything_is_refused(directory, share):
    split = load_split(directory, SplitOptions()).split
    with pytest.raises(ValueError, match=f"share is {share}, of 80 items; expected some, and not all"):
        new_items.withhold(split, share, seed=0)


def test_what_is_known_of_new_items_finds_them(directory, tmp_path, capsys):
    """Of 40 withheld items about ten have the visitor's colour."""
    out = tmp_path / "figures.json"
    command = [
        "--data",
        str(directory),
        "--out",
        str(tmp_path / "runs"),
        "--share",
        "0.5",
        "--json",
        str(out),
    ]
    assert new_items.main([*command, "--options", *TINY]) == 0
    figures = json.loads(out.read_text())
    rows = figures["rows"]
    assert figures["num_withheld"] == 40
    assert rows["chance"]["recall"] == pytest.approx(0.25)
    assert rows["text similarity"]["recall"] > 0.8
    assert rows["text similarity, the newest first"]["recall"] > 0.8
    assert rows["word similarity"]["recall"] > 0.8
    assert rows["word similarity, the newest first"]["recall"] > 0.8
    assert rows["content"]["recall"] > 0.8
    assert rows["ranker"]["recall"] == pytest.approx(0.25, abs=0.1)
    for name in ("ranker, exported", "content, exported"):
        assert rows[name]["recall"] > 0.8
        assert 0 < rows[name]["recall_of_all"] < rows[name]["recall"]
    assert rows["ranker"]["others_ndcg"] > 0
    of_withheld = figures["num_questions"] / (figures["num_questions"] + figures["num_others"])
    for row in (row for row in rows.values() if "ndcg" in row):
        assert row["ndcg"] >= (1 - of_withheld) * row["others_ndcg"] - 1e-12
    shown = capsys.readouterr().out
    assert "40 items withheld" in shown
    assert "texts by lsa" in shown
    # Again, all of it is there.
    assert new_items.main([*command, "--options", *TINY]) == 0
    assert json.loads(out.read_text()) == figures
    # What decides the exported rows' weights is not passed over.
    assert new_items.main([*command, "--options", *TINY, "pipeline.graph_weight=5"]) == 2
    assert "holds rows of other settings: weighed.graph_weight is 5.0, there null" in capsys.readouterr().err


def test_a_catalog_that_says_nothing_is_refused(directory, tmp_path, capsys):
    command = ["--data", str(directory), "--out", str(tmp_path)]
    assert new_items.main([*command, "--options", "content.encoder=none"]) == 2
    assert "the catalog says nothing of its items" in capsys.readouterr().err


def test_questions_for_items_of_both_kinds_are_in_no_mean(tmp_path):
    directory = shop(tmp_path / "data", by_time=True)
    options = [*TINY, "ranking.trainer.max_epochs=1", "split.name=global-time"]
    found = new_items.compare(directory, tmp_path / "runs", options, share=0.5, seed=0, part="test")
    asked, others = found["num_questions"], found["num_others"]
    questions = load_split(directory, SplitOptions(name="global-time")).split.test
    assert 0 < asked + others < len(questions)
    # The ranker alone hardly ever puts a withheld item first: the share of the other questions is left.
    row = found["rows"]["ranker"]
    assert row["recall_of_all"] < 0.01
    assert row["ndcg"] >= others / (asked + others) * row["others_ndcg"] > 0


def test_results_of_other_data_or_settings_are_not_reused(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(new_items, "content_of", lambda *_: None)  # goes no further than the settings
    command = ["--out", str(tmp_path / "runs"), "--share", "0.5"]

    def refused(data, *options):
        assert new_items.main(["--data", str(data), *command, "--options", *TINY, *options]) == 2
        return capsys.readouterr().err

    assert "the catalog says nothing" in refused(directory)
    assert "the catalog says nothing" in refused(directory, "pipeline.num_ranked=7")
    told = refused(directory, "ranking.trainer.max_epochs=2")
    assert "holds rows of other settings: recipe.ranking.trainer.max_epochs is 2, there" in told
    other = tmp_path / "data"
    shutil.copytree(directory, other)
    pl.read_parquet(other / "events.parquet")[:-1].write_parquet(other / "events.parquet")
    write_info(other, DatasetInfo(name="colours", source={}, time="order"))
    assert "holds rows of other settings: fingerprint is" in refused(other)
    (tmp_path / "runs" / "share0.5-seed0" / "settings.json").unlink()
    (tmp_path / "runs" / "share0.5-seed0" / "ranker").mkdir()
    assert "holds results that do not say their settings; expected another --out" in refused(directory)
