"""`trirank evaluate`: what the served artefacts find, stage by stage, ranked among all items.

The questions come from the data set, split as the bundle was trained; the answers come from the bundle: its
FAISS vectors, its ONNX ranker, its pipeline. Nothing of torch takes part. What the bundle has learned from is
its protocol, "strict" or "refit" (training/data/splits.py); every table and every JSON says which.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from engine.history import left_padded, not_asked_for
from engine.item_list import largest
from engine.pipeline import (
    RecommendationPipeline,
    Visitor,
    default_head_weights,
    query_vector,
    score_temperature,
    transition_weight,
)
from engine.policies import item_facts
from engine.policy_files import PolicyFiles
from training import metrics
from training.data.context import encoded_context
from training.data.dataset import fingerprint
from training.data.splits import (
    Holdout,
    Protocol,
    Split,
    SplitOptions,
    load_split,
    questions_at_once,
    split_as_trained,
)
from training.slices import BY_ITEM, DEFINITIONS, HEAD_ALONE, head_share, target_slices
from training.transitions import bonuses

SLATE_LENGTH = 50  # items that the pipeline is asked for
LIST_LENGTH = 10  # of the lists that coverage, diversity and the like look at
HALF_LIFE_DAYS = 30.0  # of freshness

STAGES = ("popularity", "retrieval", "ranking", "slate")


def evaluate(
    bundle: Bundle,
    data: Path,
    part: Literal["test", "validation"] = "test",
    max_users: int | None = None,
    stages: Sequence[str] = STAGES,
    policies: PolicyFiles | None = None,
    policy: str = "",
    *,
    slices: bool = False,
) -> dict[str, Any]:
    """Return the metrics of every stage, as `trirank evaluate --json` writes them.

    Items of a user's history take no part in a ranking; where the data set says that repeats are normal, that
    of the last event alone.
    Metrics are means over users; ties count by their expectation (training/metrics.py).

    Args:
        bundle: what to measure.
        data: the data set directory that the bundle was trained on.
        part: the questions to ask.
        max_users: ask this many, drawn with a fixed seed; all where None.
        stages: which to measure; ranking is left out where the bundle has no ranker.
        policies: to arrange slates by; the bundle's own where None.
        policy: which of them; "" for the default one.
        slices: whether to measure each slice of training/slices.py too.

    Raises:
        ValueError: the directory holds other data than the bundle was trained on, the bundle has learned
            from what the questions ask for, or there is no such policy.
    """
    split, holdout = load_questions(bundle, data, part, max_users)
    manifest = bundle.manifest
    pipeline = RecommendationPipeline(bundle, policies.load() if policies else None)
    chosen = pipeline.policy(policy)
    parts = target_slices(split.train, holdout, repeats=split.repeats) if slices else {}
    num_trained = len(np.unique(split.train.users))
    answers_of: dict[str, Callable[[Questions], _Answers]] = {
        "popularity": lambda q: _ranked(q, _popularity_scores(bundle, q)),
        "retrieval": lambda q: _ranked(q, retrieval_scores(bundle, q)),
        "ranking": lambda q: _ranked(q, ranking_scores(bundle, q)),
        "slate": _slate_answers(pipeline, policy),
    }
    if bundle.scorer is None:
        del answers_of["ranking"]
    cutoffs = sorted(
        {5, 10, 20, 100, 500, manifest["pipeline"]["num_ranked"], manifest["pipeline"]["num_candidates"]}
    )
    console = Console(stderr=True)
    columns = TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    results: dict[str, Any] = {}
    by_slice: dict[str, dict[str, Any]] = {name: _size(mask, holdout) for name, mask in parts.items()}
    with Progress(*columns, console=console) as progress:
        for name in stages:
            if name not in answers_of:
                continue
            task = progress.add_task(name, total=len(holdout))
            totals: list[dict[str, float]] = []
            totals_of: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
            lists: list[_List] = []
            for questions in _blocks(holdout, bundle.catalog.num_items, split.repeats):
                answers = answers_of[name](questions)
                accuracies = [metrics.accuracy(places, cutoffs) for places in answers.places]
                totals += accuracies
                for slice_name, mask in parts.items():
                    for row, places, whole in zip(questions.rows, answers.places, accuracies, strict=True):
                        inside = mask[holdout.target_offsets[row] : holdout.target_offsets[row + 1]]
                        if inside.all():
                            totals_of[slice_name].append(whole)
                        elif inside.any():
                            some = metrics.Places(places.first[inside], places.width[inside])
                            totals_of[slice_name].append(metrics.accuracy(some, cutoffs))
                lists += map(_List, answers.lists, questions.targets, questions.times)
                progress.advance(task, len(questions.users))
            results[name] = _mean_of_each(totals) | _list_metrics(lists, bundle, num_trained)
            for slice_name, found in totals_of.items():
                by_slice[slice_name][name] = _mean_of_each(found) or None
    return {
        "split": split.name,
        "protocol": protocol_of(bundle),
        "part": part,
        "num_users": len(holdout),
        "num_items": bundle.catalog.num_items,
        "history_excluded": not split.repeats,
        "slate_length": SLATE_LENGTH,
        "policy": chosen.name,
        "rules": [rule.name for rule in chosen.rules],
        "num_candidates": manifest["pipeline"]["num_candidates"],
        "bundle": bundle.version,
        "data": manifest["data"],
        "stages": list(results),
        **{name: results.get(name) for name in STAGES},
        **({"slices": by_slice} if slices else {}),
        **({"head_share": {name: head_share(by_slice, name) for name in results}} if slices else {}),
    }


def protocol_of(bundle: Bundle) -> Protocol:
    """Return what a bundle was trained on: "strict" or "refit"."""
    # Bundles that do not say were written before there was a refit.
    protocol: Protocol = bundle.manifest.get("training", {}).get("protocol", "strict")
    return protocol


def load_questions(
    bundle: Bundle, data: Path, part: Literal["test", "validation"], max_users: int | None
) -> tuple[Split, Holdout]:
    """Return the split that a bundle was trained on, and the questions of one part of it; see evaluate.

    The split's `train` is all that the bundle has learned from.
    """
    manifest = bundle.manifest
    if part == "validation" and protocol_of(bundle) == "refit":
        raise ValueError(
            f"part is 'validation', but {bundle.path} was fitted again on validation and knows the answers; "
            "expected test, or a bundle of `trirank train --no-refit`"
        )
    if "split" not in manifest.get("recipe", {}):
        raise ValueError(f"{bundle.path} does not say how its data was split; expected recipe.split")
    loaded = load_split(data, SplitOptions(**manifest["recipe"]["split"]))
    found = {"fingerprint": fingerprint(data), "time": loaded.info.time, "repeats": loaded.info.repeats}
    for key, value in found.items():
        if value != manifest["data"][key]:
            raise ValueError(
                f"{data} is not the data that {bundle.path} was trained on: "
                f"{key} is {value}, expected {manifest['data'][key]}"
            )
    holdout = loaded.split.test if part == "test" else loaded.split.validation
    if max_users is not None:
        holdout = holdout.sample(max_users)
    return split_as_trained(loaded, protocol_of(bundle)), holdout


def served_with(bundle: Bundle, *, rules: bool = True, num_candidates: int | None = None) -> Bundle:
    """Return a bundle with other settings of serving than its own.

    Args:
        bundle: whose parts to take.
        rules: False takes them away, but for drop_seen: to leave out the history is part of the question.
        num_candidates: of retrieval; None leaves the bundle's own.
    """
    manifest = dict(bundle.manifest)
    if not rules:
        manifest["policies"] = {"policies": {"no rules": {"rules": [{"rule": "drop_seen"}]}}}
    if num_candidates is not None:
        manifest["pipeline"] = manifest["pipeline"] | {"num_candidates": num_candidates}
    return dataclasses.replace(bundle, manifest=manifest)


class Questions:
    """Some questions of a holdout, as the stages take them.

    Args:
        holdout: all questions.
        rows: which of them.
        repeats: whether users return to items that they know.
    """

    def __init__(self, holdout: Holdout, rows: NDArray[np.int64], repeats: bool) -> None:
        self.rows = rows
        # A visitor asks when the first event to come is about to happen.
        self.times = holdout.events.timestamps[holdout.ends[rows]].tolist()
        self.events, self.ends = holdout.events, holdout.ends[rows]
        self.contexts = [holdout.events.context_at(int(end)) for end in self.ends]
        self.users = holdout.users[rows]
        self.visitor_histories = [holdout.history(int(q)) for q in rows]
        self.not_asked_for = [not_asked_for(history.items, repeats) for history in self.visitor_histories]
        self.targets = [holdout.target(int(q)) for q in rows]


class _Answers:
    """Where the targets of each question stand, and the first items of each list."""

    def __init__(self, places: list[metrics.Places], lists: list[NDArray[np.int32]]) -> None:
        self.places, self.lists = places, lists


def _blocks(holdout: Holdout, num_items: int, repeats: bool) -> Iterator[Questions]:
    # Questions of like length meet, so that short histories are not padded to the longest.
    order = np.argsort(holdout.ends - holdout.events.offsets[holdout.users], kind="stable")
    size = questions_at_once(num_items)
    for start in range(0, len(order), size):
        yield Questions(holdout, order[start : start + size], repeats)


def _popularity_scores(bundle: Bundle, questions: Questions) -> NDArray[np.float32]:
    popularity = bundle.catalog.popularity.astype(np.float32)
    return np.repeat(popularity[None], len(questions.users), axis=0)


def retrieval_scores(bundle: Bundle, questions: Questions) -> NDArray[np.float32]:
    """Return the products of each question's query vector with all items: [Q, I+1] float32.

    A visitor without one is served what is popular, and so it is here.
    """
    queries = np.zeros((len(questions.users), bundle.index.dim), np.float32)
    nothing = np.ones(len(queries), bool)
    for place, history in enumerate(questions.visitor_histories):
        found = query_vector(bundle, Visitor(history))
        if found is not None:
            queries[place], nothing[place] = found, False
    scores = bundle.index.scores(queries)
    scores[nothing] = _as_popular_source(bundle)
    return scores


def _as_popular_source(bundle: Bundle) -> NDArray[np.float32]:
    """Return scores [I+1] that rank as the source of popular items does; equal popularity is a tie."""
    both = np.stack([bundle.recent_popularity, bundle.catalog.popularity], axis=1)
    return np.unique(both, axis=0, return_inverse=True)[1].astype(np.float32)


def ranking_scores(bundle: Bundle, questions: Questions) -> NDArray[np.float32]:
    """Return what a bundle that has a ranker scores all items with when it serves: [Q, I+1] float32.

    The ranker in the context of each question, its heads weighed as the bundle does where no request says,
    and the transitions, all at the bundle's temperature.
    """
    assert bundle.scorer is not None
    wanted = [history.wanted for history in questions.visitor_histories]
    history = left_padded(wanted, bundle.scorer.history_length)
    scores = np.zeros((len(history), bundle.catalog.num_items + 1), np.float32)
    context = encoded_context(bundle.scorer.context, questions.events, questions.ends)
    everything = np.arange(1, bundle.catalog.num_items + 1)[None]
    weights = default_head_weights(bundle)
    repeated = None if weights is None else np.repeat(weights, len(history), axis=0)
    scores[:, 1:] = bundle.scorer.score(history, everything, context, repeated)
    if bundle.transitions is not None and (weight := transition_weight(bundle, weights)):
        scores += np.float32(weight) * bonuses(bundle.transitions, wanted)
    return scores / score_temperature(bundle, weights)


def _ranked(questions: Questions, scores: NDArray[np.float32]) -> _Answers:
    scores[:, 0] = -np.inf
    for row, items in zip(scores, questions.not_asked_for, strict=True):
        row[items] = -np.inf
    places = [
        metrics.places_by_score(row, target) for row, target in zip(scores, questions.targets, strict=True)
    ]
    length = min(LIST_LENGTH, scores.shape[1] - 1)
    top = np.argpartition(-scores, length - 1, axis=1)[:, :length].astype(np.int32)
    best = np.take_along_axis(scores, top, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    top, best = np.take_along_axis(top, order, axis=1), np.take_along_axis(best, order, axis=1)
    return _Answers(places, [rows[np.isfinite(s)] for rows, s in zip(top, best, strict=True)])


def _slate_answers(pipeline: RecommendationPipeline, policy: str) -> Callable[[Questions], _Answers]:
    chosen = pipeline.policy(policy)

    def answer(questions: Questions) -> _Answers:
        slates = [
            pipeline.recommend(
                Visitor(history, user_row=int(user)),
                SLATE_LENGTH,
                now=now if pipeline.has_clock else None,
                policy=chosen,
                seed=int(user),
                context=context,
            ).items.rows
            for user, history, now, context in zip(
                questions.users,
                questions.visitor_histories,
                questions.times,
                questions.contexts,
                strict=True,
            )
        ]
        places = [metrics.places_in_list(s, t) for s, t in zip(slates, questions.targets, strict=True)]
        return _Answers(places, [slate[:LIST_LENGTH] for slate in slates])

    return answer


class _List(NamedTuple):
    """The first items that one question was answered with."""

    rows: NDArray[np.int32]  # best first
    targets: NDArray[np.int32]
    now: int


def _list_metrics(lists: Sequence[_List], bundle: Bundle, num_users: int) -> dict[str, float]:
    """Return what the lists are like, whatever they hit; what the catalog does not know has no metric."""
    facts = item_facts(bundle.catalog)
    shown = [one.rows for one in lists]
    popularity = bundle.catalog.popularity.astype(np.float32)
    expected = (largest(popularity[1:], LIST_LENGTH) + 1).astype(np.int32)  # what anyone would show
    values = {
        "coverage": metrics.coverage(shown, facts.num_items),
        "gini": metrics.gini(metrics.exposure(shown, facts.num_items)[1:]),
        "diversity": _mean(metrics.diversity(rows, bundle.item_vectors) for rows in shown),
        "novelty": _mean(metrics.novelty(rows, bundle.catalog.popularity, num_users) for rows in shown),
        "serendipity": _mean(metrics.serendipity(one.rows, one.targets, expected) for one in lists),
    }
    for field in ("category", "brand", "seller_id"):
        groups = facts.groups[field]
        if groups.any():
            values[f"{field}_coverage"] = metrics.group_coverage(shown, groups)
            values[f"{field}_entropy"] = _mean(metrics.group_entropy(rows, groups) for rows in shown)
    margins, since = facts.margins, facts.available_from
    if margins is not None:
        values["margin"] = _mean(metrics.expected_margin(rows, margins) for rows in shown)
    if since is not None and bundle.manifest["data"]["time"] == "unix":
        values["freshness"] = _mean(
            metrics.freshness(one.rows, since, one.now, HALF_LIFE_DAYS) for one in lists
        )
    return {f"{name}@{LIST_LENGTH}": value for name, value in values.items()}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(found)) if (found := list(values)) else 0.0


def _mean_of_each(totals: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([t[key] for t in totals])) for key in totals[0]} if totals else {}


def _size(mask: NDArray[np.bool_], holdout: Holdout) -> dict[str, Any]:
    """Return of how many questions and targets a slice is made."""
    questions = np.repeat(np.arange(len(holdout)), np.diff(holdout.target_offsets))
    return {"num_users": len(np.unique(questions[mask])), "num_targets": int(mask.sum())}


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the stages side by side, and then each slice, where there are any."""
    simulated = ", SIMULATED data" if results["data"]["simulated"] else ""
    title = (
        f"{results['data']['name']}{simulated}: {results['split']}, {results['protocol']}, "
        f"{results['part']}, {results['num_users']:,} users, all {results['num_items']:,} items ranked"
    )
    table = Table(title=title)
    table.add_column("stage")
    largest = max(int(key.split("@")[1]) for key in results["popularity"])
    shown = ["recall@10", "ndcg@10", "mrr@10", "recall@20", "recall@500", f"recall@{largest}"]
    shown = [key for key in dict.fromkeys(shown) if key in results["popularity"]]
    for key in shown:
        table.add_column(key, justify="right")
    for stage in results["stages"]:
        # A slate has no place beyond its end: its recall@500 would be read as something that it is not.
        longest = results["slate_length"] if stage == "slate" else largest
        cells = (f"{results[stage][k]:.4f}" if int(k.split("@")[1]) <= longest else "-" for k in shown)
        table.add_row(stage, *cells)
    console.print(table)
    lists = Table(title=f"lists of {LIST_LENGTH}; slates by policy {results['policy']}")
    lists.add_column("")
    for stage in results["stages"]:
        lists.add_column(stage, justify="right")
    for key in results["popularity"]:
        if key.split("@")[0] not in metrics.METRICS:
            lists.add_row(key, *(f"{results[stage][key]:.4f}" for stage in results["stages"]))
    console.print(lists)
    if "slices" in results:
        _print_slices(results, title, console)


