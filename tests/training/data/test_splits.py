"""Splits, worked out by hand, against plain loops, and for looking ahead."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.history import EVENT_CODE, NEGATIVE_EVENT
from training.data.dataset import DatasetInfo, write_info
from training.data.interactions import EventLog, Interactions
from training.data.splits import SplitOptions, load_split, make_split

VIEW = EVENT_CODE["view"]
NUM_USERS, NUM_ITEMS = 4, 6


def event_log(events, is_test=None, num_users=NUM_USERS, num_items=NUM_ITEMS):
    """Return the log of (user, item, time[, event type]) events, sorted as load_event_log sorts them."""
    order = sorted(range(len(events)), key=lambda n: (events[n][0], events[n][2]))
    rows = [(*events[n], VIEW)[:4] for n in order]
    return EventLog(
        Interactions(
            np.array([row[0] for row in rows], np.int32),
            np.array([row[1] for row in rows], np.int32),
            np.array([row[3] for row in rows], np.uint8),
            np.array([row[2] for row in rows], np.int64),
            num_users,
            num_items,
        ),
        [f"u{n}" for n in range(1, num_users + 1)],
        [f"i{n}" for n in range(1, num_items + 1)],
        None if is_test is None else np.array([is_test[n] for n in order], bool),
    )


def asked(holdout):
    """Return {user: (items of the history, targets)}."""
    return {user: (history.items.tolist(), target.tolist()) for user, history, target in holdout}


def learned(split):
    """Return {user: items of training}, of the users who have some."""
    items = {user: split.train.history(user).items.tolist() for user in range(1, split.train.num_users + 1)}
    return {user: rows for user, rows in items.items() if rows}


def of_user(user, items, event_types=None):
    types = event_types or [VIEW] * len(items)
    return [(user, item, time, kind) for time, (item, kind) in enumerate(zip(items, types, strict=True))]


# --- leave-one-out


def test_leave_one_out_worked_out():
    # User 1's items are new each time; user 2 returns to known ones; user 3 has two new items only.
    log = event_log(
        of_user(1, [1, 2, 3, 4]) + of_user(2, [5, 6, 5, 5, 1, 6, 2, 5]) + of_user(3, [1, 2, 1, 2, 2])
    )
    split = make_split(log, "leave-one-out")
    assert learned(split) == {1: [1, 2], 2: [5, 6, 5, 5], 3: [1, 2, 1, 2, 2]}
    assert asked(split.validation) == {1: ([1, 2], [3]), 2: ([5, 6, 5, 5], [1])}
    assert asked(split.test) == {1: ([1, 2, 3], [4]), 2: ([5, 6, 5, 5, 1, 6], [2])}
    assert (split.name, split.ordered, split.repeats) == ("leave-one-out", True, False)


def test_leave_one_out_with_repeats():
    # What repeats the event just before it is no question: 5 (second of a run) and the last 6.
    log = event_log(of_user(1, [5, 6, 5, 5, 6, 6]) + of_user(2, [1, 1, 1, 2, 2]))
    split = make_split(log, "leave-one-out", repeats=True)
    assert asked(split.validation) == {1: ([5, 6], [5])}
    assert asked(split.test) == {1: ([5, 6, 5, 5], [6])}
    assert learned(split) == {1: [5, 6], 2: [1, 1, 1, 2, 2]}
    assert split.repeats


@pytest.mark.parametrize("repeats", [False, True])
def test_what_was_removed_from_the_cart_is_not_asked_for(repeats):
    log = event_log(of_user(1, [1, 2, 3, 4, 5], [VIEW, VIEW, VIEW, NEGATIVE_EVENT, NEGATIVE_EVENT]))
    split = make_split(log, "leave-one-out", repeats=repeats)
    assert asked(split.validation) == {1: ([1], [2])}
    assert asked(split.test) == {1: ([1, 2], [3])}


def test_events_at_one_time_keep_their_order():
    events = [(1, item, 7) for item in (4, 2, 5, 1, 3)]
    assert asked(make_split(event_log(events), "leave-one-out").test) == {1: ([4, 2, 5, 1], [3])}
    assert asked(make_split(event_log(events[::-1]), "leave-one-out").test) == {1: ([3, 1, 5, 2], [4])}


def test_users_with_too_few_new_items_are_not_asked():
    log = event_log(of_user(1, [1]) + of_user(2, [1, 2]) + of_user(4, [1, 1, 2, 1]))
    split = make_split(log, "leave-one-out")
    assert len(split.validation) == len(split.test) == 0
    assert asked(split.test) == {}
    assert learned(split) == {1: [1], 2: [1, 2], 4: [1, 1, 2, 1]}


# --- global-time


def test_global_time_worked_out():
    # Ten events; validation from time 60, test from time 80.
    log = event_log(
        [
            *[(1, 1, 0), (1, 2, 10), (1, 3, 60), (1, 2, 70), (1, 4, 90)],
            *[(2, 1, 20), (2, 5, 30), (2, 5, 80), (2, 6, 95)],
            (3, 6, 61),
        ]
    )
    split = make_split(log, "global-time", holdout_fraction=0.3)
    assert learned(split) == {1: [1, 2], 2: [1, 5]}
    # User 1 returns to item 2, which is no question. User 3 is new: no history.
    assert asked(split.validation) == {1: ([1, 2], [3]), 3: ([], [6])}
    assert asked(split.test) == {1: ([1, 2, 3, 2], [4]), 2: ([1, 5], [6])}
    assert (split.name, split.ordered) == ("global-time", True)


def test_global_time_with_repeats():
    log = event_log(
        [(1, 1, 0), (1, 2, 1), (1, 2, 2), (1, 1, 3), (1, 2, 6), (1, 1, 7), (1, 2, 7), (1, 3, 8), (1, 1, 9)]
    )
    split = make_split(log, "global-time", holdout_fraction=0.3, repeats=True)
    assert learned(split) == {1: [1, 2, 2]}
    # Item 2 is where the user is already.
    assert asked(split.validation) == {1: ([1, 2, 2], [1])}
    # Item 1 is asked for once, although it comes twice.
    assert asked(split.test) == {1: ([1, 2, 2, 1, 2], [1, 3])}


def test_global_time_never_cuts_between_events_of_one_time():
    times = [0, 1, 1, 1, 2, 2, 2, 2, 3, 3]  # the last four tenths begin in the middle of time 2
    log = event_log([(1, item, time) for item, time in enumerate(times, start=1)], num_items=10)
    split = make_split(log, "global-time", holdout_fraction=0.2)
    assert learned(split) == {1: [1, 2, 3, 4]}
    assert asked(split.validation) == {1: ([1, 2, 3, 4], [5, 6, 7, 8])}
    assert asked(split.test) == {1: ([1, 2, 3, 4, 5, 6, 7, 8], [9, 10])}


@pytest.mark.parametrize("times", [[5] * 10, [0, 1, *[2] * 8], [*[0] * 9, 1]])
def test_too_few_times_to_cut(times):
    log = event_log([(1, 1 + n % 6, time) for n, time in enumerate(times)])
    with pytest.raises(ValueError, match="share one time to cut between them; expected leave-one-out"):
        make_split(log, "global-time")


# --- given


def test_given_worked_out():
    events = [(1, 1, 0), (1, 2, 0), (1, 3, 0), (2, 4, 0), (2, 5, 0), (3, 6, 0)]
    # The test event of user 1 stands before train events; user 3 has nothing but a test event.
    log = event_log(events, is_test=[True, False, False, False, True, True])
    split = make_split(log, time="none", holdout_fraction=1e-9)
    assert learned(split) == {1: [2, 3], 2: [4]}
    assert asked(split.validation) == {}
    assert asked(split.test) == {1: ([2, 3], [1]), 2: ([4], [5]), 3: ([], [6])}
    assert (split.name, split.ordered) == ("given", False)


def test_given_draws_validation_and_leaves_a_history():
    events = [(user, item, 0) for user in range(1, 41) for item in range(1, 11 if user > 20 else 2)]
    is_test = [item == 10 for _, item, _ in events]
    log = event_log(events, is_test, num_users=40, num_items=10)
    split = make_split(log, holdout_fraction=0.4, time="none", seed=3)
    for user, (history, targets) in asked(split.validation).items():
        assert sorted(history + targets) == list(range(1, 10))
        assert history == learned(split)[user]
    drawn = sum(len(targets) for _, targets in asked(split.validation).values())
    assert 0.3 < drawn / (20 * 9) < 0.5
    assert set(learned(split)) == set(range(1, 41))  # also those with one train event
    for history, targets in asked(split.test).values():
        assert (sorted(history), targets) == (list(range(1, 10)), [10])

    again, other = (make_split(log, holdout_fraction=0.4, time="none", seed=seed) for seed in (3, 4))
    assert asked(again.validation) == asked(split.validation)
    assert asked(other.validation) != asked(split.validation)


def test_given_asks_for_no_known_item_unless_repeats():
    log = event_log([(1, 1, 0), (1, 1, 1), (1, 2, 2), (1, 2, 3)], is_test=[False, True, True, True])
    assert asked(make_split(log, time="none", holdout_fraction=1e-9).test) == {1: ([1], [2])}


# --- what cannot be done, and the rest


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("given", {}, "split is 'given', but the data set has none; expected auto, l"),
        ("leave-one-out", {"time": "none"}, "split is 'leave-one-out', but the events .* have no order"),
        ("auto", {"time": "none"}, "have no order; expected given, which takes a data set with a test set"),
        ("global-time", {"time": "none"}, "split is 'global-time', but the events .* have no order"),
        ("global-time", {"time": "order"}, "has an order and no times; expected auto or leave-one-out"),
        ("random", {}, "split is 'random'; expected auto, leave-one-out, global-time or given"),
        (
            "auto",
            {"holdout_fraction": 0.0},
            "holdout_fraction is 0.0; expected more than 0 and less than 0.5",
        ),
        (
            "auto",
            {"holdout_fraction": 0.5},
            "holdout_fraction is 0.5; expected more than 0 and less than 0.5",
        ),
    ],
)
def test_impossible_combinations(name, options, message):
    log = event_log(of_user(1, [1, 2, 3, 4]))
    with pytest.raises(ValueError, match=message):
        make_split(log, name, **options)


def test_auto_takes_the_given_split_where_there_is_one():
    events = of_user(1, [1, 2, 3, 4])
    assert make_split(event_log(events)).name == "leave-one-out"
    assert make_split(event_log(events), time="order").name == "leave-one-out"
    assert make_split(event_log(events, is_test=[False, False, True, True])).name == "given"


def test_some_questions_of_a_holdout():
    log = event_log([(user, item, item) for user in range(1, 5) for item in range(1, 5 + user % 2)])
    test = make_split(log, "global-time", holdout_fraction=0.3).test
    some = test.take(np.array([3, 1]))
    assert len(some) == 2
    assert list(asked(some).items()) == [(user, asked(test)[user]) for user in (4, 2)]
    assert some.target(0).tolist() == test.target(3).tolist()
    assert len(test.take(np.zeros(0, np.int64))) == 0


def test_load_split_is_the_same_every_time(tmp_path):
    rng = np.random.default_rng(0)
    pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in rng.integers(0, 5, 60)],
            "item_id": [f"i{n}" for n in rng.integers(0, 9, 60)],
            "timestamp": rng.integers(0, 20, 60),
            "event_type": ["view"] * 60,
        }
    ).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": [f"i{n}" for n in range(9)]}).write_parquet(tmp_path / "items.parquet")
    write_info(tmp_path, DatasetInfo(name="tiny", source={}, time="unix", repeats=True))
    options = SplitOptions(name="global-time", holdout_fraction=0.2)
    data, again = load_split(tmp_path, options), load_split(tmp_path, options)
    assert data.info.name == json.loads((tmp_path / "dataset.json").read_text())["name"]
    assert data.split.repeats
    assert len(data.split.test) > 0
    assert asked(data.split.test) == asked(again.split.test)
    assert asked(data.split.test) == asked(make_split(data.log, **vars(options), repeats=True).test)


# --- properties

EVENTS = st.lists(
    st.tuples(
        st.integers(1, NUM_USERS),
        st.integers(1, NUM_ITEMS),
        st.integers(0, 12),  # few times, many ties
        st.sampled_from([VIEW, VIEW, VIEW, NEGATIVE_EVENT]),
    ),
    min_size=1,
    max_size=40,
)


def timeline(events, user):
    """Return one user's events in the order of time; sorted() is stable."""
    return sorted((event for event in events if event[0] == user), key=lambda event: event[2])


