"""What a final fit learns from: all that the test questions know, and nothing that they ask."""

import numpy as np
import pytest

from benchmarks.final_fit import final_split
from training.data.dataset import DatasetInfo
from training.data.interactions import EventLog, Interactions
from training.data.splits import SplitData, make_split


def split_data(name, is_test=None, repeats=False):
    """Return the split of five users with eight events each, of ten items."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(1, 6, dtype=np.int32), 8)
    items = np.concatenate([rng.permutation(10)[:8] + 1 for _ in range(5)]).astype(np.int32)
    times = np.arange(40, dtype=np.int64)
    events = Interactions(users, items, np.zeros(40, np.uint8), times, 5, 10)
    log = EventLog(events, list("abcde"), list("0123456789"), is_test)
    return SplitData(
        DatasetInfo(name="x", source={}, time="unix"), log, make_split(log, name, repeats=repeats)
    )


def pairs(events):
    return set(zip(events.users.tolist(), events.items.tolist(), strict=True))


def test_given_learns_from_all_but_the_test_set():
    is_test = np.random.default_rng(1).random(40) < 0.3
    is_test[32:] = False  # user 5 is asked nothing
    data = split_data("given", is_test)
    final = final_split(data)
    assert pairs(final.train) == pairs(data.log.events.take(~is_test)) > pairs(data.split.train)
    assert final.test is data.split.test
    for user, history, target in final.test:
        assert set(final.train.history(user).items.tolist()) == set(history.items.tolist())
        assert not {(user, int(item)) for item in target} & pairs(final.train)


def test_leave_one_out_learns_from_all_but_the_last_item():
    data = split_data("leave-one-out")
    final = final_split(data)
    assert len(final.train) == 40 - 5
    assert len(data.split.train) == 40 - 10
    for user, history, target in final.test:
        assert final.train.history(user).items.tolist() == history.items.tolist()
        assert (user, int(target[0])) not in pairs(final.train)


def test_global_time_is_refused():
    with pytest.raises(
        ValueError, match="split is global-time; a final fit is defined for given and leave-one"
    ):
        final_split(split_data("global-time"))
