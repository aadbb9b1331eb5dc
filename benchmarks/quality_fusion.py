"""Does the fusion help, and is it the graph? `python -m benchmarks.quality fusion --data DATA --out DIR`.

For each seed stage one is trained once, and these answer the same test questions:

(a) sequence          the ranker without a graph
(b) graph             stage one alone, asked with the vector folded in from the history
(c) late-fusion       scores of (a) and (b), standardised per question and added; weight chosen on validation
(d) cross-attention   the default ranker: states attend to the graph vectors of stage one, and the graph's own
                      scores add to the ranker's, with a weight chosen on validation
(e) shuffled          (d), with the graph vectors dealt out to the items at random: a control
(f) content           (d), started from what is known of the items (texts, categories, brands, prices), and
                      with stage one cross-fitted as the recipe has it (training/cross_fit.py)
(g) transitions       (d), and what has often come next adds to the scores
(h) sequence-transitions  (a), likewise: is there more to the graph than pairs?
(i) sequence-content  (a), started from what is known of the items: is there more to the graph than that?
(j) content-transitions   (f), and what has often come next: what `trirank train` exports
(k) sequence-content-transitions  (i), likewise
(l) attention         (d), without the graph's own scores

The table has the mean and standard deviation over seeds, and a paired t-test over users of NDCG@10, averaged
over seeds, against a line without the graph: (a), but (i) for (f) and (k) for (j). What (d) gains and (e)
keeps is not the graph's.

Each (variant, seed) writes its row into --out when it is done: the same command goes on behind it, and within
a fit from its last epoch. Every setting of `trirank train` can be given with --options.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file
from scipy.stats import ttest_rel

from benchmarks.full_ranking import Scores, Vectors, question_metrics, recency
from engine.arguments import ArgumentParser, nearest
from ranking.ranker import HybridRanker
from retrieval.fold_in import fold_in
from training.answers import queries_of_all_heads, question_queries
from training.commit import source_commit
from training.compression import weighted
from training.data.interactions import Interactions
from training.data.splits import Holdout, Protocol, Split, SplitData, load_split, split_as_trained
from training.export import compressed_for
from training.score_weights import GRAPH_WEIGHTS, TRANSITION_WEIGHTS, ScoreWeights, best_weights, questions_of
from training.stages import keep_freed_memory, quiet_lightning
from training.train import (
    EMBEDDINGS,
    Settings,
    add_graph_scores,
    build_parser,
    chosen_before,
    chosen_of,
    content_of,
    fit_folds,
    fit_ranking,
    fit_retrieval,
    num_folds_of,
    recipe_of,
)
from training.transitions import bonuses, training_transitions

METRICS = ("recall@10", "ndcg@10")
LATE_WEIGHTS = tuple(n / 10 for n in range(11))  # of the graph's scores; the rest is the sequence's


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table.

    Attributes:
        letter: in the table.
        graph: what a ranker stands on: the vectors of stage one "as they are", "shuffled", or "none". None
            where no ranker is trained.
        content: whether the ranker is told of the items.
        upon: the variant whose ranker it is. None: its own.
        transitions: whether they add to the scores, with a weight chosen on validation.
        graph_scores: whether the graph's own do, likewise, where there is a graph.
        against: the variant that it is tested against.
    """

    letter: str
    graph: str | None = None
    content: bool = False
    upon: str | None = None
    transitions: bool = False
    graph_scores: bool = True
    against: str = "sequence"


VARIANTS = {
    "sequence": Variant(letter="a", graph="none"),
    "graph": Variant(letter="b"),
    "late-fusion": Variant(letter="c"),
    "cross-attention": Variant(letter="d", graph="as they are"),
    "shuffled": Variant(letter="e", graph="shuffled"),
    "content": Variant(letter="f", graph="as they are", content=True, against="sequence-content"),
    "transitions": Variant(letter="g", upon="cross-attention", transitions=True),
    "sequence-transitions": Variant(letter="h", upon="sequence", transitions=True),
    "sequence-content": Variant(letter="i", graph="none", content=True),
    "content-transitions": Variant(
        letter="j", upon="content", transitions=True, against="sequence-content-transitions"
    ),
    "sequence-content-transitions": Variant(letter="k", upon="sequence-content", transitions=True),
    "attention": Variant(letter="l", upon="cross-attention", graph_scores=False),
}


