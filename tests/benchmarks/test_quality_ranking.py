"""The ranking table, its baselines and its peers, on data small enough to check by hand."""

import json
import sys
import textwrap
import types

import numpy as np
import pytest
from scipy.sparse import csr_array

from benchmarks import quality, quality_ranking
from benchmarks.baselines.markov import FirstOrderMarkov
from benchmarks.baselines.session_knn import SessionKNN
from benchmarks.full_ranking import history_matrix, question_metrics
from benchmarks.peers import implicit_als, rectools_sasrec
from benchmarks.peers.implicit_als import ImplicitALS
from benchmarks.quality_ranking import BASELINES, PeerOptions, baseline_row, compare
from engine.cli import main as trirank
from training.data.interactions import Interactions
from training.data.simulator import ShopConfig, write_dataset
from training.data.splits import Holdout, SplitOptions, final_split, load_split
from training.metrics import ndcg, places_by_score


def interactions(lines, num_items):
    users = np.concatenate([[user] * len(items) for user, items in enumerate(lines, start=1)]).astype(
        np.int32
    )
    items = np.concatenate(lines).astype(np.int32)
    kinds, times = np.zeros(len(items), np.uint8), np.arange(len(items))
    return Interactions(users, items, kinds, times, len(lines), num_items)


def asked(events, users):
    """Ask after whole histories; what comes is item 1."""
    users = np.array(users, np.int32)
    ones = np.ones(len(users), np.int32)
    return Holdout(events, users, events.offsets[users + 1], ones, np.arange(len(users) + 1))


def test_a_history_is_weighed_from_its_end():
    events = interactions([[3, 1, 3, 2], [2]], 3)
    found = history_matrix(asked(events, [1, 2]), half_life=1.0).toarray()
    # Ages 3, 2, 1, 0; item 3 counts by its newer event.
    np.testing.assert_allclose(found, [[0, 0.25, 1, 0.5], [0, 0, 1, 0]])
    np.testing.assert_array_equal(
        history_matrix(asked(events, [1, 2])).toarray(), [[0, 1, 1, 1], [0, 0, 1, 0]]
    )


def test_first_order_markov_by_hand():
    train = interactions([[1, 2, 2, 3], [1, 2, 1, 3], [4]], 5)
    # Steps: 1-2, 2-3, 1-2, 2-1, 1-3; events less the repeat: 1 three times, 2 twice, 3 twice, 4 once.
    model = FirstOrderMarkov(prior=2.0)
    model.fit(train)
    share = np.array([0, 3, 2, 2, 1, 0]) / 8
    scores = model.scores(asked(interactions([[3, 1], [2, 5], []], 5), [1, 2, 3]))
    np.testing.assert_allclose(scores[0], (np.array([0, 0, 2, 1, 0, 0]) + 2 * share) / 5, rtol=1e-6)
    np.testing.assert_allclose(scores[1], share, rtol=1e-6)  # nothing ever followed item 5
    np.testing.assert_allclose(scores[2], share, rtol=1e-6)
    assert scores.dtype == np.float32


