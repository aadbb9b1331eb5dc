"""Long work beside requests, in pieces with pauses between them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PIECE_S = 0.002  # processor time


@contextlib.contextmanager
def paced(share: float, piece_s: float = PIECE_S) -> Iterator[None]:
    """Let this thread use about a share of one processor for all that is called within.

    After each piece it sleeps, and who waits for the processor or the interpreter's lock goes on at once. It
    hangs in the thread's profile function, which is called at every call and return: so it reaches into
    libraries, and nothing that is called has to know of it. A single call of C cannot be cut; the pause after
    it is longer.

    Args:
        share: above 0, up to 1.
        piece_s: processor time of a piece, in seconds.
    """
    begin = time.thread_time()

    def pause(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal begin
        used = time.thread_time() - begin
        if used >= piece_s:
            time.sleep(used * (1 / share - 1))
            begin = time.thread_time()

    before = sys.getprofile()
    sys.setprofile(pause)
    try:
        yield
    finally:
        sys.setprofile(before)
