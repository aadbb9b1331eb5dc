"""`trirank train`: data set directory -> graph encoder -> ranker -> bundle. Forward only, and resumable."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engine.pipeline import check_settings
from ranking.ranker import HybridRanker
from retrieval.item_index import IndexOptions
from training.data.dataset import Dataset
from training.data.modules import RankingData, RetrievalData
from training.data.splits import SplitData, SplitOptions, load_split
from training.export import DEFAULT_POLICY, DEFAULT_SOURCES, export_bundle
from training.ranking_module import RankingModule
from training.retrieval_module import RETRIEVAL_EPOCHS, RetrievalModule
from training.stages import (
    MONITOR,
    StageParser,
    default_precision,
    fit_stage,
    keep_freed_memory,
    quiet_lightning,
)

DESCRIPTION = """\
Train both stages on a data set directory and publish a bundle.

Stage one fits LightGCN to the graph of training events; stage two fits a Transformer ranker to the histories,
on the vectors of stage one. Each stage keeps its best epoch on validation; neither learns from test events.
The bundle is verified (ONNX against torch, FAISS against brute force) before it appears in OUT.

  trirank train data/beauty --out bundles
  trirank train data/beauty --out bundles --ranking.model.encoder.dim 64 --ranking.trainer.max_epochs 20
  trirank train data/beauty --out bundles --print_config > recipe.yaml
  trirank train data/beauty --out bundles --config recipe.yaml
"""


@dataclass(kw_only=True)
class PipelineOptions:
    """How the bundle is served.

    Attributes:
        num_candidates: items that retrieval hands to the ranker.
        num_ranked: best of them that the rules see.
        default_limit: length of a slate where the request does not say.
        sources: where the candidates come from, in order, and the share of num_candidates that each gives:
            sequence, embedding, neighbours, popular, fresh. What one cannot fill the others do, in order.
        event_weights: how much an event of each type counts in a history, such as {purchase: 3, cart: 2}; 1
            where a type is missing.
        half_life_events: after how many further events one counts half; null lets the order play no part.
        half_life_days: the same in days, where the data has times.
        index: the kind of index to search with, and how much of the best it must find; there is one over the
            graph vectors and one over the ranker's. A k of null is num_candidates.
        num_neighbours: how many neighbours the bundle holds of each item.
        popular_window_days: popular is what is popular in the last days of the training data; null, and data
            without times, count all of it.
        policy: the rules, in order.
    """

    num_candidates: int = 1000
    num_ranked: int = 500
    default_limit: int = 10
    sources: list[dict[str, Any]] = field(default_factory=lambda: [dict(entry) for entry in DEFAULT_SOURCES])
    event_weights: dict[str, float] = field(default_factory=dict)
    half_life_events: float | None = 3.0
    half_life_days: float | None = None
    index: IndexOptions = field(default_factory=IndexOptions)
    num_neighbours: int = 200
    popular_window_days: float | None = 30.0
    policy: list[dict[str, Any]] = field(default_factory=lambda: [dict(rule) for rule in DEFAULT_POLICY])


def build_parser() -> LightningArgumentParser:
    """Return the parser of `trirank train`."""
    parser = StageParser(prog="trirank train", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "dataset", type=Path, help="Data set directory (`trirank import`, `trirank simulate`)."
    )
    parser.add_argument("--config", action="config", help="Recipe (YAML); options after it take precedence.")
    parser.add_argument("--out", type=Path, default=Path("bundles"), help="Directory of bundles.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Directory of checkpoints and logs.")
    parser.add_argument(
        "--resume",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Go on with the newest run of the same data set and settings that was cut short.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of everything random.")
    parser.add_class_arguments(SplitOptions, "split")
    for stage, module, data, patience in (
        # What a falling learning rate settles in the last epochs is worth having, and stage one's are short.
        ("retrieval", RetrievalModule, RetrievalData, RETRIEVAL_EPOCHS),
        ("ranking", RankingModule, RankingData, 4),
    ):
        parser.add_argument(
            f"--{stage}.patience",
            type=int,
            default=patience,
            help="Validations, 50 steps apart at least, without a better one until the end.",
        )
        parser.add_class_arguments(module, f"{stage}.model", skip={"embeddings"})
        parser.add_class_arguments(data, f"{stage}.data", skip={"directory", "split"}, instantiate=False)
        parser.add_lightning_class_args(L.Trainer, f"{stage}.trainer")
        parser.set_defaults(
            {
                f"{stage}.trainer.max_epochs": 60,
                f"{stage}.trainer.enable_model_summary": False,
                f"{stage}.trainer.num_sanity_val_steps": 0,
                f"{stage}.trainer.log_every_n_steps": 1000,
            }
        )
    parser.set_defaults(
        {
            "retrieval.trainer.max_epochs": RETRIEVAL_EPOCHS,
            "retrieval.trainer.precision": default_precision(),
            "ranking.trainer.precision": default_precision(),
        }
    )
    parser.add_class_arguments(PipelineOptions, "pipeline")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `trirank train`: the bundle's directory on stdout, progress on stderr."""
    parser = build_parser()
    config = parser.parse_args(argv)
    recipe = json.loads(parser.dump(config, format="json"))
    # What to run, not where: a run is resumed, and a bundle reproduced, by these alone.
    recipe = {
        key: value
        for key, value in recipe.items()
        if key not in ("config", "dataset", "out", "runs", "resume")
    }
    quiet_lightning()
    keep_freed_memory()
    try:
        bundle = train(
            config.dataset, config.out, config.runs, config.resume, recipe, parser.instantiate(config)
        )
    except KeyboardInterrupt:
        _say("interrupted; go on with the same command and --resume")
        return 130
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    print(bundle)
    return 0


