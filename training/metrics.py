"""Metrics of rankings: pure functions, the only definition of each.

Ties never favour the target. Where items share a score, every order of them is equally likely, and a metric
is its expectation over these orders, in closed form: a model that scores all alike gets what chance gets.

Shapes: I items, R targets of a question, K cutoffs, L length of a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.history import not_asked_for

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class Places:
    """Where a question's targets stand in a ranking: somewhere in first[r] .. first[r] + width[r] - 1."""

    first: NDArray[np.int64]  # [R] how many items score higher (0 is the top)
    width: NDArray[np.int64]  # [R] how many items share the target's score, itself included


NOWHERE = np.iinfo(np.int64).max // 2


def places_by_score(scores: FloatArray, targets: NDArray[np.int32]) -> Places:
    """Return where the targets stand when all items are ranked by score.

    Args:
        scores: [I+1], -inf where an item takes no part in the ranking (padding, items of the history).
            NaN is an error.
        targets: [R] item rows; a target that takes no part stands nowhere.
    """
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN; expected numbers, or -inf for items that take no part")
    wanted = scores[targets][:, None]
    first = (scores[None, :] > wanted).sum(1)
    width = (scores[None, :] == wanted).sum(1)
    out = np.isneginf(wanted[:, 0])
    return Places(np.where(out, NOWHERE, first).astype(np.int64), np.where(out, 1, width).astype(np.int64))


def places_in_list(ranked: NDArray[np.int32], targets: NDArray[np.int32]) -> Places:
    """Return where the targets stand in a list of item rows, best first; nowhere where they are not in it."""
    found = ranked[None, :] == targets[:, None]
    first = np.where(found.any(1), found.argmax(1) if len(ranked) else 0, NOWHERE)
    return Places(first.astype(np.int64), np.ones(len(targets), np.int64))


def recall(places: Places, cutoff: int) -> float:
    """Return the share of targets among the first `cutoff` items."""
    return float(np.mean(_inside(places, cutoff) / places.width))


def ndcg(places: Places, cutoff: int) -> float:
    """Return the normalized discounted cumulative gain with binary gains (Jarvelin and Kekalainen 2002).

    Discount 1 / log2(place + 2) with place 0 at the top; ideal: the targets fill the first places.
    """
    discounts = 1.0 / np.log2(np.arange(2, cutoff + 2))
    gains = np.concatenate([[0.0], np.cumsum(discounts)])  # of the first n places
    begin = np.minimum(places.first, cutoff)
    gain = (gains[begin + _inside(places, cutoff)] - gains[begin]) / places.width
    return float(gain.sum() / gains[min(len(places.first), cutoff)])


def mrr(places: Places, cutoff: int) -> float:
    """Return the reciprocal of the first target's place (1 at the top), 0 beyond `cutoff`."""
    start, share = _first_hit(places, cutoff)
    return float((share / (start + 1 + np.arange(len(share)))).sum())


def hit(places: Places, cutoff: int) -> float:
    """Return 1 where any target is among the first `cutoff` items, else 0 (in expectation over ties)."""
    return float(_first_hit(places, cutoff)[1].sum())


def _inside(places: Places, cutoff: int) -> NDArray[np.int64]:
    """How many of the places a target may take lie before the cutoff."""
    inside: NDArray[np.int64] = np.clip(cutoff - places.first, 0, places.width)
    return inside


def _first_hit(places: Places, cutoff: int) -> tuple[int, FloatArray]:
    """The first place that the best target may take, and the chance of the first hit at it and at each next.

    Of `width` tied items, `tied` are targets. That none of the first p is one has the chance
    (width - tied)(width - tied - 1)... / width (width - 1)..., p factors each.
    """
    start = int(places.first.min())
    best = places.first == start
    width, tied = int(places.width[best][0]), int(best.sum())
    depth = max(0, min(cutoff - start, width - tied + 1))
    step = np.arange(depth)
    miss = (width - tied - step) / (width - step)
    none_yet = np.cumprod(np.concatenate([[1.0], miss]))[:depth]
    return start, none_yet * tied / (width - step)


METRICS = {"recall": recall, "ndcg": ndcg, "mrr": mrr, "hit": hit}


def accuracy(places: Places, cutoffs: Sequence[int]) -> dict[str, float]:
    """Return every accuracy metric of one question at every cutoff, as {"recall@5": ...}."""
    return {f"{name}@{k}": metric(places, k) for name, metric in METRICS.items() for k in cutoffs}


def coverage(lists: Iterable[NDArray[np.int32]], num_items: int) -> float:
    """Return the share of the catalog's items that stand in at least one of the lists."""
    shown = {int(row) for ranked in lists for row in ranked}
    return len(shown) / num_items if num_items else 0.0


def diversity(ranked: NDArray[np.int32], item_vectors: NDArray[np.float32]) -> float:
    """Return the intra-list diversity: the mean of 1 - cosine over all pairs (Ziegler et al. 2005).

    Args:
        ranked: [L] item rows; fewer than two give 0.
        item_vectors: [I+1, D]; a zero vector is orthogonal to every other.
    """
    if len(ranked) < 2:
        return 0.0
    vectors = item_vectors[ranked].astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    total = vectors.sum(0)
    pairs = len(ranked) * (len(ranked) - 1)
    return float(1.0 - (total @ total - (vectors * vectors).sum()) / pairs)


