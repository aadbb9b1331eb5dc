"""Slices of the questions, worked out by hand."""

import dataclasses

import numpy as np
import pytest

from training.data.interactions import Interactions
from training.data.splits import Holdout
from training.slices import DEFINITIONS, head_share, tail_popularity, target_slices


def events(users, items):
    users, items = np.array(users, np.int32), np.array(items, np.int32)
    return Interactions(users, items, np.zeros(len(users), np.uint8), np.arange(len(users)), 3, 6)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([0, 1, 1, 8], 1),  # the two items of popularity 1 make exactly a fifth
        ([0, 1, 1, 9], 9),  # and 2 of 11 events less than that, so the class that crosses it is in too
        ([0, 5, 5, 5], 5),  # all alike: all are tail, and none is head
        ([0, 0, 2, 3, 20], 3),  # an item without an event takes no part
        ([0, 0, 0], 0),
    ],
)
def test_the_tail_reaches_up_to_a_fifth_of_the_events(counts, expected):
    assert tail_popularity(np.array(counts)) == expected


def test_each_target_is_in_its_slices():
    # User 1 has 5 events, user 2 has 2, user 3 has none before the test.
    log = events([1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3], [1, 2, 3, 4, 5, 6, 1, 2, 3, 6, 1])
    train = log.take(np.array([0, 1, 2, 3, 4, 6, 7]))
    # Training counts: items 1 and 2 twice, 3, 4 and 5 once, 6 never; 7 events, a fifth is 1.4: tail is once.
    holdout = Holdout(
        log,
        users=np.array([1, 2, 3], np.int32),
        ends=np.array([5, 8, 10]),
        targets=np.array([6, 3, 6, 1], np.int32),
        target_offsets=np.array([0, 1, 3, 4]),
    )
    found = {name: mask.tolist() for name, mask in target_slices(train, holdout).items()}
    assert found == {
        "new users": [False, False, False, True],
        "short histories": [False, True, True, True],
        "new items": [True, False, True, False],
        "tail items": [False, True, False, False],
        "head items": [False, False, False, True],
    }
    # Where users return to what they know: user 2 has items 1 and 2, user 3 nothing.
    holdout = dataclasses.replace(holdout, targets=np.array([6, 2, 6, 1], np.int32))
    found |= {
        name: mask.tolist()
        for name, mask in target_slices(train, holdout, repeats=True).items()
        if name not in found
    }
    assert found["returns"] == [False, True, False, False]
    assert found["discoveries"] == [True, False, True, True]
    assert list(found) == list(DEFINITIONS)


def test_a_user_known_by_validation_alone_is_new_to_a_strict_model_and_has_a_history():
    log = events([1, 1, 2], [1, 2, 3])
    holdout = Holdout(log, np.array([1], np.int32), np.array([1]), np.array([2], np.int32), np.array([0, 1]))
    found = target_slices(log.take(np.array([2])), holdout)
    assert found["new users"].tolist() == [True]
    assert found["short histories"].tolist() == [True]


def test_what_the_head_makes_of_what_is_found():
    slices = {
        "new items": {"num_users": 3, "ranking": {"recall@10": 0.0}, "popularity": {"recall@10": 0.0}},
        "tail items": {"num_users": 10, "ranking": {"recall@10": 0.1}, "popularity": {"recall@10": 0.0}},
        "head items": {"num_users": 20, "ranking": {"recall@10": 0.2}, "popularity": {"recall@10": 0.0}},
    }
    assert head_share(slices, "ranking") == 4 / 5
    assert head_share(slices, "popularity") is None  # finds nothing
    slices["new items"] = {"num_users": 0, "ranking": None}  # nothing new was asked for
    assert head_share(slices, "ranking") == 4 / 5
