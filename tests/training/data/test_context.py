"""The context of events: the same as a request at their moment would tell."""

import numpy as np
import polars as pl
import pytest

from training.data.context import MIN_EVENTS, context_table, encoded_context
from training.data.dataset import Dataset, DatasetError, DatasetInfo, write_info
from training.data.interactions import load_event_log
from training.data.sequences import make_sequences, sequence_batches

NUM_EVENTS = 400
HOUR_MS = 3_600_000


@pytest.fixture
def dataset(tmp_path):
    """Return a data set with a device, a basket and times; some of each are missing."""
    rng = np.random.default_rng(0)
    device = rng.choice(["phone", "desktop", "watch", None], NUM_EVENTS, p=[0.5, 0.35, 0.01, 0.14])
    basket = [None if value > 90 else float(value) for value in rng.uniform(0, 100, NUM_EVENTS)]
    pl.DataFrame(
        {
            "user_id": [f"u{number}" for number in rng.integers(0, 9, NUM_EVENTS)],
            "item_id": [f"i{number}" for number in rng.integers(0, 30, NUM_EVENTS)],
            "timestamp": np.sort(rng.integers(0, 30 * 24 * HOUR_MS, NUM_EVENTS)),
            "event_type": ["view"] * NUM_EVENTS,
            "device": device.tolist(),
            "basket": basket,
            "page": ["one"] * NUM_EVENTS,
        },
        schema_overrides={"basket": pl.Float64},
    ).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": [f"i{number}" for number in range(30)]}).write_parquet(
        tmp_path / "items.parquet"
    )
    info = DatasetInfo(
        name="moments",
        source={},
        time="unix",
        context={"device": "categorical", "basket": "numeric", "page": "categorical"},
    )
    write_info(tmp_path, info)
    return Dataset.open(tmp_path)


def test_events_have_the_context_that_a_request_would_have(dataset):
    events = load_event_log(dataset).events
    table = context_table(events)
    # A key of one value says nothing; a value of few events has no effect of its own.
    assert table.names == ("device", "basket", "hour", "weekday")
    assert [key.kind for key in table.keys] == ["categorical", "numeric", "clock", "clock"]
    assert table.keys[0].values == ("desktop", "phone")
    assert set(table.keys[3].values) == set("0123456")
    rows, weights = encoded_context(table, events)
    assert rows.shape == (NUM_EVENTS, 4)
    for position in range(NUM_EVENTS):
        told = events.context_at(position)
        assert "hour" not in told
        one = table.encode(told, int(events.timestamps[position]))
        assert rows[position].tolist() == one.rows.tolist()
        np.testing.assert_allclose(weights[position], one.weights, rtol=1e-5)
    some = np.array([3, 3, 120])
    np.testing.assert_array_equal(encoded_context(table, events, some).rows, rows[some])
    known = weights[rows[:, 1] > table.defaults[1], 1]
    assert known.mean() == pytest.approx(0, abs=1e-4)
    assert known.std() == pytest.approx(1, abs=1e-4)


def test_the_table_is_that_of_the_training_events(dataset):
    """What training has not seen is unknown, whatever the rest of the log knows."""
    events = load_event_log(dataset).events
    column = events.context["device"]
    phone = column.names.index("phone") + 1
    train = events.take(column.values != phone)
    table = context_table(train, ["device", "basket"])
    assert table.names == ("basket",)  # one value of the device is left
    table = context_table(events.take(np.arange(NUM_EVENTS) < 2 * MIN_EVENTS), ["hour"])
    assert len(table) == 0 or all(len(key.values) > 1 for key in table.keys)


def test_batches_hold_the_context_of_the_moment_of_each_target(dataset):
    events = load_event_log(dataset).events
    table = context_table(events)
    batches = sequence_batches(make_sequences(events, 20, context=table), 4, 1000, np.random.default_rng(0))
    moments = {}  # (user, item) of the first touch -> its context
    rows, weights = encoded_context(table, events)
    for position in np.flatnonzero(events.is_first_touch & events.is_next_item):
        found = moments.setdefault(int(events.items[position]), [])
        found.append((*rows[position], *weights[position]))
    num_targets = 0
    for batch in batches:
        for place in np.argwhere(batch.targets.numpy() > 0):
            at = tuple(place)
            told = (*batch.context_rows[at].tolist(), *batch.context_weights[at].tolist())
            assert any(np.allclose(told, moment) for moment in moments[int(batch.targets[at])])
            num_targets += 1
    assert num_targets == events.is_first_touch.sum()


def test_times_without_meaning_have_no_hour(dataset):
    info = DatasetInfo(name="order", source={}, time="order")
    write_info(dataset.directory, info)
    assert load_event_log(Dataset.open(dataset.directory)).events.context == {}


def test_a_declared_hour_goes_before_the_clock(dataset):
    events = pl.read_parquet(dataset.directory / "events.parquet")
    events.with_columns(hour=pl.lit("late")).write_parquet(dataset.directory / "events.parquet")
    write_info(
        dataset.directory, DatasetInfo(name="x", source={}, time="unix", context={"hour": "categorical"})
    )
    context = load_event_log(Dataset.open(dataset.directory)).events.context
    assert context["hour"].kind == "categorical"
    assert context["weekday"].kind == "clock"


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (
            {"colour": "categorical"},
            "column 'colour' is None; expected String, as dataset.json says categorical",
        ),
        ({"device": "numeric"}, "column 'device' is String; expected Float64, as dataset.json says numeric"),
        ({"price": "numeric"}, "context names 'price' as 'numeric'; expected a column that is no other part"),
        ({"device": "ordinal"}, "context names 'device' as 'ordinal'"),
    ],
)
def test_wrong_declarations(dataset, context, message):
    write_info(dataset.directory, DatasetInfo(name="x", source={}, time="unix", context=context))
    with pytest.raises(DatasetError, match=message):
        Dataset.open(dataset.directory)


def test_a_key_that_the_data_does_not_have(dataset):
    events = load_event_log(dataset).events
    with pytest.raises(
        ValueError, match=r"names 'devise', which the data set does not .* did you mean device"
    ):
        context_table(events, ["devise"])
