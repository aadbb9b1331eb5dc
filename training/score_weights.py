"""What adds to the ranker's scores, and how much it counts: chosen on validation, both weights together; what
the sum is divided by, for scores to be logarithms of chances; and how much the context counts in the ranker.

The graph's own scores (ranking.fusion.GraphScores), and that an item has often come next
(ranking/transitions.py). The ranker is trained without either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.history import not_asked_for
from ranking.ranker import HybridRanker
from training.answers import ranker_scores
from training.compression import weighted
from training.data.splits import Holdout, Split
from training.metrics import mean_accuracy
from training.transitions import bonuses, training_transitions

GRAPH_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
TRANSITION_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
TEMPERATURES = tuple(2.0 ** (n / 8) for n in range(-16, 41))  # a quarter to 32
PRIOR_QUESTIONS = 10  # weight of (ln temperature)^2 beside logarithms of chances: what it takes to leave 1
CHANCES_AMONG = 500  # best items that a page is chosen from
CONTEXT_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALONE = (0.0, 0.0)  # the weights of a ranker without either
MAX_QUESTIONS = 5000
SCORES_AT_ONCE = 10_000_000  # 40 MB of float32 scores
METRIC = "ndcg@10"


@dataclass(frozen=True)
class ScoreWeights:
    """What validation chose: the weights with the best METRIC, the least of equals."""

    graph: float
    transitions: float
    metric: float  # METRIC with both
    alone: float  # METRIC of the ranker alone
    temperature: float = 1.0  # what to divide the sum by

    @classmethod
    def read(cls, file: Path) -> ScoreWeights | None:
        """Return what a run has chosen before; None where it has not, or by a version that knew less."""
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(**told) if "temperature" in told else None

    def write(self, file: Path) -> None:
        """Keep it for a run that goes on."""
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        unfinished.rename(file)


def best_weights(
    queries: NDArray[np.float32],
    items: NDArray[np.float32],
    dim: int,
    holdout: Holdout,
    split: Split,
    k: int,
    *,
    examples: NDArray[np.float32] | None = None,
    graph_weights: Sequence[float] = GRAPH_WEIGHTS,
    transition_weights: Sequence[float] = TRANSITION_WEIGHTS,
    temperature: float | None = None,
) -> ScoreWeights:
    """Return the weights with the best NDCG@10 on validation, with scores as an export has them.

    And what to divide these by, so that their softmax over the best CHANCES_AMONG items is as likely as can
    be to choose what was wanted (temperature scaling; Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017): weights that rank well make scores that lie too far apart.

    Args:
        queries: [N, Q] of a ranker, for each question of `holdout`, uncompressed, with the graph's own part
            at a weight of 1 (HybridRanker.query, item_parts); it has learned from `split.train`.
        items: [I+1, Q], likewise.
        dim: D, how many of these numbers are the ranker's.
        holdout: of questions_of(split).
        split: what it has learned from, and transitions are counted in.
        k: items that a row of the transitions keeps.
        examples: [M, Q] queries after the histories that an export compresses for; None for `queries`.
        graph_weights: to choose from.
        transition_weights: to choose from.
        temperature: what to divide by; None looks for it.
    """
    transitions = training_transitions(split.train, k, split.repeats)
    pairs = [*product(graph_weights, transition_weights), ALONE]
    by_weight = {weight: weighted(queries, items, dim, weight, examples) for weight in {*graph_weights, 0.0}}
    sums = dict.fromkeys(pairs, 0.0)
    for asked in _asked_at_once(holdout, len(transitions.after)):
        questions = holdout.take(asked)
        histories = [history for _, history, _ in questions]
        targets = [target for _, _, target in questions]
        added = bonuses(transitions, [history.wanted for history in histories])
        seen = [history.items for history in histories]
        for graph_weight, of_questions in by_weight.items():
            scores = of_questions[asked] @ items.T
            for pair in sums:
                if pair[0] == graph_weight:
                    both = scores + np.float32(pair[1]) * added
                    found = mean_accuracy(both, seen, targets, (10,), repeats=split.repeats)
                    sums[pair] += found[METRIC] * len(questions)
    best = max(pairs[:-1], key=lambda pair: (sums[pair], -pair[0], -pair[1]))
    if temperature is None:
        chances = Chances()
        for asked in _asked_at_once(holdout, len(transitions.after)):
            questions = holdout.take(asked)
            added = bonuses(transitions, [history.wanted for _, history, _ in questions])
            scores = by_weight[best[0]][asked] @ items.T + np.float32(best[1]) * added
            for row, (_, history, target) in zip(scores, questions, strict=True):
                row[0] = row[not_asked_for(history.items, split.repeats)] = -np.inf
                chances.add(row, target)
        temperature = chances.temperature()
    return ScoreWeights(*best, sums[best] / len(holdout), sums[ALONE] / len(holdout), temperature)


class Chances:
    """How likely scores make what was wanted, at each of TEMPERATURES: a softmax over the best items."""

    def __init__(self) -> None:
        self._losses: NDArray[np.float64] = PRIOR_QUESTIONS * np.log(TEMPERATURES) ** 2

    def add(self, scores: NDArray[np.float32], targets: NDArray[np.int32]) -> None:
        """Take what was wanted after a history, where it is among the best CHANCES_AMONG.

        Args:
            scores: [I+1], -inf for what takes no part.
            targets: item rows.
        """
        best = scores[np.isfinite(scores)].astype(np.float64)
        if len(best) > CHANCES_AMONG:
            best = np.partition(best, -CHANCES_AMONG)[-CHANCES_AMONG:]
        wanted = scores[targets].astype(np.float64)
        wanted = wanted[wanted >= best.min(initial=np.inf)]
        if not len(wanted):
            return
        top, temperatures = best.max(), np.array(TEMPERATURES)[:, np.newaxis]
        whole = np.log(np.exp((best - top) / temperatures).sum(axis=1, keepdims=True))
        self._losses += (whole - (wanted - top) / temperatures).sum(axis=1)

    def temperature(self) -> float:
        """Return the one of TEMPERATURES that makes it likeliest."""
        return float(TEMPERATURES[int(self._losses.argmin())])


def choose_context_strength(ranker: HybridRanker, split: Split) -> float:
    """Let a ranker's context count as much as is best on validation, the most of equals, and return it.

    Where the moment decides nothing its effects are noise, which costs what was learned without them.

    Args:
        ranker: fitted to `split.train`, in evaluation mode; changed. 1 for one without context.
        split: whose validation asks.
    """
    if ranker.context_fusion is None:
        return 1.0
    holdout = questions_of(split)
    parts = [holdout.take(asked) for asked in _asked_at_once(holdout, ranker.num_items + 1)]
    found: dict[float, float] = {}
    for strength in CONTEXT_STRENGTHS:
        ranker.context_fusion.strength = strength
        scores = ranker_scores(ranker)
        found[strength] = sum(
            len(part)
            * mean_accuracy(
                scores(part),
                [history.items for _, history, _ in part],
                [targets for _, _, targets in part],
                (10,),
                repeats=split.repeats,
            )[METRIC]
            for part in parts
        )
    ranker.context_fusion.strength = best = max(found, key=lambda strength: (found[strength], strength))
    return best


def _asked_at_once(holdout: Holdout, num_scores: int) -> list[NDArray[np.int64]]:
    """Return which questions are scored together, where each has so many scores."""
    size = max(1, SCORES_AT_ONCE // num_scores)
    return [np.arange(start, min(start + size, len(holdout))) for start in range(0, len(holdout), size)]


def questions_of(split: Split) -> Holdout:
    """Return the questions that weights are chosen on: validation's, up to MAX_QUESTIONS of a fixed draw."""
    return split.validation.sample(MAX_QUESTIONS)
