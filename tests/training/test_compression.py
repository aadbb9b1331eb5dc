"""Compressed queries and items: nearly the same scores from fewer numbers."""

import numpy as np
import pytest

from training.compression import compression


def vectors(num_rows: int, strengths: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((len(strengths), len(strengths))))
    return ((rng.standard_normal((num_rows, len(strengths))) * strengths) @ turned.T).astype(np.float32)


def relative(scores: np.ndarray) -> np.ndarray:
    return scores - scores.mean(axis=1, keepdims=True)


def test_what_needs_no_more_numbers_loses_nothing() -> None:
    strengths = np.array([3, 2, 1, 0.5, 0, 0, 0])
    queries, items = vectors(50, strengths, 1), vectors(40, strengths, 2) + np.float32(7)
    of_queries, of_items = compression(queries, items, 4)
    assert of_queries.shape == of_items.shape == (7, 4)
    found = (queries @ of_queries) @ (items @ of_items).T
    np.testing.assert_allclose(relative(found), relative(queries @ items.T), atol=1e-3)


def test_no_other_rank_loses_less() -> None:
    queries, items = vectors(300, np.linspace(2, 1, 12), 1), vectors(200, np.linspace(1, 3, 12), 2)
    of_queries, of_items = compression(queries, items, 5)
    exact = queries @ (items - items.mean(axis=0)).T
    found = (queries @ of_queries) @ ((items - items.mean(axis=0)) @ of_items).T
    strengths = np.linalg.svd(exact, compute_uv=False)
    assert np.linalg.norm(found - exact) == pytest.approx(np.linalg.norm(strengths[5:]), rel=1e-3)


def test_fewer_rows_than_numbers() -> None:
    queries, items = vectors(3, np.ones(8), 1), vectors(4, np.ones(8), 2)
    of_queries, of_items = compression(queries, items, 5)
    found = (queries @ of_queries) @ (items @ of_items).T
    np.testing.assert_allclose(relative(found), relative(queries @ items.T), atol=1e-4)
