"""Interactions and the event log, on logs small enough to read."""

import dataclasses
import itertools
import json

import numpy as np
import polars as pl
import pytest

from engine.history import EVENT_CODE, NEGATIVE_EVENT
from training.data.dataset import Dataset, DatasetError, DatasetInfo
from training.data.interactions import Interactions, load_event_log

VIEW = EVENT_CODE["view"]


def interactions(users, items, event_types=None, num_users=4, num_items=9):
    count = len(users)
    return Interactions(
        np.array(users, np.int32),
        np.array(items, np.int32),
        np.array(event_types if event_types is not None else [VIEW] * count, np.uint8),
        np.arange(count, dtype=np.int64) * 10,
        num_users,
        num_items,
    )


def test_each_users_events_stand_together():
    events = interactions([1, 1, 3, 3, 3], [5, 6, 7, 8, 9])
    assert events.offsets.tolist() == [0, 0, 2, 2, 5, 5]
    assert events.history(1).items.tolist() == [5, 6]
    assert events.history(2).items.tolist() == []
    assert events.history(3).items.tolist() == [7, 8, 9]
    assert events.history(3, end=4).items.tolist() == [7, 8]
    assert events.history(3, end=2).items.tolist() == []
    assert events.history(3).timestamps.tolist() == [20, 30, 40]
    assert events.history(3).event_types.tolist() == [VIEW] * 3


def test_no_events():
    events = interactions([], [])
    assert len(events) == 0
    assert events.offsets.tolist() == [0] * 6
    assert events.is_first_touch.tolist() == events.is_next_item.tolist() == []
    assert events.item_counts().tolist() == [0] * 10


def test_first_touch_and_next_item():
    events = interactions([1, 1, 1, 1, 2, 2], [5, 5, 6, 5, 5, 6])
    assert events.is_first_touch.tolist() == [True, False, True, False, True, True]
    # The first event of user 2 is of the item of user 1's last: another user's event repeats nothing.
    assert events.is_next_item.tolist() == [True, False, True, True, True, True]


def test_take_by_mask_and_by_position():
    events = interactions([1, 1, 2], [5, 6, 7])
    for where in (np.array([True, False, True]), np.array([0, 2])):
        taken = events.take(where)
        assert (taken.users.tolist(), taken.items.tolist()) == ([1, 2], [5, 7])
        assert taken.timestamps.tolist() == [0, 20]
        assert (taken.num_users, taken.num_items) == (4, 9)
        assert taken.offsets.tolist() == [0, 0, 1, 2, 2, 2]


def test_edges_and_item_counts():
    # User 1 views 5 twice; user 2 removes 5 and then buys it; user 3 only removes it.
    events = interactions(
        [1, 1, 2, 2, 3, 3],
        [5, 5, 5, 5, 5, 6],
        [VIEW, VIEW, NEGATIVE_EVENT, VIEW, NEGATIVE_EVENT, VIEW],
    )
    assert events.edges.users.tolist() == [1, 2, 3]
    assert events.edges.items.tolist() == [5, 5, 6]
    assert events.edges.timestamps.tolist() == [0, 30, 50]
    assert events.item_counts().tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 0, 0]


def write_dataset(directory, events, item_ids, **info):
    """Write a data set directory; events are (user, item, timestamp[, event type[, split]])."""
    columns = ["user_id", "item_id", "timestamp", "event_type", "split"]
    rows = [(*event, "view")[:4] if len(event) < 4 else event for event in events]
    width = len(rows[0]) if rows else 4
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "event_type": pl.String}
    schema |= {"split": pl.String} if width == 5 else {}
    frame = pl.DataFrame(rows, schema={name: schema[name] for name in columns[:width]}, orient="row")
    frame.write_parquet(directory / "events.parquet")
    pl.DataFrame({"item_id": item_ids}).write_parquet(directory / "items.parquet")
    info = DatasetInfo(name="tiny", source={"format": "test"}, **{"time": "unix", **info})
    (directory / "dataset.json").write_text(json.dumps(dataclasses.asdict(info)))
    return Dataset.open(directory)


def test_load_event_log(tmp_path):
    dataset = write_dataset(
        tmp_path,
        [
            ("zoe", "c", 10),
            ("adam", "b", 5),
            ("zoe", "a", 10, "remove_from_cart"),  # at the time of another event, and behind it in the file
            ("adam", "a", 10, "purchase"),
            ("zoe", "b", 20),
        ],
        ["c", "b", "never seen", "a"],
    )
    log = load_event_log(dataset)
    assert log.user_ids == ["zoe", "adam"]  # by first appearance
    assert log.item_ids == ["c", "b", "never seen", "a"]  # as items.parquet has them
    assert log.is_test is None
    events = log.events
    assert (events.num_users, events.num_items) == (2, 4)
    assert events.users.tolist() == [1, 1, 1, 2, 2]
    assert events.items.tolist() == [1, 4, 2, 2, 4]
    assert events.timestamps.tolist() == [10, 10, 20, 5, 10]
    names = ["view", "remove_from_cart", "view", "view", "purchase"]
    assert events.event_types.tolist() == [EVENT_CODE[name] for name in names]
    dtypes = [events.users.dtype, events.items.dtype, events.event_types.dtype, events.timestamps.dtype]
    assert dtypes == [np.int32, np.int32, np.uint8, np.int64]


