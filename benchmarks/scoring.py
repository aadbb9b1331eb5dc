"""What scoring costs, and what fewer bits cost it: `python -m benchmarks.scoring`.

A ranker of random weights, exported as `trirank train` does, in each precision (pipeline.ranker_precision):
the size of its two graphs, its largest difference from torch, and how long onnxruntime takes in this process
for the state of one history, and for the scores of 500 and of 10,000 candidates with and without the state.

With a bundle and its data it also ranks all items for the users of a part of the split, with the bundle's own
ranker in each precision: `python -m benchmarks.scoring --bundle bundles --data data/beauty --part test`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.load import percentile
from engine.arguments import ArgumentParser
from engine.bundle import RANKER_SCORES, RANKER_STATE, RANKER_WEIGHTS, Bundle, resolve_bundle
from ranking.encoders.sasrec import SASRec
from ranking.onnx_scorer import OnnxScorer, available_providers, write_models
from ranking.ranker import HybridRanker
from training.evaluate import evaluate
from training.export import compress, export_ranker
from training.quantization import Precision, quantize

RANKER_GRAPHS = (RANKER_STATE, RANKER_SCORES, RANKER_WEIGHTS)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NUM_CANDIDATES = (500, 10_000)
NUM_COMPARED = 64  # histories whose scores are compared with torch's
CALLS_AT_ONCE = 50  # of one precision, before the next has its turn


def made_ranker(num_items: int, dim: int, history_length: int) -> HybridRanker:
    """Return a ranker on graph vectors, whose own scores count; all weights are random, none is at zero."""
    torch.manual_seed(0)
    graph = torch.cat([torch.zeros(1, dim), torch.randn(num_items, dim)])
    degrees = torch.randint(1, 100, (num_items + 1,)).float()
    ranker = HybridRanker(
        SASRec(history_length + 1, dim=dim), graph_vectors=graph, item_degrees=degrees, num_items=num_items
    )
    with torch.no_grad():
        for parameter in ranker.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    ranker.eval().add_graph_scores(graph, 0.1, half_life=3.0)
    rng = np.random.default_rng(0)
    compress(ranker, list(rng.integers(1, num_items + 1, (1000, history_length))))
    return ranker


def variants(directory: Path, num_threads: int) -> dict[str, OnnxScorer]:
    """Return a scorer for each precision of the float32 graphs in a directory, from folders beside them."""
    found: dict[str, OnnxScorer] = {}
    for precision in PRECISIONS:
        folder = directory / precision
        folder.mkdir(exist_ok=True)
        models = onnx.load(directory / RANKER_STATE), onnx.load(directory / RANKER_SCORES)
        for model in models:
            quantize(model, precision)
        state, scores, weights = (folder / name for name in RANKER_GRAPHS)
        write_models(state, scores, weights, models)
        found[precision] = OnnxScorer(state, scores, num_threads)
    return found


def timings(scorers: dict[str, OnnxScorer], num_calls: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return p50 and p99 in ms of each kind of call, by precision; the precisions take turns."""
    rng = np.random.default_rng(0)
    first = next(iter(scorers.values()))
    history = rng.integers(1, first.num_items + 1, (1, first.history_length))
    wanted = {size: rng.integers(1, first.num_items + 1, (1, size)) for size in NUM_CANDIDATES}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in scorers}
    for begin in range(0, num_calls, CALLS_AT_ONCE):
        for name, scorer in scorers.items():
            state = scorer.user_states(history)
            calls: dict[str, Callable[[], Any]] = {"state": partial(scorer.user_states, history)}
            for size, rows in wanted.items():
                calls[f"scores of {size:,}"] = partial(scorer.score_states, state, rows)
                calls[f"both, {size:,}"] = partial(scorer.score, history, rows)
            for kind, call in calls.items():
                call()
                taken = seconds[name].setdefault(kind, [])
                for _ in range(min(CALLS_AT_ONCE, num_calls - begin)):
                    start = time.perf_counter()
                    call()
                    taken.append(time.perf_counter() - start)
    return {
        name: {
            kind: {
                f"p{p}_ms": round(1e3 * found, 4)
                for p in (50, 99)
                if (found := percentile(np.array(taken), p)) is not None
            }
            for kind, taken in kinds.items()
        }
        for name, kinds in seconds.items()
    }


def difference(ranker: HybridRanker, scorer: OnnxScorer) -> dict[str, float]:
    """Return the largest difference of a score from torch's, and the largest score, over histories."""
    rng = np.random.default_rng(1)
    history = rng.integers(1, ranker.num_items + 1, (NUM_COMPARED, ranker.history_length))
    for row, length in zip(history, np.linspace(0, ranker.history_length, NUM_COMPARED), strict=True):
        row[: ranker.history_length - int(length)] = 0
    candidates = rng.integers(1, ranker.num_items + 1, (NUM_COMPARED, max(NUM_CANDIDATES)))
    with torch.no_grad():
        table = ranker.item_vectors()
        queries = ranker.query(torch.from_numpy(history))
        expected: NDArray[np.float32] = np.take_along_axis((queries @ table.T).numpy(), candidates, axis=1)
    found = scorer.score(history, candidates)
    return {
        "max_difference": float(np.abs(found - expected).max()),
        "max_score": float(np.abs(expected).max()),
    }