@pytest.mark.parametrize("num_neighbours", [1, 2, 50])
def test_session_knn_is_the_plain_loop(num_neighbours):
    rng = np.random.default_rng(2)
    touched = (rng.random((16, 11)) < 0.35).astype(np.float32)
    touched[0] = touched[:, 0] = touched[5] = 0
    histories = (rng.random((4, 11)) * (rng.random((4, 11)) < 0.4)).astype(np.float32)
    histories[:, 0] = 0
    num_users = (touched.sum(1) > 0).sum()
    rarity = np.log(num_users / np.maximum(touched.sum(0), 1))
    expected = np.zeros_like(histories)
    for query, history in enumerate(histories):
        similar = {}
        for user, row in enumerate(touched):
            dot = (history * rarity * row * rarity).sum()
            if dot > 0:
                similar[user] = dot / np.linalg.norm(row * rarity)
        nearest = sorted(similar, key=lambda user: -similar[user])[:num_neighbours]
        for user in nearest:
            expected[query] += similar[user] * touched[user]
    model = SessionKNN(num_neighbours)
    model.fit(csr_array(touched))
    np.testing.assert_allclose(model.scores(csr_array(histories)), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A chain: each user walks the items in one order, from an item drawn at random."""
    root = tmp_path_factory.mktemp("chain")
    rng = np.random.default_rng(0)
    lines = []
    for user in range(60):
        start = rng.integers(30)
        lines += [f"{user} {(start + step) % 30}" for step in range(8)]
    (root / "chain.txt").write_text("\n".join(lines) + "\n")
    assert trirank(["import", "pairs", str(root / "chain.txt"), "--out", str(root / "chain")]) == 0
    return root / "chain"


def test_order_is_found_by_those_who_look_at_it(directory):
    results = compare(directory, ["strict", "refit"], list(BASELINES), [], [], PeerOptions())
    assert results["split"] == "leave-one-out"
    for rows in results["protocols"].values():
        found = {row["model"]: row["ndcg@10"] for row in rows}
        assert list(found) == list(BASELINES)
        assert found["markov"] > 0.9
        assert found["markov"] > found["session-knn"] > found["popularity"]
        assert found["item-knn-recent"] > found["item-knn"] > found["popularity"]


def test_a_protocol_learns_what_it_may(directory, monkeypatch):
    learned = []

    def fit(split):
        learned.append(len(split.train))
        return lambda questions: np.ones((len(questions), 31), np.float32)

    monkeypatch.setitem(BASELINES, "popularity", fit)
    results = compare(directory, ["strict", "refit"], ["popularity"], [], [], PeerOptions())
    assert learned == [60 * 6, 60 * 7]
    # All alike is chance: 10 of the 30 - 7 items that are left.
    assert results["protocols"]["strict"][0]["recall@10"] == pytest.approx(10 / 23)


def test_bundles_and_published_rows_stand_in_the_table_of_their_protocol(
    directory, tmp_path, monkeypatch, capsys
):
    tiny = ["--ranking.trainer.max_epochs=1", "--retrieval.trainer.max_epochs=1"]
    tiny += ["--ranking.model.encoder.dim=8", "--retrieval.model.encoder.dim=8", "--no-refit"]
    paths = ["--out", str(tmp_path / "bundles"), "--runs", str(tmp_path / "runs")]
    assert trirank(["train", str(directory), *paths, *tiny]) == 0
    published = {
        "strict": [("A", 0.2, 0.1, "x")],
        "refit": [("B", 0.4, 0.3, "y")],
        "unstated": [("C", 0.6, 0.5, "z")],
    }
    monkeypatch.setitem(quality_ranking.PUBLISHED, "chain", published)
    command = ["ranking", "--data", str(directory), "--bundles", str(tmp_path / "bundles")]
    file = tmp_path / "results.json"
    assert quality.main([*command, "--models", "popularity", "--json", str(file)]) == 0
    tables = json.loads(file.read_text())["protocols"]
    names = {protocol: [row["model"] for row in rows] for protocol, rows in tables.items()}
    ours = ["trirank, retrieval", "trirank, ranking", "trirank, slate"]
    assert names == {"strict": [*ours, "popularity", "A", "C"], "refit": ["popularity", "B", "C"]}
    shown = capsys.readouterr().out
    assert "chain: leave-one-out, strict, test, 60 users" in shown
    assert "chain: leave-one-out, refit, test, 60 users" in shown
    assert "published: z, protocol unstated" in shown
    assert quality.main([*command, "--models", "popularity", "--protocols", "refit"]) == 2
    assert "is of protocol strict; expected refit" in capsys.readouterr().err
    assert quality.main([*command, "--models", "popularity", "--split.seed", "1"]) == 2
    assert "was trained on split {" in capsys.readouterr().err


def test_a_split_by_time_has_baselines_too(tmp_path):
    """Everybody is asked at one moment: what is popular before it, and not what comes after, is known."""
    size = {"num_users": 200, "num_items": 60, "num_events": 3_000, "new_items": 0.0, "num_categories": 8}
    write_dataset(ShopConfig(**size), tmp_path / "data")
    by_time = SplitOptions(name="global-time")
    results = compare(tmp_path / "data", ["strict"], ["popularity"], [], [], PeerOptions(), by_time)
    assert results["split"] == "global-time"
    split = load_split(tmp_path / "data", by_time).split
    assert results["num_users"] == len(split.test)
    (row,) = results["protocols"]["strict"]
    scores = BASELINES["popularity"](split)
    found = question_metrics(scores, split.test, ["ndcg@10"], repeats=split.repeats)["ndcg@10"].mean()
    assert row["ndcg@10"] == pytest.approx(found)


def test_wrong_input(directory, tmp_path, capsys):
    command = ["ranking", "--data", str(directory)]
    assert quality.main([*command, "--models", "markof"]) == 2
    assert "model is 'markof'; expected one of popularity" in capsys.readouterr().err
    assert quality.main([*command, "--protocols", "loose"]) == 2
    assert "protocol is 'loose'; expected one of strict, refit" in capsys.readouterr().err
    assert quality.main([*command, "--fusion", str(tmp_path)]) == 2
    assert "settings.json is missing" in capsys.readouterr().err
    for make in (lambda: FirstOrderMarkov(0.0), lambda: SessionKNN(0)):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_the_published_rows_are_shares():
    for by_protocol in quality_ranking.PUBLISHED.values():
        for rows in by_protocol.values():
            assert len({name for name, *_ in rows}) == len(rows)
            assert all(0 < ndcg < recall < 0.4 for _, recall, ndcg, _ in rows)


# Peers: without them, what to install; with a stand-in for RecTools' Python, questions and answers.


def test_missing_peers_say_what_to_install(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(implicit_als.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install implicit"):
        ImplicitALS()
    peers = PeerOptions(python=tmp_path / "python")
    results = compare(directory, ["strict"], ["implicit-als", "rectools-sasrec"], [], [], peers)
    errors = [row["error"] for row in results["protocols"]["strict"]]
    assert "pip install implicit" in errors[0]
    assert 'install "rectools[torch]"' in errors[1]
    # A Python without RecTools is none.
    with pytest.raises(ValueError, match="RecTools is not there"):
        rectools_sasrec.check_python(sys.executable)


def test_rectools_is_asked_our_questions(directory, tmp_path, monkeypatch):
    """The stand-in answers with the successors of the last item: what a perfect model would find here."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        textwrap.dedent(
            """\
            import json, sys
            from pathlib import Path
            import numpy as np
            folder, settings, k = Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
            given = np.load(folder / "in.npz")
            assert len(given["train_items"]) == 60 * 7 and settings["epochs"] == 4
            order = {}
            for u in np.unique(given["train_users"]):
                line = given["train_items"][given["train_users"] == u].tolist()
                order.update(zip(line, line[1:]))
            users, items = [], []
            for u in np.unique(given["users"]):
                item = given["items"][given["users"] == u][-1]
                for _ in range(3):
                    item = order[item]
                    users.append(u)
                    items.append(item)
            np.savez(folder / "out.npz", users=np.array(users, np.int32), items=np.array(items, np.int32))
            facts = dict(epoch_s=[1.0], peak_memory_bytes=1, versions=dict(rectools="0"))
            (folder / "out.json").write_text(json.dumps(facts))
            """
        )
    )
    stand_in = tmp_path / "python"
    # A shebang line cannot name an interpreter whose path has a space.
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(rectools_sasrec, "check_python", lambda python: None)
    split = final_split(load_split(directory, SplitOptions()))
    row = baseline_row("rectools-sasrec", split, PeerOptions(python=stand_in, epochs=4))
    assert row["recall@10"] == pytest.approx(1.0)
    assert row["ndcg@10"] == pytest.approx(1.0)
    assert row["versions"] == {"rectools": "0"}