@dataclass(frozen=True)
class Answers:
    """What a ranker answers with, and the graph's own scores at a weight of 1; None without a graph.

    `examples` [N, Q] are its queries after training histories, which an export compresses for.
    """

    ranker: Vectors
    graph: Vectors | None = None
    examples: NDArray[np.float32] | None = None

    def whole(self) -> Vectors:
        """Return both in one, uncompressed."""
        if self.graph is None:
            return self.ranker
        users, items = (
            np.concatenate(pair, axis=1)
            for pair in ((self.ranker.users, self.graph.users), (self.ranker.items, self.graph.items))
        )
        return Vectors(users, items)

    def weighted(self, weight: float) -> Vectors:
        """Return them as an export has them, compressed for training histories."""
        both = self.whole()
        users, asked = np.zeros_like(both.users), both.users.any(axis=1)
        dim = self.ranker.items.shape[1]
        users[asked] = weighted(both.users[asked], both.items, dim, weight, self.examples)
        return Vectors(users, both.items)

    def save(self, file: Path) -> None:
        """Write them; the file is whole or not there."""
        arrays = {"users": self.ranker.users, "items": self.ranker.items}
        if self.graph is not None:
            arrays |= {"graph_users": self.graph.users, "graph_items": self.graph.items}
        if self.examples is not None:
            arrays["examples"] = self.examples
        unfinished = file.with_suffix(".tmp")
        save_file(arrays, unfinished)
        unfinished.rename(file)

    @classmethod
    def load(cls, file: Path) -> Answers:
        """Read what `save` has written."""
        arrays = load_file(file)
        graph = Vectors(arrays["graph_users"], arrays["graph_items"]) if "graph_users" in arrays else None
        return cls(Vectors(arrays["users"], arrays["items"]), graph, arrays.get("examples"))


