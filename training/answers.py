"""What a trained ranker, as it comes from training, answers the questions of a holdout with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.history import left_padded
from ranking.context import Encoded
from ranking.ranker import HybridRanker
from training.data.context import encoded_context
from training.data.splits import Holdout

HISTORIES_AT_ONCE = 256


@torch.no_grad()
def history_queries(
    ranker: HybridRanker,
    histories: Sequence[NDArray[np.int32]],
    context: Encoded | None = None,
    head: int = 0,
) -> NDArray[np.float32]:
    """Return what a ranker on the CPU scores candidates with after each history: [N, Q] float32.

    Args:
        ranker: in evaluation mode.
        histories: item rows of the events that were wanted, oldest first (History.wanted).
        context: of the moments, [N, K] each; None where nothing is known of them.
        head: place in ranker.heads of the one that asks; the first where it has none.
    """
    weights = torch.eye(len(ranker.heads))[head] if ranker.heads else None
    # Histories of like length meet, so that short ones are not padded to the longest.
    order = np.argsort([len(items) for items in histories], kind="stable")
    queries = np.zeros((len(histories), ranker.item_vectors().shape[1]), np.float32)
    for start in range(0, len(order), HISTORIES_AT_ONCE):
        rows = order[start : start + HISTORIES_AT_ONCE]
        padded = left_padded([histories[row] for row in rows], ranker.history_length)
        of_context, strengths = (
            (None, None) if context is None else (torch.from_numpy(part[rows]) for part in context)
        )
        heads = None if weights is None else weights.expand(len(rows), -1)
        query = ranker.query(torch.from_numpy(padded), of_context, strengths, heads)
        queries[rows] = query.float().numpy()
    return queries


def queries_of_all_heads(ranker: HybridRanker, histories: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
    """Return the same for each head in turn, [heads * N, Q]: what an export's scores are to be right for."""
    heads = range(max(1, len(ranker.heads)))
    return np.concatenate([history_queries(ranker, histories, head=head) for head in heads])


def question_queries(ranker: HybridRanker, holdout: Holdout) -> NDArray[np.float32]:
    """Return the same for each question of a holdout, in the context of its moment: [N, Q] float32."""
    histories = [history.wanted for _, history, _ in holdout]
    return history_queries(ranker, histories, encoded_context(ranker.context, holdout.events, holdout.ends))


@torch.no_grad()
def ranker_scores(ranker: HybridRanker) -> Callable[[Holdout], NDArray[np.float32]]:
    """Return what scores all items for the questions of a holdout, [N, I+1], by a ranker on the CPU."""
    items = ranker.item_vectors().float().numpy()
    return lambda questions: question_queries(ranker, questions) @ items.T
