"""What variety and margin cost: `python -m benchmarks.quality reranking --bundle bundles --data data/beauty`.

Ranks all items for every user of the validation split with the bundle's ranker, once, and keeps the best 500.
Then arranges them by one rule at a time, from mild to strong, and measures NDCG@10 against intra-list
diversity@10 (mean of 1 - cosine, of the bundle's graph vectors and of its content vectors) and against
expected margin. --over says which vectors the rules for variety go by, and which diversity counts.

Of each rule, the setting with the most of what it is for at a loss of at most 3% of NDCG@10 is chosen there,
and measured on the test split, beside the bundle's default policy. The bundle must not know the answers of
the validation split: train it with --no-refit. Where the catalog has no margins, some are drawn with a fixed
seed, independent of everything, and the results say so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from engine.policies import item_facts
from reranking.items import ItemFacts
from reranking.policy import Policy, policies_from_config, single_policy
from reranking.rerank import rerank
from training import metrics
from training.data.splits import Holdout
from training.evaluate import Questions, load_questions, ranking_scores

NUM_RANKED = 500
LENGTH = 10
MAX_LOSS = 0.03  # of NDCG@10
BLOCK = 128
GRAPH, CONTENT = "diversity", "content_diversity"  # by whose vectors

Over = Literal["graph", "content"]


def goal(family: str, over: Over) -> str:
    """Return what a family of settings is for."""
    return "margin" if family == "margin" else {"graph": GRAPH, "content": CONTENT}[over]


def settings(temperature: float, over: Over = "graph") -> dict[str, list[list[dict[str, Any]]]]:
    """Return the policies to measure, by family, from mild to strong."""
    return {
        "mmr": [
            [{"rule": "mmr", "relevance_weight": w, "over": over}]
            for w in (0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
        ],
        "dpp": [
            [{"rule": "dpp", "relevance_weight": w, "over": over}] for w in (0.99, 0.97, 0.95, 0.9, 0.85, 0.8)
        ],
        "max_sum": [
            [{"rule": "max_sum", "relevance_weight": w, "temperature": temperature, "over": over}]
            for w in (0.99, 0.985, 0.98, 0.976, 0.973, 0.97, 0.967, 0.96, 0.95, 0.93)
        ],
        "cap": [[{"rule": "cap", "field": "category", "max_items": m}] for m in (5, 4, 3, 2, 1)],
        "margin": [
            [{"rule": "margin", "of": "share", "relevance_per_unit": rate}]
            for rate in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
        ],
    }


@dataclass(frozen=True)
class Ranked:
    """The best items of each of Q users, and what they wanted."""

    rows: NDArray[np.int32]  # [Q, N]
    scores: NDArray[np.float32]  # [Q, N]
    targets: list[NDArray[np.int32]]  # Q


def rank_all(bundle: Bundle, holdout: Holdout, repeats: bool) -> Ranked:
    """Return the best NUM_RANKED of all items for every question, items of the history left out.

    Scores are those that the bundle serves with, transitions included.
    """
    if bundle.scorer is None:
        raise ValueError(f"{bundle.path} has no ranker; expected a bundle with one")
    length = min(NUM_RANKED, bundle.catalog.num_items)
    rows, scores = [], []
    for start in track(range(0, len(holdout), BLOCK), "ranking", console=Console(stderr=True)):
        questions = Questions(holdout, np.arange(start, min(start + BLOCK, len(holdout))), repeats)
        found = ranking_scores(bundle, questions)
        found[:, 0] = -np.inf
        for row, items in zip(found, questions.not_asked_for, strict=True):
            row[items] = found[:, 1:].min()  # last, and finite: a rule needs numbers
        top = np.argpartition(-found, length - 1, axis=1)[:, :length]
        best = np.take_along_axis(found, top, axis=1)
        order = np.argsort(-best, axis=1, kind="stable")
        rows.append(np.take_along_axis(top, order, axis=1).astype(np.int32))
        scores.append(np.take_along_axis(best, order, axis=1))
    return Ranked(
        np.concatenate(rows), np.concatenate(scores), [holdout.target(q) for q in range(len(holdout))]
    )


def measure(ranked: Ranked, policy: Policy, facts: ItemFacts, label: str) -> dict[str, float]:
    """Return the means over users of the metrics of a slate of LENGTH items."""
    rules = policy.bound_to(facts).rules
    columns = {column for rule in rules for column in rule.reads}
    groups = {group for rule in rules for group in rule.groups}
    categories, margins = facts.groups["category"], facts.margins
    vectors, content = facts.vectors, facts.content_vectors
    assert margins is not None
    assert vectors is not None
    assert content is not None
    seen = np.zeros(ranked.rows.shape[1], np.bool_)
    slates, totals = [], []
    for rows, scores, targets in track(
        zip(ranked.rows, ranked.scores, ranked.targets, strict=True),
        label,
        total=len(ranked.rows),
        console=Console(stderr=True),
    ):
        items = facts.ranked(rows, scores, seen, columns=columns, groups=groups)
        slate = rerank(items, rules, LENGTH).rows
        slates.append(slate)
        totals.append(
            (
                metrics.ndcg(metrics.places_in_list(slate, targets), LENGTH),
                metrics.diversity(slate, vectors),
                metrics.diversity(slate, content),
                metrics.expected_margin(slate, margins),
                metrics.group_entropy(slate, categories),
            )
        )
    names = ("ndcg", GRAPH, CONTENT, "margin", "category_entropy")
    means = {
        f"{name}@{LENGTH}": float(mean) for name, mean in zip(names, np.mean(totals, axis=0), strict=True)
    }
    return means | {f"coverage@{LENGTH}": metrics.coverage(slates, facts.num_items)}


def facts_with_margins(bundle: Bundle) -> tuple[ItemFacts, bool]:
    """Return what rules may know of the items, with margins, and whether these are simulated."""
    facts = item_facts(bundle.catalog, bundle.item_vectors, bundle.content_vectors)
    if facts.margins is not None:
        return facts, False
    drawn = np.random.default_rng(0).beta(4, 8, facts.num_items)
    return replace(facts, margins=np.concatenate([[np.nan], drawn])), True


def compare(
    bundle: Bundle, data: Path, max_users: int | None, temperature: float, over: Over = "graph"
) -> dict[str, Any]:
    """Return the curves on validation and, of each family, the chosen setting on test."""
    facts, is_simulated = facts_with_margins(bundle)
    no_rules = single_policy([], "no rules")[None]
    default = policies_from_config(bundle.manifest["policies"])[None]
    split, validation = load_questions(bundle, data, "validation", max_users)
    _, test_questions = load_questions(bundle, data, "test", max_users)
    ranked = rank_all(bundle, validation, split.repeats)
    plain = measure(ranked, no_rules, facts, "no rules")
    curves: dict[str, list[dict[str, Any]]] = {
        family: [
            {"policy": policy, **measure(ranked, single_policy(policy)[None], facts, family)}
            for policy in policies
        ]
        for family, policies in settings(temperature, over).items()
    }
    floor = (1 - MAX_LOSS) * plain[f"ndcg@{LENGTH}"]
    chosen: dict[str, list[dict[str, Any]]] = {}
    for family, curve in curves.items():
        bearable = [point for point in curve if point[f"ndcg@{LENGTH}"] >= floor]
        if bearable:
            wanted = f"{goal(family, over)}@{LENGTH}"
            chosen[family] = max(bearable, key=lambda point: point[wanted])["policy"]
    ranked = rank_all(bundle, test_questions, split.repeats)
    test: dict[str, Any] = {"no rules": measure(ranked, no_rules, facts, "no rules")}
    test["default policy"] = measure(ranked, default, facts, default.name)
    for family, policy in chosen.items():
        rules = single_policy(policy)[None]
        test[family] = {"policy": policy, **measure(ranked, rules, facts, family)}
    return {
        "data": bundle.manifest["data"]["name"],
        "bundle": bundle.version,
        "num_users": {"validation": len(validation), "test": len(test_questions)},
        "num_ranked": ranked.rows.shape[1],
        "over": over,
        "margins_simulated": is_simulated,
        "validation": {"no rules": plain, **curves},
        "test": test,
    }


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print every point, with its change against no rules."""
    simulated = "; margins are SIMULATED" if results["margins_simulated"] else ""
    for part in ("validation", "test"):
        plain = results[part]["no rules"]
        table = Table(title=f"{results['data']}, {part}, {results['num_users'][part]:,} users{simulated}")
        table.add_column("policy")
        for key in plain:
            table.add_column(key, justify="right")
            table.add_column("", justify="right")
        for family, points in results[part].items():
            for point in points if isinstance(points, list) else [points]:
                cells = []
                for key, before in plain.items():
                    cells += [f"{point[key]:.4f}", f"{point[key] / before - 1:+.1%}" if before else "-"]
                table.add_row(_label(point.get("policy"), family), *cells)
        console.print(table)


