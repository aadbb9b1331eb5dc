"""From a data set directory to a bundle and its metrics, through the public commands, on tiny data."""

import dataclasses
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from benchmarks import latency, quality, quality_reranking, reranking_latency, reranking_soundness, sources
from engine.bundle import Bundle, resolve_bundle
from engine.cli import main
from engine.history import EMPTY_HISTORY
from engine.pipeline import RecommendationPipeline, Visitor, query_vector
from engine.policies import item_facts
from engine.policy_files import PolicyFiles
from ranking.context import Encoded
from reranking.policy import single_policy
from reranking.rules import RULES
from retrieval.neighbours import item_neighbours
from retrieval.sources import PopularSource
from training import train
from training.data.dataset import Dataset
from training.data.splits import Holdout, SplitOptions, final_split, load_split
from training.evaluate import Questions, evaluate, load_questions, retrieval_scores, served_with
from training.export import folded_in, recent_popularity
from training.ranking_module import RankingModule
from training.retrieval_module import RetrievalModule
from training.score_weights import CONTEXT_STRENGTHS, GRAPH_WEIGHTS, TRANSITION_WEIGHTS

FAST = [
    "--retrieval.trainer.max_epochs=2",
    "--ranking.trainer.max_epochs=2",
    "--retrieval.model.encoder.dim=16",
    "--ranking.model.encoder.dim=16",
    "--retrieval.model.loss=SampledSoftmax",
    "--retrieval.model.loss.num_negatives=64",
    "--content.encoder=lsa",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated data set, a run and a bundle, in a folder whose name has a space."""
    root = tmp_path_factory.mktemp("a shop")
    size = ["--num_users", "200", "--num_items", "100", "--num_events", "4000"]
    assert main(["simulate", "--out", str(root / "data"), *size]) == 0
    # After so short a training nobody knows yet that the moment counts.
    with mock.patch("training.score_weights.CONTEXT_STRENGTHS", (1.0,)):
        assert _train(root) == 0
    return root


@pytest.fixture(scope="module")
def strict(shop: Path) -> Path:
    """A bundle of the strict protocol on the same shop."""
    assert main(["train", str(shop / "data"), *_paths(shop / "strict"), *FAST, "--no-refit"]) == 0
    return shop / "strict" / "bundles"


def _train(root: Path, *options: str) -> int:
    return main(["train", str(root / "data"), *_paths(root), *FAST, *options])


def _paths(root: Path) -> list[str]:
    return ["--out", str(root / "bundles"), "--runs", str(root / "runs")]


def test_train_publishes_one_verified_bundle_and_leaves_logs(shop: Path) -> None:
    bundle = Bundle.load(resolve_bundle(shop / "bundles"))
    manifest = bundle.manifest
    assert manifest["data"]["simulated"] is True
    assert manifest["ranker"] == {
        "kind": "ordered",
        "history_length": 50,
        "context": ["placement", "hour", "weekday"],
        "heads": [],
    }
    assert manifest["pipeline"]["sources"] == manifest["recipe"]["pipeline"]["sources"]
    events = pl.read_parquet(shop / "data" / "events.parquet")
    assert 0 < manifest["data"]["clock"] <= events["timestamp"].max()
    assert len(bundle.neighbours.columns) > 100
    assert 0 < bundle.recent_popularity.sum() < bundle.catalog.popularity.sum()  # of 30 days, and of all
    assert manifest["recipe"]["ranking"]["model"]["encoder"]["init_args"]["dim"] == 16
    found = manifest["metrics"]["validation"]
    assert set(found) == {"retrieval", "ranking", "scores"}
    assert found["scores"]["val_ndcg@10"] >= found["scores"]["val_ndcg@10 of the ranker alone"] > 0
    assert manifest["pipeline"]["graph_weight"] in GRAPH_WEIGHTS
    assert manifest["pipeline"]["transition_weight"] in TRANSITION_WEIGHTS
    assert len(bundle.transitions.after.columns) > 100
    assert bundle.item_vectors.shape == (101, 16)
    run = min((shop / "runs").iterdir())  # that of the fixture
    for stage in ("retrieval", "ranking", "refit/retrieval", "refit/ranking"):
        assert list(run.glob(f"{stage}/csv/*/metrics.csv"))
        assert list(run.glob(f"{stage}/tensorboard/*/events.out.*"))


def test_the_manifest_says_the_protocol_and_what_validation_chose(shop: Path, strict: Path) -> None:
    for bundles, protocol in ((shop / "bundles", "refit"), (strict, "strict")):
        manifest = Bundle.load(resolve_bundle(bundles)).manifest
        assert manifest["training"]["protocol"] == protocol
        assert manifest["recipe"]["refit"] is (protocol == "refit")
        assert set(manifest["training"]["epochs"]) == {"retrieval", "ranking"}
        assert all(epochs in (1, 2) for epochs in manifest["training"]["epochs"].values())
        assert 0 < manifest["metrics"]["validation"]["ranking"]["val_ndcg@10"] < 1
        assert 0 < manifest["metrics"]["validation"]["retrieval"]["val_ndcg@20"] < 1


def test_a_refitted_bundle_knows_train_and_validation_and_no_more(shop: Path, strict: Path) -> None:
    data = load_split(shop / "data", SplitOptions())
    final = final_split(data)
    for bundles, train_events in ((shop / "bundles", final.train), (strict, data.split.train)):
        bundle = Bundle.load(resolve_bundle(bundles))
        # By a plain loop, each user's items once.
        counts = np.zeros(len(bundle.item_degrees), np.int64)
        for user in range(1, train_events.num_users + 1):
            counts[np.unique(train_events.history(user).wanted)] += 1
        np.testing.assert_array_equal(bundle.item_degrees, counts)
        np.testing.assert_array_equal(bundle.catalog.popularity, counts)
        assert bundle.manifest["data"]["clock"] == train_events.timestamps.max()
        np.testing.assert_array_equal(bundle.recent_popularity, recent_popularity(train_events, 30))
        edges = train_events.edges
        near = item_neighbours(edges.users, edges.items, edges.num_users, edges.num_items, 200)
        np.testing.assert_array_equal(bundle.neighbours.columns, near.columns)
        np.testing.assert_allclose(bundle.neighbours.values, near.values)
        assert (bundle.item_vectors[counts > 0] != 0).any(axis=1).all()
    assert len(final.train) > len(data.split.train)


def test_no_fit_learns_from_what_the_test_asks_for(shop: Path, tmp_path: Path) -> None:
    """Other test items change nothing in what both stages learn; other validation items do, in a refit."""
    data = load_split(shop / "data", SplitOptions())
    events, rng = data.log.events, np.random.default_rng(1)
    parser = train.build_parser()
    config = parser.parse_args([str(shop / "data"), *FAST])

    def learned(folder: Path, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Fit both stages where all events but those kept have another item."""
        items = np.where(kept, events.items, rng.integers(1, 101, len(events))).astype(np.int32)
        log = dataclasses.replace(data.log, events=dataclasses.replace(events, items=items))
        split = final_split(dataclasses.replace(data, log=log))
        chosen = train.Chosen(1, 0.5)
        arguments = (lambda: parser.instantiate(config), 0, False, chosen)
        train.fit_retrieval(shop / "data", split, folder, *arguments)
        ranker, _ = train.fit_ranking(shop / "data", split, folder / train.EMBEDDINGS, folder, *arguments)
        return {name: value.numpy() for name, value in ranker.state_dict().items()}

    everything, without_validation = np.ones((2, len(events)), bool)
    without_validation[data.split.validation.ends] = False  # where its targets stand
    first = learned(tmp_path / "first", everything)
    second = learned(tmp_path / "second", data.split.before_test)
    third = learned(tmp_path / "third", without_validation)
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert any((value != third[name]).any() for name, value in first.items())


def test_an_index_of_another_kind(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [
        "--pipeline.num_candidates=15",
        "--pipeline.index.kind=hnsw",
        "--out",
        str(tmp_path),
        "--no-refit",
    ]
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


def test_where_an_evaluation_is_to_be_written_is_looked_at_before_it(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "none" / "results.json"
    ask = ["evaluate", str(shop / "bundles"), "--data", str(shop / "data")]
    assert main([*ask, "--json", str(file)]) == 2
    assert f"json is {file}; expected a file in a directory that is there" in capsys.readouterr().err


def test_evaluate_writes_every_metric_of_every_stage(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert main(["evaluate", str(shop / "bundles"), "--data", str(shop / "data"), "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["split"] == "leave-one-out"
    assert results["protocol"] == "refit"
    assert "slices" not in results
    assert 0 < results["num_users"] <= 200
    names = {f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr", "hit") for k in (5, 10, 20, 1000)}
    for stage in ("retrieval", "ranking", "slate", "popularity"):
        assert names | {"coverage@10", "diversity@10", "novelty@10"} <= set(results[stage])
        assert all(np.isfinite(value) and value >= 0 for value in results[stage].values())
    lists = {
        "gini",
        "serendipity",
        "margin",
        "freshness",
        "category_entropy",
        "brand_coverage",
        "seller_id_entropy",
    }
    for stage in ("retrieval", "ranking", "slate", "popularity"):
        assert {f"{name}@10" for name in lists} <= set(results[stage])
        assert 0 < results[stage]["margin@10"] < 1
    assert results["slate"]["category_entropy@10"] <= np.log2(10)
    # Everybody gets much the same from popularity: it shows the fewest items, and nothing unexpected.
    assert results["popularity"]["gini@10"] > results["ranking"]["gini@10"]
    assert results["popularity"]["serendipity@10"] < results["ranking"]["serendipity@10"]
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
    rules = ["in_stock", "available", "max_sum", "cap:seller_id@10", "cap:category@10", "drop_seen"]
    assert (with_rules["policy"], with_rules["rules"]) == ("standard", rules)
    assert plain["rules"] == ["drop_seen"]
    # All 100 items are candidates and nothing moves them: the slate is the ranker's full ranking.
    assert plain["slate"]["ndcg@10"] == pytest.approx(plain["ranking"]["ndcg@10"])
    assert with_rules["slate"]["ndcg@10"] != pytest.approx(plain["slate"]["ndcg@10"])
    assert narrow["num_candidates"] == 1
    assert narrow["ranking"]["ndcg@10"] == plain["ranking"]["ndcg@10"]
    assert main([*ask, "--num_candidates", "0"]) == 2
    assert "num_candidates is 0; expected 1 to 10000" in capsys.readouterr().err


def test_evaluate_with_other_policies(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policies.yaml").write_text(
        "default: plain\npolicies:\n  plain:\n    rules: [{rule: drop_seen}]\n"
        "  rich:\n    rules: [{rule: margin, of: share, relevance_per_unit: 100}, {rule: drop_seen}]\n"
    )
    ask = ["evaluate", str(shop / "bundles"), "--data", str(shop / "data"), "--max_users", "50"]
    margins = {}
    for policy in ("", "rich"):
        policies = ["--policies", str(tmp_path), "--policy", policy]
        assert main([*ask, *policies, "--json", "-"]) == 0
        results = json.loads(capsys.readouterr().out)
        assert results["policy"] == (policy or "plain")
        margins[policy] = results["slate"]["margin@10"]
    assert margins["rich"] > margins[""] + 0.05
    assert main([*ask, *policies]) == 0
    assert "slates by policy rich" in capsys.readouterr().out
    assert main([*ask, "--policy", "poor"]) == 2
    assert "policy is 'poor'; expected standard" in capsys.readouterr().err
    assert main([*ask, "--policy", "standard", "--rules", "off"]) == 2
    assert "rules is off" in capsys.readouterr().err


def test_the_example_of_all_rules_fits_the_simulated_shop(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[2] / "docs" / "policies.example.yaml"
    assert main(["policy", "check", str(example), "--bundle", str(shop / "bundles")]) == 0
    capsys.readouterr()
    bundle = Bundle.load(resolve_bundle(shop / "bundles"))
    pipeline = RecommendationPipeline(bundle, PolicyFiles(example).load())
    policies = pipeline.reranker.policies.by_name
    assert {rule.rule for policy in policies.values() for rule in policy.rules} == set(RULES)
    history = bundle.users.get("17")
    for name in policies:
        items, trace = pipeline.recommend(Visitor(history), 20, policy=pipeline.policy(name), explain=True)
        assert trace.degraded_stages == []
        assert len(items) == 20


def test_the_benchmarks_of_reranking(
    shop: Path,
    strict: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = tmp_path / "curve.png"
    assert quality.main(["reranking", "--bundle", str(shop / "bundles"), "--data", str(shop / "data")]) == 2
    assert "knows the answers" in capsys.readouterr().err
    ask = ["--bundle", str(strict), "--data", str(shop / "data"), "--max_users", "20"]
    assert quality.main(["reranking", *ask, "--json", "-", "--png", str(picture)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {"mmr", "dpp", "max_sum", "cap", "margin"} <= set(results["validation"])
    assert "default policy" in results["test"]
    assert results["margins_simulated"] is False
    assert picture.read_bytes().startswith(b"\x89PNG")

    for name in reranking_latency.ONE_THREAD:
        monkeypatch.setenv(name, "1")
    size = ["--requests", "3", "--rounds", "1", "--num_items", "1500"]
    assert latency.main(["reranking", *size, "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)["latency"]
    assert all(figures["p50_ms"] > 0 for figures in timed.values())

    assert reranking_soundness.main(["--bundle", str(shop / "bundles"), "--requests", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []


def test_a_refitted_bundle_is_not_asked_what_it_was_told(
    shop: Path, strict: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--data", str(shop / "data"), "--part", "validation", "--max_users", "20", "--json", "-"]
    assert main(["evaluate", str(shop / "bundles"), *ask]) == 2
    assert "was fitted again on validation and knows the answers" in capsys.readouterr().err
    assert main(["evaluate", str(strict), *ask]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == "strict"


def test_the_slices_add_up_and_change_nothing_else(
    shop: Path, strict: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(resolve_bundle(strict))
    whole = evaluate(bundle, shop / "data", stages=("popularity", "ranking"))
    results = evaluate(bundle, shop / "data", stages=("popularity", "ranking"), slices=True)
    slices, head = results.pop("slices"), results.pop("head_share")
    assert results == whole
    # One target a user: new, tail and head items part the users, and the mean over all is theirs.
    parts = [slices[name] for name in ("new items", "tail items", "head items")]
    assert sum(part["num_users"] for part in parts) == results["num_users"]
    for stage in ("popularity", "ranking"):
        total = sum(part["num_users"] * part[stage]["ndcg@10"] for part in parts if part[stage])
        assert total / results["num_users"] == pytest.approx(results[stage]["ndcg@10"])
        found = sum(part["num_users"] * part[stage]["recall@10"] for part in parts if part[stage])
        of_the_head = slices["head items"]["num_users"] * slices["head items"][stage]["recall@10"]
        assert head[stage] == pytest.approx(of_the_head / found)
    # Popularity finds nothing in the tail.
    assert slices["tail items"]["popularity"]["ndcg@10"] == 0
    assert head["popularity"] == 1 > head["ranking"]
    assert slices["new users"]["num_users"] == 0
    assert slices["new users"]["ranking"] is None
    command = ["evaluate", str(strict), "--data", str(shop / "data"), "--slices", "--max_users", "30"]
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "leave-one-out, strict, test, 30 users" in shown
    assert "tail items: targets among the least popular items that make 20%" in shown
    assert "popularity: head items are 100.0% of its recall@10" in shown
    assert "its accuracy comes from the head alone" in shown


def test_the_global_time_split_is_the_second_protocol(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    assert _train(tmp_path, "--split.name=global-time", "--ranking.trainer.max_epochs=1") == 0
    ask = ["evaluate", str(tmp_path / "bundles"), "--data", str(tmp_path / "data"), "--slices", "--json", "-"]
    capsys.readouterr()
    assert main(ask) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["split"], results["protocol"]) == ("global-time", "refit")
    bundle = Bundle.load(resolve_bundle(tmp_path / "bundles"))
    split, holdout = load_questions(bundle, tmp_path / "data", "test", None)
    # Everybody is asked at one moment, behind all that was learned from, and new users among them.
    test_start = min(holdout.events.timestamps[holdout.ends])
    assert split.train.timestamps.max() < test_start
    assert bundle.manifest["data"]["clock"] == split.train.timestamps.max()
    num_new = sum(len(history) == 0 for _, history, _ in holdout)
    assert results["slices"]["new users"]["num_users"] == num_new
    assert results["slices"]["short histories"]["num_users"] >= num_new
    num_targets = sum(
        results["slices"][name]["num_targets"] for name in ("new items", "tail items", "head items")
    )
    assert num_targets == len(holdout.targets) > results["num_users"]


def test_the_benchmark_of_the_sources(shop: Path, strict: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = [str(strict), "--data", str(shop / "data"), "--part", "validation", "--max_users", "50"]
    assert sources.main([*ask, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["sequence", "transitions", "embedding", "neighbours", "popular", "fresh", "all, merged"]
    assert list(result["sources"]) == names
    assert result["num_users"] == 50
    # The shop has 100 items, so whoever finds all of them has recall 1; merged has no item twice.
    for name in ("sequence", "embedding", "popular", "all, merged"):
        assert result["sources"][name]["recall@500"] == pytest.approx(1.0)
    assert result["sources"]["neighbours"]["recall@500"] > 0.5
    assert sources.main([*ask, "--quotas", '{"popular": 1}', "--json"]) == 0
    popular = json.loads(capsys.readouterr().out)["sources"]
    assert [popular[name]["quota"] for name in names[:-1]] == [
        float(name == "popular") for name in names[:-1]
    ]
    assert popular["popular"]["mean_given"] == popular["all, merged"]["mean_given"]
    assert sources.main([*ask, "--quotas", '{"unpopular": 1}']) == 2
    assert "unpopular; expected of sequence" in capsys.readouterr().err
    given = sum(row["mean_given"] for name, row in result["sources"].items() if name != "all, merged")
    assert given == pytest.approx(result["sources"]["all, merged"]["mean_given"])
    assert given < 100
    assert result["funnel"]["kept"] == pytest.approx(1.0)
    assert sources.main(ask) == 0
    assert "= 100.0% of" in capsys.readouterr().out


def with_transition_weight(bundle: Bundle, weight: float) -> Bundle:
    settings = bundle.manifest["pipeline"] | {"transition_weight": weight}
    return dataclasses.replace(bundle, manifest=bundle.manifest | {"pipeline": settings})


def test_full_ranking_of_evaluation_agrees_with_the_pipeline_without_rules(shop: Path) -> None:
    bundle = with_transition_weight(Bundle.load(resolve_bundle(shop / "bundles")), 0.0)
    pipeline = RecommendationPipeline(served_with(bundle, rules=False))
    history = bundle.users.get("17")
    slate = pipeline.recommend(Visitor(history), 10).items
    assert bundle.scorer is not None
    rows, weights = bundle.scorer.context.encode({}, bundle.manifest["data"]["clock"])
    asked = np.asarray([without_seen(history.items)]), np.arange(101)[None]
    scores = bundle.scorer.score(*asked, Encoded(rows[None], weights[None]))[0]
    scores[[0, *history.items]] = -np.inf
    assert slate.rows.tolist() == np.argsort(-scores, kind="stable")[:10].tolist()


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_evaluation_ranks_as_the_pipeline_does(shop: Path, weight: float) -> None:
    bundle = with_transition_weight(Bundle.load(resolve_bundle(shop / "bundles")), weight)
    found = evaluate(served_with(bundle, rules=False), shop / "data", stages=["ranking", "slate"])
    assert found["ranking"]["ndcg@10"] == pytest.approx(found["slate"]["ndcg@10"])
    other = dataclasses.replace(bundle, transitions=None)
    alone = evaluate(served_with(other, rules=False), shop / "data", stages=["ranking"])
    assert (alone["ranking"]["ndcg@10"] == found["ranking"]["ndcg@10"]) == (weight == 0)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_curve_of_reranking_starts_from_what_evaluation_ranks(shop: Path, weight: float) -> None:
    bundle = with_transition_weight(Bundle.load(resolve_bundle(shop / "bundles")), weight)
    found = evaluate(bundle, shop / "data", stages=["ranking"])
    split, questions = load_questions(bundle, shop / "data", "test", None)
    ranked = quality_reranking.rank_all(bundle, questions, split.repeats)
    facts = item_facts(bundle.catalog, bundle.item_vectors, bundle.content_vectors)
    plain = quality_reranking.measure(ranked, single_policy([], "no rules")[None], facts, "no rules")
    assert plain["ndcg@10"] == pytest.approx(found["ranking"]["ndcg@10"])


def test_without_a_history_retrieval_is_what_is_popular_of_late(shop: Path) -> None:
    bundle = Bundle.load(resolve_bundle(shop / "bundles"))
    # Another order than by all events, the ties of which the events of all times break.
    bundle = dataclasses.replace(bundle, recent_popularity=bundle.catalog.popularity[::-1] // 8)
    split, _ = load_questions(bundle, shop / "data", "test", None)
    events = split.train
    first = events.offsets[1:2]  # before the first event of user 1
    nobody = Holdout(events, np.array([1], np.int32), first, events.items[first], np.array([0, 1]))
    scores = retrieval_scores(bundle, Questions(nobody, np.array([0]), repeats=False))[0, 1:]
    source = PopularSource(bundle.recent_popularity, bundle.catalog.popularity)
    everything = RecommendationPipeline(bundle).query(Visitor(EMPTY_HISTORY))
    expected = source.find(everything, None, 100).rows
    assert (np.argsort(-scores, kind="stable") + 1).tolist() == expected.tolist()


def without_seen(items: np.ndarray) -> np.ndarray:
    return items[np.r_[True, items[1:] != items[:-1]]]


def test_the_moment_counts_and_unknown_values_do_not(shop: Path) -> None:
    # The ranker alone: it has seen two epochs, and the transitions have more to say.
    bundle = with_transition_weight(Bundle.load(resolve_bundle(shop / "bundles")), 0.0)
    pipeline = RecommendationPipeline(bundle)
    assert pipeline.context_keys == {"placement", "hour", "weekday"}
    assert bundle.manifest["training"]["context_strength"] == 1.0
    visitor = Visitor(pipeline.bundle.users.get("17"))

    def scores(now: int | None = None, **context: str) -> list[float]:
        candidates = np.arange(1, 101, dtype=np.int32)
        found = pipeline.rank(visitor, candidates, now=now, context=context).items
        return found.scores[np.argsort(found.rows)].tolist()

    clock = pipeline.bundle.manifest["data"]["clock"]
    at_home = scores(placement="home")
    assert scores() != at_home != scores(placement="search")
    assert scores(placement="attic") == scores(colour="red") == scores(clock)
    assert scores(clock + 3 * 3_600_000) != scores(clock)
    assert scores(clock, hour="4") != scores(clock)
    slates = [
        pipeline.recommend(visitor, 100, context={"placement": place}).items.rows.tolist()
        for place in ("home", "search")
    ]
    assert slates[0] != slates[1]


def test_heads_are_weighed_by_the_recipe_and_by_each_request(shop: Path, tmp_path: Path) -> None:
    heads = ["--ranking.model.heads=[click, purchase]", "--pipeline.head_weights={next: 1, purchase: 2}"]
    heads.append("--pipeline.ranker_precision=int8")
    assert _train(shop, *heads, "--no-refit", "--out", str(tmp_path)) == 0
    bundle = Bundle.load(resolve_bundle(tmp_path))
    assert bundle.manifest["ranker"]["heads"] == ["next", "click", "purchase"]
    pipeline = RecommendationPipeline(bundle)
    visitor = Visitor(bundle.users.get("17"))

    def scores(**weights: float) -> np.ndarray:
        found = pipeline.rank(visitor, np.arange(1, 101, dtype=np.int32), head_weights=weights).items
        return found.scores[np.argsort(found.rows)]

    by_head = np.stack([scores(**{name: 1.0}) for name in pipeline.heads])
    assert np.abs(by_head[0] - by_head[2]).max() > 1e-3
    np.testing.assert_allclose(scores(), (by_head[0] + 2 * by_head[2]) / 3, atol=1e-4)
    np.testing.assert_allclose(scores(click=0.5, purchase=3), by_head.T @ [0, 0.5, 3] / 3.5, atol=1e-4)
    found = evaluate(bundle, shop / "data", max_users=40, stages=("ranking", "slate"))
    plain = served_with(bundle, rules=False)
    slates = evaluate(plain, shop / "data", max_users=40, stages=("slate",))
    assert slates["slate"]["ndcg@10"] == pytest.approx(found["ranking"]["ndcg@10"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--pipeline.head_weights={purchase: 1}"],
            "names 'purchase'; expected none without ranking.model.heads",
        ),
        (
            ["--ranking.model.heads=[cart]", "--pipeline.head_weights={carts: 1}"],
            "head_weights names 'carts'; expected one of next, cart",
        ),
        (["--ranking.model.heads=[cart]", "--pipeline.head_weights={cart: -1}"], "head_weights.cart is -1"),
        (["--ranking.model.heads=[cart]", "--pipeline.head_weights={cart: 0}"], "head_weights are all 0"),
        (["--content.encoder=no/such/folder/model"], "content.encoder is 'no/such/folder/model'"),
        (
            ["--ranking.model.encoder.num_heads=3"],
            "ranking.model.encoder: num_heads is 3; expected a divisor",
        ),
        (["--ranking.model.encoder.dim=0"], "ranking.model.encoder: dim is 0; expected 1 or more"),
        (["--ranking.model.encoder.num_blocks=-1"], "ranking.model.encoder: num_blocks is -1; expected 0"),
        (
            ["--ranking.trainer.limit_val_batches=0"],
            "ranking.trainer.limit_val_batches is 0; expected above 0",
        ),
        (
            ["--retrieval.trainer.check_val_every_n_epoch=2"],
            "retrieval.trainer.check_val_every_n_epoch is 2; expected 1",
        ),
        (["--retrieval.model.encoder=ranking.encoders.hstu.HSTU"], "retrieval.model.encoder: it fails"),
        (["--ranking.trainer.max_epochs=0"], "ranking.trainer.max_epochs is 0; expected 1 or more"),
        (["--retrieval.patience=-3"], "retrieval.patience is -3; expected 1 or more"),
        (["--ranking.data.history_length=0"], "ranking.data.history_length is 0; expected 1 or more"),
        (["--ranking.data.batch_size=-5"], "ranking.data.batch_size is -5; expected 1 or more"),
        (["--retrieval.data.batch_size=0"], "retrieval.data.batch_size is 0; expected 1 or more"),
        (["--retrieval.data.max_validation_users=0"], "retrieval.data.max_validation_users is 0; expected 1"),
        (["--ranking.data.context=[regoin]"], "context names 'regoin'"),
        (["--ranking.model.dropout=1.5"], "ranking.model.dropout is 1.5; expected 0 or more and below 1"),
        (["--ranking.model.learning_rate=-1"], "ranking.model.learning_rate is -1; expected above 0"),
        (["--ranking.model.num_negatives=0"], "ranking.model.num_negatives is 0; expected 1 or more"),
        (["--retrieval.model.l2=-1"], "retrieval.model.l2 is -1; expected 0 or more"),
        (["--seed=-1"], "seed is -1; expected 0 or more"),
    ],
)
def test_what_is_wrong_is_refused_before_training(
    shop: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(shop, *options) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "train_loss" not in shown


@pytest.mark.parametrize("stage", ["retrieval", "ranking"])
def test_more_than_one_device_is_refused(shop: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    """Each of several processes would run the whole command."""
    assert train.build_parser().get_defaults()[f"{stage}.trainer.devices"] == 1
    for devices in ("2", "auto"):
        found = _train(
            shop,
            f"--{stage}.trainer.devices={devices}",
            f"--{stage}.trainer.accelerator=cpu",
            f"--{stage}.trainer.num_nodes={1 if devices == '2' else 3}",
        )
        assert found == 2
        message = capsys.readouterr().err
        assert f"{stage}.trainer.devices is '{devices}' on {1 if devices == '2' else 3} node(s)" in message
        assert f"python -m training.{stage} fit" in message


@pytest.mark.parametrize("stage", ["retrieval", "ranking"])
def test_a_falling_rate_needs_an_end(shop: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(shop, f"--{stage}.trainer.max_epochs=-1", "--no-refit") == 2
    shown = capsys.readouterr().err
    assert f"{stage}.trainer.max_epochs is -1; expected 1 or more" in shown
    assert "epoch 0" not in shown  # it is said before anything is trained


@pytest.mark.parametrize("stage", ["retrieval", "ranking"])
def test_epochs_are_validated_whole(shop: Path, stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    for interval in ("0.5", "1", "20"):
        assert _train(shop, f"--{stage}.trainer.val_check_interval={interval}") == 2
        shown = capsys.readouterr().err
        assert f"{stage}.trainer.val_check_interval is {interval}; expected null" in shown
        assert "epoch 0" not in shown


def test_what_stops_a_training_is_told_in_a_line(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for options, message in (
        (("--out", str(tmp_path / "file")), f"out is {tmp_path}/file, which is a file; expected a directory"),
        (("--runs", str(tmp_path / "file")), f"runs is {tmp_path}/file, which is a file"),
        (("--out", str(tmp_path / "file" / "bundles")), "Not a directory"),
        (("--retrieval.model.learning_rate=1e30",), "the retrieval has diverged: its vectors are not finite"),
        (("--ranking.model.learning_rate=1e30",), "expected a ranking.model.learning_rate below 1e+30"),
        (("--retrieval.trainer.enable_checkpointing=false",), "error: Trainer was configured with"),
    ):
        assert _train(shop, *_paths(tmp_path), *options) == 2
        assert message in capsys.readouterr().err


def test_a_resumed_fit_makes_what_it_would_have_made(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and negatives are drawn by the number of the epoch."""

    def weights(root: Path) -> dict[str, dict[str, torch.Tensor]]:
        (run,) = (root / "runs").iterdir()
        return {
            stage: torch.load(run / stage / "last.ckpt", weights_only=True)["state_dict"]
            for stage in ("retrieval", "ranking")
        }

    sampled = ("--no-refit", "--ranking.model.loss=sampled", "--ranking.model.dropout=0.3")
    epochs = ("--retrieval.trainer.max_epochs=3", "--ranking.trainer.max_epochs=3", *sampled)
    assert _train(shop, *_paths(tmp_path / "whole"), *epochs) == 0
    for cut in (RetrievalModule, RankingModule, None):
        with monkeypatch.context() as patched:
            if cut:
                begin = cut.on_train_epoch_start

                def cut_short(module: Any, begin: Any = begin) -> None:
                    begin(module)
                    if module.current_epoch == 2:
                        raise KeyboardInterrupt

                patched.setattr(cut, "on_train_epoch_start", cut_short)
            resume = ["--resume"] if cut is not RetrievalModule else []
            assert _train(shop, *_paths(tmp_path / "parts"), *epochs, *resume) == (130 if cut else 0)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for stage, expected in whole.items():
        for name, value in expected.items():
            assert torch.equal(parts[stage][name], value), f"{stage}: {name}"


def test_heads_of_events_that_training_lacks(shop: Path, tmp_path: Path, capsys: Any) -> None:
    assert _train(shop, "--ranking.model.heads=[wishlist]", "--runs", str(tmp_path)) == 2
    assert "heads names 'wishlist', of which training has no event; it has view" in capsys.readouterr().err


def test_a_visitor_with_nothing_gets_a_full_slate(shop: Path) -> None:
    pipeline = RecommendationPipeline(Bundle.load(resolve_bundle(shop / "bundles")))
    assert len(pipeline.recommend(Visitor(EMPTY_HISTORY), 10).items) == 10


def test_resume_goes_on_in_each_of_the_four_fits(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    fit_stage = train.fit_stage
    monkeypatch.setattr(  # both epochs, whatever validation says: the refit has one to be cut short in
        train,
        "fit_stage",
        lambda *args, **options: dataclasses.replace(fit_stage(*args, **options), epochs=2),
    )
    fold = "folds/2/retrieval"
    fits = ["retrieval", fold, "ranking", "refit/retrieval", f"refit/{fold}", "refit/ranking"]
    shown = []
    for number, fit in enumerate([*fits, None]):

        def cut_short(module: L.LightningModule, fit: str | None = fit) -> None:
            folder = module.trainer.checkpoint_callback.dirpath
            here = fit and folder.endswith(fit) and fit.startswith("refit") == ("/refit/" in folder)
            if here and module.current_epoch == 1:
                raise KeyboardInterrupt

        for module in (RetrievalModule, RankingModule):
            monkeypatch.setattr(module, "on_train_epoch_start", cut_short)
        assert _train(tmp_path, *(["--resume"] if number else [])) == (130 if fit else 0)
        shown.append(capsys.readouterr().err)
        assert bool(list(tmp_path.glob("bundles/*"))) == (fit is None)
        assert fit is None or "--resume" in shown[-1]
    lines = re.findall(r"^(\w+ (?:refit )?epoch \d)", "\n".join(shown), re.MULTILINE)
    folds = ["retrieval refit"] * 5
    names = ["retrieval", *folds, "ranking", "retrieval refit", *folds, "ranking refit"]
    assert lines == [f"{name} epoch {epoch}" for name in names for epoch in (0, 1)]
    assert "fit 4 of 4: ranking on train and validation, 2 epochs as chosen" in shown[-1]
    assert "retrieval: already trained in this run" in shown[-1]
    assert "ranking: already trained in this run" in shown[-1]
    # What was found before the cuts is on record.
    manifest = Bundle.load(resolve_bundle(tmp_path / "bundles")).manifest
    assert manifest["training"] == {
        "protocol": "refit",
        "epochs": {"retrieval": 2, "ranking": 2},
        "content": "lsa",
        "context_strength": mock.ANY,
    }
    assert manifest["training"]["context_strength"] in CONTEXT_STRENGTHS
    assert manifest["metrics"]["validation"]["retrieval"]["val_ndcg@20"] > 0
    assert manifest["metrics"]["validation"]["ranking"]["val_ndcg@10"] > 0
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_stage_one_is_cross_fitted_where_content_is_a_start_and_items_have_few_events(
    shop: Path, tmp_path: Path
) -> None:
    data = load_split(shop / "data", SplitOptions())
    parser = train.build_parser()

    def found(*options: str, content: Path | None = Path("content.safetensors")) -> int:
        config = parser.parse_args([str(shop / "data"), *options])
        return train.num_folds_of(parser.instantiate(config).ranking, data.split, content)

    assert len(data.split.train) < 50 * data.split.train.num_items
    assert found() == 5
    assert found(content=None) == 1
    assert found("--ranking.model.content_as=input") == 1
    assert found("--ranking.num_folds=3", content=None) == 3
    for wrong in (0, 100_000):
        with pytest.raises(ValueError, match=rf"ranking.num_folds is {wrong}; expected 1 to the number of"):
            found(f"--ranking.num_folds={wrong}")
    assert found("--ranking.model.fine_tune_graph=true") == 1
    with pytest.raises(ValueError, match=r"num_folds is 2; expected 1 with ranking.model.fine_tune_graph"):
        found("--ranking.model.fine_tune_graph=true", "--ranking.num_folds=2")
    once = dataclasses.replace(data.split.train, users=np.ones_like(data.split.train.users))
    alone = dataclasses.replace(data.split, train=once)
    assert train.num_folds_of(parser.instantiate(parser.parse_args(["x"])).ranking, alone, Path("c")) == 1
    # Of a run nothing is left of the fits but their vectors.
    run = min((shop / "runs").iterdir())  # that of the fixture
    for folder in (run, run / "refit"):
        vectors = load_file(folder / "folds.safetensors")["fold_vectors"]
        assert vectors.shape == (5, data.split.train.num_items + 1, 16)
        assert not (folder / "folds").exists()


def test_a_refit_repeats_epochs_and_not_steps(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(shop, "--ranking.trainer.max_steps=5") == 2
    shown = capsys.readouterr().err
    assert "ranking.trainer.max_steps is 5" in shown
    assert "epoch 0" not in shown


@pytest.mark.parametrize("protocol", ["--refit", "--no-refit"])
def test_a_finished_run_is_exported_anew_with_other_settings_of_serving(
    shop: Path, tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Early stopping ends both stages long before the last epoch: to go on would make another model.
    stopped = ["--retrieval.trainer.max_epochs=40", "--ranking.trainer.max_epochs=40"]
    stopped += ["--retrieval.patience=1", "--ranking.patience=1"]
    stopped += ["--ranking.model.learning_rate=0.02", "--ranking.data.batch_size=8", "--ranking.num_folds=1"]
    words = ["train", str(shop / "data"), *_paths(tmp_path), *FAST, *stopped, protocol]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.count("\nranking epoch") < 40
    first = Bundle.load(Path(said.out.strip()))
    chosen = first.manifest["pipeline"]["transition_weight"]
    few = ["--pipeline.num_candidates=50"]
    graph_weight = ["--pipeline.graph_weight=0.25"]
    for more, weight in (
        (few, chosen),
        ([*few, "--pipeline.num_neighbours=7"], None),
        ([*few, "--pipeline.transition_weight=0.3"], 0.3),
        ([*few, "--pipeline.transition_weight=0.3", *graph_weight], 0.3),
    ):
        assert main([*words, "--resume", *more]) == 0
        said = capsys.readouterr()
        assert "train_loss" not in said.err
        again = Bundle.load(Path(said.out.strip()))
        assert again.version != first.version
        assert again.manifest["pipeline"]["num_candidates"] == 50
        assert weight is None or again.manifest["pipeline"]["transition_weight"] == weight
        assert again.manifest["training"] == first.manifest["training"]
        np.testing.assert_array_equal(again.item_vectors, first.item_vectors)
        history = np.array([[1, 2, 3]])
        everything = np.arange(1, len(again.item_vectors))[None]
        scores = [one.scorer.score(history, everything)[0] for one in (first, again) if one.scorer]
        same_weight = again.manifest["pipeline"]["graph_weight"] == first.manifest["pipeline"]["graph_weight"]
        assert (np.abs(scores[0] - scores[1]).max() < 1e-4) == same_weight
    assert again.manifest["pipeline"]["graph_weight"] == 0.25
    assert main([*words, "--resume", *more]) == 2  # it has been published
    assert "anything left to do" in capsys.readouterr().err


def test_a_run_that_another_process_works_in_is_passed_over(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(shop / "data"), *_paths(tmp_path), *FAST, "--no-refit", "--resume"]
    dataset, parser = Dataset.open(shop / "data"), train.build_parser()
    recipe = train.recipe_of(parser, parser.parse_args(words[1:]))
    with train._run_directory(tmp_path / "runs", dataset, recipe, False) as run:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"{run}: another process works in it; passed over" in said
    assert main(words) == 0


def test_resume_without_anything_to_resume_says_so(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runs", str(tmp_path), "--out", str(tmp_path), "--resume"]
    assert main(["train", str(shop / "data"), *options]) == 2
    assert "has anything left to do" in capsys.readouterr().err


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


def test_the_same_seed_gives_the_same_vectors(shop: Path, strict: Path, tmp_path: Path) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    assert _train(tmp_path, "--no-refit") == 0
    first = Bundle.load(resolve_bundle(strict))
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


@pytest.mark.parametrize(
    ("stage", "name"),
    [("ranking", "hstu.HSTU"), ("retrieval", "ngcf.NGCF"), ("retrieval", "spectral.SpectralFilter")],
)
@pytest.mark.parametrize("by", ["option", "name", "recipe"])
def test_an_encoder_that_is_named_has_its_own_defaults(
    stage: str, name: str, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not those of the encoder that it replaces, which is what jsonargparse would give it."""
    path = f"{stage}.encoders.{name}"
    if by != "recipe":
        given = path if by == "option" else path.rpartition(".")[2]
        words = [f"--{stage}.model.encoder", given, f"--{stage}.model.encoder.dim=24"]
    else:
        settings = {"class_path": path, "init_args": {"dim": 24}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({stage: {"model": {"encoder": settings}}}))
        words = ["--config", str(tmp_path / "recipe.yaml")]
    with pytest.raises(SystemExit) as stop:
        train.main(["data", *words, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)[stage]["model"]["encoder"]
    module, _, class_name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), class_name)).parameters
    expected = {key: one.default for key, one in parameters.items() if one.default is not one.empty}
    expected.pop("dropout", None)  # the data's
    assert printed == {"class_path": path, "init_args": expected | {"dim": 24}}


def test_an_encoder_that_is_none_is_told_of_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("ranking.encoders.gru4rec.GRU", "STU", "ranking.encoders.sasrec.SASrec"):
        with pytest.raises(SystemExit):
            train.main(["data", "--ranking.model.encoder", given])
        shown = capsys.readouterr().err
        assert "one of ranking.encoders.hstu.HSTU, ranking.encoders.sasrec.SASRec by its name" in shown
        assert len(shown.splitlines()) < 8
    assert "did you mean ranking.encoders.sasrec.SASRec?" in shown


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
    for rule, message in (
        ('{"rule": "capp"}', "policy 'home': rules[0]: rule is 'capp'"),
        ('{"rule": "deny", "brand": "No Such"}', "deny: brand is 'No Such'; expected one of the catalog's"),
    ):
        policies = f'{{"policies": {{"home": {{"rules": [{rule}]}}}}}}'
        assert _train(shop, "--pipeline.policies", policies) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert "train_loss" not in shown


def test_a_wrong_source_is_refused_before_training(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(shop, "--pipeline.sources", '[{"source": "neighbors", "quota": 1}]') == 2
    shown = capsys.readouterr().err
    assert "did you mean 'neighbours'?" in shown
    assert "train_loss" not in shown


def test_evaluate_refuses_data_that_changed_since(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shop / "data", tmp_path / "data")
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(info | {"repeats": True}))
    assert main(["evaluate", str(shop / "bundles"), "--data", str(tmp_path / "data")]) == 2
    assert "repeats is True, expected False" in capsys.readouterr().err
