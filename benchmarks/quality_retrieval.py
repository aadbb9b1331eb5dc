"""Stage one's quality table: `python -m benchmarks.quality retrieval --data data/gowalla --seeds 0 1`.

Ours, training-free and item-item models, and the published rows of the same split, all items ranked but those
of the user's history. Every row learns from all that is known at test time (train and validation together, as
published tables do), with settings and epochs fixed beforehand, and reads the test split once. To choose
settings, `--part validation` learns from train alone and asks the validation questions.

Encoders answer with the trained user vector, as their papers do; what a folded-in vector finds is in
`python -m benchmarks.query_vectors`. Baselines answer from the history. SLIM has no row: its regressions, one
an item over 40,981 items, take hours in SciPy.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_array
from torch import nn
from torch_geometric.data import HeteroData

from benchmarks.bare_trainer import bare_trainer
from benchmarks.baselines.ease import EASE
from benchmarks.baselines.gf_cf import GFCF
from benchmarks.baselines.item_knn import ItemKNN
from benchmarks.baselines.popularity import Popularity
from benchmarks.full_ranking import Scores, history_matrix, question_metrics, touched_matrix
from engine.arguments import ArgumentParser
from retrieval.encoders.blend import SpectralLightGCN
from retrieval.encoders.lightgcn import LightGCN
from retrieval.encoders.mf import MF
from retrieval.encoders.ngcf import NGCF
from retrieval.encoders.spectral import SpectralFilter
from training.data.modules import RetrievalData
from training.data.splits import Holdout, Split, SplitData, SplitOptions, final_split, load_split
from training.retrieval_losses import RetrievalLoss
from training.retrieval_module import RetrievalModule
from training.stages import default_precision, keep_freed_memory, quiet_lightning

CUTOFF = 20

# Recall@20, NDCG@20 by data set. BARS: the reruns of openbenchmark.github.io/BARS; papers: as printed there.
PUBLISHED: dict[str, list[tuple[str, float, float, str]]] = {
    "gowalla": [
        ("MF-BPR", 0.1627, 0.1378, "BARS"),
        ("NGCF", 0.1570, 0.1327, "BARS"),
        ("LightGCN", 0.1830, 0.1554, "its paper"),
        ("LightGCN, rerun", 0.1820, 0.1547, "BARS"),
        ("UltraGCN", 0.1862, 0.1580, "BARS"),
        ("SimpleX", 0.1872, 0.1557, "BARS"),
        ("GF-CF", 0.1849, 0.1518, "BARS"),
        ("EASE", 0.1765, 0.1467, "BARS"),
        ("SLIM", 0.1699, 0.1382, "BARS"),
        ("BSPM-EM", 0.1920, 0.1597, "its paper"),
    ],
    "yelp2018": [
        ("MF-BPR", 0.0576, 0.0468, "BARS"),
        ("NGCF", 0.0579, 0.0477, "BARS"),
        ("LightGCN", 0.0649, 0.0530, "its paper"),
        ("LightGCN, rerun", 0.0653, 0.0532, "BARS"),
        ("UltraGCN", 0.0683, 0.0561, "BARS"),
        ("SimpleX", 0.0701, 0.0575, "BARS"),
        ("SimGCL", 0.0721, 0.0601, "SELFRec"),
        ("XSimGCL", 0.0723, 0.0604, "SELFRec"),
        ("GF-CF", 0.0697, 0.0571, "BARS"),
        ("EASE", 0.0657, 0.0552, "BARS"),
        ("SLIM", 0.0646, 0.0541, "BARS"),
    ],
}


class Baseline(Protocol):
    """A model that scores items from a history, without training by steps."""

    def fit(self, touched: csr_array) -> None:
        """Learn from the matrix [U+1, I+1] of who touched what, ones and zeros."""

    def scores(self, histories: csr_array) -> NDArray[np.float32]:
        """Return [Q, I+1] for Q histories [Q, I+1], ones and zeros."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an encoder is trained: settings that were chosen on validation.

    Attributes:
        encoder: makes the GraphEncoder from the graph.
        epochs: of the final fit.
        batch_size: edges of a step; None for RetrievalData's own.
        module: keywords of RetrievalModule; what is missing has its default.
    """

    encoder: Callable[[HeteroData], nn.Module]
    epochs: int
    batch_size: int | None = None
    module: Mapping[str, Any] = field(default_factory=dict)


# Chosen on Gowalla, on a validation set of a fifth of each user's training events (see results/README.md).
ENCODERS = {
    "mf": Recipe(encoder=MF, epochs=20, module={"l2": 0.2}),
    "ngcf": Recipe(
        encoder=partial(NGCF, message_dropout=0.0, init="spectral", init_std=0.3),
        epochs=10,
        module={"learning_rate": 1e-2, "l2": 0.1},
    ),
    "lightgcn": Recipe(encoder=LightGCN, epochs=40, module={"l2": 0.05}),
    "spectral": Recipe(encoder=SpectralFilter, epochs=1),
    "spectral-lightgcn": Recipe(encoder=SpectralLightGCN, epochs=40, module={"l2": 0.05}),
}
BASELINES: dict[str, Callable[[], Baseline]] = {
    "popularity": Popularity,
    "item-knn": ItemKNN,
    "ease": EASE,
    "gf-cf": GFCF,
}
MODELS = [*BASELINES, *ENCODERS]


def fit_encoder(recipe: Recipe, directory: Path, split: Split, seed: int, precision: str) -> Scores:
    """Train a graph encoder; return the scores of the trained user vectors."""
    vectors = train_vectors(recipe, directory, split, seed, precision)
    users, items = vectors["user_vectors"], vectors["item_vectors"]
    return lambda questions: users[questions.users] @ items.T


def train_vectors(
    recipe: Recipe, directory: Path, split: Split, seed: int, precision: str
) -> dict[str, NDArray[np.float32]]:
    """Train a graph encoder through the real modules, without validation.

    Returns item_vectors [I+1, D], user_vectors [U+1, D] and item_degrees [I+1].
    """
    L.seed_everything(seed, verbose=False)
    data = RetrievalData(directory, batch_size=recipe.batch_size)
    data.split = split
    module = RetrievalModule(recipe.encoder, **recipe.module)
    trainer = bare_trainer(max_epochs=recipe.epochs, precision=precision)
    trainer.fit(module, datamodule=data)
    return module.cpu().eval().vectors()


def fit_baseline(make: Callable[[], Baseline], split: Split) -> Scores:
    """Fit a baseline; return its scores."""
    model = make()
    model.fit(touched_matrix(split.train))
    return lambda questions: model.scores(history_matrix(questions))


def accuracy(scores: Scores, holdout: Holdout, *, repeats: bool) -> dict[str, float]:
    """Return {"recall": ..., "ndcg": ...} at CUTOFF, the mean over all questions, all items ranked."""
    names = {name: f"{name}@{CUTOFF}" for name in ("recall", "ndcg")}
    found = question_metrics(scores, holdout, list(names.values()), repeats=repeats)
    return {name: float(found[full].mean()) for name, full in names.items()}


def compare(
    directory: Path,
    models: Sequence[str],
    seeds: Sequence[int],
    *,
    part: Literal["test", "validation"] = "test",
    epochs: int | None = None,
    loss: RetrievalLoss | None = None,
    precision: str = "32-true",
) -> dict[str, Any]:
    """Return the rows of the table; see main's options.

    A model that does not fit in memory has an `error` in its row and no figures.
    """
    data: SplitData = load_split(directory, SplitOptions())
    split = final_split(data) if part == "test" else data.split
    holdout = split.test if part == "test" else split.validation
    console = Console(stderr=True)
    rows = []
    for name in models:
        runs: list[dict[str, float]] = []
        error = ""
        for seed in seeds if name in ENCODERS else [0]:
            console.print(f"{name}: fitting" + (f", seed {seed}" if name in ENCODERS else ""))
            begin = time.perf_counter()
            try:
                if name in ENCODERS:
                    recipe = ENCODERS[name]
                    if epochs is not None:
                        recipe = replace(recipe, epochs=epochs)
                    if loss is not None:
                        recipe = replace(recipe, module={**recipe.module, "loss": loss})
                    scores = fit_encoder(recipe, directory, split, seed, precision)
                else:
                    scores = fit_baseline(BASELINES[name], split)
            except (ValueError, MemoryError) as reason:
                error = str(reason) or "out of memory"
                console.print(f"{name}: {error}")
                break
            fitted = time.perf_counter()
            run = accuracy(scores, holdout, repeats=split.repeats)
            runs.append({**run, "train_s": fitted - begin, "evaluate_s": time.perf_counter() - fitted})
            console.print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in runs[-1].items())}")
        rows.append(
            {"model": name, "seeds": list(seeds) if name in ENCODERS else [], "runs": runs, "error": error}
        )
    published = PUBLISHED.get(data.info.name, []) if part == "test" and split.name == "given" else []
    return {
        "data": data.info.name,
        "simulated": data.info.simulated,
        "fingerprint": data.info.fingerprint,
        "split": split.name,
        "part": part,
        "num_users": len(holdout),
        "num_items": split.train.num_items,
        "num_training_events": len(split.train),
        "rows": rows,
        "published": [
            {"model": name, "recall": recall, "ndcg": ndcg, "source": source}
            for name, recall, ndcg, source in published
        ],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "numpy", "scipy")},
        },
    }


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print ours and the published rows, best NDCG first."""
    simulated = ", SIMULATED data" if results["simulated"] else ""
    table = Table(
        title=f"{results['data']}{simulated}: {results['split']}, {results['part']}, "
        f"{results['num_users']:,} users, all {results['num_items']:,} items ranked",
        caption=f"{results['machine']}; mean and standard deviation over seeds",
    )
    for heading in ("model", f"recall@{CUTOFF}", f"ndcg@{CUTOFF}", "train s", "seeds", "source"):
        table.add_column(heading, justify="left" if heading in ("model", "source") else "right")
    lines: list[tuple[float, list[str]]] = []
    for row in results["rows"]:
        if row["error"]:
            lines.append((-1.0, [row["model"], "-", "-", "-", "-", row["error"]]))
            continue
        cells = [_mean_and_std([run[key] for run in row["runs"]], 4) for key in ("recall", "ndcg")]
        train_s = _mean_and_std([run["train_s"] for run in row["runs"]], 1)
        seeds = " ".join(map(str, row["seeds"])) or "-"
        ndcg = float(np.mean([run["ndcg"] for run in row["runs"]]))
        lines.append((ndcg, [row["model"], *cells, train_s, seeds, "this run"]))
    for row in results["published"]:
        cells = [f"{row['recall']:.4f}", f"{row['ndcg']:.4f}"]
        lines.append((row["ndcg"], [row["model"], *cells, "-", "-", f"published: {row['source']}"]))
    for _, line in sorted(lines, key=lambda pair: -pair[0]):
        table.add_row(*line)
    console.print(table)