def test_events_at_one_time_keep_the_order_of_the_file(tmp_path):
    items = [f"i{n}" for n in range(200)]
    order = np.random.default_rng(0).permutation(200)
    dataset = write_dataset(tmp_path, [(f"u{n % 2}", items[n], 0) for n in order], items, time="none")
    events = load_event_log(dataset).events
    for user, parity in ((1, order[0] % 2), (2, 1 - order[0] % 2)):
        assert (events.history(user).items - 1).tolist() == [n for n in order if n % 2 == parity]


def days(num_users, num_days, per_day):
    """Return events (user, item, day) of users who touch so many items of 50 a day, in the order of time."""
    rng = np.random.default_rng(0)
    return [
        (f"u{user}", f"i{item}", day)
        for day in range(num_days)
        for user in range(num_users)
        for item in rng.choice(50, per_day, replace=False)
    ]


def items_in_order(tmp_path, events, names):
    loaded = load_event_log(write_dataset(tmp_path, events, names))
    return {
        loaded.user_ids[user - 1]: [loaded.item_ids[item - 1] for item in loaded.events.history(user).items]
        for user in range(1, loaded.events.num_users + 1)
    }


def test_a_log_in_the_order_of_time_tells_what_came_first_on_a_day(tmp_path):
    events = days(20, 5, 3)
    expected = {}
    for user, item, _ in events:
        expected.setdefault(user, []).append(item)
    assert items_in_order(tmp_path, events, [f"i{n}" for n in range(50)]) == expected


@pytest.mark.parametrize("numeric", [False, True])
@pytest.mark.parametrize(
    "key",
    [
        lambda user, item, day: item,
        lambda user, item, day: (day, item),
        lambda user, item, day: (user, day, item),
        lambda user, item, day: (-day, item),
    ],
    ids=["item", "day and item", "user, day and item", "newest day first, and item"],
)
@pytest.mark.parametrize("num_days", [1, 5])
def test_a_log_sorted_by_item_does_not(tmp_path, key, numeric, num_days):
    """Else the next item of a day would always be the one further down the catalog."""
    names = [str(n) if numeric else f"i{n:02}" for n in range(50)]
    events = [(user, names[int(item[1:])], day) for user, item, day in days(200, num_days, 3)]
    events.sort(key=lambda event: key(event[0], names.index(event[1]), event[2]))
    found = items_in_order(tmp_path, events, names)
    assert found == items_in_order(tmp_path, events, names)
    # The three items of each day of each user: does the next stand further down?
    steps = [
        names.index(after) > names.index(before)
        for items in found.values()
        for place, (before, after) in enumerate(itertools.pairwise(items))
        if place % 3 < 2
    ]
    assert len(steps) == 400 * num_days
    assert 0.4 < np.mean(steps) < 0.6


def test_what_happened_to_one_item_at_one_time_stays_in_order(tmp_path):
    """View, cart and purchase of one moment, in a log that is sorted by item."""
    kinds = ["view", "cart", "purchase"]
    times = np.random.default_rng(0).integers(3, size=(20, 20))
    events = [
        (f"u{user}", f"i{item}", int(times[user, item]), kind)
        for item in range(20)
        for user in range(20)
        for kind in kinds
    ]
    loaded = load_event_log(write_dataset(tmp_path, events, [f"i{n}" for n in range(20)])).events
    assert loaded.event_types.tolist() == [EVENT_CODE[kind] for kind in kinds] * 400


def test_a_split_of_the_data_set_is_carried_along(tmp_path):
    dataset = write_dataset(
        tmp_path,
        [("u", "a", 0, "view", "train"), ("v", "a", 0, "view", "test"), ("u", "b", 0, "view", "test")],
        ["a", "b"],
        time="none",
        split="given",
    )
    log = load_event_log(dataset)
    assert log.events.users.tolist() == [1, 1, 2]
    assert log.is_test.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "has no events"),
        ([("u", "a", 1), ("u", "x", 2), ("v", "y", 2)], "2 events of .* name an item"),
        ([("u", "a", 1), (None, "a", 2)], "1 events of .* have no user"),
        ([("u", "a", None), ("u", "a", 2)], "1 events of .* have no timestamp"),
        ([("u", "a", 1, "view"), ("u", "a", 1, None)], "1 events of .* have no event_type"),
        ([("u", "a", 1, "glance")], "a table of .* is damaged: .*glance"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, events, message):
    dataset = write_dataset(tmp_path, events, ["a"])
    with pytest.raises(DatasetError, match=message):
        load_event_log(dataset)


@pytest.mark.parametrize("name", ["events.parquet", "items.parquet"])
def test_a_table_that_is_cut_short_is_said_to_be_damaged(tmp_path, name):
    write_dataset(tmp_path, [("u", "a", 1)], ["a"])
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=f"a table of {tmp_path} is damaged"):
        Dataset.open(tmp_path)
