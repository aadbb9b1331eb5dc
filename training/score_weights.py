"""What adds to the ranker's scores, and how much it counts: chosen on validation, both weights together.

The graph's own scores (ranking.fusion.GraphScores), and that an item has often come next
(ranking/transitions.py). The ranker is trained without either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.splits import Holdout, Split
from training.metrics import mean_accuracy
from training.transitions import bonuses, training_transitions

GRAPH_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
TRANSITION_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
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

    @classmethod
    def read(cls, file: Path) -> ScoreWeights | None:
        """Return what a run has chosen before; None where it has not."""
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, file: Path) -> None:
        """Keep it for a run that goes on."""
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        unfinished.rename(file)


def best_weights(
    parts: Callable[[Holdout], tuple[NDArray[np.float32], NDArray[np.float32]]],
    split: Split,
    k: int,
    *,
    graph_weights: Sequence[float] = GRAPH_WEIGHTS,
    transition_weights: Sequence[float] = TRANSITION_WEIGHTS,
) -> ScoreWeights:
    """Return the weights with the best NDCG@10 on validation.

    Args:
        parts: of some questions, the ranker's scores and the graph's own at a weight of 1, each [N, I+1]
            (training.answers.score_parts); both have learned from `split.train`.
        split: whose validation asks, up to MAX_QUESTIONS of it drawn with a fixed seed.
        k: items that a row of the transitions keeps.
        graph_weights: to choose from.
        transition_weights: to choose from.
    """
    holdout = split.validation.sample(MAX_QUESTIONS)
    transitions = training_transitions(split.train, k)
    pairs = list(product(graph_weights, transition_weights))
    sums = dict.fromkeys([*pairs, ALONE], 0.0)
    size = max(1, SCORES_AT_ONCE // len(transitions))
    for start in range(0, len(holdout), size):
        questions = holdout.take(np.arange(start, min(start + size, len(holdout))))
        histories = [history for _, history, _ in questions]
        targets = [target for _, _, target in questions]
        of_ranker, of_graph = parts(questions)
        added = bonuses(transitions, [history.wanted for history in histories])
        seen = [history.items for history in histories]
        for graph_weight, weight in sums:
            scores = of_ranker + np.float32(graph_weight) * of_graph + np.float32(weight) * added
            found = mean_accuracy(scores, seen, targets, (10,), repeats=split.repeats)
            sums[graph_weight, weight] += found[METRIC] * len(questions)
    best = max(pairs, key=lambda pair: (sums[pair], -pair[0], -pair[1]))
    return ScoreWeights(*best, sums[best] / len(holdout), sums[ALONE] / len(holdout))
