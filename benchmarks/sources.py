"""What each candidate source finds: `python -m benchmarks.sources bundles --data data/beauty`.

Recall of the held-out items among 500 and 1,000 candidates, of each source alone and of all of them merged by
the bundle's quotas, or by others (--quotas '{"sequence": 0.8, "popular": 0.2}'); and the funnel: how much of
the ranker's full-ranking NDCG@10 is left in the slate when 500 candidates reach the ranker and the rules are
off.
Items of the history take no part; where repeats are normal, that of the last event alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from engine.history import not_asked_for
from engine.pipeline import RecommendationPipeline, Visitor
from retrieval.sources import Candidates, merge
from training.evaluate import evaluate, load_questions, protocol_of, served_with

CUTOFFS = (500, 1000)
FUNNEL_CANDIDATES = 500
MERGED = "all, merged"


def measure(
    bundle: Bundle, data: Path, part: Literal["test", "validation"], max_users: int | None
) -> dict[str, Any]:
    """Return recall and share of questions of each source, and the funnel, as --json prints them."""
    split, holdout = load_questions(bundle, data, part, max_users)
    pipeline = RecommendationPipeline(bundle)
    has_times = bundle.manifest["data"]["time"] == "unix"
    names = [source.name for source in pipeline.sources]
    recall = {name: dict.fromkeys(CUTOFFS, 0.0) for name in [*names, MERGED]}
    num_found = dict.fromkeys([*names, MERGED], 0)
    given = dict.fromkeys(names, 0)  # items of the merged list, by the source that gave them
    for question in track(range(len(holdout)), "questions", console=Console(stderr=True)):
        history, target = holdout.history(question), holdout.target(question)
        now = int(holdout.events.timestamps[holdout.ends[question]]) if has_times else None
        context = holdout.events.context_at(int(holdout.ends[question]))
        query = pipeline.query(Visitor(history, user_row=int(holdout.users[question])), now, context)
        allowed = np.ones(bundle.catalog.num_items + 1, np.bool_)
        allowed[0] = False
        allowed[not_asked_for(history.items, split.repeats)] = False
        parts = [source.find(query, allowed, max(CUTOFFS)) for source in pipeline.sources]
        for cutoff in CUTOFFS:
            first = [Candidates(p.rows[:cutoff], p.scores[:cutoff], p.source) for p in parts]
            merged = merge(first, pipeline.quotas, cutoff)
            for name, rows in zip([*names, MERGED], [*(p.rows for p in first), merged.rows], strict=True):
                recall[name][cutoff] += np.isin(target, rows).mean() / len(holdout)
        for part_found in parts:
            num_found[part_found.source] += len(part_found)
        num_found[MERGED] += len(merged.rows)
        for name, count in zip(names, np.bincount(merged.source_of, minlength=len(names)), strict=True):
            given[name] += int(count)

    full = "ranking" if bundle.scorer else "retrieval"
    plain = served_with(bundle, rules=False, num_candidates=FUNNEL_CANDIDATES)
    results = evaluate(plain, data, part, max_users, stages=(full, "slate"))
    slate, ranked = results["slate"]["ndcg@10"], results[full]["ndcg@10"]
    return {
        "data": bundle.manifest["data"]["name"],
        "bundle": bundle.version,
        "split": split.name,
        "protocol": protocol_of(bundle),
        "part": part,
        "num_users": len(holdout),
        "num_items": bundle.catalog.num_items,
        "sources": {
            name: {
                "quota": dict(zip(names, pipeline.quotas, strict=True)).get(name, 1.0),
                "mean_found": num_found[name] / max(len(holdout), 1),
                "mean_given": given.get(name, num_found[MERGED]) / max(len(holdout), 1),
                **{f"recall@{cutoff}": value for cutoff, value in recall[name].items()},
            }
            for name in [*names, MERGED]
        },
        "funnel": {
            "num_candidates": FUNNEL_CANDIDATES,
            "slate_ndcg@10": slate,
            "full_ranking": full,
            "full_ranking_ndcg@10": ranked,
            "kept": slate / ranked if ranked else None,
        },
    }


def with_quotas(bundle: Bundle, quotas: dict[str, float]) -> Bundle:
    """Return a bundle whose sources have these quotas; 0 for those that are not named.

    Raises:
        ValueError: a source that the bundle does not have.
    """
    settings = bundle.manifest["pipeline"]
    names = [source["source"] for source in settings["sources"]]
    if unknown := sorted(quotas.keys() - set(names)):
        raise ValueError(f"quotas name {', '.join(unknown)}; expected of {', '.join(names)}")
    sources = [source | {"quota": quotas.get(source["source"], 0.0)} for source in settings["sources"]]
    return dataclasses.replace(
        bundle, manifest=bundle.manifest | {"pipeline": settings | {"sources": sources}}
    )


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Print the sources and the funnel."""
    asked = f"{result['split']}, {result['protocol']}, {result['part']}"
    title = f"{result['data']}: {asked}, {result['num_users']:,} users"
    table = Table(title=f"{title}, {result['num_items']:,} items")
    table.add_column("source")
    for heading in ("quota", f"found of {max(CUTOFFS):,}", "given", *(f"recall@{k}" for k in CUTOFFS)):
        table.add_column(heading, justify="right")
    for name, row in result["sources"].items():
        counts = f"{row['mean_found']:.0f}", f"{row['mean_given']:.0f}"
        table.add_row(name, f"{row['quota']:g}", *counts, *(f"{row[f'recall@{k}']:.4f}" for k in CUTOFFS))
    console.print(table)
    funnel = result["funnel"]
    kept = "-" if funnel["kept"] is None else f"{funnel['kept']:.1%}"
    console.print(
        f"funnel: slate NDCG@10 {funnel['slate_ndcg@10']:.4f} with {funnel['num_candidates']} candidates and "
        f"rules off = {kept} of {funnel['full_ranking_ndcg@10']:.4f}, all items by {funnel['full_ranking']}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: tables on stdout, or JSON with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.sources", description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--data", type=Path, required=True, help="The data set directory it was trained on.")
    parser.add_argument(
        "--part", type=Literal["test", "validation"], default="test", help="Tune on validation, report test."
    )
    parser.add_argument("--max_users", type=int | None, default=None, help="Ask a fixed part of the users.")
    parser.add_argument("--quotas", type=dict[str, float] | None, default=None, help="By source; see above.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        if options.max_users is not None and options.max_users < 1:
            raise ValueError(f"max_users is {options.max_users}; expected 1 or more")
        bundle = Bundle.load(resolve_bundle(options.bundle), num_threads=os.cpu_count() or 1)
        if options.quotas is not None:
            bundle = with_quotas(bundle, options.quotas)
        result = measure(bundle, options.data, options.part, options.max_users)
    except (ValueError, OSError) as error:
        print(f"benchmarks.sources: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_tables(result, Console(width=None if sys.stdout.isatty() else 120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
