"""What comes after an item: counted in histories, as a sparse matrix, and asked with a history.

A ranker of some dozen numbers an item cannot keep every "who bought this camera then bought that case". A
table can. The idea to let one help the other is that of factorized models beside Markov chains (He and
McAuley, "Fusing Similarity Models with Markov Chains for Sparse Sequential Recommendation", ICDM 2016) and of
language models that look up what they have read (Khandelwal et al., ICLR 2020).

Shape legend: I items, E events, H events of a history, N items that may come next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.sparse import SparseRows, strongest

WINDOW = 3  # events behind one that count as coming after it
LAST_EVENTS = 20  # of a history that are asked what comes after them
RETURN_EVENTS = 200  # of a history whose items may be come back to
PRIOR_RETURNS, PRIOR_USERS = 1, 10  # that the rate of returns counts beside what was seen


@dataclass(frozen=True)
class Transitions:
    """What may come next.

    Attributes:
        after: [I+1, I+1] what comes after each item, of item_transitions.
        return_rate: how likely the next item is one that the visitor knows, of return_rate; 0 where users do
            not return to what they know.
    """

    after: SparseRows
    return_rate: float = 0.0


def item_transitions(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    num_items: int,
    k: int,
    window: int = WINDOW,
) -> SparseRows:
    """Return what comes after each item, [I+1, I+1]: the k likeliest of each row, likeliest first.

    The d-th event after one counts 1 / d, up to the window. A row is divided by the sum of all its counts, so
    that it holds probabilities, which sum to 1 where k leaves none out and something follows. Row 0 is empty,
    and no item follows itself.

    Args:
        users: [E] int32, 1..U: the events of one after those of the other,
        items: [E] int32, 1..I: and each user's from the oldest to the newest.
        num_items: I.
        k: most items that a row keeps.
        window: at least 1.
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
    is_other = rows != columns
    rows, columns, sums = rows[is_other], columns[is_other], sums[is_other]
    values = sums / np.bincount(rows, sums, minlength=size)[rows]
    whole = SparseRows.from_entries(rows, columns, values, size, size)
    return SparseRows.from_rows([strongest(*whole.row(item), k) for item in range(size)], size)


def return_rate(users: NDArray[np.int32], items: NDArray[np.int32]) -> float:
    """Return the share of users whose last event is with an item that they knew: how likely a return is.

    Of the last event alone, as a history is asked at its end: what comes first can be no return. Of those who
    could return, from a third event on; each counts once, whatever a machine among them does, and
    PRIOR_USERS more of whom PRIOR_RETURNS do.

    Args:
        users: [E] int32, 1..U: the events of one after those of the other,
        items: [E] int32: and each user's from the oldest to the newest, without immediate repeats.
    """
    num_events = np.bincount(users)
    ends = np.cumsum(num_events)
    is_return = np.ones(len(items), np.bool_)
    pairs = users.astype(np.int64) * (int(items.max(initial=0)) + 1) + items
    is_return[np.unique(pairs, return_index=True)[1]] = False
    returns = is_return[ends[num_events >= 3] - 1]
    return float((returns.sum() + PRIOR_RETURNS) / (len(returns) + PRIOR_USERS))


def next_items(
    transitions: Transitions, history: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the items that may come next after a history, ascending [N], and how likely each is [N].

    The mean of what comes after each of the last events, the n-th last of weight 1 / n; who looks at an item
    and then buys it has done one thing. With the probability of a return it is an item of the history
    instead, that of the n-th last event in proportion to 1 / sqrt(n); here every event counts: who has put an
    item into the cart after looking at it is likelier to come back to it. The item of the last event is none
    that comes next. What is missing, by this or as `item_transitions` left it out, is no other's, so the
    numbers sum to 1 at most.

    Args:
        transitions: of events without immediate repeats.
        history: [H] int32 item rows, oldest first.
    """
    is_repeat = history[1:] == history[:-1]
    newest = np.delete(history, np.flatnonzero(is_repeat))[::-1]
    here = newest[0] if len(newest) else 0
    last = newest[:LAST_EVENTS]
    weights = 1.0 / np.arange(1, len(last) + 1)
    found, probabilities = transitions.after.weighted_sum(last, weights / max(float(weights.sum()), 1.0))
    is_other = found != here
    found, probabilities = found[is_other], probabilities[is_other]
    known = history[::-1][:RETURN_EVENTS]
    places = np.flatnonzero(known != here)
    if not (transitions.return_rate and len(places)):
        return found, probabilities
    shares = (places + 1.0) ** -0.5
    rows, place = np.unique(np.concatenate([found, known[places]]), return_inverse=True)
    others = probabilities * (1 - transitions.return_rate)
    returns = transitions.return_rate * shares / shares.sum()
    return rows, np.bincount(place, np.concatenate([others, returns])).astype(np.float32)