def _print_slices(results: dict[str, Any], title: str, console: Console) -> None:
    shown = ("recall@10", "ndcg@10", "recall@20")
    table = Table(title=title)
    for heading in ("slice", "users", "stage", *shown):
        table.add_column(heading, justify="left" if heading in ("slice", "stage") else "right")
    for name, found in results["slices"].items():
        for place, stage in enumerate(results["stages"]):
            figures = found[stage]
            cells = [f"{figures[key]:.4f}" if figures else "-" for key in shown]
            first = (name, f"{found['num_users']:,}") if not place else ("", "")
            table.add_row(*first, stage, *cells, end_section=place == len(results["stages"]) - 1)
    console.print(table)
    for name in results["slices"]:
        console.print(f"{name}: {DEFINITIONS[name]}", highlight=False)
    asked = {name: results["slices"][name]["num_targets"] for name in BY_ITEM}
    asked_share = asked["head items"] / max(sum(asked.values()), 1)
    for stage, share in results["head_share"].items():
        told = "it finds nothing"
        if share is not None:
            told = f"head items are {share:.1%} of its recall@10 and {asked_share:.1%} of what is asked for"
            told += ": its accuracy comes from the head alone" if share > HEAD_ALONE else ""
        console.print(f"{stage}: {told}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run `trirank evaluate`: a table on stdout, or JSON with `--json -`."""
    parser = ArgumentParser(prog="trirank evaluate", description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--data", type=Path, required=True, help="The data set directory it was trained on.")
    parser.add_argument(
        "--json", type=str, default=None, help="File for all metrics; - for stdout, no table."
    )
    parser.add_argument(
        "--part",
        type=Literal["test", "validation"],
        default="test",
        help="Tune on validation (of --no-refit), report test.",
    )
    parser.add_argument(
        "--policy",
        type=str,
        default="",
        help="The policy that arranges the slates (default: the default one).",
    )
    parser.add_argument(
        "--policies",
        type=Path | None,
        default=None,
        help="Policies instead of the bundle's own: a YAML file, or a directory of such files.",
    )
    parser.add_argument(
        "--rules",
        type=Literal["on", "off"],
        default="on",
        help="off: slates without any rules; what a user has seen stays left out.",
    )
    parser.add_argument(
        "--num_candidates", type=int | None, default=None, help="Of retrieval (default: the bundle's own)."
    )
    parser.add_argument("--max_users", type=int, default=None, help="Ask a fixed random part of the users.")
    parser.add_argument(
        "--slices",
        action="store_true",
        help="Measure slices too: new users, short histories, new items, tail and head items; and, where "
        "users return to items, returns and discoveries.",
    )
    options = parser.parse_args(argv)
    try:
        if options.max_users is not None and options.max_users < 1:
            raise ValueError(f"max_users is {options.max_users}; expected 1 or more")
        file = None if options.json in (None, "-") else Path(options.json)
        if file and not file.absolute().parent.is_dir():
            raise ValueError(f"json is {options.json}; expected a file in a directory that is there, or -")
        bundle = Bundle.load(resolve_bundle(options.bundle), num_threads=os.cpu_count() or 1)
        bundle = served_with(bundle, rules=options.rules == "on", num_candidates=options.num_candidates)
        if options.rules == "off" and (options.policy or options.policies):
            raise ValueError("rules is off; expected it without policy and policies")
        policies = PolicyFiles(options.policies) if options.policies else None
        results = evaluate(
            bundle,
            options.data,
            options.part,
            options.max_users,
            policies=policies,
            policy=options.policy,
            slices=options.slices,
        )
        text = json.dumps(results, indent=2)
        if options.json == "-":
            print(text)
            return 0
        print_table(results, Console(width=None if sys.stdout.isatty() else 160))
        if file:
            file.write_text(text + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"trirank evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
