"""What a server does about its memory, so that no request waits for it.

Nothing runs beside Python's garbage collector, nor beside the freeing of a large object: hundreds of
thousands of strings, or an array whose pages go back to the system, take tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from types import NoneType
from typing import Any

import numpy as np

from engine.ids import AT_ONCE

LARGE_BYTES = 4 << 20
KEPT_BYTES = 8 << 20  # in each of the heaps; what a request of a million items has at once
PAUSE_S = 0.001
SCALARS = (str, bytes, int, float, NoneType)
OURS = ("engine.", "retrieval.", "ranking.", "reranking.")


def set_up_for_serving() -> None:
    """Prepare a process that is about to open its first bundle.

    What was imported is kept from the garbage collector, which would look through it again and again. And
    glibc's malloc is to return blocks of LARGE_BYTES and more when they are freed. It would raise its own
    threshold to the largest block ever freed, and from then on keep a bundle's arrays, with holes, in its
    heaps: 10 to 15 MB more after each swap of 100,000 items. A request's own arrays are smaller, and stay
    there, up to KEPT_BYTES: to get them from the system anew would cost each request the clearing of their
    pages, several ms with a million items.
    """
    gc.collect()
    gc.freeze()
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, LARGE_BYTES)
        libc.mallopt(trim_threshold, KEPT_BYTES)  # or it would be 128 KB, and no longer follow


def give_back() -> None:
    """Have the C library return to the system what was freed.

    glibc would keep it: after eight bundles of 12,000 items 390 MB instead of 240.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def leaves(root: object, without: object = None) -> list[Any]:
    """Return what an object and the objects of this project that hang on it hold: arrays, tables, sessions.

    Who keeps them can let the objects go at once, and these afterwards, one at a time (`let_go`). A table of
    tables stands behind them; a single number or string is not worth a pause.

    Args:
        root: of a class of this project.
        without: an object that is left out, with all that hangs on it.
    """
    found: list[Any] = []
    waiting, known = [root], {id(without)}
    while waiting:
        one = waiting.pop()
        if id(one) in known:
            continue
        known.add(id(one))
        if isinstance(one, list | tuple):
            waiting.extend(one)
        elif type(one).__module__.startswith(OURS) and hasattr(one, "__dict__"):
            waiting.extend(vars(one).copy().values())
        elif not isinstance(one, SCALARS):
            found.append(one)
            if isinstance(one, dict) and isinstance(next(iter(one.values()), None), dict):
                waiting.extend(one.values())
    return found[::-1]


def let_go(things: list[Any]) -> None:
    """Empty a list from its end, with a pause after each thing; what nobody else has is freed, in parts."""
    while things:
        if sys.getrefcount(things[-1]) <= 2:  # the list's own, and that of the call
            _empty(things[-1])
        things.pop()
        time.sleep(PAUSE_S)


def _empty(thing: Any) -> None:
    """Free what a table or an array of objects holds, in parts."""
    if isinstance(thing, dict):
        while thing:
            for _ in range(min(AT_ONCE, len(thing))):
                thing.popitem()
            time.sleep(PAUSE_S)
    elif isinstance(thing, np.ndarray) and thing.dtype == np.object_ and thing.flags.owndata:
        for start in range(0, len(thing), AT_ONCE):
            thing[start : start + AT_ONCE] = None
            time.sleep(PAUSE_S)
