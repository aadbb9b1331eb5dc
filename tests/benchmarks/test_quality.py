"""The quality table: its questions, its figures and its rows, on data small enough to check by hand."""

import importlib.metadata
import json

import numpy as np
import pytest

from benchmarks import full_ranking, quality, quality_retrieval
from benchmarks.baselines.popularity import Popularity
from benchmarks.quality_retrieval import Recipe
from retrieval.encoders.lightgcn import LightGCN
from retrieval.encoders.mf import MF
from retrieval.encoders.ngcf import NGCF
from training.data.formats import lightgcn
from training.data.importing import import_source
from training.data.splits import SplitOptions, final_split, load_split
from training.metrics import accuracy, places_by_score

NUM_USERS, NUM_ITEMS = 40, 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a data set directory: a checkerboard with its own test set.

    Of 30 items of a user's parity 10 are for training and 2 to be found, among the first 20 of those left.
    """
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    lines = {"train": [], "test": []}
    for user in range(NUM_USERS):
        items = rng.permutation(np.arange(user % 2, NUM_ITEMS, 2))[:12]
        lines["train"].append(f"{user} {' '.join(map(str, items[2:]))}\n")
        lines["test"].append(f"{user} {' '.join(map(str, items[:2]))}\n")
    for name, text in lines.items():
        (folder / f"{name}.txt").write_text("".join(text))
    out = tmp_path_factory.mktemp("data") / "gowalla"
    import_source(lightgcn.read(str(folder)), out, format_name="lightgcn", name="gowalla")
    return out


@pytest.fixture(scope="module")
def data(directory):
    return load_split(directory, SplitOptions())


@pytest.mark.parametrize("questions_at_once", [1, 7, 1000])
def test_accuracy_is_the_mean_over_questions_however_many_at_once(monkeypatch, data, questions_at_once):
    monkeypatch.setattr(full_ranking, "SCORES_AT_ONCE", questions_at_once * (NUM_ITEMS + 1))
    table = np.random.default_rng(1).standard_normal((NUM_USERS + 1, NUM_ITEMS + 1)).astype(np.float32)
    split = final_split(data)
    sizes = []

    def scores(questions):
        sizes.append(len(questions))
        return table[questions.users]

    found = quality_retrieval.accuracy(scores, split.test, repeats=False)
    assert max(sizes) == min(questions_at_once, NUM_USERS)
    totals = []
    for user, history, target in split.test:
        row = table[user].copy()
        row[[0, *history.items]] = -np.inf
        totals.append(accuracy(places_by_score(row, target), (20,)))
    for name in ("recall", "ndcg"):
        assert found[name] == pytest.approx(np.mean([total[f"{name}@20"] for total in totals]))


def test_the_matrices_hold_the_edges_and_the_histories(data):
    split = final_split(data)
    touched = full_ranking.touched_matrix(split.train).toarray()
    assert touched.sum() == NUM_USERS * 10
    assert set(np.unique(touched)) == {0.0, 1.0}
    histories = full_ranking.history_matrix(split.test).toarray()
    np.testing.assert_array_equal(histories, touched[split.test.users])


def test_every_model_has_its_row(directory):
    results = quality_retrieval.compare(directory, quality_retrieval.MODELS, [0, 1], epochs=1)
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == quality_retrieval.MODELS
    assert results["num_training_events"] == NUM_USERS * 10
    chance = rows["popularity"]["runs"][0]["recall"]
    for name, row in rows.items():
        assert len(row["runs"]) == (2 if name in quality_retrieval.ENCODERS else 1)
        for run in row["runs"]:
            assert 0 <= run["ndcg"] <= 1
            assert run["train_s"] >= 0
            if name in ("item-knn", "ease", "gf-cf"):
                assert run["recall"] > 0.9 > chance + 0.2, name
    assert {row["model"] for row in results["published"]} >= {"LightGCN", "GF-CF", "BSPM-EM"}


@pytest.mark.parametrize("encoder", [LightGCN, MF, NGCF])
def test_an_encoder_is_trained_and_asked_in_the_right_rows(directory, data, encoder):
    split = final_split(data)
    recipe = Recipe(encoder=encoder, epochs=12, module={"learning_rate": 0.04, "l2": 0.0})
    scores = quality_retrieval.fit_encoder(recipe, directory, split, 0, "32-true")
    assert quality_retrieval.accuracy(scores, split.test, repeats=False)["recall"] > 0.9
    again, other = scores(split.test.take(np.arange(3))), scores(split.test.take(np.arange(1, 4)))
    np.testing.assert_allclose(again[1:], other[:2], rtol=1e-5)


def test_validation_is_asked_of_what_train_alone_taught(monkeypatch, directory, data):
    learned = []

    class Remembering(Popularity):
        def fit(self, touched):
            learned.append(touched.sum())
            super().fit(touched)

    monkeypatch.setitem(quality_retrieval.BASELINES, "popularity", Remembering)
    results = quality_retrieval.compare(directory, ["popularity"], [0], part="validation")
    assert learned == [len(data.split.train)]
    assert len(data.split.train) + len(data.split.validation.targets) == NUM_USERS * 10
    assert results["num_users"] == len(data.split.validation)
    assert not results["published"]


def test_the_same_seed_gives_the_same_row(directory):
    def run(seed):
        (row,) = quality_retrieval.compare(directory, ["lightgcn"], [seed], epochs=1)["rows"]
        return row["runs"][0]["ndcg"]

    assert run(3) == run(3) != run(4)


def test_main_prints_the_table_and_writes_the_figures(directory, tmp_path, capsys, monkeypatch):
    class TooLarge(Popularity):
        def fit(self, touched):
            raise ValueError("a matrix too large")

    monkeypatch.setitem(quality_retrieval.BASELINES, "ease", TooLarge)
    file = tmp_path / "results.json"
    command = ["retrieval", "--data", str(directory), "--models", "popularity", "ease", "--json", str(file)]
    assert quality.main(command) == 0
    shown = capsys.readouterr().out
    assert "BSPM-EM" in shown
    assert "a matrix too large" in shown
    results = json.loads(file.read_text())
    assert [row["model"] for row in results["rows"]] == ["popularity", "ease"]
    assert results["versions"]["torch"] == importlib.metadata.version("torch")


def test_wrong_input(directory, capsys):
    assert quality.main(["retreival"]) == 2
    assert "'retreival' is not a table; did you mean retrieval?" in capsys.readouterr().err
    assert quality.main(["retrieval", "--data", str(directory), "--models", "svd"]) == 2
    assert "model is 'svd'; expected one of popularity," in capsys.readouterr().err
    assert quality.main(["retrieval", "--data", str(directory / "none")]) == 2
    assert "is not a data set directory" in capsys.readouterr().err
    assert quality.main([]) == 2
    assert quality.main(["--help"]) == 0


def test_the_published_rows_are_shares():
    for rows in quality_retrieval.PUBLISHED.values():
        assert len({name for name, *_ in rows}) == len(rows)
        assert all(0 < ndcg < recall < 0.3 for _, recall, ndcg, _ in rows)
