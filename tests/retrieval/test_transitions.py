"""What comes after an item, by hand and against a loop over pairs of events."""

import numpy as np
import pytest

from retrieval.transitions import LAST_EVENTS, PRIOR_EVENTS, item_transitions, next_items

USERS, ITEMS = np.array([1, 1, 1, 1, 2, 2], np.int32), np.array([1, 2, 3, 1, 1, 2], np.int32)


def test_worked_out():
    transitions = item_transitions(USERS, ITEMS, 4, k=10)
    rows = [dict(zip(*(part.tolist() for part in transitions.row(item)), strict=True)) for item in range(5)]
    # 1 is followed by 2 of both users, and by 3 at a distance of two; three events later by itself.
    assert rows[1] == pytest.approx({2: 0.8, 3: 0.2})
    assert rows[2] == pytest.approx({3: 2 / 3, 1: 1 / 3})
    assert rows[3] == {1: 1}
    assert rows[0] == rows[4] == {}
    # What is left out still counts in the sum.
    assert item_transitions(USERS, ITEMS, 4, k=1).row(1)[0].tolist() == [2]
    assert item_transitions(USERS, ITEMS, 4, k=1).row(1)[1].tolist() == pytest.approx([0.8])

    items, probabilities = next_items(transitions, np.array([1, 2], np.int32))
    assert items.tolist() == [1, 3]  # not 2: there the visitor is
    assert probabilities.tolist() == pytest.approx([2 / 9, 4 / 9 + 0.2 / 3])


def test_returns():
    transitions = item_transitions(USERS, ITEMS, 4, k=10, repeats=True)
    rows = [dict(zip(*(part.tolist() for part in transitions.row(item)), strict=True)) for item in range(5)]
    # One event of user 1's four returns, none of user 2's. Item 1 has itself behind it three events later.
    itself = (1 / 3 + PRIOR_EVENTS / 8) / (17 / 6 + PRIOR_EVENTS)
    assert rows[1] == pytest.approx({2: 0.8 * (1 - itself), 3: 0.2 * (1 - itself), 1: itself})
    itself = (PRIOR_EVENTS / 8) / (3 / 2 + PRIOR_EVENTS)
    assert rows[2] == pytest.approx({3: 2 / 3 * (1 - itself), 1: 1 / 3 * (1 - itself), 2: itself})
    assert rows[0] == rows[4] == {}

    found = dict(zip(*(part.tolist() for part in next_items(transitions, np.array([2, 3]))), strict=True))
    assert 3 not in found  # there the visitor is
    assert found[2] == pytest.approx(itself / 3)
    # What nobody else has come back to is come back to, too.
    assert rows[3].keys() == {1, 3}


def test_a_machine_does_not_set_the_rate_of_returns():
    users = np.repeat(np.arange(1, 102), [10] * 100 + [5000]).astype(np.int32)
    items = np.concatenate([np.tile(np.arange(1, 11), 100), np.tile([20, 21], 2500)]).astype(np.int32)
    transitions = item_transitions(users, items, 30, k=10, repeats=True)
    columns, values = transitions.row(3)
    assert values[columns == 3].sum() < 0.01


@pytest.mark.parametrize(("k", "window"), [(2, 1), (100, 1), (3, 3), (100, 9)])
def test_agrees_with_a_loop(k, window):
    rng = np.random.default_rng(0)
    lengths = [0, 1, 2, 7, 30, 4]
    users = np.repeat(np.arange(1, 7), lengths).astype(np.int32)
    items = rng.integers(1, 9, len(users)).astype(np.int32)
    expected = np.zeros((10, 10))  # nobody touched item 9
    for first in range(len(items)):
        for second in range(first + 1, min(first + window + 1, len(items))):
            if users[first] == users[second] and items[first] != items[second]:
                expected[items[first], items[second]] += 1 / (second - first)
    expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1e-9)
    transitions = item_transitions(users, items, 9, k, window)
    for item in range(10):
        columns, values = transitions.row(item)
        assert len(columns) == min(k, np.count_nonzero(expected[item]))
        np.testing.assert_allclose(values, -np.sort(-expected[item])[: len(values)], rtol=1e-6)
        np.testing.assert_allclose(values, expected[item][columns], rtol=1e-6)


def test_the_last_events_are_asked_the_newest_most():
    transitions = item_transitions(np.array([1, 1, 2, 2]), np.array([1, 2, 3, 4]), 4, k=5)
    for length in (1, LAST_EVENTS, 3 * LAST_EVENTS):
        history = np.array([1, 2] * length, np.int32)[-length:]  # nothing follows 2
        history[-1] = 3
        weights = 1 / np.arange(1, min(length, LAST_EVENTS) + 1)
        ones = weights[history[::-1][: len(weights)] == 1]
        found = dict(zip(*(part.tolist() for part in next_items(transitions, history)), strict=True))
        assert found.pop(4) == pytest.approx(1 / weights.sum())
        assert found == ({2: pytest.approx(ones.sum() / weights.sum())} if len(ones) else {})


@pytest.mark.parametrize("num_repeats", [1, 4, 3 * LAST_EVENTS])
def test_who_looks_at_an_item_twice_has_done_one_thing(num_repeats):
    transitions = item_transitions(np.array([1, 1, 2, 2]), np.array([1, 2, 3, 4]), 4, k=5)
    history = np.array([1] + [3] * num_repeats, np.int32)
    items, probabilities = next_items(transitions, history)
    assert dict(zip(items.tolist(), probabilities.tolist(), strict=True)) == {
        2: pytest.approx(1 / 3),
        4: pytest.approx(2 / 3),
    }


def test_of_nothing_nothing_follows():
    nothing = np.zeros(0, np.int32)
    transitions = item_transitions(nothing, nothing, 3, k=5)
    assert len(transitions) == 4
    for history in (nothing, np.array([2], np.int32)):
        assert [len(part) for part in next_items(transitions, history)] == [0, 0]