def possible_targets(line, repeats):
    """Return the places of a timeline that may be asked for, by the plainest of loops."""
    places, known, previous = [], set(), None
    for place, (_, item, _, kind) in enumerate(line):
        new = item != previous if repeats else item not in known
        if new and kind != NEGATIVE_EVENT:
            places.append(place)
        known.add(item)
        previous = item
    return places


@settings(deadline=None, max_examples=60)
@given(EVENTS, st.booleans())
def test_leave_one_out_is_the_plain_loop_and_never_looks_ahead(events, repeats):
    split = make_split(event_log(events), "leave-one-out", repeats=repeats)
    train, validation, test = learned(split), asked(split.validation), asked(split.test)
    for user in range(1, NUM_USERS + 1):
        line = timeline(events, user)
        items = [item for _, item, _, _ in line]
        places = possible_targets(line, repeats)
        if len(places) < 3:
            assert user not in validation
            assert user not in test
            assert train.get(user, []) == items
            continue
        *_, before_last, last = places
        # What is learned and what is asked is a prefix of the timeline that ends before the target.
        assert train.get(user, []) == items[:before_last]
        assert validation[user] == (items[:before_last], [items[before_last]])
        assert test[user] == (items[:last], [items[last]])
        if not repeats:
            assert items[last] not in items[:last]
            assert items[before_last] not in items[:before_last]


