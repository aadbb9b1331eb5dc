"""ContextTable: which row stands for what, worked out by hand."""

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranking.context import ContextKey, ContextTable, clock

TABLE = ContextTable(
    (
        ContextKey(name="device", kind="categorical", values=("phone", "desktop")),  # rows 0, 1, 2
        ContextKey(name="basket", kind="numeric", mean=10.0, std=4.0),  # rows 3, 4
        ContextKey(name="weekday", kind="clock", values=("5", "6")),  # rows 5, 6, 7
    )
)
SATURDAY = 1_767_398_400_000  # 2026-01-03 00:00 UTC


def encoded(context, now_ms=None):
    rows, weights = TABLE.encode(context, now_ms)
    assert (rows.dtype, weights.dtype) == (np.int64, np.float32)
    return rows.tolist(), weights.tolist()


def test_rows_and_weights():
    assert TABLE.num_rows == 8
    assert TABLE.names == ("device", "basket", "weekday")
    assert encoded({"device": "desktop", "basket": "16"}, SATURDAY) == ([2, 4, 6], [1, 1.5, 1])
    assert encoded({"device": "phone", "basket": "6"}, SATURDAY + 86_400_000) == ([1, 4, 7], [1, -1, 1])


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"device": "watch", "basket": "many", "weekday": "someday"},
        {"device": "", "basket": "nan"},
        {"basket": "inf", "colour": "red", "hour": "3"},
    ],
)
def test_what_is_unknown_or_missing_is_the_default(context):
    assert encoded(context) == ([0, 3, 5], [1, 1, 1])
    unknown = TABLE.unknown(2)
    assert unknown.rows.tolist() == [[0, 3, 5]] * 2
    assert unknown.weights.tolist() == [[1, 1, 1]] * 2


def test_a_day_without_a_row_is_the_default_and_the_request_goes_before_the_clock():
    assert encoded({}, SATURDAY - 1)[0] == [0, 3, 5]  # a Friday
    assert encoded({"weekday": "6"}, SATURDAY)[0] == [0, 3, 7]


def test_far_numbers_count_as_five_deviations():
    assert encoded({"basket": "1e9"})[1] == [1, 5, 1]
    assert encoded({"basket": "-1e9"})[1] == [1, -5, 1]


@given(st.integers(0, 4_102_444_800_000))
def test_the_clock_is_utc(now_ms):
    moment = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
    assert clock(now_ms) == {"hour": str(moment.hour), "weekday": str(moment.weekday())}


def test_text_and_back():
    again = ContextTable.from_json(TABLE.to_json())
    assert again.keys == TABLE.keys
    assert len(ContextTable.from_json("[]")) == 0
    for text in ('[{"name": "a"}]', '[{"name": "a", "kind": "categorical", "values": [], "rows": 3}]', "[3]"):
        with pytest.raises(ValueError, match="context of the ranker cannot be read"):
            ContextTable.from_json(text)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            [{"name": "a", "kind": "ordinal"}],
            "kind of 'a' is 'ordinal'; expected categorical, numeric or clock",
        ),
        ([{"name": "a", "kind": "categorical", "values": ("x", "x")}], "values of 'a' has one of them twice"),
        ([{"name": "a", "kind": "numeric", "std": 0.0}], "mean and std of 'a' are 0.0 and 0.0"),
        ([{"name": "a", "kind": "numeric"}] * 2, "keys are a, a; expected each once"),
    ],
)
def test_wrong_tables(keys, message):
    with pytest.raises(ValueError, match=message):
        ContextTable(tuple(ContextKey(**key) for key in keys))
