"""Ids as Python objects, made a few at a time: a server opens a bundle beside the requests that it answers.

Whoever makes a hundred thousand objects at once keeps the interpreter's lock for tens of milliseconds, and
requests, which need it again and again, wait. So it is given away after each part, which takes less than a
millisecond.

Strings stand in an array of objects, which the garbage collector does not look into: of a list it would look
at every string again and again, and keep the lock meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

AT_ONCE = 4096


def strings(column: pl.Series) -> NDArray[np.object_]:
    """Return the strings of a column [N]; None where there is none."""
    found = np.empty(len(column), np.object_)
    for part in _parts(len(column)):
        found[part] = column[part].to_list()
    return found


def rows_by_id(ids: Sequence[str] | NDArray[np.object_]) -> dict[str, int]:
    """Return the row of each id, the first one 1; of an id that is repeated the last."""
    row_of: dict[str, int] = {}
    for part in _parts(len(ids)):
        row_of.update(zip(ids[part], range(part.start + 1, part.stop + 1), strict=True))
    return row_of


def _parts(length: int) -> Iterator[slice]:
    for start in range(0, length, AT_ONCE):
        yield slice(start, min(start + AT_ONCE, length))
        time.sleep(0)
