"""Which vector to search with: `python -m benchmarks.query_vectors bundles --data data/beauty`.

Compares, on the vectors of a bundle, the trained user vector with the one folded in from the history, over
all items. The validation targets come right after what training saw; the test targets one event later, which
only the history knows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from retrieval.fold_in import fold_in
from training.data.splits import Holdout
from training.evaluate import load_questions, protocol_of
from training.metrics import mean_accuracy

CUTOFFS = (20, 500)
BLOCK = 256


def compare(bundle: Bundle, holdout: Holdout, repeats: bool) -> dict[str, dict[str, float]]:
    """Return {"trained user vector" | "folded in": {"recall@20": ...}} over all questions of a holdout."""
    totals: dict[str, dict[str, float]] = {}
    for start in track(range(0, len(holdout), BLOCK), "questions", console=Console(stderr=True)):
        questions = range(start, min(start + BLOCK, len(holdout)))
        histories = [holdout.history(q).items for q in questions]
        targets = [holdout.target(q) for q in questions]
        queries: dict[str, NDArray[np.float32]] = {
            "trained user vector": bundle.user_vectors[holdout.users[start : start + BLOCK]],
            "folded in": np.stack(
                [
                    fold_in(bundle.item_vectors, bundle.item_degrees, holdout.history(q).wanted)
                    for q in questions
                ]
            ),
        }
        for name, vectors in queries.items():
            means = mean_accuracy(bundle.index.scores(vectors), histories, targets, CUTOFFS, repeats=repeats)
            total = totals.setdefault(name, dict.fromkeys(means, 0.0))
            for key, value in means.items():
                total[key] += value * len(histories) / len(holdout)
    return totals


def main(argv: list[str] | None = None) -> int:
    """Run the comparison: a table on stdout."""
    parser = ArgumentParser(prog="python -m benchmarks.query_vectors", description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--data", type=Path, required=True, help="The data set directory it was trained on.")
    options = parser.parse_args(argv)
    try:
        bundle = Bundle.load(resolve_bundle(options.bundle))
        # A refitted bundle has learned from what validation asks for.
        parts: list[Literal["validation", "test"]] = ["validation", "test"]
        asked = parts[1:] if protocol_of(bundle) == "refit" else parts
        questions = {part: load_questions(bundle, options.data, part, None) for part in asked}
    except ValueError as error:
        print(f"benchmarks.query_vectors: {error}", file=sys.stderr)
        return 2
    split, _ = questions["test"]
    name = bundle.manifest["data"]["name"]
    table = Table(title=f"{name}, split {split.name}, {protocol_of(bundle)}, all items ranked")
    columns = [f"{metric}@{k}" for k in CUTOFFS for metric in ("recall", "ndcg")]
    for heading in ("", "", *columns):
        table.add_column(heading)
    for part, (_, holdout) in questions.items():
        for name, means in compare(bundle, holdout, split.repeats).items():
            table.add_row(part, name, *(f"{means[column]:.4f}" for column in columns))
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