class Experiment:
    """The rows of one directory: what was asked, and where the answers lie.

    Args:
        directory: a data set directory.
        out: gets settings.json, a JSON row and per-user metrics (npz) of each (variant, seed), and the runs.
        protocol: what the test questions are answered from.
        options: of `trirank train`, as NAME=VALUE.

    Raises:
        ValueError: `out` holds rows of other settings.
    """

    def __init__(self, directory: Path, out: Path, protocol: Protocol, options: Sequence[str]) -> None:
        self.directory, self.out, self.protocol, self.options = directory, out, protocol, tuple(options)
        recipe, settings = self._recipe()
        self.half_life: float | None = recipe["pipeline"]["half_life_events"]
        self.num_neighbours: int = recipe["pipeline"]["num_neighbours"]
        # What the recipe says; None has validation choose.
        self.graph_weight: float | None = recipe["pipeline"].get("graph_weight")
        self.transition_weight: float | None = recipe["pipeline"].get("transition_weight")
        self.data: SplitData = load_split(directory, settings().split)
        if not self.data.split.ordered:
            raise ValueError(f"split {self.data.split.name} leaves the events without an order to learn from")
        # Of what is for serving a model nothing else plays a part here, and the recipe's own seed plays none.
        record = {
            "data": self.data.info.name,
            "fingerprint": self.data.info.fingerprint,
            "simulated": self.data.info.simulated,
            "split": self.data.split.name,
            "protocol": protocol,
            "half_life_events": self.half_life,
            "num_neighbours": self.num_neighbours,
            "graph_weight": self.graph_weight,
            "transition_weight": self.transition_weight,
            "compressed_for": "training histories",
            "recipe": of_training(recipe),
        }
        keep_settings(out, record)

    def _recipe(self) -> tuple[dict[str, Any], Settings]:
        parser = build_parser()
        config = parser.parse_args([str(self.directory), *(f"--{option}" for option in self.options)])
        return recipe_of(parser, config), lambda: parser.instantiate(config)

    def row_file(self, variant: str, seed: int) -> Path:
        """Return where a row lies once it is done; its per-user metrics lie beside it."""
        return self.out / f"{variant}-seed{seed}.json"

    def run(self, variant: str, seed: int) -> None:
        """Train and measure what is not yet done of a row, and write it."""
        file = self.row_file(variant, seed)
        if file.is_file():
            return
        begin = time.perf_counter()
        record: dict[str, Any] = {
            "variant": variant, "seed": seed, "protocol": self.protocol, "commit": source_commit()
        }  # fmt: skip
        scores: Scores
        if variant == "graph":
            scores = self.graph(seed, "test").scores
        elif variant == "late-fusion":
            weight = self._late_weight(seed)
            record["graph_weight"] = weight
            scores = late_fusion(
                self.answers("sequence", seed, "test").ranker, self.graph(seed, "test"), weight
            )
        else:
            weights = self._weights(variant, seed)
            record |= {"graph_weight": weights.graph, "transition_weight": weights.transitions}
            scores = self.with_weights(self.answers(VARIANTS[variant].upon or variant, seed, "test"), weights)
        chosen = chosen_before(self._folder(variant, seed))
        if chosen is not None:
            record |= {"epochs": chosen.epochs, "validation_ndcg@10": chosen.metric}
        found = question_metrics(scores, self.data.split.test, METRICS, repeats=self.data.split.repeats)
        record |= {name: float(values.mean()) for name, values in found.items()}
        record |= {"num_users": len(self.data.split.test), "seconds": time.perf_counter() - begin}
        np.savez_compressed(file.with_suffix(".npz"), users=self.data.split.test.users, **found)  # type: ignore[arg-type]
        _drop_checkpoints(self._folder(variant, seed))
        # Last, and by a rename: the row says that all of it is there.
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(file)

    def answers(self, variant: str, seed: int, part: str) -> Answers:
        """Return what a variant's ranker answers the questions of a part with, trained where it is not.

        On validation it has learned from train alone; on test, what the protocol says.
        """
        file = self._folder(variant, seed) / f"{part}.safetensors"
        if not file.is_file():
            self._train(variant, seed)
        return Answers.load(file)

    def graph(self, seed: int, part: str) -> Vectors:
        """Return what stage one answers with, likewise."""
        holdout = self.data.split.test if part == "test" else self.data.split.validation
        file = self.embeddings(seed, self.protocol if part == "test" else "strict")
        return graph_answers(file, holdout, self.half_life)

    def with_weights(self, answers: Answers, weights: ScoreWeights) -> Scores:
        """Return scores with the graph's own and with transitions of what the protocol has learned from."""
        known = split_as_trained(self.data, self.protocol)
        transitions = None
        if weights.transitions:
            transitions = training_transitions(known.train, self.num_neighbours, known.repeats)

        vectors = answers.weighted(weights.graph)

        def scores(questions: Holdout) -> NDArray[np.float32]:
            found = vectors.scores(questions)
            if transitions is not None:
                wanted = [history.wanted for _, history, _ in questions]
                found += np.float32(weights.transitions) * bonuses(transitions, wanted)
            return found

        return scores

    def embeddings(self, seed: int, protocol: Protocol) -> Path:
        """Return the file of stage one's vectors, trained where it is not there; once for all variants."""
        folder = self.out / "runs" / f"stage-one-seed{seed}"
        _, settings = self._recipe()
        if not (folder / EMBEDDINGS).is_file():
            _say(f"seed {seed}: retrieval on train; validation chooses the epochs")
        chosen = fit_retrieval(self.directory, self.data.split, folder, settings, seed, resume=True)
        _drop_checkpoints(folder / "retrieval")  # the vectors are in their file
        if protocol == "strict":
            return folder / EMBEDDINGS
        final = split_as_trained(self.data, "refit")
        if not (folder / "refit" / EMBEDDINGS).is_file():
            _say(f"seed {seed}: retrieval on train and validation, {chosen.epochs} epochs as chosen")
        fit_retrieval(self.directory, final, folder / "refit", settings, seed, resume=True, chosen=chosen)
        _drop_checkpoints(folder / "refit" / "retrieval")
        return folder / "refit" / EMBEDDINGS

    def _folder(self, variant: str, seed: int) -> Path:
        return self.out / "runs" / f"{variant}-seed{seed}"

    def _train(self, variant: str, seed: int) -> None:
        folder, split = self._folder(variant, seed), self.data.split
        _, settings = self._recipe()
        content = self.content if VARIANTS[variant].content else None
        chosen = chosen_before(folder) if (folder / "validation.safetensors").is_file() else None
        if chosen is None:
            _say(f"seed {seed}: {variant} on train; validation chooses the epochs")
            ranker, chosen = fit_ranking(
                self.directory,
                split,
                self._graph(variant, seed, "strict"),
                folder,
                settings,
                seed,
                resume=True,
                content=content,
                folds=self._folds(variant, seed, "strict"),
            )
            self._add_graph_scores(ranker, variant, seed, "strict")
            if self.protocol == "strict":
                self._answers_of(ranker, split, "test").save(folder / "test.safetensors")
            # Last: this file says that the fit is done.
            self._answers_of(ranker, split, "validation").save(folder / "validation.safetensors")
        if self.protocol == "refit":
            _say(f"seed {seed}: {variant} on train and validation, {chosen.epochs} epochs as chosen")
            final = split_as_trained(self.data, "refit")
            ranker, _ = fit_ranking(
                self.directory,
                final,
                self._graph(variant, seed, "refit"),
                folder / "refit",
                settings,
                seed,
                resume=True,
                chosen=chosen,
                content=content,
                folds=self._folds(variant, seed, "refit"),
            )
            self._add_graph_scores(ranker, variant, seed, "refit")
            self._answers_of(ranker, final, "test").save(folder / "test.safetensors")

    def _answers_of(self, ranker: HybridRanker, known: Split, part: str) -> Answers:
        """Return what a ranker that has learned from a split answers the questions of a part with."""
        holdout = self.data.split.test if part == "test" else self.data.split.validation
        return ranker_answers(ranker, holdout, known.train)

    def _add_graph_scores(self, ranker: HybridRanker, variant: str, seed: int, protocol: Protocol) -> None:
        """Let the graph's own scores add to a ranker's, at a weight of 1, where it has a graph."""
        if (file := self._graph(variant, seed, protocol)) is not None:
            add_graph_scores(ranker, load_file(file), 1.0, self.half_life)

    def can_run(self, variant: str) -> bool:
        """Return whether what a variant stands on is there: the catalog may say nothing of its items."""
        return not VARIANTS[VARIANTS[variant].upon or variant].content or self.content is not None

    @functools.cached_property
    def content(self) -> Path | None:
        """The file of what the items are, once for all seeds; None where nothing is known or wanted."""
        _, settings = self._recipe()
        folder = self.out / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        return content_of(self.directory, settings().content, folder)

    def _graph(self, variant: str, seed: int, protocol: Protocol) -> Path | None:
        """Return the file of the graph vectors that a variant's ranker stands on."""
        if VARIANTS[variant].graph == "none":
            return None
        file = self.embeddings(seed, protocol)
        return shuffled(file, seed) if VARIANTS[variant].graph == "shuffled" else file

    def _folds(self, variant: str, seed: int, protocol: Protocol) -> Path | None:
        """Return the file of cross-fitted vectors of stage one; None where a variant has none."""
        if VARIANTS[variant].graph != "as they are" or not VARIANTS[variant].content:
            return None
        folder = self.embeddings(seed, protocol).parent
        chosen = chosen_of(folder / EMBEDDINGS)
        split = split_as_trained(self.data, protocol)
        _, settings = self._recipe()
        num_folds = num_folds_of(settings().ranking, self.data.split, self.content)
        return fit_folds(self.directory, split, folder, settings, seed, True, chosen, num_folds)

    def _late_weight(self, seed: int) -> float:
        """Return the weight of LATE_WEIGHTS with the best NDCG@10 on validation."""
        holdout = questions_of(self.data.split)
        sequence, graph = self.answers("sequence", seed, "validation").ranker, self.graph(seed, "validation")
        found = {
            weight: question_metrics(
                late_fusion(sequence, graph, weight), holdout, ["ndcg@10"], repeats=self.data.split.repeats
            )["ndcg@10"].mean()
            for weight in LATE_WEIGHTS
        }
        return max(found, key=lambda weight: float(found[weight]))

    def _weights(self, variant: str, seed: int) -> ScoreWeights:
        """Return how much a variant lets add to its ranker's scores: the best on validation."""
        its = VARIANTS[variant]
        base = its.upon or variant
        with_graph = its.graph_scores and VARIANTS[base].graph != "none"
        answers, holdout = self.answers(base, seed, "validation"), questions_of(self.data.split)
        both = answers.whole()
        return best_weights(
            both.users[holdout.users],
            both.items,
            answers.ranker.items.shape[1],
            holdout,
            self.data.split,
            self.num_neighbours,
            examples=answers.examples,
            graph_weights=_choices(with_graph, self.graph_weight, GRAPH_WEIGHTS),
            transition_weights=_choices(its.transitions, self.transition_weight, TRANSITION_WEIGHTS),
        )