def test_implicit_is_told_the_confidence_of_a_touched_item(monkeypatch):
    """There an untouched item has a confidence of 1, and a touched one alpha times its entry."""
    told = {}
    stand_in = types.ModuleType("implicit.cpu.als")
    stand_in.AlternatingLeastSquares = lambda **options: told.update(options)
    for name in ("implicit", "implicit.cpu"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", stand_in)
    monkeypatch.setattr(implicit_als.importlib.util, "find_spec", lambda name: name)
    ImplicitALS(alpha=3.0)
    assert told["alpha"] == 4.0
    ImplicitALS()
    assert told["alpha"] == 2.0


@pytest.mark.skipif(not implicit_als.importlib.util.find_spec("implicit"), reason="implicit is not installed")
def test_implicit_als_finds_a_checkerboard():
    users, items = np.indices((40, 21))
    touched = ((users + items) % 2 == 0).astype(np.float32)
    touched[0] = touched[:, 0] = 0
    model = ImplicitALS(dim=4)
    model.fit(csr_array(touched))
    history = np.zeros((1, 21), np.float32)
    history[0, 4] = 1
    scores = model.scores(csr_array(history))[0]
    scores[[0, 4]] = -np.inf
    # All that its likes touched, in whatever order, stands before all that they did not.
    likes = np.array([2, *range(6, 21, 2)], np.int32)
    assert ndcg(places_by_score(scores, likes), 10) == pytest.approx(1.0)