def quality(
    path: Path, data: Path, part: Literal["validation", "test"], max_users: int | None
) -> dict[str, dict[str, float]]:
    """Return recall@10 and NDCG@10 of a bundle's ranker over all items, by precision.

    Raises:
        ValueError: the bundle has no ranker in float32, or is not of this data.
    """
    bundle = Bundle.load(path)
    if bundle.scorer is None:
        raise ValueError(f"bundle {bundle.version} has no ranker")
    if (has := bundle.manifest["pipeline"].get("ranker_precision", "float32")) != "float32":
        raise ValueError(f"bundle {bundle.version} has a ranker in {has}; expected one in float32")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RANKER_GRAPHS:
            if name in bundle.manifest["files"]:  # an older bundle has its tables in the graphs
                shutil.copyfile(path / name, Path(folder) / name)
        for precision, scorer in variants(Path(folder), num_threads=os.cpu_count() or 1).items():
            ranked = evaluate(replace(bundle, scorer=scorer), data, part, max_users, ["ranking"])["ranking"]
            found[precision] = {name: ranked[name] for name in ("recall@10", "ndcg@10")}
    return found


def measure(
    num_items: int, dim: int, history_length: int, threads: list[int], num_calls: int
) -> dict[str, Any]:
    """Return sizes, differences and timings of a made ranker: {precision: ...}."""
    ranker = made_ranker(num_items, dim, history_length)
    found: dict[str, Any] = {precision: {"ms": {}} for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder:
        export_ranker(ranker, Path(folder))
        for num_threads in threads:
            scorers = variants(Path(folder), num_threads)
            for precision, times in timings(scorers, num_calls).items():
                found[precision]["ms"][str(num_threads)] = times
        for precision, scorer in scorers.items():
            sizes = [(Path(folder) / precision / name).stat().st_size for name in RANKER_GRAPHS]
            found[precision] |= {"mb": round(sum(sizes) / 1e6, 2)} | difference(ranker, scorer)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: tables on stdout, or JSON with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--num_items", type=int, default=12_101, help="Items of the made ranker.")
    parser.add_argument("--dim", type=int, default=64, help="Its D.")
    parser.add_argument("--history_length", type=int, default=50, help="Events of the history.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="Of onnxruntime.")
    parser.add_argument("--calls", type=int, default=500, help="Of each kind.")
    parser.add_argument("--bundle", type=Path | None, default=None, help="A bundle, or a directory of them.")
    parser.add_argument("--data", type=Path | None, default=None, help="What it was trained on.")
    parser.add_argument("--part", type=Literal["validation", "test"], default="test", help="Questions.")
    parser.add_argument("--max_users", type=int | None, default=None, help="Ask this many; default: all.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no tables.")
    options = parser.parse_args(argv)
    try:
        if (options.bundle is None) != (options.data is None):
            raise ValueError("--bundle and --data go together; expected both or neither")
        for name in ("num_items", "dim", "history_length", "calls"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} is {getattr(options, name)}; expected 1 or more")
        found = measure(
            options.num_items, options.dim, options.history_length, options.threads, options.calls
        )
        if options.bundle is not None:
            path = resolve_bundle(options.bundle)
            for precision, row in quality(path, options.data, options.part, options.max_users).items():
                found[precision]["quality"] = row
    except ValueError as error:
        print(f"benchmarks.scoring: {error}", file=sys.stderr)
        return 2
    result = {
        "items": options.num_items,
        "dim": options.dim,
        "history_length": options.history_length,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "providers": list(available_providers()),
        "precisions": found,
    }
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result, options.part)
    return 0


def print_tables(result: dict[str, Any], part: str) -> None:
    """Print the figures for a person."""
    shown = Table(
        title=f"{result['items']:,} items, D = {result['dim']}, history of {result['history_length']}; p50 / "
        f"p99 ms; {result['machine']}"
    )
    precisions = result["precisions"]
    for heading in ("", *precisions):
        shown.add_column(heading, justify="left" if not heading else "right")
    shown.add_row("MB of both graphs", *(f"{row['mb']:.2f}" for row in precisions.values()))
    shown.add_row(
        "largest difference from torch", *(f"{row['max_difference']:.1e}" for row in precisions.values())
    )
    shown.add_row("of scores up to", *(f"{row['max_score']:.1f}" for row in precisions.values()))
    first = next(iter(precisions.values()))
    for num_threads, kinds in first["ms"].items():
        for kind in kinds:
            cells = [row["ms"][num_threads][kind] for row in precisions.values()]
            shown.add_row(
                f"{kind}, {num_threads} thread{'s' if num_threads != '1' else ''}",
                *(" / ".join(f"{value:.3f}" for value in cell.values()) for cell in cells),
            )
    for metric in first.get("quality", {}):
        shown.add_row(f"{metric}, {part}", *(f"{row['quality'][metric]:.4f}" for row in precisions.values()))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(shown)


if __name__ == "__main__":
    sys.exit(main())
