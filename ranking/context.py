"""Context: what is known of the moment of a request, as the rows of the ranker's table of effects.

NumPy only: training writes the table, serving reads it.
Shapes: K keys, B batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

HOUR_MS = 3_600_000
# Worked out from the time of the request, in UTC: hour 0 to 23, weekday 0 (Monday) to 6.
CLOCK_KEYS = ("hour", "weekday")
KeyKind = Literal["categorical", "numeric", "clock"]
MAX_STANDARD = 5.0  # a number further from its mean, in standard deviations, counts as this far


class Encoded(NamedTuple):
    """A context as the ranker takes it, for each of some questions; the last axis is the keys."""

    rows: NDArray[np.int64]  # [..., K] rows of the table of effects
    weights: NDArray[np.float32]  # [..., K] how often each counts: 1, or a standardised number


@dataclass(frozen=True, kw_only=True)
class ContextKey:
    """One key, and what training saw of it.

    Attributes:
        name: as requests and events.parquet call it.
        kind: "categorical"; "numeric"; "clock": categorical, and told by the time where nobody says it.
        values: of a key that is not numeric: those that have an effect of their own.
        mean: of a numeric key.
        std: of a numeric key, more than 0.
    """

    name: str
    kind: KeyKind
    values: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("categorical", "numeric", "clock"):
            raise ValueError(
                f"kind of {self.name!r} is {self.kind!r}; expected categorical, numeric or clock"
            )
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"values of {self.name!r} has one of them twice; expected each once")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean and std of {self.name!r} are {self.mean} and {self.std}; expected numbers, std above 0"
            )

    @property
    def num_rows(self) -> int:
        """The default, then one row for each value; of a numeric key, one for a standard deviation."""
        return 1 + (1 if self.kind == "numeric" else len(self.values))


class ContextTable:
    """The keys of a ranker, and where their effects stand.

    Each key has a run of rows, keys one after the other: first its default, which stands for a value that
    training did not see, or that nobody gave.

    Args:
        keys: in the order of the ranker's inputs; none is a table without rows.

    Raises:
        ValueError: a name is there twice.
    """

    def __init__(self, keys: tuple[ContextKey, ...] = ()) -> None:
        names = [key.name for key in keys]
        if len(set(names)) != len(names):
            raise ValueError(f"keys are {', '.join(names)}; expected each once")
        self.keys = keys
        sizes = [key.num_rows for key in keys]
        self.num_rows = sum(sizes)
        self.defaults = np.cumsum([0, *sizes])[:-1].astype(np.int64)  # [K]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the keys, in order."""
        return tuple(key.name for key in self.keys)

    @cached_property
    def _row_of(self) -> list[dict[str, int]]:
        return [
            {value: int(default) + 1 + place for place, value in enumerate(key.values)}
            for key, default in zip(self.keys, self.defaults, strict=True)
        ]

    def unknown(self, batch_size: int) -> Encoded:
        """Return the context of questions of which nothing is known: [B, K]."""
        rows = np.tile(self.defaults, (batch_size, 1))
        return Encoded(rows, np.ones(rows.shape, np.float32))

    def encode(self, context: Mapping[str, str], now_ms: int | None = None) -> Encoded:
        """Return the context of one question, [K].

        A value that training did not see, a number that is none, and a key that is missing count as the
        default. Keys that the table does not have mean nothing.

        Args:
            context: key -> value, as a request gives them.
            now_ms: time of the request, milliseconds since 1970 UTC; None where there is no clock.
        """
        hours = clock(now_ms) if now_ms is not None else {}
        rows, weights = self.defaults.copy(), np.ones(len(self), np.float32)
        for place, key in enumerate(self.keys):
            text = context.get(key.name, hours.get(key.name) if key.kind == "clock" else None)
            if text is None:
                continue
            if key.kind == "numeric":
                number = _number(text)
                if number is not None:
                    rows[place] += 1
                    weights[place] = standardised(number, key)
            else:
                rows[place] = self._row_of[place].get(text, rows[place])
        return Encoded(rows, weights)

    def to_json(self) -> str:
        """Return the table as text, for the metadata of an ONNX file."""
        return json.dumps([asdict(key) for key in self.keys], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ContextTable:
        """Return the table of a text that to_json wrote; ValueError where it is none."""
        try:
            return cls(
                tuple(ContextKey(**entry | {"values": tuple(entry["values"])}) for entry in json.loads(text))
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"the context of the ranker cannot be read: {error}") from error


def clock(now_ms: int) -> dict[str, str]:
    """Return what a time says of the hour and the weekday, in UTC."""
    hours = now_ms // HOUR_MS
    # 1970-01-01 was a Thursday.
    return {"hour": str(hours % 24), "weekday": str((hours // 24 + 3) % 7)}


def standardised(number: float, key: ContextKey) -> float:
    """Return how many standard deviations a number lies from the mean, at most MAX_STANDARD."""
    return min(max((number - key.mean) / key.std, -MAX_STANDARD), MAX_STANDARD)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
