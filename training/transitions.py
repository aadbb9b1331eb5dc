"""What has come next in the training histories, and what that adds to the scores of all items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.history import NEGATIVE_EVENT
from ranking.transitions import transition_gain
from retrieval.transitions import Transitions, item_transitions, next_items, return_rate
from training.data.interactions import Interactions


def training_transitions(train: Interactions, k: int, repeats: bool) -> Transitions:
    """Return what comes after each item in the training histories, and how likely a return is.

    Events that say "not this" are left out, and so are immediate repeats, and a user's oldest beyond
    MAX_EVENTS.

    Args:
        train: the training events.
        k: most items that a row keeps.
        repeats: whether users return to items that they know.
    """
    wanted = train.take(train.event_types != NEGATIVE_EVENT)
    wanted = wanted.take(wanted.is_learned_in_order)
    after = item_transitions(wanted.users, wanted.items, train.num_items, k)
    return Transitions(after, return_rate(wanted.users, wanted.items) if repeats else 0.0)


def bonuses(transitions: Transitions, histories: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
    """Return what a weight of 1 adds to the scores of all items: [Q, I+1] float32.

    Args:
        transitions: of training_transitions.
        histories: Q times the item rows of the events that were wanted, oldest first (History.wanted).
    """
    found = np.zeros((len(histories), len(transitions.after)), np.float32)
    for row, history in zip(found, histories, strict=True):
        items, probabilities = next_items(transitions, history)
        row[items] = transition_gain(probabilities, 1.0)
    return found
