import numpy as np
import pytest

from ranking.transitions import FLOOR, TransitionBonus

ITEMS, PROBABILITIES = np.array([2, 5, 9], np.int32), np.array([0.5, FLOOR, 0.01], np.float32)


def test_worked_out():
    bonus = TransitionBonus(12)(np.array([9, 1, 5, 12, 2, 9], np.int32), ITEMS, PROBABILITIES, 0.5)
    likely, rare = 0.5 * np.log(1 + 0.01 / FLOOR), 0.5 * np.log(2)
    assert bonus.dtype == np.float32
    assert bonus.tolist() == pytest.approx([likely, 0, rare, 0, 0.5 * np.log(1 + 0.5 / FLOOR), likely])


def test_nothing_is_added_where_nothing_is_known():
    candidates, transition_bonus = np.array([9, 1], np.int32), TransitionBonus(9)
    assert transition_bonus(candidates, ITEMS, PROBABILITIES, 0.0).tolist() == [0, 0]
    assert transition_bonus(candidates, ITEMS[:0], PROBABILITIES[:0], 1.0).tolist() == [0, 0]
    assert transition_bonus(candidates[:0], ITEMS, PROBABILITIES, 1.0).tolist() == []


def test_a_request_leaves_nothing_to_the_next():
    bonus, candidates = TransitionBonus(12), np.arange(13, dtype=np.int32)
    first = bonus(candidates, ITEMS, PROBABILITIES, 1.0)
    with pytest.raises(IndexError):
        bonus(np.array([13], np.int32), np.array([4], np.int32), PROBABILITIES[:1], 1.0)
    assert bonus(candidates, ITEMS[:1], PROBABILITIES[:1], 1.0).tolist() == [0, 0, first[2], *[0] * 10]
    assert first[9] > 0  # and the answers are not the table