@settings(deadline=None, max_examples=60)
@given(EVENTS, st.booleans(), st.sampled_from([0.1, 0.25, 0.4]))
def test_global_time_never_looks_ahead(events, repeats, fraction):
    try:
        split = make_split(event_log(events), "global-time", repeats=repeats, holdout_fraction=fraction)
    except ValueError:
        assume(False)
    # The two cuts, each at the time of an event: a share of all events stands at or behind it.
    times = sorted(time for _, _, time, _ in events)
    test_start = times[int(len(times) * (1 - fraction))]
    validation_start = times[int(len(times) * (1 - 2 * fraction))]
    assert times[0] < validation_start < test_start
    assert len(split.train) > 0
    assert split.train.timestamps.max() < validation_start

    for holdout, start, end in (
        (split.validation, validation_start, test_start),
        (split.test, test_start, np.inf),
    ):
        expected = {}
        for user in range(1, NUM_USERS + 1):
            line = timeline(events, user)
            history = [item for _, item, time, _ in line if time < start]
            inside = [p for p in possible_targets(line, repeats) if start <= line[p][2] < end]
            # Nor is the item that the user is at.
            inside = [p for p in inside if line[p][1] not in history[-1:]]
            if inside:
                expected[user] = (history, list(dict.fromkeys(line[p][1] for p in inside)))
                assert repeats or not set(history) & set(expected[user][1])
        assert asked(holdout) == expected
        for _, history, _ in holdout:
            assert (history.timestamps < start).all()


