"""What has come next in training, and what that adds to the scores."""

import numpy as np

from engine.history import NEGATIVE_EVENT
from ranking.transitions import FLOOR
from retrieval.transitions import next_items
from training.data.interactions import Interactions
from training.transitions import bonuses, training_transitions


def test_what_is_added() -> None:
    items = np.array([1, 2, 3, 2, 3, 4, 2, 4, 3, 1], np.int32)
    users = np.repeat(np.array([1, 2, 3], np.int32), [3, 4, 3])
    log = Interactions(users, items, np.zeros(10, np.uint8), np.arange(10), 3, 4)
    table = training_transitions(log, 10, repeats=False)
    histories = [np.array([1, 2], np.int32), np.zeros(0, np.int32)]
    added = bonuses(table, histories)
    assert added.shape == (2, 5)
    found, probabilities = next_items(table, histories[0])
    assert len(found) > 1
    expected = np.zeros(5)
    expected[found] = np.log(1 + probabilities / FLOOR)
    np.testing.assert_allclose(added, [expected, np.zeros(5)], rtol=1e-5)


def test_events_that_say_not_this_are_no_steps() -> None:
    kinds = np.array([0, NEGATIVE_EVENT, 0, 0], np.uint8)
    log = Interactions(np.ones(4, np.int32), np.array([1, 2, 3, 3], np.int32), kinds, np.arange(4), 1, 3)
    table = training_transitions(log, 10, repeats=False)
    assert [table.after.row(item)[0].tolist() for item in range(4)] == [[], [3], [], []]
    assert table.return_rate == 0
    assert training_transitions(log, 10, repeats=True).return_rate > 0
