import numpy as np
import pytest

from ranking.transitions import FLOOR, transition_bonus

ITEMS, PROBABILITIES = np.array([2, 5, 9], np.int32), np.array([0.5, FLOOR, 0.01], np.float32)


def test_worked_out():
    bonus = transition_bonus(np.array([9, 1, 5, 12, 2, 9], np.int32), ITEMS, PROBABILITIES, 0.5)
    likely, rare = 0.5 * np.log(1 + 0.01 / FLOOR), 0.5 * np.log(2)
    assert bonus.dtype == np.float32
    assert bonus.tolist() == pytest.approx([likely, 0, rare, 0, 0.5 * np.log(1 + 0.5 / FLOOR), likely])


def test_nothing_is_added_where_nothing_is_known():
    candidates = np.array([9, 1], np.int32)
    assert transition_bonus(candidates, ITEMS, PROBABILITIES, 0.0).tolist() == [0, 0]
    assert transition_bonus(candidates, ITEMS[:0], PROBABILITIES[:0], 1.0).tolist() == [0, 0]
    assert transition_bonus(candidates[:0], ITEMS, PROBABILITIES, 1.0).tolist() == []
