"""Baselines against their formulas, in dense matrices and plain loops."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from benchmarks.baselines import ease, item_knn
from benchmarks.baselines.ease import EASE
from benchmarks.baselines.gf_cf import GFCF
from benchmarks.baselines.item_knn import ItemKNN
from benchmarks.baselines.popularity import Popularity

NUM_USERS, NUM_ITEMS = 15, 12


def random_matrix(seed=0, density=0.4):
    """Return [U+1, I+1] zeros and ones; row and column 0 are empty, and so are user 3 and item 5."""
    touched = (np.random.default_rng(seed).random((NUM_USERS + 1, NUM_ITEMS + 1)) < density).astype(
        np.float32
    )
    touched[[0, 3]] = touched[:, [0, 5]] = 0
    return touched


def found(model, touched, histories):
    model.fit(csr_array(touched))
    scores = model.scores(csr_array(histories))
    assert scores.dtype == np.float32
    assert scores.shape == histories.shape
    return scores


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(item_knn, "BLOCK", 5)
    monkeypatch.setattr(ease, "BLOCK", 5)


def test_popularity_counts_users():
    touched = random_matrix()
    scores = found(Popularity(), touched, random_matrix(1)[:4])
    np.testing.assert_array_equal(scores, np.tile(touched.sum(0), (4, 1)))


@pytest.mark.parametrize("num_neighbours", [1, 3, 100])
@pytest.mark.parametrize("shrink", [0.0, 2.5])
def test_item_knn_is_the_plain_loop(num_neighbours, shrink):
    rng, histories = np.random.default_rng(0), random_matrix(1)
    # Many users and items of unlike popularity, so that no two cosines tie.
    touched = (rng.random((500, NUM_ITEMS + 1)) < rng.random(NUM_ITEMS + 1)).astype(np.float32)
    touched[:, 0] = 0
    expected = np.zeros_like(histories)
    for item in range(1, NUM_ITEMS + 1):
        cosines = {}
        for other in range(1, NUM_ITEMS + 1):
            norms = np.sqrt(touched[:, item].sum() * touched[:, other].sum())
            together = (touched[:, item] * touched[:, other]).sum()
            if other != item and together:
                cosines[other] = together / (norms + shrink)
        ranked = sorted(cosines.values(), reverse=True)
        last = ranked[:num_neighbours][-1]
        if len(ranked) > num_neighbours:
            assert ranked[num_neighbours] < last, "a tie: the example says nothing"
        for other, cosine in cosines.items():
            if cosine >= last:
                expected[:, item] += histories[:, other] * cosine
    np.testing.assert_allclose(
        found(ItemKNN(num_neighbours, shrink), touched, histories), expected, rtol=1e-5, atol=1e-6
    )


def test_item_knn_by_hand():
    # Item 1 has users 1, 2; item 2 users 2, 3, 4; item 3 user 4. Cosines: 1 / sqrt 6, 0 and 1 / sqrt 3.
    touched = np.zeros((5, 4), np.float32)
    for user, item in ((1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 3)):
        touched[user, item] = 1
    history = np.array([[0, 0, 1, 0]], np.float32)
    scores = found(ItemKNN(num_neighbours=5, shrink=0), touched, history)
    np.testing.assert_allclose(scores, [[0, 1 / np.sqrt(6), 0, 1 / np.sqrt(3)]], rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_gf_cf_is_the_dense_formula(rank):
    touched, histories = random_matrix(), random_matrix(1)
    of_user = np.sqrt(np.maximum(touched.sum(1), 1))[:, None]
    of_item = np.sqrt(np.maximum(touched.sum(0), 1))
    scaled = (touched / of_user / of_item).astype(np.float64)
    _, _, rows = np.linalg.svd(scaled)
    low_pass = rows[: min(rank, NUM_ITEMS)]
    ideal = (histories / of_item) @ low_pass.T @ low_pass * of_item
    expected = histories @ scaled.T @ scaled + 0.7 * ideal
    np.testing.assert_allclose(found(GFCF(rank, 0.7), touched, histories), expected, rtol=1e-3, atol=1e-4)


def test_ease_is_the_dense_formula():
    touched, histories = random_matrix(), random_matrix(1)
    inverse = np.linalg.inv(touched.T.astype(np.float64) @ touched + 3.0 * np.eye(NUM_ITEMS + 1))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    np.testing.assert_allclose(
        found(EASE(3.0), touched, histories), histories @ weights, rtol=1e-4, atol=1e-5
    )


def test_ease_says_when_it_does_not_fit():
    with pytest.raises(ValueError, match=r"EASE on 12 items is a matrix of .* at most"):
        EASE(max_memory_bytes=13 * 13 * 4 - 1).fit(csr_array(random_matrix()))
    EASE(max_memory_bytes=13 * 13 * 4).fit(csr_array(random_matrix()))


@pytest.mark.parametrize(
    "make",
    [lambda: ItemKNN(0), lambda: ItemKNN(shrink=-1.0), lambda: GFCF(rank=0), lambda: EASE(l2=0.0)],
)
def test_impossible_options(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize("model", [ItemKNN(5), GFCF(4), EASE(3.0)], ids=lambda m: type(m).__name__)
def test_a_checkerboard_is_found(model):
    """Users of one parity touch the items of that parity; a history of one item tells the rest."""
    users, items = np.indices((NUM_USERS + 1, NUM_ITEMS + 1))
    touched = ((users + items) % 2 == 0).astype(np.float32)
    touched[0] = touched[:, 0] = 0
    history = np.zeros((1, NUM_ITEMS + 1), np.float32)
    history[0, 4] = 1
    scores = found(model, touched, history)[0]
    assert scores[[2, 6, 8, 10, 12]].min() > scores[[1, 3, 5, 7, 9, 11]].max()
