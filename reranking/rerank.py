"""From the ranked items to the slate: the rules, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reranking.rules import RankedItems, Rule


@dataclass(frozen=True)
class Reranked:
    """The slate."""

    order: NDArray[np.int64]  # [at most limit] indices into the ranked items, best first
    relaxed: list[str]  # names of the rules that had to yield, in their order


def rerank(items: RankedItems, rules: Sequence[Rule], limit: int) -> Reranked:
    """Return the first `limit` items after every rule had its turn; with no rules, the ranking as it is.

    A later rule may undo what an earlier one did; `relaxed` says which rules yielded on their own turn.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    order = np.arange(len(items.rows))
    relaxed = []
    for rule in rules:
        order, yielded = rule.apply(items, order, limit)
        if yielded:
            relaxed.append(rule.name)
    return Reranked(order[:limit], relaxed)