def novelty(ranked: NDArray[np.int32], popularity: NDArray[np.int64], num_users: int) -> float:
    """Return the mean self-information -log2(share of users who know the item) (Vargas and Castells 2011).

    Args:
        ranked: [L] item rows; an empty list gives 0.
        popularity: [I+1] how many users touched the item in training; 0 counts as 1.
        num_users: users in training.
    """
    if not len(ranked):
        return 0.0
    share = np.maximum(popularity[ranked], 1) / max(num_users, 1)
    return float(np.mean(-np.log2(share)))


def group_coverage(lists: Iterable[NDArray[np.int32]], groups: NDArray[np.int32]) -> float:
    """Return the share of the catalog's groups (categories, brands, sellers) that stand in any of the lists.

    Args:
        lists: item rows.
        groups: [I+1] number of each item's group, 0 where it has none; a catalog without groups gives 0.
    """
    known = np.unique(groups[groups > 0])
    shown = {int(group) for ranked in lists for group in groups[ranked] if group}
    return len(shown) / len(known) if len(known) else 0.0


def group_entropy(ranked: NDArray[np.int32], groups: NDArray[np.int32]) -> float:
    """Return the Shannon entropy in bits of a list's groups: 0 for one group, log2(L) for L different ones.

    Args:
        ranked: [L] item rows; those without a group are left out, and nothing left gives 0.
        groups: [I+1] number of each item's group, 0 where it has none.
    """
    found = groups[ranked]
    _, counts = np.unique(found[found > 0], return_counts=True)
    share = counts / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0  # never -0


def attention(length: int) -> NDArray[np.float64]:
    """Return the attention that each place gets, [length] float64: 1 / log2(place + 1), place 1 the top."""
    return 1.0 / np.log2(np.arange(2, length + 2))


def exposure(lists: Iterable[NDArray[np.int32]], num_items: int) -> NDArray[np.float64]:
    """Return the attention that each item gets in all lists, [I+1] float64 (Singh and Joachims 2018)."""
    total = np.zeros(num_items + 1)
    for ranked in lists:
        np.add.at(total, ranked, attention(len(ranked)))
    return total


def gini(amounts: FloatArray) -> float:
    """Return the Gini coefficient of some amounts: 0 where all are equal, (n - 1) / n where one has all.

    Args:
        amounts: [n] at least 0, such as exposure(...)[1:]; none, or nothing but zeros, gives 0.
    """
    ordered = np.sort(amounts.astype(np.float64))
    count, total = len(ordered), ordered.sum()
    if not total:
        return 0.0
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * total))


def serendipity(ranked: NDArray[np.int32], targets: NDArray[np.int32], expected: NDArray[np.int32]) -> float:
    """Return the share of a list that is wanted and not expected (Ge et al. 2010).

    Args:
        ranked: [L] item rows; an empty list gives 0.
        targets: item rows that the user wants.
        expected: item rows that a plain recommender shows to everybody, such as the L most popular.
    """
    if not len(ranked):
        return 0.0
    return float(np.mean(np.isin(ranked, targets) & ~np.isin(ranked, expected)))


def expected_margin(ranked: NDArray[np.int32], margins: FloatArray) -> float:
    """Return the mean margin of a list, in the unit of the margins, each place weighed by its attention.

    Args:
        ranked: [L] item rows; an empty list gives 0.
        margins: [I+1], shares of the price or amounts of money; NaN counts as 0.
    """
    if not len(ranked):
        return 0.0
    return float(np.average(np.nan_to_num(margins[ranked], nan=0.0), weights=attention(len(ranked))))


def freshness(
    ranked: NDArray[np.int32], available_from: NDArray[np.int64], now_ms: int, half_life_days: float
) -> float:
    """Return the mean of 2^(-age / half-life): 1 where all came today, 1/2 where all are one half-life old.

    Args:
        ranked: [L] item rows; an empty list gives 0.
        available_from: [I+1] ms; 0 is unknown and counts as infinitely old.
        now_ms: on the same clock; what comes later counts as new.
        half_life_days: above 0.
    """
    if not len(ranked):
        return 0.0
    since = available_from[ranked]
    age_days = np.maximum(now_ms - since, 0) / 86_400_000
    return float(np.mean(np.where(since == 0, 0.0, np.exp2(-age_days / half_life_days))))


def mean_accuracy(
    scores: NDArray[np.float32],
    histories: Sequence[NDArray[np.int32]],
    targets: Sequence[NDArray[np.int32]],
    cutoffs: Sequence[int],
    *,
    repeats: bool = False,
) -> dict[str, float]:
    """Return the mean of every accuracy metric over some questions, all items ranked.

    Args:
        scores: [Q, I+1]; changed in place: padding and what is not_asked_for become -inf.
        histories: Q arrays of item rows.
        targets: Q arrays of item rows.
        cutoffs: the K of the metrics.
        repeats: whether users return to items that they know.
    """
    scores[:, 0] = -np.inf
    results = []
    for row, history, target in zip(scores, histories, targets, strict=True):
        row[not_asked_for(history, repeats)] = -np.inf
        results.append(accuracy(places_by_score(row, target), cutoffs))
    return {key: float(np.mean([r[key] for r in results])) for key in results[0]} if results else {}
