"""What comes after an item: counted in histories, as a sparse matrix, and asked with a history.

A ranker of some dozen numbers an item cannot keep every "who bought this camera then bought that case". A
table can. The idea to let one help the other is that of factorized models beside Markov chains (He and
McAuley, "Fusing Similarity Models with Markov Chains for Sparse Sequential Recommendation", ICDM 2016) and of
language models that look up what they have read (Khandelwal et al., ICLR 2020).

Shape legend: I items, E events, H events of a history, N items that may come next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval.sparse import SparseRows, strongest

WINDOW = 3  # events behind one that count as coming after it
PRIOR_EVENTS = 10  # of an item, that the rate of returns to all items counts beside its own
LAST_EVENTS = 20  # of a history that are asked what comes after them


def item_transitions(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    num_items: int,
    k: int,
    window: int = WINDOW,
    *,
    repeats: bool = False,
) -> SparseRows:
    """Return what comes after each item, [I+1, I+1]: the k likeliest of each row, likeliest first.

    The d-th event after one counts 1 / d, up to the window. A row is divided by the sum of all its counts, so
    that it holds probabilities, which sum to 1 where k leaves none out and something follows. Row 0 is empty.

    An item does not follow itself, unless `repeats`: then it does as often as its own counts say, and as
    PRIOR_EVENTS more of which as many return as a user's events do to something that is there already (a beta
    prior). So what a visitor has come back to is likely to be come back to, whichever item it is.

    Args:
        users: [E] int32, 1..U: the events of one after those of the other,
        items: [E] int32, 1..I: and each user's from the oldest to the newest.
        num_items: I.
        k: most items that a row keeps.
        window: at least 1.
        repeats: whether users return to items that they know.
    """
    size = num_items + 1
    pairs, counts = [np.zeros(0, np.int64)], [np.zeros(0)]
    for distance in range(1, window + 1):
        same_user = users[:-distance] == users[distance:]
        pairs.append(items[:-distance][same_user].astype(np.int64) * size + items[distance:][same_user])
        counts.append(np.full(len(pairs[-1]), 1.0 / distance))
    distinct, place = np.unique(np.concatenate(pairs), return_inverse=True)
    sums = np.bincount(place, np.concatenate(counts), minlength=len(distinct)).astype(np.float64)
    rows, columns = distinct // size, distinct % size
    itself = rows == columns
    own = np.bincount(rows[itself], sums[itself], minlength=size)
    rows, columns, sums = rows[~itself], columns[~itself], sums[~itself]
    others = np.bincount(rows, sums, minlength=size)
    values = sums / others[rows]
    if repeats and len(items):
        returns = (own + PRIOR_EVENTS * _return_rate(users, items, size)) / (own + others + PRIOR_EVENTS)
        there = np.unique(items[items > 0]).astype(np.int64)
        values = np.append(values * (1 - returns[rows]), returns[there])
        rows, columns = np.append(rows, there), np.append(columns, there)
    whole = SparseRows.from_entries(rows, columns, values, size, size)
    return SparseRows.from_rows([strongest(*whole.row(item), k) for item in range(size)], size)


def _return_rate(users: NDArray[np.int32], items: NDArray[np.int32], size: int) -> float:
    """Return the share of a user's events that are with an item that was there already: the users' mean."""
    is_return = np.ones(len(items), np.bool_)
    is_return[np.unique(users.astype(np.int64) * size + items, return_index=True)[1]] = False
    num_events = np.bincount(users)
    shares = np.bincount(users, is_return)[num_events > 0] / num_events[num_events > 0]
    return float(shares.mean())


def next_items(
    transitions: SparseRows, history: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the items that may come next after a history, ascending [N], and how likely each is [N].

    The mean of what comes after each of the last events, the n-th last of weight 1 / n; who looks at an item
    and then buys it has done one thing. The item of the last event is none that comes next. What is missing,
    by this or as `item_transitions` left it out, is no other's, so the numbers sum to 1 at most.

    Args:
        transitions: of item_transitions, of events without immediate repeats.
        history: [H] int32 item rows, oldest first; immediate repeats count once.
    """
    is_repeat = history[1:] == history[:-1]
    last = np.delete(history, np.flatnonzero(is_repeat))[::-1][:LAST_EVENTS]
    weights = 1.0 / np.arange(1, len(last) + 1)
    found, probabilities = transitions.weighted_sum(last, weights / max(float(weights.sum()), 1.0))
    is_other = found != (last[0] if len(last) else 0)
    return found[is_other], probabilities[is_other]
