"""New items get the vectors of the trained ones most like them, in both stages, and serving knows them."""

import numpy as np
import polars as pl
import pytest
import torch

from engine.bundle import RANKER_SCORES, RANKER_STATE
from ranking.encoders.sasrec import SASRec
from ranking.onnx_scorer import OnnxScorer
from ranking.ranker import HybridRanker
from retrieval.new_items import like_items
from training.content import content_features
from training.export import export_ranker
from training.new_items import RANKER_SCALE, give_new_items_vectors, new_items, with_new_items

#                            a: 1             b: 2   c: 3, new  d: 4, new        e: 5, new
ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d", "e"],
        "title": ["red shoes of wool", "blue, green or white", "teapot", "red shoes in blue", "shoes"],
        "available_from": [None, 5, 5, 10, 11],
    }
)
FEATURES = content_features(ITEMS)
DEGREES = np.array([0, 3, 3, 0, 0, 0], np.float32)


def test_what_is_on_sale_and_has_no_event_is_new():
    assert new_items(ITEMS, DEGREES, clock=10).tolist() == [3, 4]  # e goes on sale at 11
    assert new_items(ITEMS, DEGREES, clock=0).tolist() == [3, 4, 5]  # no clock, no future
    assert new_items(ITEMS.drop("available_from"), DEGREES, clock=10).tolist() == [3, 4, 5]
    assert new_items(ITEMS, np.ones(6, np.float32), clock=10).tolist() == []


def test_stage_one_gives_them_the_vector_of_their_like():
    vectors = np.array([[0, 0], [2, 0], [0, 2], [0, 0], [0, 0], [0, 0]], np.float32)
    new = np.array([3, 4], np.int32)
    completed = with_new_items(vectors, DEGREES, new, like_items(DEGREES, FEATURES, new))
    np.testing.assert_array_equal(completed[:3], vectors[:3])
    assert completed[3].tolist() == [0, 0]  # like no trained item
    assert completed[4, 0] > completed[4, 1] > 0  # mostly like a, a little like b
    np.testing.assert_allclose(np.linalg.norm(completed[4]), 2, rtol=1e-6)
    assert completed[5].tolist() == [0, 0]  # was not asked for


@pytest.mark.parametrize("with_content", [False, True])
def test_the_ranker_scores_them_by_their_like_and_so_does_its_export(tmp_path, with_content):
    torch.manual_seed(0)
    content = torch.cat([torch.zeros(1, 4), torch.randn(5, 4)]) if with_content else None
    ranker = HybridRanker(
        SASRec(4, dim=8, num_blocks=1, num_heads=1),
        num_items=5,
        content_vectors=content,
        is_trained=torch.from_numpy(DEGREES > 0),
    ).eval()
    before = ranker.item_vectors().detach().numpy().copy()
    new = np.array([3, 4, 5], np.int32)
    give_new_items_vectors(ranker, DEGREES, new, like_items(DEGREES, FEATURES, new))
    after = ranker.item_vectors().detach().numpy()
    np.testing.assert_array_equal(after[:4], before[:4])  # trained, or like no trained item
    lengths = np.linalg.norm(after, axis=1)
    np.testing.assert_allclose(lengths[4:], RANKER_SCALE * np.median(lengths[1:3]), rtol=1e-5)
    np.testing.assert_allclose(after[5] / lengths[5], before[1] / lengths[1], atol=1e-6)  # like a alone

    _check_export(ranker, tmp_path)


def test_the_graphs_own_part_of_them_is_that_of_their_like(tmp_path):
    torch.manual_seed(0)
    graph = 5 * torch.randn(6, 3)
    graph[[0, 3, 4, 5]] = 0  # stage one has no vector of what it has not seen
    ranker = HybridRanker(
        SASRec(4, dim=8, num_blocks=1, num_heads=1),
        graph_vectors=graph,
        item_degrees=torch.from_numpy(DEGREES),
        is_trained=torch.from_numpy(DEGREES > 0),
    ).eval()
    ranker.add_graph_scores(graph, 0.5, half_life=3)
    before = ranker.item_vectors().detach().numpy().copy()
    new = np.array([3, 4, 5], np.int32)
    give_new_items_vectors(ranker, DEGREES, new, like_items(DEGREES, FEATURES, new))
    after = ranker.item_vectors().detach().numpy()
    np.testing.assert_array_equal(after[:4], before[:4])
    for part in (slice(8), slice(8, None)):  # each as long as it would be alone
        lengths = np.linalg.norm(after[:, part], axis=1)
        np.testing.assert_allclose(lengths[4:], RANKER_SCALE * np.median(lengths[1:3]), rtol=1e-5)
        np.testing.assert_allclose(after[5, part] / lengths[5], before[1, part] / lengths[1], atol=1e-6)
    _check_export(ranker, tmp_path)


def _check_export(ranker, tmp_path):
    export_ranker(ranker, tmp_path)
    scorer = OnnxScorer(tmp_path / RANKER_STATE, tmp_path / RANKER_SCORES)
    history, everything = np.array([[0, 4, 1], [0, 0, 5]]), np.arange(1, 6)[None]
    with torch.no_grad():
        scores, _ = ranker(torch.from_numpy(history), torch.from_numpy(everything).expand(2, -1))
    np.testing.assert_allclose(scorer.score(history, everything), scores.numpy(), atol=1e-5)
