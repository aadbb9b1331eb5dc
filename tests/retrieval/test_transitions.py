"""What comes after an item, by hand and against a loop over pairs of events."""

import numpy as np
import pytest

from retrieval.transitions import (
    LAST_EVENTS,
    PRIOR_RETURNS,
    PRIOR_USERS,
    RETURN_EVENTS,
    Transitions,
    item_transitions,
    next_items,
    return_rate,
)

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

    items, probabilities = next_items(Transitions(transitions), np.array([1, 2], np.int32))
    assert items.tolist() == [1, 3]  # not 2: there the visitor is
    assert probabilities.tolist() == pytest.approx([2 / 9, 4 / 9 + 0.2 / 3])


def found_after(transitions, history):
    found = next_items(transitions, np.array(history, np.int32))
    return dict(zip(*(part.tolist() for part in found), strict=True))


def test_returns():
    after = item_transitions(USERS, ITEMS, 4, k=10)
    found = found_after(Transitions(after, 0.25), [3, 3, 2, 3, 1, 2])
    without = found_after(Transitions(after), [3, 3, 2, 3, 1, 2])
    # The visitor is at 2, was at 1 before, and at 3 the third, fifth and sixth last time.
    shares = {1: 2**-0.5, 3: 3**-0.5 + 5**-0.5 + 6**-0.5}
    whole = sum(shares.values())
    assert found.keys() == without.keys() == {1, 3}
    assert found == pytest.approx(
        {item: 0.75 * without[item] + 0.25 * share / whole for item, share in shares.items()}
    )
    # What nothing is known to come after, and what nobody else touched, is come back to as well.
    assert found_after(Transitions(after, 0.25), [4, 2])[4] == pytest.approx(0.25)
    # Who knows one item alone cannot return to another.
    assert found_after(Transitions(after, 0.25), [2, 2]) == found_after(Transitions(after), [2])
    newest = [3] + [1, 2] * (RETURN_EVENTS // 2)
    assert 3 not in found_after(Transitions(item_transitions(USERS[:0], ITEMS[:0], 4, k=1), 0.25), newest)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_no_more_than_certain(rate):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(1, 21), 30).astype(np.int32)
    items = rng.integers(1, 9, len(users)).astype(np.int32)
    transitions = Transitions(item_transitions(users, items, 9, k=10), rate)
    for length in (1, 2, 5, 300):
        rows, probabilities = next_items(transitions, items[:length])
        assert (np.diff(rows) > 0).all()
        assert probabilities.dtype == np.float32
        assert 0 < probabilities.sum() <= 1 + 1e-6


def test_how_likely_a_return_is():
    # Of four users two know the item of their last event; a fifth has too few events to return anywhere.
    users = np.repeat(np.arange(1, 6), [3, 3, 4, 3, 2]).astype(np.int32)
    items = np.array([1, 2, 1, 1, 2, 3, 1, 2, 3, 2, 4, 5, 6, 7, 8], np.int32)
    assert return_rate(users, items) == (2 + PRIOR_RETURNS) / (4 + PRIOR_USERS)
    assert return_rate(users[:0], items[:0]) == PRIOR_RETURNS / PRIOR_USERS
    # A machine that goes to and fro is one user.
    users = np.repeat(np.arange(1, 102), [10] * 100 + [5000]).astype(np.int32)
    items = np.concatenate([np.tile(np.arange(1, 11), 100), np.tile([20, 21], 2500)]).astype(np.int32)
    assert return_rate(users, items) == (1 + PRIOR_RETURNS) / (101 + PRIOR_USERS)


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
        found = found_after(Transitions(transitions), history)
        assert found.pop(4) == pytest.approx(1 / weights.sum())
        assert found == ({2: pytest.approx(ones.sum() / weights.sum())} if len(ones) else {})


@pytest.mark.parametrize("num_repeats", [1, 4, 3 * LAST_EVENTS])
def test_who_looks_at_an_item_twice_has_done_one_thing(num_repeats):
    transitions = item_transitions(np.array([1, 1, 2, 2]), np.array([1, 2, 3, 4]), 4, k=5)
    history = np.array([1] + [3] * num_repeats, np.int32)
    items, probabilities = next_items(Transitions(transitions), history)
    assert dict(zip(items.tolist(), probabilities.tolist(), strict=True)) == {
        2: pytest.approx(1 / 3),
        4: pytest.approx(2 / 3),
    }


def test_of_nothing_nothing_follows():
    nothing = np.zeros(0, np.int32)
    transitions = item_transitions(nothing, nothing, 3, k=5)
    assert len(transitions) == 4
    for history in (nothing, np.array([2], np.int32)):
        assert [len(part) for part in next_items(Transitions(transitions), history)] == [0, 0]
