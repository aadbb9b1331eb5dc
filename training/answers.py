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
def question_states(ranker: HybridRanker, holdout: Holdout) -> NDArray[np.float32]:
    """Return a ranker's states after the histories of a holdout, in their context: [Q, D] float32."""
    states = np.zeros((len(holdout), ranker.embedding.embedding_dim), np.float32)
    # Histories of like length meet, so that short ones are not padded to the longest.
    order = np.argsort(holdout.ends - holdout.events.offsets[holdout.users], kind="stable")
    for start in range(0, len(order), HISTORIES_AT_ONCE):
        rows = order[start : start + HISTORIES_AT_ONCE]
        histories = left_padded([holdout.history(int(q)).items for q in rows], ranker.history_length)
        context = map(torch.from_numpy, encoded_context(ranker.context, holdout.events, holdout.ends[rows]))
        found = ranker.in_context(ranker.states(torch.from_numpy(histories))[:, -1], *context)
        states[rows] = found.float().numpy()
    return states


def ranker_scores(ranker: HybridRanker) -> Callable[[Holdout], NDArray[np.float32]]:
    """Return what scores all items for the questions of a holdout, [Q, I+1], by a ranker on the CPU."""
    with torch.no_grad():
        items = ranker.item_vectors().float().numpy()
    return lambda questions: question_states(ranker, questions) @ items.T
