"""All items ranked, question by question: what every quality table is made of.

Q questions, U users, I items, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from engine.history import History, not_asked_for
from retrieval.fold_in import event_weights
from training.data.interactions import Interactions
from training.data.splits import Holdout
from training.metrics import METRICS, places_by_score

SCORES_AT_ONCE = 10_000_000  # 40 MB of float32 scores: users times items never stand at once

Scores = Callable[[Holdout], NDArray[np.float32]]  # of some questions: [Q, I+1]


def question_metrics(
    scores: Scores, holdout: Holdout, names: Sequence[str], *, repeats: bool
) -> dict[str, NDArray[np.float64]]:
    """Return each metric of each question, {"ndcg@10": [Q], ...}.

    Args:
        scores: the model; it is asked some questions at a time, in any order.
        holdout: the questions.
        names: metrics of training/metrics.py with their cutoff, such as "recall@10".
        repeats: whether users return to items that they know.

    Raises:
        ValueError: there are no questions.
    """
    if not len(holdout):
        raise ValueError("the split asks no questions")
    parsed = [(name, METRICS[name.split("@")[0]], int(name.split("@")[1])) for name in names]
    found = {name: np.zeros(len(holdout)) for name in names}
    size = max(1, SCORES_AT_ONCE // (holdout.events.num_items + 1))
    for start in range(0, len(holdout), size):
        questions = np.arange(start, min(start + size, len(holdout)))
        asked = holdout.take(questions)
        table = scores(asked)
        table[:, 0] = -np.inf
        for question, row, (_, history, target) in zip(questions, table, asked, strict=True):
            row[not_asked_for(history.items, repeats)] = -np.inf
            places = places_by_score(row, target)
            for name, metric, cutoff in parsed:
                found[name][question] = metric(places, cutoff)
    return found


@dataclass(frozen=True)
class Vectors:
    """A model whose scores are inner products, asked one holdout."""

    users: NDArray[np.float32]  # [U+1, D] what each user asks with; zero for users who ask nothing
    items: NDArray[np.float32]  # [I+1, D]

    def scores(self, questions: Holdout) -> NDArray[np.float32]:
        """Return [Q, I+1]."""
        scores: NDArray[np.float32] = self.users[questions.users] @ self.items.T
        return scores


def touched_matrix(events: Interactions) -> csr_array:
    """Return who touched what, [U+1, I+1] float32: one for every edge of the graph."""
    edges = events.edges
    ones = np.ones(len(edges), np.float32)
    return csr_array((ones, (edges.users, edges.items)), shape=(events.num_users + 1, events.num_items + 1))


def history_matrix(questions: Holdout, half_life: float | None = None) -> csr_array:
    """Return the items of each question's history, [Q, I+1] float32, each item once.

    Args:
        questions: whose histories.
        half_life: after how many further events one counts half, the newest 1; None counts each 1.
    """
    rows = [questions.history(q) for q in range(len(questions))]
    items, weights = [], []
    for history in rows:
        # Of an item that comes again the newest event counts.
        newest, place = np.unique(history.wanted[::-1], return_index=True)
        items.append(newest)
        weights.append(recency(history, half_life)[::-1][place])
    starts = np.cumsum([0, *map(len, items)])
    shape = (len(questions), questions.events.num_items + 1)
    flat = np.concatenate([np.zeros(0, np.int32), *items])
    return csr_array((np.concatenate([np.zeros(0, np.float32), *weights]), flat, starts), shape=shape)


def recency(history: History, half_life: float | None) -> NDArray[np.float32]:
    """Return what each event of `history.wanted` counts, [H'] float32: half per `half_life` behind it."""
    size = len(history.wanted)
    ages = np.arange(size)[::-1].astype(np.float64)
    return event_weights(np.zeros(size, np.uint8), ages, np.ones(1, np.float32), half_life)
