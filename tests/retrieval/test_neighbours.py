"""Item neighbours by hand and against a dense loop over users."""

import numpy as np
import pytest

from retrieval.neighbours import item_neighbours


def test_worked_out():
    # User 1 touched items 1 and 2, user 2 items 1, 2 and 3, user 3 item 4 alone.
    users, items = np.array([1, 1, 2, 2, 2, 3], np.int32), np.array([1, 2, 1, 2, 3, 4], np.int32)
    neighbours = item_neighbours(users, items, 3, 4, k=10)
    columns, weights = neighbours.row(1)
    assert columns.tolist() == [2, 3]
    # 1/2 of user 1 and 1/3 of user 2, by sqrt(2 * 2); 1/3 of user 2, by sqrt(2 * 1)
    np.testing.assert_allclose(weights, [5 / 12, 1 / (3 * np.sqrt(2))], rtol=1e-6)
    assert [len(neighbours.row(item)[0]) for item in range(5)] == [0, 2, 2, 2, 0]
    assert item_neighbours(users, items, 3, 4, k=1).row(1)[0].tolist() == [2]


@pytest.mark.parametrize("k", [1, 3, 100])
def test_agrees_with_a_dense_loop(k):
    rng = np.random.default_rng(0)
    touched = rng.random((30, 12)) < 0.3
    touched[:, 7] = False  # nobody touched item 8
    users, items = (np.argwhere(touched).T + 1).astype(np.int32)
    expected = np.zeros((13, 13))
    for user in range(30):
        for i in np.flatnonzero(touched[user]):
            for j in np.flatnonzero(touched[user]):
                if i != j:
                    size = np.sqrt(touched[:, i].sum() * touched[:, j].sum())
                    expected[i + 1, j + 1] += 1 / (touched[user].sum() * size)
    neighbours = item_neighbours(users, items, 30, 12, k)
    for item in range(13):
        columns, weights = neighbours.row(item)
        best = np.argsort(-expected[item], kind="stable")[: min(k, int((expected[item] > 0).sum()))]
        np.testing.assert_allclose(weights, expected[item][best], rtol=1e-5)
        np.testing.assert_allclose(expected[item][columns], weights, rtol=1e-5)
        assert item not in columns


def test_no_events():
    nothing = np.zeros(0, np.int32)
    assert len(item_neighbours(nothing, nothing, 0, 0, 5)) == 1
