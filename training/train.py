"""`trirank train`: data set directory -> graph encoder -> ranker -> bundle. Forward only, and resumable."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jsonargparse import ActionYesNo
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engine.catalog import Catalog
from engine.pipeline import check_settings
from engine.policies import check_policies
from ranking.ranker import NEXT, HybridRanker
from retrieval.item_index import IndexOptions
from training.answers import queries_of_all_heads, question_queries
from training.content import ContentOptions, encoder_name, write_content
from training.cross_fit import fold_vectors, without_fold
from training.data.context import context_table
from training.data.dataset import Dataset
from training.data.modules import RankingData, RetrievalData
from training.data.sequences import targets_per_item
from training.data.splits import Split, SplitData, SplitOptions, final_split, load_split
from training.encoder_checks import check_graph_encoder, check_sequence_encoder
from training.export import DEFAULT_POLICIES, DEFAULT_SOURCES, compressed_for, export_bundle
from training.quantization import Precision
from training.ranking_module import RANKING_EPOCHS, RankingModule, check_heads
from training.retrieval_module import RETRIEVAL_EPOCHS, RetrievalModule
from training.score_weights import (
    GRAPH_WEIGHTS,
    METRIC,
    TRANSITION_WEIGHTS,
    ScoreWeights,
    best_weights,
    choose_context_strength,
    questions_of,
)
from training.stages import (
    MONITOR,
    Chosen,
    StageParser,
    check_numbers,
    check_vectors,
    default_precision,
    fit_stage,
    keep_freed_memory,
    quiet_lightning,
    refit_stage,
)

EMBEDDINGS, CONTENT, CHOSEN = "embeddings.safetensors", "content.safetensors", "chosen.json"
FOLDS, SCORE_WEIGHTS = "folds.safetensors", "score_weights.json"
NUM_FOLDS = 5  # of users, by default, where items have fewer events than
FOLDED_BELOW = 50
# What of the pipeline's settings decides which weights of scores are best.
WEIGHED_WITH = (
    "graph_weight",
    "transition_weight",
    "score_temperature",
    "num_neighbours",
    "half_life_events",
)

DESCRIPTION = """\
Train both stages on a data set directory and publish a bundle.

