"""Items that nobody has touched yet: `python -m benchmarks.new_items --data data/beauty --out runs/new`.

A share of the items is withheld from training entirely: both stages learn from the training events of all
other items, and validation, which chooses the epochs, asks for other items alone. Then the questions of a
part whose target is withheld are asked, and only the withheld items are ranked: recall@10 is the share of
questions whose target is among the first ten of them, the items of the history left out, or where repeats
are normal that of the last event. Histories are whole: who has touched a withheld item before has it in the
history.

    chance            ten drawn at random
    text similarity   cosine of an item's text vector with the mean of those of the history
    the newest first  the same, each event of the history counting by its age, as the recipe has it
    ranker            the ranker as the recipe has it: nothing tells withheld items apart, so this is chance
    content           a ranker that has learned to read what items are

Both rankers also answer as they would be exported, but for the transitions, which no withheld item has:
withheld items get the vectors of the trained ones most like them (training/new_items.py). Beside these stands
what all items ranked give: recall@10 of the questions for withheld items, NDCG@10 of those for other items,
and NDCG@10 of both together.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from benchmarks.full_ranking import Scores, question_metrics, recency
from benchmarks.quality_fusion import SETTINGS, keep_settings, of_training
from engine.arguments import ArgumentParser
from ranking.ranker import HybridRanker
from retrieval.new_items import like_items
from retrieval.sparse import SparseRows
from training.answers import ranker_scores
from training.commit import source_commit
from training.content import content_features, encoder_name, text_vectors
from training.data.dataset import Dataset
from training.data.splits import Holdout, Split, load_split
from training.export import compress, compressed_for
from training.new_items import give_new_items_vectors
from training.stages import keep_freed_memory, quiet_lightning
from training.train import (
    EMBEDDINGS,
    add_graph_scores,
    build_parser,
    choose_weights,
    content_of,
    fit_folds,
    fit_ranking,
    fit_retrieval,
    num_folds_of,
    recipe_of,
)

CUTOFF = 10
RECALL, NDCG = f"recall@{CUTOFF}", f"ndcg@{CUTOFF}"


def withhold(split: Split, share: float, seed: int) -> tuple[Split, NDArray[np.bool_]]:
    """Return the split without a share of the items in training and validation, and which: [I+1] bool.

    Raises:
        ValueError: the share is not between 0 and 1, or leaves no item to withhold or to learn from.
    """
    num_items = split.train.num_items
    chosen = np.random.default_rng(seed).permutation(num_items)[: round(share * num_items)] + 1
    if not 0 < len(chosen) < num_items:
        raise ValueError(f"share is {share}, of {num_items} items; expected some, and not all")
    withheld = np.zeros(num_items + 1, np.bool_)
    withheld[chosen] = True
    train = split.train.take(~withheld[split.train.items])
    validation = asking_for(split.validation, ~withheld)
    return dataclasses.replace(split, train=train, validation=validation), withheld


def asking_for(holdout: Holdout, wanted: NDArray[np.bool_]) -> Holdout:
    """Return the questions all of whose targets are wanted.

    Args:
        holdout: the questions.
        wanted: [I+1] bool.
    """
    if not len(holdout):
        return holdout
    fits = np.logical_and.reduceat(wanted[holdout.targets], holdout.target_offsets[:-1])
    return holdout.take(np.flatnonzero(fits))


def among(scores: Scores, candidates: NDArray[np.bool_]) -> Scores:
    """Return scores that leave out all items but the candidates [I+1]."""

    def only(questions: Holdout) -> NDArray[np.float32]:
        table = scores(questions).astype(np.float32)
        table[:, ~candidates] = -np.inf
        return table

    return only


def text_similarity(vectors: NDArray[np.float32], half_life: float | None = None) -> Scores:
    """Return the products of each item's vector with the mean of those of the history.

    Args:
        vectors: [I+1, C] float32, of length 1 or zero.
        half_life: of an event of the history, in events; None counts all alike.
    """

    def scores(questions: Holdout) -> NDArray[np.float32]:
        histories = [history for _, history, _ in questions]
        sums = [recency(history, half_life) @ vectors[history.wanted] for history in histories]
        found: NDArray[np.float32] = np.stack(sums) @ vectors.T
        return found

    return scores


def word_similarity(features: SparseRows, half_life: float | None = None) -> Scores:
    """Return the same with the items' words and attributes, each for itself, weighted by rarity.

    Args:
        features: [I+1, F], rows of length 1 or empty (retrieval.new_items.tfidf).
        half_life: likewise.
    """
    having = features.transposed()

    def scores(questions: Holdout) -> NDArray[np.float32]:
        found = np.zeros((len(questions), len(features)), np.float32)
        for number, (_, history, _) in enumerate(questions):
            columns, sums = features.weighted_sum(history.wanted, recency(history, half_life))
            rows, products = having.weighted_sum(columns, sums)
            found[number, rows] = products
        return found

    return scores


def compare(
    directory: Path,
    out: Path,
    options: list[str],
    *,
    share: float,
    seed: int,
    part: Literal["test", "validation"],
) -> dict[str, Any]:
    """Return the figures of the module's docstring; see main's options.

    Raises:
        ValueError: `out` holds results of other data or settings, or there is nothing to compare.
    """
    parser = build_parser()
    arguments = [str(directory), *(f"--{option}" for option in options)]
    config = parser.parse_args(arguments)
    reading = parser.parse_args([*arguments, "--ranking.model.content_as=input"])
    settings, reading_settings = (partial(parser.instantiate, one) for one in (config, reading))
    content_options = settings().content
    data = load_split(directory, settings().split)
    split, withheld = withhold(data.split, share, seed)
    holdout = data.split.test if part == "test" else data.split.validation
    asked, others = asking_for(holdout, withheld), asking_for(holdout, ~withheld)
    out = out / f"share{share:g}-seed{seed}"
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise ValueError(f"{out} holds results that do not say their settings; expected another --out")
    whole = recipe_of(parser, config)
    # No transitions lead to what nobody has touched.
    pipeline = whole["pipeline"] | {"transition_weight": 0.0}
    # Of what is for serving a model nothing else changes anything here, and the seed is not the recipe's own.
    weighed = {name: pipeline.get(name) for name in ("graph_weight", "half_life_events")}
    kept = {"fingerprint": data.info.fingerprint, "share": share, "seed": seed, "weighed": weighed}
    keep_settings(out, kept | {"recipe": of_training(whole)})
    content = content_of(directory, content_options, out)
    if content is None:
        raise ValueError("the catalog says nothing of its items, or content.encoder is none")
    chosen = fit_retrieval(directory, split, out, settings, seed, resume=True)
    vectors = load_file(out / EMBEDDINGS)

    def means(scores: Scores, questions: Holdout) -> dict[str, float]:
        found = question_metrics(scores, questions, [RECALL, NDCG], repeats=split.repeats)
        return {name: float(values.mean()) for name, values in found.items()}

    def figures(ranker: HybridRanker) -> dict[str, float]:
        scores = ranker_scores(ranker)
        of_all, of_others = means(scores, asked), means(scores, others)[NDCG]
        return {
            "recall": means(among(scores, withheld), asked)[RECALL],
            "recall_of_all": of_all[RECALL],
            "others_ndcg": of_others,
            # Questions for items of both kinds are in neither.
            "ndcg": float(np.average([of_all[NDCG], of_others], weights=[len(asked), len(others)])),
        }

    items = Dataset.open(directory).items.collect()
    texts = text_vectors(items, content_options, directory.resolve().parent / "text-vectors")
    words = content_features(items)
    rows: dict[str, dict[str, float]] = {"chance": {"recall": min(1.0, CUTOFF / int(withheld.sum()))}}
    for half_life in dict.fromkeys((None, pipeline.get("half_life_events"))):
        how = ", the newest first" if half_life else ""
        for name, likeness in (
            ("text similarity", text_similarity(texts, half_life)),
            ("word similarity", word_similarity(words, half_life)),
        ):
            rows[f"{name}{how}"] = {"recall": means(among(likeness, withheld), asked)[RECALL]}
    new, degrees = np.flatnonzero(withheld).astype(np.int32), split.train.item_counts().astype(np.float32)
    like = like_items(degrees, words, new)
    commits: dict[str, str | None] = {}
    for name, its in (("ranker", settings), ("content", reading_settings)):
        done = out / name / f"{part}.json"
        if not done.is_file():
            num_folds = num_folds_of(its().ranking, split, content)
            ranker, _ = fit_ranking(
                directory,
                split,
                out / EMBEDDINGS,
                out / name,
                its,
                seed,
                resume=True,
                content=content,
                folds=fit_folds(directory, split, out, its, seed, True, chosen, num_folds),
            )
            alone = figures(ranker)
            weights = choose_weights(ranker, vectors, split, pipeline)
            add_graph_scores(ranker, vectors, weights.graph, pipeline.get("half_life_events"))
            compress(ranker, compressed_for(split.train))
            give_new_items_vectors(ranker, degrees, new, like)
            found = {name: alone, f"{name}, exported": figures(ranker)}
            done.write_text(json.dumps({"commit": source_commit(), "rows": found}) + "\n", encoding="utf-8")
        told = json.loads(done.read_text(encoding="utf-8"))
        rows |= told["rows"]
        commits[name] = told["commit"]
    return {
        "data": data.info.name,
        "simulated": data.info.simulated,
        "split": split.name,
        "part": part,
        "seed": seed,
        "encoder": encoder_name(content_options),
        "num_withheld": int(withheld.sum()),
        "num_questions": len(asked),
        "num_others": len(others),
        "commits": commits,
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, print the table on stdout, and write everything to a file with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.new_items", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="A data set directory.")
    parser.add_argument("--out", type=Path, required=True, help="Directory of the trainings; goes on there.")
    parser.add_argument("--share", type=float, default=0.05, help="Of the items, to withhold.")
    parser.add_argument("--seed", type=int, default=0, help="Of the draw and of the trainings.")
    parser.add_argument(
        "--part", type=Literal["test", "validation"], default="test", help="Tune on validation, report test."
    )
    parser.add_argument(
        "--options",
        type=str,
        nargs="+",
        default=[],
        help="Of `trirank train`: --options ranking.trainer.max_epochs=12 content.encoder=lsa",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="File for all figures.")
    options = parser.parse_args(argv)
    quiet_lightning()
    keep_freed_memory()
    try:
        results = compare(
            options.data,
            options.out,
            options.options,
            share=options.share,
            seed=options.seed,
            part=options.part,
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks.new_items: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    simulated = ", SIMULATED data" if results["simulated"] else ""
    table = Table(
        title=f"{results['data']}{simulated}: {results['num_withheld']:,} items withheld, "
        f"{results['num_questions']:,} questions of {results['part']} for them, texts by {results['encoder']}"
    )
    table.add_column("")
    headings = {
        "recall": f"{RECALL} among withheld",
        "recall_of_all": f"among all, {RECALL}",
        "others_ndcg": f"other questions, {NDCG}",
        "ndcg": f"all questions, {NDCG}",
    }
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for name, row in results["rows"].items():
        table.add_row(name, *(f"{row[key]:.4f}" if key in row else "-" for key in headings))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
