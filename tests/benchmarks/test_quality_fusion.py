"""The fusion table: its variants, what they learn from, its test over users, and how it goes on."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import stdtr

from benchmarks import full_ranking, quality, quality_fusion
from benchmarks.full_ranking import Vectors, question_metrics
from benchmarks.quality_fusion import VARIANTS, Answers, Experiment, late_fusion, paired_test, shuffled
from engine.cli import main as trirank
from engine.history import left_padded
from training import train
from training.answers import history_queries
from training.compression import compression
from training.data.splits import SplitOptions, load_split
from training.export import compressed_for
from training.score_weights import GRAPH_WEIGHTS, TRANSITION_WEIGHTS

TINY = [
    "ranking.trainer.max_epochs=1",
    "retrieval.trainer.max_epochs=1",
    "ranking.model.encoder.dim=8",
    "retrieval.model.encoder.dim=8",
    "retrieval.model.loss=SampledSoftmax",
    "retrieval.model.loss.num_negatives=32",
    "content.encoder=lsa",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("shop") / "data"
    size = ["--num_users", "60", "--num_items", "50", "--num_events", "700"]
    assert trirank(["simulate", "--out", str(out), *size]) == 0
    return out


@pytest.fixture(scope="module")
def strict(directory, tmp_path_factory):
    """The rows of two seeds, strict protocol."""
    out = tmp_path_factory.mktemp("fusion") / "strict"
    assert _run(directory, out, "--seeds", "0", "1") == 0
    return out


def _run(directory, out, *options):
    command = ["fusion", "--data", str(directory), "--out", str(out), "--options", *TINY, *options]
    return quality.main(command)


def test_every_variant_has_its_row(strict, capsys):
    results = quality_fusion.collect(strict)
    assert list(results["variants"]) == list(VARIANTS)
    assert [row["letter"] for row in results["variants"].values()] == list("abcdefghijkl")
    assert (results["protocol"], results["split"]) == ("strict", "leave-one-out")
    for name, row in results["variants"].items():
        assert row["seeds"] == [0, 1]
        figures = [run["ndcg@10"] for run in row["runs"]]
        assert row["ndcg@10"]["mean"] == pytest.approx(np.mean(figures))
        assert row["ndcg@10"]["std"] == pytest.approx(np.std(figures, ddof=1))
        assert 0 < row["ndcg@10"]["mean"] < row["recall@10"]["mean"] < 1
        assert (row["test"] is None) == (name == "sequence")
        if name != "sequence":
            assert 0 <= row["test"]["p"] <= 1
            other = results["variants"][VARIANTS[name].against]
            assert row["against"] == other["letter"] == {"f": "i", "j": "k"}.get(row["letter"], "a")
            assert row["test"]["difference"] == pytest.approx(
                row["ndcg@10"]["mean"] - other["ndcg@10"]["mean"]
            )
    assert all(0 <= run["graph_weight"] <= 1 for run in results["variants"]["late-fusion"]["runs"])
    for name, its in VARIANTS.items():
        if name in ("graph", "late-fusion"):
            continue
        may_graph = its.graph_scores and VARIANTS[its.upon or name].graph != "none"
        for run in results["variants"][name]["runs"]:
            assert run["graph_weight"] in (GRAPH_WEIGHTS if may_graph else [0])
            assert run["transition_weight"] in (TRANSITION_WEIGHTS if its.transitions else [0])
    assert not list(strict.rglob("*.ckpt"))
    # The control stands on other vectors, or it would keep the gain that it is to lose.
    answers = [np.load(strict / f"{name}-seed0.npz")["ndcg@10"] for name in ("cross-attention", "shuffled")]
    assert not np.array_equal(*answers)


def test_a_row_is_what_its_ranker_finds(directory, strict):
    """The figures of (d), from scratch: from the recipe to the ranks, by other code."""
    data = load_split(directory, SplitOptions())
    parser = train.build_parser()
    config = parser.parse_args([str(directory), *(f"--{option}" for option in TINY)])
    embeddings = strict / "runs" / "stage-one-seed1" / train.EMBEDDINGS
    ranker, _ = train.fit_ranking(
        directory,
        data.split,
        embeddings,
        strict.parent / "again",
        lambda: parser.instantiate(config),
        1,
        False,
    )
    row = json.loads((strict / "cross-attention-seed1.json").read_text())
    ranker.add_graph_scores(torch.from_numpy(load_file(embeddings)["item_vectors"]), row["graph_weight"], 3)
    known = compressed_for(data.split.train)
    queries, items = history_queries(ranker, known), ranker.item_parts()[1:].detach().numpy()
    if row["graph_weight"]:
        ranker.compress(*map(torch.from_numpy, compression(queries, items, 8)))
    found = []
    test = data.split.test
    for end, (_, history, target) in zip(test.ends, test, strict=True):
        rows = torch.from_numpy(left_padded([history.items], ranker.history_length))
        moment = ranker.context.encode(test.events.context_at(end), int(test.events.timestamps[end]))
        with torch.no_grad():
            context = [torch.from_numpy(part)[None] for part in moment]
            scores, _ = ranker(rows, torch.arange(51)[None], *context)
        scores[0, [0, *history.items]] = -torch.inf
        place = int((scores[0] > scores[0, target[0]]).sum())
        found.append(1 / np.log2(place + 2) if place < 10 else 0.0)
    per_user = np.load(strict / "cross-attention-seed1.npz")
    np.testing.assert_array_equal(per_user["users"], data.split.test.users)
    np.testing.assert_allclose(per_user["ndcg@10"], found, atol=1e-6)


def test_a_second_start_skips_what_is_done_and_prints_the_table(directory, strict, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in strict.glob("*.*")}
    for name in ("fit_ranking", "fit_retrieval", "question_metrics"):
        monkeypatch.setattr(quality_fusion, name, None)
    assert _run(directory, strict, "--seeds", "0", "1") == 0
    shown = capsys.readouterr()
    assert shown.err.count("done before") == 2 * len(VARIANTS)
    assert "leave-one-out, strict, test" in shown.out
    assert "(d)" in shown.out
    assert {file: file.read_bytes() for file in strict.glob("*.*")} == before


def test_rows_of_other_settings_are_not_mixed(directory, strict, capsys):
    assert _run(directory, strict, "--seeds", "0", "--protocol", "refit") == 2
    assert 'holds rows of other settings: protocol is "refit", there "strict"' in capsys.readouterr().err
    assert _run(directory, strict, "--max_epochs", "2") == 2
    assert "holds rows of other settings: recipe." in capsys.readouterr().err


def test_a_refit_goes_on_where_it_was_interrupted(directory, tmp_path, monkeypatch, capsys):
    """What validation chooses comes from the fit on train; the answers come from the refit."""
    options = ["--seeds", "0", "--protocol", "refit", "--variants", "sequence", "late-fusion"]
    fits = []
    fit_ranking = quality_fusion.fit_ranking

    def interrupted_in_the_refit(directory, split, embeddings, folder, *args, **kwargs):
        fits.append(len(split.train))
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit_ranking(directory, split, embeddings, folder, *args, **kwargs)

    monkeypatch.setattr(quality_fusion, "fit_ranking", interrupted_in_the_refit)
    assert _run(directory, tmp_path, *options) == 130
    assert "go on with the same command" in capsys.readouterr().err
    assert _run(directory, tmp_path, *options) == 0
    data = load_split(directory, SplitOptions())
    both = len(data.split.train) + len(data.split.validation)
    assert fits[0] == len(data.split.train)
    assert fits[1:] == [fits[1]] * 2
    assert fits[1] >= both
    row = json.loads((tmp_path / "late-fusion-seed0.json").read_text())
    assert row["protocol"] == "refit"
    folder = tmp_path / "runs" / "sequence-seed0"
    validation, test = (load_file(folder / f"{part}.safetensors") for part in ("validation", "test"))
    assert np.abs(validation["items"] - test["items"]).max() > 1e-3
    assert (tmp_path / "runs" / "stage-one-seed0" / "refit" / train.EMBEDDINGS).is_file()


@pytest.mark.parametrize("interrupted_at", [1, 2])
def test_a_strict_row_goes_on_where_its_answers_were_being_saved(
    directory, tmp_path, monkeypatch, interrupted_at
):
    options = ["--seeds", "0", "--variants", "sequence"]
    saved, save = [], Answers.save

    def interrupted(answers, file):
        saved.append(file)
        if len(saved) == interrupted_at:
            raise KeyboardInterrupt
        save(answers, file)

    monkeypatch.setattr(Answers, "save", interrupted)
    assert _run(directory, tmp_path, *options) == 130
    assert _run(directory, tmp_path, *options) == 0
    assert (tmp_path / "sequence-seed0.json").is_file()


def test_the_number_of_neighbours_is_a_setting_of_the_rows(directory, tmp_path):
    Experiment(directory, tmp_path, "strict", TINY)
    file = tmp_path / "settings.json"
    settings = json.loads(file.read_text())
    assert settings.pop("num_neighbours") == 200
    other = [*TINY, "pipeline.num_neighbours=50"]
    with pytest.raises(ValueError, match=r"holds rows of other settings: num_neighbours is 50, there 200"):
        Experiment(directory, tmp_path, "strict", other)
    # A directory that does not say it is of other code.
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds rows of other settings: num_neighbours is 200, there null"):
        Experiment(directory, tmp_path, "strict", TINY)


def test_shuffled_vectors_are_the_same_ones_elsewhere(tmp_path):
    rng = np.random.default_rng(0)
    vectors = {
        "item_vectors": rng.standard_normal((41, 3)).astype(np.float32),
        "item_degrees": np.arange(41, dtype=np.float32),
        "user_vectors": np.zeros((5, 3), np.float32),
    }
    save_file(vectors, tmp_path / "embeddings.safetensors")
    first = load_file(shuffled(tmp_path / "embeddings.safetensors", 3))
    order = first["item_degrees"].astype(int)
    assert order[0] == 0
    assert sorted(order) == list(range(41))
    assert (order[1:] != np.arange(1, 41)).sum() > 30
    np.testing.assert_array_equal(first["item_vectors"], vectors["item_vectors"][order])


def test_late_fusion_by_hand(directory):
    questions = load_split(directory, SplitOptions()).split.test.take(np.array([0]))
    user = int(questions.users[0])

    def scoring(values):
        users = np.zeros((61, 1), np.float32)
        users[user] = 1
        return Vectors(users, np.array([[0.0], *([value] for value in values)], np.float32))

    sequence, graph = scoring([1.0, 3.0]), scoring([40.0, 20.0])  # standardised: -1, 1 and 1, -1
    np.testing.assert_allclose(late_fusion(sequence, graph, 0.25)(questions)[0, 1:], [-0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(late_fusion(sequence, graph, 1.0)(questions)[0, 1:], [1, -1], atol=1e-6)
    # A model that scores all alike has no say.
    flat = late_fusion(sequence, scoring([7.0, 7.0]), 0.5)(questions)[0, 1:]
    np.testing.assert_allclose(flat, [-0.5, 0.5], atol=1e-6)


def test_the_weight_of_late_fusion_is_the_best_on_validation(directory, tmp_path, monkeypatch):
    experiment = Experiment(directory, tmp_path, "strict", TINY)
    split = experiment.data.split
    right, wrong = np.zeros((2, 61, 61), np.float32)
    for user, _, target in split.validation:
        right[user, target], wrong[user, target] = 1, -1
    everything = np.eye(51, 61, dtype=np.float32)
    answers, graph = Answers(Vectors(wrong, everything)), Vectors(right, everything)
    monkeypatch.setattr(Experiment, "answers", lambda self, variant, seed, part: answers)
    monkeypatch.setattr(Experiment, "graph", lambda self, seed, part: graph)
    # Equal parts cancel out: all weights beyond that put the target first, and the first of them is taken.
    assert experiment._late_weight(0) == 0.6


def test_the_paired_test_by_its_formula():
    rng = np.random.default_rng(0)
    ours, reference = rng.random((2, 3, 30))
    rows = [
        {seed: {"per_user": {"ndcg@10": values[seed]}} for seed in range(3)} for values in (ours, reference)
    ]
    del rows[0][2]  # a seed that one of them lacks plays no part
    found = paired_test(*rows)
    difference = (ours[:2] - reference[:2]).mean(axis=0)
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(30))
    assert found["seeds"] == [0, 1]
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["p"] == pytest.approx(2 * stdtr(29, -abs(t)))
    assert paired_test(rows[0], rows[0])["p"] == 1.0
    assert paired_test(rows[0], {}) is None


def test_content_is_made_once_and_given_to_its_variant_alone(strict, directory):
    """The ranker of (f) is another than that of (d), though seeds and graph vectors are the same."""
    assert load_file(strict / "runs" / "content.safetensors")["content_vectors"].shape[0] == 51
    rows = {name: np.load(strict / f"{name}-seed0.npz")["ndcg@10"] for name in ("content", "cross-attention")}
    assert (rows["content"] != rows["cross-attention"]).any()


def test_what_needs_content_is_left_out_where_there_is_none(directory, tmp_path, capsys):
    options = ["--seeds", "0", "--variants", "graph", "content", "content-transitions", "attention"]
    assert _run(directory, tmp_path, *options, "--options", *TINY, "content.encoder=none") == 0
    out, err = capsys.readouterr()
    assert "content.encoder is none: content, content-transitions\n" in err
    assert "attention" in out
    assert "content" not in out


def test_wrong_input(directory, tmp_path, capsys):
    assert _run(directory, tmp_path / "a", "--variants", "sequnce") == 2
    assert "variant is 'sequnce'; expected some of sequence" in capsys.readouterr().err
    assert _run(directory / "none", tmp_path / "b") == 2
    assert "is not a data set directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"settings\.json is missing"):
        quality_fusion.collect(tmp_path)


@pytest.mark.parametrize("questions_at_once", [1, 7, 1000])
def test_metrics_of_each_question_however_many_at_once(monkeypatch, directory, questions_at_once):
    monkeypatch.setattr(full_ranking, "SCORES_AT_ONCE", questions_at_once * 51)
    split = load_split(directory, SplitOptions()).split
    table = np.random.default_rng(1).standard_normal((61, 51)).astype(np.float32)
    found = question_metrics(lambda q: table[q.users], split.test, ["recall@10"], repeats=False)["recall@10"]
    for value, (user, history, target) in zip(found, split.test, strict=True):
        rivals = np.setdiff1d(np.arange(1, 51), history.items)
        assert value == float((table[user, rivals] > table[user, target[0]]).sum() < 10)
