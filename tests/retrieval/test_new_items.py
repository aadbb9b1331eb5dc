"""Vectors of items that training has not seen, by hand."""

import numpy as np
import pytest

from retrieval import new_items
from retrieval.new_items import content_vectors, first_event_vectors, like_items, of_like_norm, tfidf
from retrieval.sparse import SparseRows

#                    row 0   1       2       3       4       5 (new)  6 (new)
VECTORS = np.array([[0, 0], [3, 0], [0, 3], [0, 6], [6, 0], [0, 0], [0, 0]], np.float32)
DEGREES = np.array([0, 1, 1, 1, 9, 0, 0], np.float32)


def test_tfidf_by_hand():
    # Feature 0 is on items 1 and 2, feature 1 on item 1 alone; item 3 has neither.
    matrix = tfidf(np.array([1, 2, 1, 1], np.int32), np.array([0, 0, 1, 0], np.int32), 3, 2)
    common, rare = np.log(4 / 3) + 1, np.log(4 / 2) + 1
    length = np.hypot(common, rare)
    np.testing.assert_allclose(matrix.row(1)[1], [common / length, rare / length], rtol=1e-6)
    np.testing.assert_allclose(matrix.row(2)[1], [1])
    assert len(matrix.row(3)[1]) == 0
    assert len(tfidf(np.zeros(0, np.int32), np.zeros(0, np.int32), 3, 0)) == 4


def test_content_vectors_by_hand():
    # Item 5 has the features of 1 and 2 at cosines .8 and .6; item 6 is like nothing.
    features = SparseRows.from_entries(
        np.array([1, 2, 5, 5, 6]), np.array([0, 1, 0, 1, 2]), np.array([1, 1, 0.8, 0.6, 1]), 7, 3
    )
    new = np.array([5, 6], np.int32)
    vectors = content_vectors(VECTORS, DEGREES, like_items(DEGREES, features, new))
    # The direction of .8^4 (3, 0) + .6^4 (0, 3). All four trained items are examples: the median of their
    # lengths 3, 3, 6, 6 is 4.5.
    length = np.hypot(0.8**4, 0.6**4)
    np.testing.assert_allclose(vectors, [[4.5 * 0.8**4 / length, 4.5 * 0.6**4 / length], [0, 0]], rtol=1e-6)
    nearest = content_vectors(VECTORS, DEGREES, like_items(DEGREES, features, new, num_like=1))
    np.testing.assert_allclose(nearest, [[4.5, 0], [0, 0]], rtol=1e-6)


def test_features_of_very_many_items_play_a_part_where_there_are_no_others(monkeypatch):
    # Feature 0 is of items 1 to 3, feature 1 of item 4; item 5 has both, item 6 the frequent one alone.
    entries = np.array([1, 2, 3, 4, 5, 5, 6]), np.array([0, 0, 0, 1, 0, 1, 0])
    features = SparseRows.from_entries(*entries, np.array([1, 1, 1, 1, 0.8, 0.6, 1]), 7, 2)
    new = np.array([5, 6], np.int32)
    assert like_items(DEGREES, features, new).row(0)[0].tolist() == [1, 2, 3, 4]
    monkeypatch.setattr(new_items, "MAX_HAVING", 4)
    like = like_items(DEGREES, features, new)
    assert [like.row(n)[0].tolist() for n in (0, 1)] == [[4], [1, 2, 3]]


def test_new_items_are_no_example_for_each_other():
    features = SparseRows.from_entries(np.array([5, 6]), np.array([0, 0]), np.array([1, 1]), 7, 1)
    like = like_items(DEGREES, features, np.array([5, 6], np.int32))
    assert not content_vectors(VECTORS, DEGREES, like).any()


def test_first_event_vectors_by_hand():
    users = np.array([[0, 0], [1, 0], [0, 1], [5, 5]], np.float32)
    degrees = np.array([0, 4, 1, 1], np.float32)
    touches = SparseRows.from_rows(
        [(np.array([1, 2], np.int32), np.array([1, 1], np.float32)), (np.zeros(0, np.int32),) * 2], 4
    )
    vectors = first_event_vectors(users, degrees, VECTORS, DEGREES, touches)
    direction = np.array([1 / 2, 1])  # (1, 0) / sqrt(4) + (0, 1) / sqrt(1)
    np.testing.assert_allclose(vectors[0], 4.5 * direction / np.linalg.norm(direction), rtol=1e-6)
    assert vectors[1].tolist() == [0, 0]


def test_the_norm_is_that_of_items_of_like_degree():
    # 300 items: degree d from 1 to 300, and a vector of that length.
    degrees = np.arange(301, dtype=np.float32)
    vectors = np.stack([degrees, np.zeros(301)], axis=1).astype(np.float32)
    ones = np.ones((4, 2), np.float32)
    norms = np.linalg.norm(
        of_like_norm(ones, np.array([0, 1, 150, 999], np.float32), vectors, degrees), axis=1
    )
    # The 100 items of the nearest degree: 1 to 100, the same, 100 to 199, and 201 to 300.
    np.testing.assert_allclose(norms, [50.5, 50.5, 149.5, 250.5], rtol=1e-6)


def test_many_items_of_one_degree_are_taken_from_their_middle():
    degrees = np.array([0] + [1] * 1000 + [2] * 1000, np.float32)
    lengths = np.array([0] + [5] * 1000 + [7] * 1000, np.float32)
    vectors = np.stack([lengths, np.zeros(2001)], axis=1).astype(np.float32)
    norms = np.linalg.norm(
        of_like_norm(np.ones((3, 2), np.float32), np.array([0, 1, 2], np.float32), vectors, degrees), axis=1
    )
    np.testing.assert_allclose(norms, [5, 5, 7])


@pytest.mark.parametrize("degrees", [np.zeros(3, np.float32)])
def test_without_a_trained_item_there_is_no_length(degrees):
    assert not of_like_norm(
        np.ones((1, 2), np.float32), np.ones(1, np.float32), np.ones((3, 2), np.float32), degrees
    ).any()