def _choices(plays_a_part: bool, said: float | None, choices: Sequence[float]) -> Sequence[float]:
    if not plays_a_part:
        return (0.0,)
    return choices if said is None else (said,)


SETTINGS = "settings.json"  # what all rows of a directory have in common


def of_training(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a recipe decides how models are trained, but for the seed."""
    return {key: value for key, value in recipe.items() if key not in ("pipeline", "seed", "refit")}


def keep_settings(out: Path, record: Mapping[str, Any]) -> None:
    """Write what the rows of a directory come from; where it says so already, it must be the same.

    Args:
        out: the directory, made where it is not there.
        record: the settings, as JSON would have them.

    Raises:
        ValueError: the directory holds rows of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / SETTINGS
    if not file.is_file():
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    now, before = (dict(_leaves(one)) for one in (record, json.loads(file.read_text(encoding="utf-8"))))
    differ = [
        f"{name} is {json.dumps(now.get(name))}, there {json.dumps(before.get(name))}"
        for name in sorted(now.keys() | before.keys())
        if now.get(name) != before.get(name)
    ]
    if differ:
        raise ValueError(f"{out} holds rows of other settings: {'; '.join(differ)}; expected another --out")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings within settings, by their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _drop_checkpoints(folder: Path) -> None:
    for checkpoint in folder.rglob("*.ckpt"):
        checkpoint.unlink()


def ranker_answers(ranker: HybridRanker, holdout: Holdout, known: Interactions) -> Answers:
    """Return what a ranker scores with after the histories of a holdout, and the vectors that it scores.

    Args:
        ranker: on the CPU, in evaluation mode.
        holdout: what is asked.
        known: what it has learned from; an export compresses for its histories.
    """
    with torch.no_grad():
        items = ranker.item_vectors().float().numpy()
    users = np.zeros((holdout.events.num_users + 1, items.shape[1]), np.float32)
    users[holdout.users] = question_queries(ranker, holdout)
    dim = ranker.embedding.embedding_dim
    own, graph = (
        Vectors(users[:, part].copy(), items[:, part].copy()) for part in (slice(dim), slice(dim, None))
    )
    if ranker.graph_scores is None:
        return Answers(own)
    return Answers(own, graph, queries_of_all_heads(ranker, compressed_for(known)))


def graph_answers(embeddings: Path, holdout: Holdout, half_life: float | None) -> Vectors:
    """Return the vectors folded in from the histories of a holdout, and stage one's item vectors."""
    vectors = load_file(embeddings)
    items, degrees = vectors["item_vectors"], vectors["item_degrees"]
    users = np.zeros((holdout.events.num_users + 1, items.shape[1]), np.float32)
    for user, history, _ in holdout:
        users[user] = fold_in(items, degrees, history.wanted, recency(history, half_life))
    return Vectors(users, items)


def shuffled(embeddings: Path, seed: int) -> Path:
    """Write the vectors of stage one, each with its degree, to an item drawn at random; return the file."""
    file = embeddings.with_name("shuffled.safetensors")
    if not file.is_file():
        vectors = load_file(embeddings)
        size = len(vectors["item_vectors"])
        order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(size - 1)])
        unfinished = file.with_suffix(".tmp")
        names = ("item_vectors", "item_degrees")
        save_file({name: np.ascontiguousarray(vectors[name][order]) for name in names}, unfinished)
        unfinished.rename(file)
    return file