def train(directory: Path, out: Path, runs: Path, resume: bool, recipe: dict[str, Any], options: Any) -> Path:
    """Train both stages and return the published bundle's directory.

    Args:
        directory: data set directory.
        out: directory of bundles.
        runs: directory of runs.
        resume: go on with the newest unfinished run of the same recipe and data.
        recipe: the settings as plain data.
        options: the settings as objects, as build_parser's parser instantiates them.
    """
    # What can be wrong is found before the training, not after it.
    check_settings(recipe["pipeline"], recipe["pipeline"]["policy"])
    dataset = Dataset.open(directory)
    data = load_split(directory, options.split)
    run = _run_directory(runs, dataset, recipe, resume)
    split = data.split
    _say(
        f"{data.info.name}{' (SIMULATED)' if data.info.simulated else ''}: "
        f"{len(split.train):,} training events, {split.train.num_users:,} users, "
        f"{split.train.num_items:,} items; split {split.name}, "
        f"{len(split.validation):,} validation and {len(split.test):,} test users; run {run}"
    )
    if not len(split.validation):
        raise ValueError(
            f"{directory} leaves nobody to validate on: split {split.name} needs users with events behind "
            "those that it trains on (leave-one-out: at least 3 different items)"
        )
    metrics: dict[str, Any] = {}

    embeddings = run / "embeddings.safetensors"
    if embeddings.is_file():
        _say("retrieval: already trained in this run")
    else:
        L.seed_everything(recipe["seed"], verbose=False)
        graph_data: RetrievalData = _with_split(
            RetrievalData(directory, **options.retrieval.data.as_dict()), data
        )
        graph_module = options.retrieval.model
        best = fit_stage(
            "retrieval", graph_module, graph_data, run / "retrieval", options.retrieval.trainer.as_dict(),
            patience=options.retrieval.patience, resume=resume,
        )  # fmt: skip
        # A rename, so that the file is whole or not there: it is what tells a resumed run to go on behind it.
        unfinished = run / ".embeddings.tmp"
        save_file(graph_module.vectors(), unfinished, metadata={MONITOR["retrieval"]: str(best)})
        unfinished.rename(embeddings)
    vectors = load_file(embeddings)
    with safe_open(embeddings, "numpy") as file:
        metrics["retrieval"] = {key: float(value) for key, value in file.metadata().items()}

    ranker: HybridRanker | None = None
    if split.ordered:
        L.seed_everything(recipe["seed"], verbose=False)
        ranking_data: RankingData = _with_split(
            RankingData(directory, **options.ranking.data.as_dict()), data
        )
        ranking_module = options.ranking.model
        ranking_module.embeddings = embeddings
        best = fit_stage(
            "ranking", ranking_module, ranking_data, run / "ranking", options.ranking.trainer.as_dict(),
            patience=options.ranking.patience, resume=resume,
        )  # fmt: skip
        metrics["ranking"] = {MONITOR["ranking"]: best}
        ranker = ranking_module.ranker
    else:
        _say(f"ranking: left out, split {split.name} leaves the events without an order to learn from")

    _say("export: writing and verifying the bundle")
    pipeline = recipe["pipeline"]
    bundle = export_bundle(
        out, dataset, data, vectors, ranker,
        pipeline={key: value for key, value in pipeline.items() if key != "policy"},
        policy=pipeline["policy"], recipe=recipe, metrics={"validation": metrics},
    )  # fmt: skip
    (run / "bundle.txt").write_text(f"{bundle}\n", encoding="utf-8")
    return bundle


def _with_split(data: Any, loaded: SplitData) -> Any:
    data.split = loaded.split  # read once for both stages
    return data


def _run_directory(runs: Path, dataset: Dataset, recipe: dict[str, Any], resume: bool) -> Path:
    """Return a new run directory, or the newest unfinished one of the same recipe and data."""
    record = {"fingerprint": dataset.info.fingerprint, "recipe": recipe}
    prefix = dataset.directory.resolve().name
    if resume:
        for run in sorted(runs.glob(f"{prefix}-*"), reverse=True):
            started = run / "run.json"
            if not started.is_file() or (run / "bundle.txt").is_file():
                continue
            if json.loads(started.read_text(encoding="utf-8")) == record:
                return run
        raise ValueError(
            f"--resume: {runs} has no unfinished run of {dataset.directory} with these settings; "
            "start without --resume"
        )
    run = runs / f"{prefix}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return run


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
