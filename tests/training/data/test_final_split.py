"""What a final fit learns from: all that the test questions know, and nothing that they ask."""

import numpy as np

from training.data.dataset import DatasetInfo
from training.data.interactions import EventLog, Interactions
from training.data.splits import SplitData, final_split, make_split, split_as_trained


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


def test_global_time_learns_from_all_before_the_test_period():
    data = split_data("global-time")
    final = final_split(data)
    test_start = data.log.events.timestamps[36]  # a tenth of 40 events is the test period
    assert final.train.timestamps.tolist() == list(range(36))
    assert len(data.split.train) == 32
    for _, history, _ in final.test:
        assert (history.timestamps < test_start).all()


def test_global_time_keeps_the_test_period_of_users_who_are_asked_nothing():
    """Who only repeats in the test period is asked nothing, and is learned from no further all the same."""
    users = np.array([1] * 5 + [2] * 5, np.int32)
    items = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 4], np.int32)
    times = np.array([0, 2, 4, 6, 8, 1, 3, 5, 7, 9])
    events = Interactions(users, items, np.zeros(10, np.uint8), times, 2, 5)
    log = EventLog(events, ["a", "b"], list("12345"), None)
    split = make_split(log, "global-time", holdout_fraction=0.2)
    assert split.test.users.tolist() == [1]
    final = final_split(SplitData(DatasetInfo(name="x", source={}, time="unix"), log, split))
    assert sorted(final.train.timestamps.tolist()) == list(range(8))


def test_the_protocol_says_what_was_learned_from():
    data = split_data("leave-one-out")
    assert split_as_trained(data, "strict") is data.split
    assert len(split_as_trained(data, "refit").train) == 35