def _mean_and_std(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def main(argv: list[str] | None = None) -> int:
    """Print the table on stdout, and write everything to a file with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.quality retrieval", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="A data set directory.")
    parser.add_argument("--models", type=str, nargs="+", default=MODELS, help=f"Of {', '.join(MODELS)}.")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="One training each, of the encoders."
    )
    parser.add_argument(
        "--part", type=Literal["test", "validation"], default="test", help="Tune on validation, report test."
    )
    parser.add_argument(
        "--epochs", type=int, default=None, help="Of the encoders, in place of their recipes'."
    )
    parser.add_argument(
        "--loss",
        type=RetrievalLoss | None,
        default=None,
        help="Of the encoders, in place of their recipes': a class of training.retrieval_losses, and its "
        "keywords as --loss.NAME.",
    )
    parser.add_argument(
        "--precision", type=str, default=default_precision(), help="Of the encoders' lightning.Trainer."
    )
    parser.add_argument("--json", type=Path, default=None, help="File for all figures.")
    options = parser.parse_args(argv)
    quiet_lightning()
    keep_freed_memory()
    try:
        for name in options.models:
            if name not in MODELS:
                raise ValueError(f"model is {name!r}; expected one of {', '.join(MODELS)}")
        results = compare(
            options.data,
            options.models,
            options.seeds,
            part=options.part,
            epochs=options.epochs,
            loss=parser.instantiate(options).loss,
            precision=options.precision,
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_table(results, Console(width=None if sys.stdout.isatty() else 120))
    return 0
