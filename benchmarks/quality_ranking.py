"""Stage two's quality table: `python -m benchmarks.quality ranking --data data/beauty --bundles bundles`.

Bundles, through what they serve; the rows of `benchmarks.quality fusion`; baselines and peers, which are
fitted here; and what others published. All items are ranked but those of the user's history, or where
repeats are normal that of the last event. There is one table for each protocol: strict has learned from
`train`, refit from train and validation. Both ask the test questions with whole histories. Baselines have
fixed settings; nothing here is chosen on test.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.baselines.item_knn import ItemKNN
from benchmarks.baselines.markov import FirstOrderMarkov
from benchmarks.baselines.popularity import Popularity
from benchmarks.baselines.session_knn import SessionKNN
from benchmarks.full_ranking import Scores, history_matrix, question_metrics, touched_matrix
from benchmarks.peers import rectools_sasrec
from benchmarks.peers.implicit_als import ImplicitALS
from benchmarks.quality_fusion import collect
from engine.arguments import ArgumentParser, nearest
from engine.bundle import Bundle, resolve_bundle
from training.data.splits import (
    Holdout,
    Protocol,
    Split,
    SplitData,
    SplitOptions,
    load_split,
    split_as_trained,
)
from training.evaluate import evaluate, protocol_of
from training.metrics import METRICS, places_in_list

FIGURES = ("recall@10", "ndcg@10")
HALF_LIFE = 3.0  # events; what serving has by default (training.train.PipelineOptions)
PROTOCOLS: tuple[Protocol, ...] = ("strict", "refit")

# (model, R@10, N@10, source) by data set and protocol; the source is the paper or program whose table it is.
# "unstated": published without saying which of the two it is, so it stands in both tables.
Rows = list[tuple[str, float, float, str]]
PUBLISHED: dict[str, dict[str, Rows]] = {
    "beauty": {
        "strict": [
            ("SASRec", 0.0605, 0.0318, "S3-Rec"),
            ("S3-Rec", 0.0647, 0.0327, "S3-Rec"),
            ("TIGER", 0.0648, 0.0384, "genrec"),
            ("ICLRec", 0.0744, 0.0403, "ICLRec"),
            ("ActionPiece", 0.0775, 0.0424, "eSASRec"),
            ("DuoRec", 0.0845, 0.0443, "eSASRec"),
        ],
        "refit": [
            ("HSTU, rerun", 0.0788, 0.0439, "eSASRec"),
            ("FuXi-alpha, rerun", 0.0809, 0.0451, "eSASRec"),
            ("SASRec + sampled softmax", 0.0921, 0.0531, "eSASRec"),
            ("eSASRec", 0.0928, 0.0523, "eSASRec"),
        ],
    },
    "toys_and_games": {
        "strict": [
            ("SASRec", 0.0675, 0.0374, "S3-Rec"),
            ("S3-Rec", 0.0700, 0.0376, "S3-Rec"),
            ("TIGER", 0.0712, 0.0432, "genrec"),
            ("ICLRec", 0.0834, 0.0480, "ICLRec"),
        ],
        "refit": [
            ("HSTU, rerun", 0.0778, 0.0450, "eSASRec"),
            ("FuXi-alpha, rerun", 0.0765, 0.0437, "eSASRec"),
            ("SASRec + sampled softmax", 0.0970, 0.0580, "eSASRec"),
            ("eSASRec", 0.0939, 0.0538, "eSASRec"),
        ],
    },
    "ml-1m": {
        "refit": [
            ("eSASRec", 0.3133, 0.1772, "eSASRec"),
            ("FuXi-alpha, rerun", 0.3164, 0.1813, "eSASRec"),
        ],
        "unstated": [
            ("SASRec, binary cross-entropy", 0.2392, 0.1259, "gSASRec"),
            ("BERT4Rec, replicated", 0.2821, 0.1516, "bert4rec_repro"),
            ("GRU4Rec, full negatives", 0.2811, 0.1648, "generative-recommenders"),
            ("SASRec + sampled softmax", 0.2853, 0.1603, "generative-recommenders"),
            ("gSASRec", 0.3003, 0.1726, "gSASRec"),
            ("RecTools SASRec, softmax", 0.3058, 0.1779, "bert4rec_repro"),
            ("HSTU", 0.3097, 0.1720, "generative-recommenders"),
            ("HSTU-large", 0.3294, 0.1893, "generative-recommenders"),
        ],
    },
}


def _of_matrix(make: Callable[[], Any], half_life: float | None, split: Split) -> Scores:
    """Fit a baseline that knows who touched what, and asks with (weighted) sets of items."""
    model = make()
    model.fit(touched_matrix(split.train))

    def scores(questions: Holdout) -> NDArray[np.float32]:
        found: NDArray[np.float32] = model.scores(history_matrix(questions, half_life))
        return found

    return scores


def _markov(split: Split) -> Scores:
    model = FirstOrderMarkov()
    model.fit(split.train)
    return model.scores


BASELINES: dict[str, Callable[[Split], Scores]] = {
    "popularity": partial(_of_matrix, Popularity, None),
    "item-knn": partial(_of_matrix, ItemKNN, None),
    "item-knn-recent": partial(_of_matrix, ItemKNN, HALF_LIFE),
    "session-knn": partial(_of_matrix, SessionKNN, HALF_LIFE),
    "markov": _markov,
}
PEERS = ("implicit-als", "rectools-sasrec")
MODELS = [*BASELINES, *PEERS]


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """How the peers are run.

    Attributes:
        python: the Python that has RecTools.
        epochs: of RecTools' SASRec: fixed, not chosen on validation.
    """

    python: Path = rectools_sasrec.DEFAULT_PYTHON
    epochs: int = 30


def baseline_row(name: str, split: Split, peers: PeerOptions) -> dict[str, Any]:
    """Return the figures of a baseline or a peer on the test questions.

    Raises:
        ValueError: a library is missing; the message says what to install.
    """
    begin = time.perf_counter()
    if name == "rectools-sasrec":
        figures, versions = _rectools(split, peers)
        return {**figures, "seconds": time.perf_counter() - begin, "versions": versions}
    scores = _of_matrix(ImplicitALS, None, split) if name == "implicit-als" else BASELINES[name](split)
    found = question_metrics(scores, split.test, FIGURES, repeats=split.repeats)
    means = {figure: float(values.mean()) for figure, values in found.items()}
    return {**means, "seconds": time.perf_counter() - begin}


def _rectools(split: Split, peers: PeerOptions) -> tuple[dict[str, float], dict[str, str]]:
    if split.repeats:
        raise ValueError("rectools-sasrec leaves out the history's items, which are normal in this data")
    settings = rectools_sasrec.Settings(epochs=peers.epochs)
    histories = [history.items for _, history, _ in split.test]
    users = np.repeat(split.test.users, [len(items) for items in histories])
    result = rectools_sasrec.run(
        peers.python,
        settings,
        (split.train.users, split.train.items),
        (users, np.concatenate([np.zeros(0, np.int32), *histories])),
        k=20,
    )
    nothing = np.zeros(0, np.int32)
    places = [places_in_list(result.lists.get(user, nothing), target) for user, _, target in split.test]
    figures = {}
    for figure in FIGURES:
        name, cutoff = figure.split("@")
        figures[figure] = float(np.mean([METRICS[name](place, int(cutoff)) for place in places]))
    return figures, result.versions


def compare(
    directory: Path,
    protocols: Sequence[Protocol],
    models: Sequence[str],
    bundles: Sequence[Path],
    fusion: Sequence[Path],
    peers: PeerOptions,
    options: SplitOptions = SplitOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Return the rows of each protocol's table; see main's options.

    A peer that is not installed has an `error` in its row and no figures.

    Raises:
        ValueError: a bundle or a fusion table is of other data or another split.
    """
    data: SplitData = load_split(directory, options)
    if not data.split.ordered:
        raise ValueError(f"split {data.split.name} leaves the events without an order to rank by")
    console = Console(stderr=True)
    tables: dict[str, list[dict[str, Any]]] = {protocol: [] for protocol in protocols}
    for path in bundles:
        bundle = Bundle.load(resolve_bundle(path), num_threads=os.cpu_count() or 1)
        protocol = protocol_of(bundle)
        told = bundle.manifest.get("recipe", {}).get("split", {})
        theirs = told | {"name": bundle.manifest["data"]["split"]}
        ours = asdict(options) | {"name": data.split.name}
        if any(ours.get(name) != value for name, value in theirs.items()):
            raise ValueError(f"{path} was trained on split {theirs}; expected {ours}")
        if protocol not in tables:
            raise ValueError(f"{path} is of protocol {protocol}; expected {' or '.join(protocols)}")
        console.print(f"{bundle.version}: asking")
        results = evaluate(bundle, directory, stages=("retrieval", "ranking", "slate"))
        tables[protocol] += [
            {
                "model": f"trirank, {stage}",
                "source": f"bundle {bundle.version}",
                **{figure: results[stage][figure] for figure in FIGURES},
            }
            for stage in results["stages"]
        ]
    for path in fusion:
        found = collect(path)
        same = (found["fingerprint"], found["split"]) == (data.info.fingerprint, data.split.name)
        if not same or found["protocol"] not in tables:
            raise ValueError(
                f"{path} has {found['data']}, {found['split']}, {found['protocol']}; expected "
                f"{data.info.name}, {data.split.name}, {' or '.join(protocols)}"
            )
        tables[found["protocol"]] += [
            {
                "model": f"({row['letter']}) {name}",
                "source": f"fusion table, {len(row['seeds'])} seed(s)",
                **{figure: row[figure]["mean"] for figure in FIGURES},
                "std": {figure: row[figure]["std"] for figure in FIGURES},
            }
            for name, row in found["variants"].items()
        ]
    for protocol in protocols:
        split = split_as_trained(data, protocol)
        for name in models:
            console.print(f"{name}: fitting, {protocol}")
            try:
                row = baseline_row(name, split, peers)
            except ValueError as reason:
                console.print(f"{name}: {reason}", markup=False)
                row = {"error": str(reason)}
            tables[protocol].append({"model": name, "source": "this run", **row})
        published = PUBLISHED.get(data.info.name.lower(), {})
        if data.split.name != "leave-one-out":
            published = {}
        for said in (protocol, "unstated"):
            note = ", protocol unstated" if said == "unstated" else ""
            tables[protocol] += [
                {"model": model, "recall@10": recall, "ndcg@10": ndcg, "source": f"published: {source}{note}"}
                for model, recall, ndcg, source in published.get(said, [])
            ]
    return {
        "data": data.info.name,
        "simulated": data.info.simulated,
        "fingerprint": data.info.fingerprint,
        "split": data.split.name,
        "num_users": len(data.split.test),
        "num_items": data.split.train.num_items,
        "protocols": tables,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy")},
        },
    }