Stage one fits LightGCN to the graph of training events; stage two fits a Transformer ranker to the histories,
on the vectors of stage one and what the catalog says of the items. Validation chooses the epochs of each;
then both are fitted again, for as many epochs, on train and validation together. --no-refit leaves that out.
No fit learns from test events.
The bundle is verified (ONNX against torch, FAISS against brute force) before it appears in OUT.

  trirank train data/beauty --out bundles
  trirank train data/beauty --out bundles --ranking.model.encoder.dim 64 --ranking.trainer.max_epochs 20
  trirank train data/beauty --out bundles --no-refit
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
            sequence, transitions, embedding, neighbours, popular, fresh. What one cannot fill the others do,
            in order.
        event_weights: how much an event of each type counts in a history, such as {purchase: 3, cart: 2}; 1
            where a type is missing.
        half_life_events: after how many further events one counts half; null lets the order play no part.
        half_life_days: the same in days, where the data has times.
        index: the kind of index to search with, and how much of the best it must find; there is one over the
            graph vectors and one over the ranker's. A k of null is what its source is asked for.
        head_weights: how much each head of the ranker counts where a request does not say, such as {next: 1,
            purchase: 3}; of ranking.model.heads and "next". Empty: the next item alone.
        ranker_precision: float32; float16, whose tables of item vectors take half the memory; or int8, with
            a quarter of it (python -m benchmarks.scoring says what each costs in time and quality).
        num_neighbours: how many neighbours the bundle holds of each item, and how many items that came next.
        graph_weight: how much the graph's own scores count beside the ranker's; 0 where they do not. null:
            what is best on validation, together with transition_weight.
        transition_weight: how much it counts in the ranker's scores that an item has often come next; 0
            where it does not. null: what is best on validation.
        score_temperature: what the ranker's scores, with what adds to them, are divided by, for their softmax
            to be chances, which max_sum trades against variety; orders nothing anew. null: what makes
            validation likeliest.
        popular_window_days: popular is what is popular in the last days of the training data; null, and data
            without times, count all of it.
        policies: what a file of policies holds (docs/policies.md): policies by name, and the default one.
    """

    num_candidates: int = 1000
    num_ranked: int = 500
    default_limit: int = 10
    sources: list[dict[str, Any]] = field(default_factory=lambda: [dict(entry) for entry in DEFAULT_SOURCES])
    event_weights: dict[str, float] = field(default_factory=dict)
    half_life_events: float | None = 3.0
    half_life_days: float | None = None
    index: IndexOptions = field(default_factory=IndexOptions)
    head_weights: dict[str, float] = field(default_factory=dict)
    ranker_precision: Precision = "float32"
    num_neighbours: int = 200
    graph_weight: float | None = None
    transition_weight: float | None = None
    score_temperature: float | None = None
    popular_window_days: float | None = 30.0
    policies: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(DEFAULT_POLICIES))


def build_parser() -> LightningArgumentParser:
    """Return the parser of `trirank train`."""
    usage = "trirank train [options] dataset"
    parser = StageParser(prog="trirank train", usage=usage, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "dataset", type=Path, help="Data set directory (`trirank import`, `trirank simulate`)."
    )
    parser.add_argument("--out", type=Path, default=Path("bundles"), help="Directory of bundles.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Directory of checkpoints and logs.")
    parser.add_argument(
        "--resume",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Go on with the newest run of the same data set and settings that was cut short. Where only "
        "pipeline.* differs from a finished run, what it has trained is exported anew.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of everything random.")
    parser.add_argument(
        "--refit",
        action=ActionYesNo(no_prefix="no-"),
        default=True,
        help="Fit both stages again on train and validation, for the epochs that validation chose. "
        "--no-refit: the strict protocol, where the model never learns from what validation asks for.",
    )
    parser.add_class_arguments(SplitOptions, "split")
    parser.add_class_arguments(ContentOptions, "content")
    for stage, module, data, epochs in (
        ("retrieval", RetrievalModule, RetrievalData, RETRIEVAL_EPOCHS),
        ("ranking", RankingModule, RankingData, RANKING_EPOCHS),
    ):
        parser.add_argument(
            f"--{stage}.patience",
            type=int,
            default=epochs,  # what a falling rate settles in the last epochs is worth having
            help="Validations, 50 steps apart at least, without a better one until the end.",
        )
        parser.add_class_arguments(module, f"{stage}.model", skip={"embeddings", "content", "folds"})
        skipped = {"directory", "split", "num_folds"}
        parser.add_class_arguments(data, f"{stage}.data", skip=skipped, instantiate=False)
        parser.add_lightning_class_args(L.Trainer, f"{stage}.trainer")
        parser.set_defaults(
            {
                f"{stage}.trainer.devices": 1,  # see check_one_process
                f"{stage}.trainer.max_epochs": epochs,
                f"{stage}.trainer.enable_model_summary": False,
                f"{stage}.trainer.num_sanity_val_steps": 0,
                f"{stage}.trainer.log_every_n_steps": 1000,
            }
        )
    parser.add_argument(
        "--ranking.num_folds",
        type=int | None,
        default=None,
        help="Fits of stage one that each lack a part of the users, so that the ranker learns from their "
        f"histories beside vectors that have not seen them; 1: none. null: {NUM_FOLDS} where there is "
        f"content to start from and items have fewer than {FOLDED_BELOW} events, else 1.",
    )
    parser.set_defaults(
        {
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
    recipe = recipe_of(parser, config)
    quiet_lightning()
    keep_freed_memory()
    try:
        bundle = train(
            config.dataset, config.out, config.runs, config.resume, recipe, lambda: parser.instantiate(config)
        )
    except KeyboardInterrupt:
        _say("interrupted; go on with the same command and --resume")
        return 130
    except (ValueError, OSError, MisconfigurationException) as error:
        _say(f"error: {error}")
        return 2
    print(bundle)
    return 0


def recipe_of(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """Return the settings as plain data: what to run, not where.

    A run is resumed, and a bundle reproduced, by these alone.
    """
    settings: dict[str, Any] = json.loads(parser.dump(config, format="json"))
    settings["content"].pop("cache", None)
    where = ("config", "dataset", "out", "runs", "resume")
    return {key: value for key, value in settings.items() if key not in where}


Settings = Callable[[], Any]
"""Makes the settings as objects, fresh ones at each call: a module and its callbacks serve one fit."""


def train(
    directory: Path, out: Path, runs: Path, resume: bool, recipe: dict[str, Any], settings: Settings
) -> Path:
    """Train both stages and return the published bundle's directory.

    Args:
        directory: data set directory.
        out: directory of bundles.
        runs: directory of runs.
        resume: go on with the newest run of the same training and data that has not made this bundle.
        recipe: the settings as plain data.
        settings: makes the settings as objects, as build_parser's parser instantiates them.
    """
    # What can be wrong is found before the training, not after it.
    check_settings(recipe["pipeline"])
    check_numbers("", 0, {"seed": recipe["seed"]}, below=2**32)
    heads = recipe["ranking"]["model"].get("heads") or []
    for name in recipe["pipeline"]["head_weights"]:
        if name not in (NEXT, *heads) or not heads:
            known = f"one of {', '.join((NEXT, *heads))}" if heads else "none without ranking.model.heads"
            raise ValueError(f"pipeline.head_weights names {name!r}; expected {known}")
    for stage in ("retrieval", "ranking"):
        check_one_process(stage, recipe[stage]["trainer"])
        epochs = recipe[stage]["trainer"]["max_epochs"]
        ends = stage == "retrieval" and recipe[stage]["trainer"]["max_steps"] != -1  # its rate falls by steps
        if epochs != -1 or not (ends or recipe[stage]["model"]["schedule"] == "constant"):  # -1: without end
            check_numbers(f"{stage}.trainer.", 1, {"max_epochs": epochs})
        check_numbers(f"{stage}.", 1, {"patience": recipe[stage]["patience"]})
        _check_validations(stage, recipe[stage]["trainer"])
    for stage in ("retrieval", "ranking") if recipe["refit"] else ():
        max_steps = recipe[stage]["trainer"]["max_steps"]
        if max_steps != -1:
            raise ValueError(
                f"{stage}.trainer.max_steps is {max_steps}; a refit repeats epochs: expected "
                f"{stage}.trainer.max_epochs in its place, or --no-refit"
            )
    dataset = Dataset.open(directory)
    check_policies(recipe["pipeline"]["policies"], Catalog(dataset.items.collect()))
    options = settings()
    data = load_split(directory, options.split)
    check_heads(heads, data.split.train.wanted_types)
    context_table(data.split.train, recipe["ranking"]["data"].get("context"))
    RetrievalData(directory, **options.retrieval.data.as_dict())
    RankingData(directory, **options.ranking.data.as_dict())
    check_graph_encoder(options.retrieval.model.make_encoder)
    check_sequence_encoder(options.ranking.model.make_encoder)
    for name, folder in (("out", out), ("runs", runs)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{name} is {folder}, which is a file; expected a directory, there or not")
        folder.mkdir(parents=True, exist_ok=True)
    with _run_directory(runs, dataset, recipe, resume) as run:
        return _train_in(run, directory, out, resume, recipe, settings, dataset, data)


def _train_in(
    run: Path,
    directory: Path,
    out: Path,
    resume: bool,
    recipe: dict[str, Any],
    settings: Settings,
    dataset: Dataset,
    data: SplitData,
) -> Path:
    """Train in a run's directory, going on from what it holds, and return the published bundle's."""
    refit: bool = recipe["refit"]
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

    content = content_of(directory, settings().content, run) if split.ordered else None
    num_folds = num_folds_of(settings().ranking, split, content) if split.ordered else 1
    num_fits = (2 if split.ordered else 1) * (2 if refit else 1)
    step = iter(f"fit {number} of {num_fits}" for number in range(1, num_fits + 1))
    chosen: dict[str, Chosen] = {}
    ranker: HybridRanker | None = None
    pipeline = recipe["pipeline"]
    weights = ScoreWeights.read(run / SCORE_WEIGHTS)

    how = (settings, recipe["seed"], resume)
    _say(f"{next(step)}: retrieval on train; validation chooses the epochs")
    chosen["retrieval"] = fit_retrieval(directory, split, run, *how)
    if split.ordered:
        _say(f"{next(step)}: ranking on train; validation chooses the epochs")
        before = chosen_before(run) if refit and weights is not None else None
        if before is not None:
            _say("ranking: already trained in this run")
            chosen["ranking"] = before
        else:
            folds = fit_folds(directory, split, run, *how, chosen["retrieval"], num_folds)
            ranker, chosen["ranking"] = fit_ranking(
                directory, split, run / EMBEDDINGS, run, *how, content=content, folds=folds
            )
            if ranker.context_fusion is not None:
                _say(f"context: strength {chosen['ranking'].context_strength:g}")
            if weights is None:
                weights = choose_weights(ranker, load_file(run / EMBEDDINGS), split, pipeline)
                weights.write(run / SCORE_WEIGHTS)
                _say(
                    f"scores: graph weight {weights.graph:g}, transition weight {weights.transitions:g}, "
                    f"temperature {weights.temperature:.2g}; "
                    f"val_{METRIC} {weights.metric:.4f} ({weights.alone:.4f} without them)"
                )
    else:
        _say(f"ranking: left out, split {split.name} leaves the events without an order to learn from")

    vectors = run / EMBEDDINGS
    if refit:
        data = dataclasses.replace(data, split=final_split(data))
        vectors = run / "refit" / EMBEDDINGS
        for stage, fit in chosen.items():
            _say(f"{next(step)}: {stage} on train and validation, {fit.epochs} epochs as chosen")
            if stage == "retrieval":
                fit_retrieval(directory, data.split, vectors.parent, *how, fit)
            else:
                folds = fit_folds(directory, data.split, vectors.parent, *how, chosen["retrieval"], num_folds)
                ranker, _ = fit_ranking(
                    directory, data.split, vectors, vectors.parent, *how, fit, content=content, folds=folds
                )

    _say("export: writing and verifying the bundle")
    metrics = {stage: {MONITOR[stage]: fit.metric} for stage, fit in chosen.items()}
    learned = load_file(vectors)
    if ranker is not None and weights is not None:
        add_graph_scores(ranker, learned, weights.graph, pipeline.get("half_life_events"))
        pipeline = pipeline | {
            "graph_weight": weights.graph,
            "transition_weight": weights.transitions,
            "score_temperature": weights.temperature,
        }
        metrics["scores"] = {
            f"val_{METRIC}": weights.metric,
            f"val_{METRIC} of the ranker alone": weights.alone,
        }
    bundle = export_bundle(
        out, dataset, data, learned, ranker,
        pipeline={key: value for key, value in pipeline.items() if key != "policies"},
        policies=pipeline["policies"],
        training={
            "protocol": "refit" if refit else "strict",
            "epochs": {stage: fit.epochs for stage, fit in chosen.items()},
            "content": encoder_name(settings().content) if content else "none",
            "context_strength": chosen["ranking"].context_strength if "ranking" in chosen else None,
        },
        recipe=recipe,
        metrics={"validation": metrics},
    )  # fmt: skip
    (run / "bundle.txt").write_text(f"{bundle}\n", encoding="utf-8")
    return bundle


def choose_weights(
    ranker: HybridRanker, vectors: Mapping[str, Any], split: Split, pipeline: Mapping[str, Any]
) -> ScoreWeights:
    """Return how much adds to a ranker's scores, and what divides them: what the recipe says, and else what
    is best on validation.

    Args:
        ranker: fitted to `split.train`, in evaluation mode.
        vectors: of stage one, fitted to the same.
        split: whose validation asks.
        pipeline: the recipe's settings.
    """
    add_graph_scores(ranker, vectors, 1.0, pipeline.get("half_life_events"))
    graph, transitions = pipeline.get("graph_weight"), pipeline.get("transition_weight")
    holdout = questions_of(split)
    return best_weights(
        question_queries(ranker, holdout),
        ranker.item_parts().detach().numpy(),
        ranker.embedding.embedding_dim,
        holdout,
        split,
        pipeline["num_neighbours"],
        examples=queries_of_all_heads(ranker, compressed_for(split.train)),
        graph_weights=GRAPH_WEIGHTS if graph is None else (graph,),
        transition_weights=TRANSITION_WEIGHTS if transitions is None else (transitions,),
        temperature=pipeline.get("score_temperature"),
    )


def add_graph_scores(
    ranker: HybridRanker, vectors: Mapping[str, Any], weight: float, half_life: float | None
) -> None:
    """Let the scores of stage one's vectors add to a ranker's; see HybridRanker.add_graph_scores."""
    ranker.add_graph_scores(torch.from_numpy(vectors["item_vectors"]), weight, half_life)


def _check_validations(stage: str, trainer: Mapping[str, Any]) -> None:
    """Raise ValueError where a fit would never be asked anything, so that no epoch could be the best."""
    for name in ("limit_train_batches", "limit_val_batches"):
        check_numbers(f"{stage}.trainer.", 0, {name: trainer.get(name)}, above=True)
    if (every := trainer.get("check_val_every_n_epoch")) != 1:
        raise ValueError(
            f"{stage}.trainer.check_val_every_n_epoch is {every}; expected 1: the best epoch is looked for "
            "among all"
        )
    interval = trainer.get("val_check_interval")
    if interval is not None and not (isinstance(interval, float) and interval == 1):  # 1 is after each batch
        raise ValueError(
            f"{stage}.trainer.val_check_interval is {interval}; expected null: epochs are chosen "
            "and repeated whole"
        )


def num_folds_of(options: Any, split: Split, content: Path | None) -> int:
    """Return how many folds the users are dealt into: what the recipe says, else NUM_FOLDS or 1.

    Where items have many events, one user's share of a vector is too small to mislead. Without a start from
    content the ranker finds out what items are alike from the vectors, and those that have seen all do better
    (benchmarks/results/README.md).

    Args:
        options: of the ranking stage, with `num_folds` and `model`.
        split: what is learned from.
        content: file of what items are; None where that is left out.

    Raises:
        ValueError: the recipe's number is not 1 or more, and at most the number of users; or is not 1 where
            the graph vectors are tuned.
    """
    num_users = len(np.unique(split.train.users))
    is_tuned = options.model.fine_tune_graph
    if options.num_folds is None:
        density = targets_per_item(split.train, split.repeats)
        starts = content is not None and options.model.content_as == "start" and not is_tuned
        return min(NUM_FOLDS, num_users) if starts and density < FOLDED_BELOW else 1
    if not 1 <= options.num_folds <= (1 if is_tuned else num_users):
        tuned = "1 with ranking.model.fine_tune_graph, which tunes one set of vectors"
        allowed = tuned if is_tuned else f"1 to the number of users, {num_users}"
        raise ValueError(f"ranking.num_folds is {options.num_folds}; expected {allowed}")
    return int(options.num_folds)


def check_one_process(stage: str, trainer: Mapping[str, Any]) -> None:
    """Raise ValueError unless a stage would be trained by one process: each of more runs the whole command.

    Args:
        stage: name in the message.
        trainer: its keywords of lightning.Trainer.
    """
    where = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes")}
    silent: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    probe = L.Trainer(**where, **silent)
    if probe.num_devices * probe.num_nodes != 1:
        raise ValueError(
            f"{stage}.trainer.devices is {where['devices']!r} on {where['num_nodes']} node(s), which is "
            f"{probe.num_devices * probe.num_nodes} devices; expected one: 1, or a list of one such as [0]. "
            f"A stage alone trains on several: `python -m training.{stage} fit`"
        )


def content_of(directory: Path, options: ContentOptions, folder: Path) -> Path | None:
    """Return the file of what the items of a data set are, in this folder, made where it is not there.

    None where the recipe wants none, or the catalog says nothing.
    """
    file = folder / CONTENT
    if not file.is_file():
        begin = time.perf_counter()
        if not write_content(directory, options, file):
            asked_for = options.encoder != "none"
            _say(f"content: none, {'the catalog says nothing of its items' if asked_for else 'as asked for'}")
            return None
        _say(f"content: vectors of the items by {encoder_name(options)}, {time.perf_counter() - begin:.1f} s")
    return file


def fit_retrieval(
    directory: Path,
    split: Split,
    folder: Path,
    settings: Settings,
    seed: int,
    resume: bool,
    chosen: Chosen | None = None,
) -> Chosen:
    """Fit stage one, unless folder/embeddings.safetensors is there; leave its vectors in that file.

    Args:
        directory: data set directory.
        split: what to learn from, and the questions.
        folder: gets embeddings.safetensors, and checkpoints and logs in retrieval/.
        settings: makes the settings.
        seed: of everything random.
        resume: go on with a fit that was cut short.
        chosen: what validation chose before: fit for as many epochs, without validation. None: choose now.
    """
    embeddings = folder / EMBEDDINGS
    if embeddings.is_file():
        _say("retrieval: already trained in this run")
        return chosen_of(embeddings)
    L.seed_everything(seed, verbose=False)
    options = settings().retrieval
    data, module = RetrievalData(directory, **options.data.as_dict()), options.model
    data.split = split  # read once for all fits
    trainer = options.trainer.as_dict()
    if chosen is None:
        chosen = fit_stage(
            "retrieval", module, data, folder / "retrieval", trainer, patience=options.patience, resume=resume
        )
    else:
        refit_stage(
            "retrieval", module, data, folder / "retrieval", trainer, epochs=chosen.epochs, resume=resume
        )
    vectors = module.vectors()
    check_vectors("retrieval", torch.from_numpy(vectors["item_vectors"]), module.learning_rate)
    # A rename, so that the file is whole or not there: it is what tells a resumed run to go on behind it.
    unfinished = folder / ".embeddings.tmp"
    metadata = {"epochs": str(chosen.epochs), "metric": str(chosen.metric)}
    save_file(vectors, unfinished, metadata=metadata)
    unfinished.rename(embeddings)
    return chosen


def chosen_of(embeddings: Path) -> Chosen:
    """Return what validation chose for the fit of stage one that left this file."""
    with safe_open(embeddings, "numpy") as file:
        metadata = file.metadata()
    return Chosen(int(metadata["epochs"]), float(metadata["metric"]))


def fit_folds(
    directory: Path,
    split: Split,
    folder: Path,
    settings: Settings,
    seed: int,
    resume: bool,
    chosen: Chosen,
    num_folds: int,
) -> Path | None:
    """Fit stage one without each fold of the users, and return the file of their vectors; None for one fold.

    Args:
        directory: data set directory.
        split: what to learn from.
        folder: has embeddings.safetensors of the fit on all users, and gets folds.safetensors, and what comes
            of each fit in folds/.
        settings: makes the settings.
        seed: of everything random.
        resume: go on with a fit that was cut short.
        chosen: for how many epochs.
        num_folds: of num_folds_of. A refit has as many as the fit whose epochs it repeats.
    """
    file = folder / FOLDS
    if num_folds == 1:
        return None
    if file.is_file():
        shutil.rmtree(folder / "folds", ignore_errors=True)  # of a run that was cut short right here
        return file
    fits = []
    for fold in range(num_folds):
        _say(f"retrieval without part {fold + 1} of {num_folds} of the users, {chosen.epochs} epochs")
        part = folder / "folds" / str(fold)
        part.mkdir(parents=True, exist_ok=True)
        others = dataclasses.replace(split, train=without_fold(split.train, fold, num_folds))
        fit_retrieval(directory, others, part, settings, seed, resume, chosen)
        found = load_file(part / EMBEDDINGS)
        fits.append((found["item_vectors"], found["item_degrees"]))
    vectors = fold_vectors(fits, load_file(folder / EMBEDDINGS)["item_vectors"])
    unfinished = folder / ".folds.tmp"
    save_file({"fold_vectors": vectors}, unfinished)
    unfinished.rename(file)
    shutil.rmtree(folder / "folds")
    return file


def fit_ranking(
    directory: Path,
    split: Split,
    embeddings: Path | None,
    folder: Path,
    settings: Settings,
    seed: int,
    resume: bool,
    chosen: Chosen | None = None,
    *,
    content: Path | None = None,
    folds: Path | None = None,
) -> tuple[HybridRanker, Chosen]:
    """Fit stage two on the vectors of stage one; what validation chose is kept for chosen_before.

    Args:
        directory: data set directory.
        split: what to learn from, and the questions.
        embeddings: file of stage one's vectors; None trains the sequence model alone.
        folder: gets checkpoints and logs in ranking/.
        settings: makes the settings.
        seed: of everything random.
        resume: go on with a fit that was cut short.
        chosen: what validation chose before: fit for as many epochs, without validation. None: choose now.
        content: file of what items are; None leaves that out.
        folds: of fit_folds.
    """
    L.seed_everything(seed, verbose=False)
    options = settings().ranking
    num_folds = 1
    if folds is not None:
        with safe_open(folds, "numpy") as file:
            num_folds = file.get_slice("fold_vectors").get_shape()[0]
    data, module = RankingData(directory, **options.data.as_dict(), num_folds=num_folds), options.model
    data.split, module.embeddings, module.content, module.folds = split, embeddings, content, folds
    trainer = options.trainer.as_dict()
    if chosen is None:
        chosen = fit_stage(
            "ranking", module, data, folder / "ranking", trainer, patience=options.patience, resume=resume
        )
        chosen = dataclasses.replace(chosen, context_strength=choose_context_strength(module.ranker, split))
        text = json.dumps(dataclasses.asdict(chosen))
        (folder / "ranking" / CHOSEN).write_text(text + "\n", encoding="utf-8")
    else:
        refit_stage("ranking", module, data, folder / "ranking", trainer, epochs=chosen.epochs, resume=resume)
        check_vectors("ranking", module.ranker.item_vectors().detach(), module.learning_rate)
        if module.ranker.context_fusion is not None:
            module.ranker.context_fusion.strength = chosen.context_strength
    return module.ranker, chosen


def chosen_before(folder: Path) -> Chosen | None:
    """Return what validation chose in a fit of stage two that ended in this folder; None where none has."""
    file = folder / "ranking" / CHOSEN
    return Chosen(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


@contextmanager
def _run_directory(runs: Path, dataset: Dataset, recipe: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Yield a new run directory, or the newest of the same training and data that has not made this bundle.

    What a bundle is served with (recipe["pipeline"]) plays no part in the training: a run goes on with other
    settings of it, and where it was finished there is nothing left but the export. A run that another process
    works in is passed over.
    """
    record = {"fingerprint": dataset.info.fingerprint, "recipe": recipe}
    prefix = dataset.directory.resolve().name
    for run in sorted(runs.glob(f"{prefix}-*"), reverse=True) if resume else ():
        started, published = run / "run.json", run / "bundle.txt"
        if not started.is_file():
            continue
        before = json.loads(started.read_text(encoding="utf-8"))
        if _of_training(before) != _of_training(record) or (before == record and published.is_file()):
            continue
        with (run / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                _say(f"{run}: another process works in it; passed over")
                continue
            was, is_now = before["recipe"]["pipeline"], recipe["pipeline"]
            if any(was.get(name) != is_now.get(name) for name in WEIGHED_WITH):
                (run / SCORE_WEIGHTS).unlink(missing_ok=True)  # they were chosen for others
            published.unlink(missing_ok=True)
            _write_json(started, record)
            yield run
            return
    if resume:
        raise ValueError(
            f"--resume: {runs} has no run of {dataset.directory} with these settings that has anything left "
            "to do; start without --resume"
        )
    run = runs / f"{prefix}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run.mkdir(parents=True)
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_json(run / "run.json", record)
        yield run


def _of_training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run's record decides what is trained."""
    return {**record, "recipe": {**record["recipe"], "pipeline": None}}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