def late_fusion(sequence: Vectors, graph: Vectors, weight: float) -> Scores:
    """Return scores (1 - weight) z(sequence) + weight z(graph); z: less the mean, by the standard deviation.

    The mean and the deviation are those of a question's scores of all items.
    """

    def scores(questions: Holdout) -> NDArray[np.float32]:
        return (1 - weight) * _standardised(sequence.scores(questions)) + weight * _standardised(
            graph.scores(questions)
        )

    return scores


def _standardised(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    items = scores[:, 1:]
    deviation = items.std(axis=1, keepdims=True)
    standard: NDArray[np.float32] = (scores - items.mean(axis=1, keepdims=True)) / np.maximum(
        deviation, 1e-12
    )
    return standard


def collect(out: Path) -> dict[str, Any]:
    """Return the finished rows of a directory, with means, deviations and tests.

    Raises:
        ValueError: the directory is none of this benchmark.
    """
    file = out / SETTINGS
    if not file.is_file():
        raise ValueError(f"{out} holds no rows of `benchmarks.quality fusion`: settings.json is missing")
    settings = json.loads(file.read_text(encoding="utf-8"))
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob("*-seed*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        row["per_user"] = dict(np.load(path.with_suffix(".npz")))
        rows.setdefault(row["variant"], {})[row["seed"]] = row
    summary = {}
    for name in [name for name in VARIANTS if name in rows]:
        summary[name] = {
            "letter": VARIANTS[name].letter,
            "seeds": sorted(rows[name]),
            **{
                metric: {
                    "mean": float(np.mean(values)),
                    "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                }
                for metric in METRICS
                if (values := [row[metric] for row in rows[name].values()])
            },
            "against": VARIANTS[against].letter if (against := VARIANTS[name].against) != name else None,
            "test": paired_test(rows[name], rows.get(against, {})) if against != name else None,
            "runs": [
                {key: value for key, value in rows[name][seed].items() if key != "per_user"}
                for seed in sorted(rows[name])
            ],
        }
    num_users = {row["num_users"] for found in rows.values() for row in found.values()}
    return {**settings, "num_users": max(num_users, default=0), "variants": summary}


def paired_test(
    ours: Mapping[int, dict[str, Any]], reference: Mapping[int, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the mean difference in NDCG@10 and its p (two-sided paired t-test over users).

    Each user's NDCG is the mean over the seeds that both have; None where they have none in common.
    """
    seeds = sorted(set(ours) & set(reference))
    if not seeds:
        return None
    first, second = (
        np.mean([rows[seed]["per_user"]["ndcg@10"] for seed in seeds], axis=0) for rows in (ours, reference)
    )
    difference = first - second
    p = float(ttest_rel(first, second).pvalue) if difference.any() else 1.0
    return {"seeds": seeds, "difference": float(difference.mean()), "p": p}


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print one line a variant."""
    simulated = ", SIMULATED data" if results["simulated"] else ""
    table = Table(
        title=f"{results['data']}{simulated}: {results['split']}, {results['protocol']}, test, "
        f"{results['num_users']:,} users, all items ranked",
        caption="mean ± standard deviation over seeds; gain: ndcg@10 less that of another line; "
        "p: its paired t-test over users, two-sided",
    )
    for heading in ("", "variant", *METRICS, "gain", "p", "epochs", "seeds"):
        table.add_column(heading, justify="left" if heading in ("", "variant") else "right")
    for name, row in results["variants"].items():
        test = row["test"]
        epochs = [run["epochs"] for run in row["runs"] if "epochs" in run]
        table.add_row(
            f"({row['letter']})",
            name,
            *(_mean_and_std(row[metric]) for metric in METRICS),
            f"{test['difference']:+.4f} ({row['against']})" if test else "-",
            f"{test['p']:.2g}" if test else "-",
            " ".join(map(str, epochs)) or "-",
            " ".join(map(str, row["seeds"])),
        )
    console.print(table)


def _mean_and_std(figure: Mapping[str, float | None]) -> str:
    std = figure["std"]
    return f"{figure['mean']:.4f}" + (f" ± {std:.4f}" if std is not None else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then print the table on stdout."""
    parser = ArgumentParser(prog="python -m benchmarks.quality fusion", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="A data set directory.")
    parser.add_argument(
        "--out", type=Path, required=True, help="Directory of the rows; one for each data set and protocol."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="One training each.")
    parser.add_argument(
        "--variants", type=str, nargs="+", default=list(VARIANTS), help=f"Of {', '.join(VARIANTS)}."
    )
    parser.add_argument("--protocol", type=Protocol, default="strict", help="What the test is answered from.")
    parser.add_argument(
        "--max_epochs", type=int | None, default=None, help="Of stage two (default: the recipe's)."
    )
    parser.add_argument(
        "--options",
        type=str,
        nargs="+",
        default=[],
        help="Of `trirank train`: --options config=recipe.yaml ranking.model.encoder.dim=64",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="File for all figures.")
    options = parser.parse_args(argv)
    quiet_lightning()
    keep_freed_memory()
    settings = list(options.options)
    if options.max_epochs is not None:
        settings.append(f"ranking.trainer.max_epochs={options.max_epochs}")
    try:
        for name in options.variants:
            if name not in VARIANTS:
                known = ", ".join(VARIANTS)
                raise ValueError(f"variant is {name!r}; expected some of {known}{nearest([name], VARIANTS)}")
        experiment = Experiment(options.data, options.out, options.protocol, settings)
        wanted = [name for name in VARIANTS if name in options.variants]
        if without := [name for name in wanted if not experiment.can_run(name)]:
            reason = "the catalog says nothing of its items, or content.encoder is none"
            _say(f"left out, as {reason}: {', '.join(without)}")
            wanted = [name for name in wanted if name not in without]
        for place, seed in enumerate(options.seeds):
            for number, name in enumerate(wanted):
                done = experiment.row_file(name, seed).is_file()
                _say(
                    f"seed {seed} ({place + 1} of {len(options.seeds)}), {name} ({number + 1} of "
                    f"{len(wanted)}){': done before' if done else ''}"
                )
                experiment.run(name, seed)
        results = collect(options.out)
    except KeyboardInterrupt:
        _say("interrupted; go on with the same command")
        return 130
    except (ValueError, OSError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_table(results, Console(width=None if sys.stdout.isatty() else 140))
    return 0