def _label(policy: list[dict[str, Any]] | None, family: str) -> str:
    if policy is None:
        return family
    return family + " " + " ".join(f"{v}" for rule in policy for k, v in rule.items() if k != "rule")


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw NDCG against diversity and against margin, on validation, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    plain = results["validation"]["no rules"]
    for panel, measured in zip(axes, (goal("max_sum", results["over"]), "margin"), strict=True):
        for family, points in results["validation"].items():
            if family == "no rules" or goal(family, results["over"]) != measured:
                continue
            line = [plain, *points]
            panel.plot(
                [point[f"{measured}@{LENGTH}"] for point in line],
                [point[f"ndcg@{LENGTH}"] for point in line],
                marker="o",
                label=family,
            )
        panel.axhline((1 - MAX_LOSS) * plain[f"ndcg@{LENGTH}"], linestyle=":", label=f"{MAX_LOSS:.0%} loss")
        panel.set_xlabel(f"{measured}@{LENGTH}")
        panel.set_ylabel(f"NDCG@{LENGTH}")
        panel.legend()
    axes[1].set_title("simulated margins" if results["margins_simulated"] else "margins of the catalog")
    axes[0].set_title(f"{results['data']}, validation")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison: a table on stdout, JSON and PNG where asked."""
    parser = ArgumentParser(prog="python -m benchmarks.quality reranking", description=__doc__)
    parser.add_argument(
        "--bundle", type=Path, required=True, help="A bundle, or a directory of bundles: the newest one."
    )
    parser.add_argument("--data", type=Path, required=True, help="The data set directory it was trained on.")
    parser.add_argument("--max_users", type=int, default=None, help="Ask a fixed random part of the users.")
    parser.add_argument("--over", type=Over, default="graph", help="Vectors that say what is alike.")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="Of max_sum's softmax, beside the bundle's."
    )
    parser.add_argument(
        "--json", type=str, default=None, help="File for all figures; - for stdout, no table."
    )
    parser.add_argument("--png", type=Path, default=None, help="File for the curves.")
    options = parser.parse_args(argv)
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        print("benchmarks.quality_reranking: --png needs matplotlib, which is not installed", file=sys.stderr)
        return 2
    try:
        bundle = Bundle.load(resolve_bundle(options.bundle), num_threads=os.cpu_count() or 1)
        results = compare(bundle, options.data, options.max_users, options.temperature, options.over)
    except (ValueError, OSError) as error:
        print(f"benchmarks.quality_reranking: {error}", file=sys.stderr)
        return 2
    if options.png is not None:
        draw(results, options.png)
    text = json.dumps(results, indent=2)
    if options.json == "-":
        print(text)
        return 0
    if options.json is not None:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    print_table(results, Console(width=None if sys.stdout.isatty() else 160))
    return 0


if __name__ == "__main__":
    sys.exit(main())
