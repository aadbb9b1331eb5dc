"""What a trained ranker, as it comes from training, answers the questions of a holdout with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from engine.history import left_padded
from ranking.ranker import HybridRanker
from training.data.context import encoded_context
from training.data.splits import Holdout

HISTORIES_AT_ONCE = 256


@torch.no_grad()
def question_queries(ranker: HybridRanker, holdout: Holdout) -> NDArray[np.float32]:
    """Return what a ranker on the CPU scores candidates with for each question: [N, Q] float32."""
    # Histories of like length meet, so that short ones are not padded to the longest.
    order = np.argsort(holdout.ends - holdout.events.offsets[holdout.users], kind="stable")
    found = [np.zeros((0, ranker.item_vectors().shape[1]), np.float32)]
    for start in range(0, len(order), HISTORIES_AT_ONCE):
        rows = order[start : start + HISTORIES_AT_ONCE]
        histories = left_padded([holdout.history(int(q)).items for q in rows], ranker.history_length)
        context = map(torch.from_numpy, encoded_context(ranker.context, holdout.events, holdout.ends[rows]))
        found.append(ranker.query(torch.from_numpy(histories), *context).float().numpy())
    queries = np.concatenate(found)
    return queries[np.argsort(order)]


@torch.no_grad()
def ranker_scores(ranker: HybridRanker) -> Callable[[Holdout], NDArray[np.float32]]:
    """Return what scores all items for the questions of a holdout, [N, I+1], by a ranker on the CPU."""
    items = ranker.item_vectors().float().numpy()
    return lambda questions: question_queries(ranker, questions) @ items.T
