"""From a data set directory to a bundle and its metrics, through the public commands, on tiny data."""

import json
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import polars as pl
import pytest

from benchmarks import sources
from engine.bundle import Bundle, resolve_bundle
from engine.cli import main
from engine.history import EMPTY_HISTORY
from engine.pipeline import RecommendationPipeline, Visitor, query_vector
from training import train
from training.export import folded_in
from training.ranking_module import RankingModule

FAST = [
    "--retrieval.trainer.max_epochs=2",
    "--ranking.trainer.max_epochs=2",
    "--retrieval.model.encoder.dim=16",
    "--ranking.model.encoder.dim=16",
    "--retrieval.model.num_negatives=64",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated data set, a run and a bundle, in a folder whose name has a space."""
    root = tmp_path_factory.mktemp("a shop")
    size = ["--num_users", "200", "--num_items", "100", "--num_events", "4000"]
    assert main(["simulate", "--out", str(root / "data"), *size]) == 0
    assert _train(root) == 0
    return root


def _train(root: Path, *options: str) -> int:
    paths = ["--out", str(root / "bundles"), "--runs", str(root / "runs")]
    return main(["train", str(root / "data"), *paths, *FAST, *options])


def test_train_publishes_one_verified_bundle_and_leaves_logs(shop: Path) -> None:
    bundle = Bundle.load(resolve_bundle(shop / "bundles"))
    manifest = bundle.manifest
    assert manifest["data"]["simulated"] is True
    assert manifest["ranker"] == {"kind": "ordered", "history_length": 50}
    assert manifest["pipeline"]["sources"] == manifest["recipe"]["pipeline"]["sources"]
    events = pl.read_parquet(shop / "data" / "events.parquet")
    assert 0 < manifest["data"]["clock"] <= events["timestamp"].max()
    assert len(bundle.neighbours.columns) > 100
    assert 0 < bundle.recent_popularity.sum() < bundle.catalog.popularity.sum()  # of 30 days, and of all
    assert manifest["recipe"]["ranking"]["model"]["encoder"]["init_args"]["dim"] == 16
    assert set(manifest["metrics"]["validation"]) == {"retrieval", "ranking"}
    assert bundle.item_vectors.shape == (101, 16)
    (run,) = (shop / "runs").iterdir()
    assert list(run.glob("ranking/csv/*/metrics.csv"))
    assert list(run.glob("ranking/tensorboard/*/events.out.*"))


def test_an_index_of_another_kind(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--pipeline.num_candidates=15", "--pipeline.index.kind=hnsw", "--out", str(tmp_path)]
    assert _train(shop, *wanted, "--retrieval.trainer.max_epochs=1", "--ranking.trainer.max_epochs=1") == 0
    bundle = Bundle.load(resolve_bundle(tmp_path), num_threads=2)
    assert bundle.ranker_index is not None
    for name, index in (("item_index.faiss", bundle.index), ("ranker_index.faiss", bundle.ranker_index)):
        told = bundle.manifest["indexes"][name]
        assert (told["kind"], told["setting"]) == (index.kind, index.setting)
        assert index.kind == "hnsw"
        assert index.num_threads == 2
        assert told["k"] == 15
        assert told["recall"] >= 0.99
    answer = RecommendationPipeline(bundle).recommend(Visitor(bundle.users.get("17")), 5)
    assert len(answer.items) == 5
    assert not answer.trace.degraded_stages
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 0
    assert "indexes.item_index.faiss.kind" in (shown := capsys.readouterr().out)
    assert "efSearch" in shown
    with pytest.raises(SystemExit):
        _train(shop, "--pipeline.index.kind=annoy")
    assert _train(shop, "--pipeline.index.recall_target=2") == 2
    assert "recall_target is 2.0; expected more than 0, up to 1" in capsys.readouterr().err


def test_the_indexes_are_tuned_on_what_the_pipeline_asks(shop: Path) -> None:
    bundle = Bundle.load(resolve_bundle(shop / "bundles"))
    histories = [bundle.users.get(str(user)) for user in range(1, 9)]
    vectors = {"item_vectors": bundle.item_vectors, "item_degrees": bundle.item_degrees}
    asked = folded_in(vectors, [EMPTY_HISTORY, *histories], bundle.manifest["pipeline"], "unix")
    expected = [query_vector(bundle, Visitor(history)) for history in histories]
    np.testing.assert_array_equal(asked, [vector for vector in expected if vector is not None])


def test_evaluate_writes_every_metric_of_every_stage(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert main(["evaluate", str(shop / "bundles"), "--data", str(shop / "data"), "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["split"] == "leave-one-out"
    assert 0 < results["num_users"] <= 200
    names = {f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr", "hit") for k in (5, 10, 20, 1000)}
    for stage in ("retrieval", "ranking", "slate", "popularity"):
        assert names | {"coverage@10", "diversity@10", "novelty@10"} <= set(results[stage])
        assert all(np.isfinite(value) and value >= 0 for value in results[stage].values())
    # One target a user: recall is hit, and every list of a catalog of 100 holds it by place 1000.
    assert results["ranking"]["recall@10"] == pytest.approx(results["ranking"]["hit@10"])
    assert results["ranking"]["recall@1000"] == pytest.approx(1.0)


def test_evaluate_without_rules_and_with_other_candidates(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["evaluate", str(shop / "bundles"), "--data", str(shop / "data"), "--json", "-"]
    results = []
    for options in ([], ["--rules", "off"], ["--rules", "off", "--num_candidates", "1"]):
        capsys.readouterr()
        assert main([*ask, *options]) == 0
        results.append(json.loads(capsys.readouterr().out))
    with_rules, plain, narrow = results
    assert with_rules["rules"] == ["mmr", "cap", "cap", "drop_seen"]
    assert plain["rules"] == ["drop_seen"]
    # All 100 items are candidates and nothing moves them: the slate is the ranker's full ranking.
    assert plain["slate"]["ndcg@10"] == pytest.approx(plain["ranking"]["ndcg@10"])
    assert with_rules["slate"]["ndcg@10"] != pytest.approx(plain["slate"]["ndcg@10"])
    assert narrow["num_candidates"] == 1
    assert narrow["ranking"]["ndcg@10"] == plain["ranking"]["ndcg@10"]
    assert main([*ask, "--num_candidates", "0"]) == 2
    assert "num_candidates is 0; expected 1 to 10000" in capsys.readouterr().err


def test_the_benchmark_of_the_sources(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [str(shop / "bundles"), "--data", str(shop / "data"), "--part", "validation", "--max_users", "50"]
    assert sources.main([*ask, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["sequence", "embedding", "neighbours", "popular", "fresh", "all, merged"]
    assert list(result["sources"]) == names
    assert result["num_users"] == 50
    # The shop has 100 items, so whoever finds all of them has recall 1; merged has no item twice.
    for name in ("sequence", "embedding", "popular", "all, merged"):
        assert result["sources"][name]["recall@500"] == pytest.approx(1.0)
    assert result["sources"]["neighbours"]["recall@500"] > 0.5
    given = sum(row["mean_given"] for name, row in result["sources"].items() if name != "all, merged")
    assert given == pytest.approx(result["sources"]["all, merged"]["mean_given"])
    assert given < 100
    assert result["funnel"]["kept"] == pytest.approx(1.0)
    assert sources.main(ask) == 0
    assert "= 100.0% of" in capsys.readouterr().out


def test_full_ranking_of_evaluation_agrees_with_the_pipeline_without_rules(shop: Path) -> None:
    bundle = Bundle.load(resolve_bundle(shop / "bundles"))
    bundle.manifest["policy"][:] = [{"rule": "drop_seen"}]
    pipeline = RecommendationPipeline(bundle)
    history = bundle.users.get("17")
    slate = pipeline.recommend(Visitor(history), 10).items
    assert bundle.scorer is not None
    scores = bundle.scorer.score(np.asarray([without_seen(history.items)]), np.arange(101)[None])[0]
    scores[[0, *history.items]] = -np.inf
    assert slate.rows.tolist() == np.argsort(-scores, kind="stable")[:10].tolist()


def without_seen(items: np.ndarray) -> np.ndarray:
    return items[np.r_[True, items[1:] != items[:-1]]]


def test_a_visitor_with_nothing_gets_a_full_slate(shop: Path) -> None:
    pipeline = RecommendationPipeline(Bundle.load(resolve_bundle(shop / "bundles")))
    assert len(pipeline.recommend(Visitor(EMPTY_HISTORY), 10).items) == 10


def test_resume_goes_on_where_the_run_was_cut_short(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")

    def cut_short(module: L.LightningModule) -> None:
        if module.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RankingModule, "on_train_epoch_start", cut_short)
        assert _train(tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
    assert not list(tmp_path.glob("bundles/*"))

    assert _train(tmp_path, "--resume") == 0
    shown = capsys.readouterr().err
    assert "retrieval: already trained" in shown
    assert "ranking epoch 1" in shown
    assert "ranking epoch 0" not in shown
    # Both stages' validation metrics are on record, though one was trained before the cut.
    metrics = Bundle.load(resolve_bundle(tmp_path / "bundles")).manifest["metrics"]["validation"]
    assert set(metrics) == {"retrieval", "ranking"}
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_resume_without_anything_to_resume_says_so(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runs", str(tmp_path), "--out", str(tmp_path), "--resume"]
    assert main(["train", str(shop / "data"), *options]) == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_data_without_order_trains_and_serves_retrieval_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "source").mkdir()
    for name, size in (("train", 8), ("test", 3)):
        lines = [" ".join(map(str, [u, *rng.choice(60, size, replace=False)])) for u in range(40)]
        (tmp_path / "source" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    out = str(tmp_path / "data")
    assert main(["import", "lightgcn", str(tmp_path / "source"), "--out", out]) == 0
    assert _train(tmp_path) == 0
    assert "ranking: left out" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "bundles"), "--data", out, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["ranking"] is None
    assert results["split"] == "given"
    bundle = Bundle.load(resolve_bundle(tmp_path / "bundles"))
    assert bundle.manifest["ranker"]["kind"] == "none"
    pipeline = RecommendationPipeline(bundle)
    items, trace = pipeline.recommend(pipeline.resolve_visitor("5"), 10)
    assert len(items) == 10
    assert "retrieval.sequence" not in [timing.stage for timing in trace.timings]
    assert sources.main([str(tmp_path / "bundles"), "--data", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["sources"]) == ["embedding", "neighbours", "popular", "fresh", "all, merged"]
    assert result["funnel"]["full_ranking"] == "retrieval"
    assert result["funnel"]["kept"] == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_vectors(shop: Path, tmp_path: Path) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    assert _train(tmp_path) == 0
    first = Bundle.load(resolve_bundle(shop / "bundles"))
    second = Bundle.load(resolve_bundle(tmp_path / "bundles"))
    np.testing.assert_allclose(first.item_vectors, second.item_vectors, atol=1e-5)


def test_evaluate_refuses_other_data(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--num_users", "100", "--num_items", "60", "--num_events", "1500"]
    assert main(["simulate", "--out", str(tmp_path / "other"), *size]) == 0
    assert main(["evaluate", str(shop / "bundles"), "--data", str(tmp_path / "other")]) == 2
    assert "is not the data that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--retrieval.model.learning_rat=1", "retrieval.model.learning_rate"),
        ("--ranking.trainer.max_epoch=1", "ranking.trainer.max_epochs"),
        ("--ranking.model.encoder.dims=8", "dim"),
    ],
)
def test_unknown_options_name_the_nearest(
    shop: Path, option: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([str(shop / "data"), option])
    assert stop.value.code == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_unknown_keys_of_a_recipe_name_the_nearest(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("ranking:\n  model:\n    learning_rates: 0.1\n")
    with pytest.raises(SystemExit) as stop:
        train.main([str(shop / "data"), "--config", str(tmp_path / "recipe.yaml")])
    assert stop.value.code == 2
    assert "did you mean learning_rate?" in capsys.readouterr().err


def test_a_directory_that_is_no_data_set_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    assert "is not a data set directory" in capsys.readouterr().err


def test_unknown_commands_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recomend"]) == 2
    assert "did you mean recommend?" in capsys.readouterr().err


def test_a_wrong_policy_is_refused_before_training(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(shop, "--pipeline.policy", '[{"rule": "capp"}]') == 2
    shown = capsys.readouterr().err
    assert "cap" in shown
    assert "epoch" not in shown


def test_a_wrong_source_is_refused_before_training(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(shop, "--pipeline.sources", '[{"source": "neighbors", "quota": 1}]') == 2
    shown = capsys.readouterr().err
    assert "did you mean 'neighbours'?" in shown
    assert "epoch" not in shown


def test_evaluate_refuses_data_that_changed_since(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(info | {"repeats": True}))
    assert main(["evaluate", str(shop / "bundles"), "--data", str(tmp_path / "data")]) == 2
    assert "repeats is True, expected False" in capsys.readouterr().err