def print_tables(results: dict[str, Any], console: Console) -> None:
    """Print one table a protocol, best NDCG first; published rows among ours."""
    simulated = ", SIMULATED data" if results["simulated"] else ""
    for protocol, rows in results["protocols"].items():
        table = Table(
            title=f"{results['data']}{simulated}: {results['split']}, {protocol}, test, "
            f"{results['num_users']:,} users, all {results['num_items']:,} items ranked"
        )
        for heading in ("model", *FIGURES, "seconds", "source"):
            table.add_column(heading, justify="left" if heading in ("model", "source") else "right")
        for row in sorted(rows, key=lambda row: -row.get("ndcg@10", -1.0)):
            if "error" in row:
                table.add_row(row["model"], "-", "-", "-", row["error"])
                continue
            cells = []
            for figure in FIGURES:
                std = row.get("std", {}).get(figure)
                cells.append(f"{row[figure]:.4f}" + (f" ± {std:.4f}" if std is not None else ""))
            seconds = f"{row['seconds']:.1f}" if "seconds" in row else "-"
            table.add_row(row["model"], *cells, seconds, row["source"])
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Print the tables on stdout, and write everything to a file with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.quality ranking", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="A data set directory.")
    parser.add_argument(
        "--protocols", type=str, nargs="+", default=list(PROTOCOLS), help="Which tables: strict, refit."
    )
    parser.add_argument(
        "--models",
        type=str,
        nargs="*",
        default=list(BASELINES),
        help=f"Of {', '.join(MODELS)}; the last {len(PEERS)} need what they say when it is missing.",
    )
    parser.add_argument("--bundles", type=Path, nargs="+", default=[], help="Ours, as they are served.")
    parser.add_argument(
        "--fusion", type=Path, nargs="+", default=[], help="Ours: --out of `benchmarks.quality fusion`."
    )
    parser.add_argument(
        "--rectools_python",
        type=Path,
        default=rectools_sasrec.DEFAULT_PYTHON,
        help="The Python that has RecTools.",
    )
    parser.add_argument(
        "--peer_epochs", type=int, default=30, help="Of RecTools' SASRec; minutes each on two cores."
    )
    parser.add_argument(
        "--split",
        type=SplitOptions,
        default=SplitOptions(),
        help="As bundles were trained with: --split.name global-time asks everybody at one moment.",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="File for all figures.")
    options = parser.parse_args(argv)
    try:
        for what, asked, known in (
            ("model", options.models, MODELS),
            ("protocol", options.protocols, PROTOCOLS),
        ):
            for name in asked:
                if name not in known:
                    hint = nearest([name], known)
                    raise ValueError(f"{what} is {name!r}; expected one of {', '.join(known)}{hint}")
        results = compare(
            options.data,
            options.protocols,
            options.models,
            options.bundles,
            options.fusion,
            PeerOptions(python=options.rectools_python, epochs=options.peer_epochs),
            parser.instantiate(options).split,
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_tables(results, Console(width=None if sys.stdout.isatty() else 120))
    return 0
