"""What folding in costs: `python -m benchmarks.new_users --data data/gowalla`.

A share of the users is withheld from training entirely, then asked with their events as history alone.
Beside them stand the same users in a training that had them, answered by their trained vectors. Both
trainings follow a recipe of `benchmarks.quality retrieval` and learn from train and validation together.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.full_ranking import Scores
from benchmarks.quality_retrieval import CUTOFF, ENCODERS, accuracy, train_vectors
from engine.arguments import ArgumentParser
from retrieval.fold_in import fold_in
from training.data.splits import Holdout, Split, SplitOptions, final_split, load_split
from training.stages import default_precision, keep_freed_memory, quiet_lightning


def withhold(split: Split, share: float, seed: int) -> tuple[Split, Holdout]:
    """Return the split without a share of the test users' training events, and these users' questions.

    Raises:
        ValueError: the share is not between 0 and 1, or leaves nobody to withhold or to learn from.
    """
    num_users = len(split.test)
    chosen = np.sort(np.random.default_rng(seed).permutation(num_users)[: round(share * num_users)])
    if not 0 < len(chosen) < num_users:
        raise ValueError(f"share is {share}, of {num_users} users; expected some, and not all")
    questions = split.test.take(chosen)
    stay = ~np.isin(split.train.users, questions.users)
    return dataclasses.replace(split, train=split.train.take(stay)), questions


def compare(
    directory: Path, model: str, *, share: float, seed: int, precision: str, epochs: int | None = None
) -> dict[str, Any]:
    """Return the recall and NDCG of the withheld users by either way, and their ratio; see main's options."""
    data = load_split(directory, SplitOptions())
    split = final_split(data)
    without, questions = withhold(split, share, seed)
    recipe = ENCODERS[model]
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs)
    console = Console(stderr=True)
    rows: dict[str, dict[str, float]] = {}
    for name, learned in (("withheld, folded in", without), ("trained", split)):
        console.print(f"{model}: fitting, for the users as {name}")
        vectors = train_vectors(recipe, directory, learned, seed, precision)
        scores = _folded(vectors) if learned is without else _trained(vectors)
        rows[name] = accuracy(scores, questions, repeats=split.repeats)
    ratio = {key: value / rows["trained"][key] for key, value in rows["withheld, folded in"].items()}
    return {
        "data": data.info.name,
        "simulated": data.info.simulated,
        "model": model,
        "seed": seed,
        "num_withheld": len(questions),
        "rows": rows,
        "ratio": ratio,
    }


def _folded(vectors: dict[str, NDArray[np.float32]]) -> Scores:
    items, degrees = vectors["item_vectors"], vectors["item_degrees"]

    def scores(questions: Holdout) -> NDArray[np.float32]:
        histories = [questions.history(q).wanted for q in range(len(questions))]
        queries = np.stack([fold_in(items, degrees, history) for history in histories])
        products: NDArray[np.float32] = queries @ items.T
        return products

    return scores


def _trained(vectors: dict[str, NDArray[np.float32]]) -> Scores:
    return lambda questions: vectors["user_vectors"][questions.users] @ vectors["item_vectors"].T


def main(argv: list[str] | None = None) -> int:
    """Print the table on stdout, and write everything to a file with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.new_users", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="A data set directory.")
    parser.add_argument("--model", type=str, default="lightgcn", help=f"Of {', '.join(ENCODERS)}.")
    parser.add_argument("--share", type=float, default=0.1, help="Of the test users, to withhold.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draw and of the trainings.")
    parser.add_argument("--epochs", type=int, default=None, help="In place of the recipe's.")
    parser.add_argument("--precision", type=str, default=default_precision(), help="Of lightning.Trainer.")
    parser.add_argument("--json", type=Path, default=None, help="File for all figures.")
    options = parser.parse_args(argv)
    quiet_lightning()
    keep_freed_memory()
    try:
        if options.model not in ENCODERS:
            raise ValueError(f"model is {options.model!r}; expected one of {', '.join(ENCODERS)}")
        results = compare(
            options.data,
            options.model,
            share=options.share,
            seed=options.seed,
            precision=options.precision,
            epochs=options.epochs,
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks.new_users: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    simulated = ", SIMULATED data" if results["simulated"] else ""
    table = Table(
        title=f"{results['data']}{simulated}: {results['model']}, {results['num_withheld']:,} users withheld"
    )
    for heading in ("users", f"recall@{CUTOFF}", f"ndcg@{CUTOFF}"):
        table.add_column(heading)
    for name, row in (*results["rows"].items(), ("ratio", results["ratio"])):
        table.add_row(name, f"{row['recall']:.4f}", f"{row['ndcg']:.4f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
