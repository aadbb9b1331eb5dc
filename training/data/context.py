"""The context of events, as the ranker takes it: which keys and values have effects, and what each event has.

Shapes: N events, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.arguments import nearest
from ranking.context import MAX_STANDARD, ContextKey, ContextTable, Encoded
from training.data.interactions import ContextColumn, Interactions

MIN_EVENTS = 20  # of a value that has an effect of its own; rarer ones share the default


def context_table(train: Interactions, names: Sequence[str] | None = None) -> ContextTable:
    """Return the keys of the context that a ranker of these events has.

    A key of which training saw one value alone, or none, has no effect that could be learned and is left out.

    Args:
        train: the training events.
        names: which keys, in order; None for all that the events have.

    Raises:
        ValueError: the events have no such key.
    """
    keys = []
    for name in train.context if names is None else names:
        if name not in train.context:
            known = ", ".join(train.context) or "none"
            raise ValueError(
                f"context names {name!r}, which the data set does not declare; it has {known}"
                f"{nearest([name], train.context)}"
            )
        key = _key(name, train.context[name])
        if key is not None:
            keys.append(key)
    return ContextTable(tuple(keys))


def _key(name: str, column: ContextColumn) -> ContextKey | None:
    if column.kind == "numeric":
        known = column.values[np.isfinite(column.values)].astype(np.float64)
        spread = float(known.std()) if len(known) else 0.0
        if spread <= 0:
            return None
        return ContextKey(name=name, kind="numeric", mean=float(known.mean()), std=spread)
    counts = np.bincount(column.values, minlength=len(column.names) + 1)[1:]
    values = tuple(text for text, count in zip(column.names, counts, strict=True) if count >= MIN_EVENTS)
    return ContextKey(name=name, kind=column.kind, values=values) if len(values) > 1 else None


def encoded_context(
    table: ContextTable, events: Interactions, positions: NDArray[np.int64] | None = None
) -> Encoded:
    """Return the context of events, [N, K], as ContextTable.encode gives it for a request at their moment.

    Args:
        table: of the ranker.
        events: its `context` has every key of the table, or the key is unknown throughout.
        positions: of the events that are wanted; None for all.
    """
    count = len(events) if positions is None else len(positions)
    rows, weights = table.unknown(count)
    for place, (key, default) in enumerate(zip(table.keys, table.defaults, strict=True)):
        column = events.context.get(key.name)
        if column is None:
            continue
        values = column.values if positions is None else column.values[positions]
        if key.kind == "numeric":
            known = np.isfinite(values)
            standard = (np.where(known, values, 0.0) - key.mean) / key.std
            weights[:, place] = np.where(known, standard.clip(-MAX_STANDARD, MAX_STANDARD), 1.0)
            rows[:, place] += known
        else:
            place_of = {text: number for number, text in enumerate(key.values, start=1)}
            row_of = np.array([0, *(place_of.get(text, 0) for text in column.names)], np.int64)
            rows[:, place] = default + row_of[values]
    return Encoded(rows, weights)
