from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from engine.events import Recorded, StoreBusyError, StoreUnavailableError, UserEvent
from engine.group_commit import Batch, GroupCommit, Outcome

WAIT_S = 60


class Slow:
    """Commits nothing before it may; notes the groups."""

    def __init__(self, **options: Any) -> None:
        self.groups: list[list[int]] = []
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        self.num_behind = 0
        self.group = GroupCommit("test", self.commit, afterwards=self.behind, **options)

    def commit(self, batches: Sequence[Batch]) -> list[Outcome]:
        self.groups.append([len(batch) for batch in batches])
        self.begun.set()
        assert self.may_end.wait(WAIT_S)
        if self.failure:
            raise self.failure
        return [
            Recorded(len(batch), 0) if batch[0].item_id else StoreUnavailableError("no item")
            for batch in batches
        ]

    def behind(self) -> None:
        self.num_behind += 1
        raise RuntimeError("ends nothing")

    def begin(self) -> Any:
        """Return a batch's future that is being committed now."""
        future = self.group.submit(batch(1))
        assert self.begun.wait(WAIT_S)
        return future


def batch(size: int, item_id: str = "x") -> list[UserEvent]:
    return [UserEvent(f"e{number}", "u", item_id) for number in range(size)]


def test_what_comes_meanwhile_is_one_group_of_bounded_size() -> None:
    slow = Slow(max_together=5)
    first = slow.begin()
    futures = [slow.group.submit(batch(size)) for size in (2, 3, 1, 9, 1)]
    cancelled = slow.group.submit(batch(1))
    assert cancelled.cancel()
    slow.may_end.set()
    slow.group.close()
    assert first.result(WAIT_S) == Recorded(1, 0)
    assert [future.result(WAIT_S).num_new for future in futures] == [2, 3, 1, 9, 1]
    assert slow.groups == [[1], [2, 3], [1], [9], [1]]
    assert slow.num_behind == 5
    with pytest.raises(StoreUnavailableError, match="closed"):
        slow.group.submit(batch(1))
    slow.group.close()


def test_too_much_is_refused_at_once() -> None:
    slow = Slow(max_waiting=4)
    first = slow.begin()
    futures = [slow.group.submit(batch(3)), slow.group.submit(batch(1))]
    with pytest.raises(StoreBusyError, match="too many events wait to be made safe"):
        slow.group.submit(batch(1))
    slow.may_end.set()
    for future in (first, *futures):
        assert future.result(WAIT_S).num_new
    assert slow.group.submit(batch(9)).result(WAIT_S).num_new == 9  # where nothing waits, any batch may
    slow.group.close()


def test_each_batch_has_its_own_outcome(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    first = slow.begin()
    good, bad = slow.group.submit(batch(1)), slow.group.submit(batch(1, item_id=""))
    slow.may_end.set()
    assert (first.result(WAIT_S), good.result(WAIT_S)) == (Recorded(1, 0), Recorded(1, 0))
    with pytest.raises(StoreUnavailableError, match="no item"):
        bad.result(WAIT_S)
    for failure, said in (
        (StoreUnavailableError("down"), "down"),
        (KeyError("what"), "store failed: 'what'"),
    ):
        slow.failure = failure
        with pytest.raises(StoreUnavailableError, match=said):
            slow.group.submit(batch(1)).result(WAIT_S)
    slow.group.close()
    assert "KeyError" in caplog.text
    assert "events could not be made safe: down" in caplog.text
