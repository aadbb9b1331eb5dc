"""How much it counts in the ranker's scores that an item has often come next: chosen on validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.history import NEGATIVE_EVENT
from ranking.transitions import transition_gain
from retrieval.sparse import SparseRows
from retrieval.transitions import item_transitions, next_items
from training.data.interactions import Interactions
from training.data.splits import Holdout, Split
from training.metrics import mean_accuracy

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
MAX_QUESTIONS = 5000
SCORES_AT_ONCE = 10_000_000  # 40 MB of float32 scores
METRIC = "ndcg@10"


@dataclass(frozen=True)
class TransitionWeight:
    """What validation chose."""

    weight: float  # that with the best METRIC, the least of equals
    metrics: dict[str, float]  # METRIC of each weight

    @classmethod
    def read(cls, file: Path) -> TransitionWeight | None:
        """Return what a run has chosen before; None where it has not."""
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, file: Path) -> None:
        """Keep it for a run that goes on."""
        text = json.dumps({"weight": self.weight, "metrics": self.metrics}, indent=2)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.rename(file)


def training_transitions(train: Interactions, k: int) -> SparseRows:
    """Return what comes after each item in the training histories, [I+1, I+1]: the k likeliest of each row.

    Events that say "not this" are left out, and so are immediate repeats.
    """
    wanted = train.take(train.event_types != NEGATIVE_EVENT)
    wanted = wanted.take(wanted.is_next_item)
    return item_transitions(wanted.users, wanted.items, train.num_items, k)


def bonuses(transitions: SparseRows, histories: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
    """Return what a weight of 1 adds to the scores of all items: [Q, I+1] float32.

    Args:
        transitions: [I+1, I+1], of training_transitions.
        histories: Q times the item rows of the events that were wanted, oldest first (History.wanted).
    """
    found = np.zeros((len(histories), len(transitions)), np.float32)
    for row, history in zip(found, histories, strict=True):
        items, probabilities = next_items(transitions, history)
        row[items] = transition_gain(probabilities, 1.0)
    return found


def best_weight(scores: Callable[[Holdout], NDArray[np.float32]], split: Split, k: int) -> TransitionWeight:
    """Return the weight with the best NDCG@10 on validation, of WEIGHTS.

    Args:
        scores: the model's, of some questions: [Q, I+1]; it has learned from `split.train`.
        split: whose validation asks, up to MAX_QUESTIONS of it drawn with a fixed seed.
        k: items that a row of the transitions keeps.
    """
    holdout = split.validation.sample(MAX_QUESTIONS)
    transitions = training_transitions(split.train, k)
    sums = dict.fromkeys(WEIGHTS, 0.0)
    size = max(1, SCORES_AT_ONCE // len(transitions))
    for start in range(0, len(holdout), size):
        questions = holdout.take(np.arange(start, min(start + size, len(holdout))))
        histories = [history for _, history, _ in questions]
        targets = [target for _, _, target in questions]
        alone = scores(questions)
        added = bonuses(transitions, [history.wanted for history in histories])
        seen = [history.items for history in histories]
        for weight in WEIGHTS:
            both = alone + np.float32(weight) * added
            found = mean_accuracy(both, seen, targets, (10,), repeats=split.repeats)
            sums[weight] += found[METRIC] * len(questions)
    metrics = {weight: total / len(holdout) for weight, total in sums.items()}
    best = max(WEIGHTS, key=lambda weight: (metrics[weight], -weight))
    return TransitionWeight(best, {f"{weight:g}": metric for weight, metric in metrics.items()})