@settings(deadline=None, max_examples=60)
@given(EVENTS.flatmap(lambda e: st.tuples(st.just(e), st.tuples(*[st.booleans()] * len(e)))), st.booleans())
def test_given_keeps_the_parts_apart(log_and_test, repeats):
    events, is_test = log_and_test
    events = [(user, item, 100 + n, kind) for n, (user, item, _, kind) in enumerate(events)]  # time tells who
    split = make_split(event_log(events, is_test), "given", repeats=repeats, holdout_fraction=0.4, seed=1)
    test_times = {time for (_, _, time, _), held in zip(events, is_test, strict=True) if held}
    train_times = set(split.train.timestamps.tolist())
    assert not train_times & test_times
    for user, history, targets in split.validation:
        assert set(history.timestamps.tolist()) == train_times & {e[2] for e in events if e[0] == user}
        wanted = {e[1] for e in events if e[0] == user and e[2] not in train_times | test_times}
        assert set(targets.tolist()) <= wanted
        assert repeats or not set(targets.tolist()) & set(history.items.tolist())
        assert len(history)
    for user, history, targets in split.test:
        expected = {e[2] for e in events if e[0] == user} - test_times
        assert set(history.timestamps.tolist()) == expected
        assert set(targets.tolist()) <= {e[1] for e in events if e[0] == user and e[2] in test_times}
        assert repeats or not set(targets.tolist()) & set(history.items.tolist())
    for holdout in (split.validation, split.test):
        for user, _, targets in holdout:
            assert len(set(targets.tolist())) == len(targets) > 0
            positive = {e[1] for e in events if e[0] == user and e[3] != NEGATIVE_EVENT}
            assert set(targets.tolist()) <= positive
