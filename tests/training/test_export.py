"""The exported ranker against the one it was made from."""

import numpy as np
import onnx
import pytest
import torch

from ranking.encoders.sasrec import SASRec
from ranking.onnx_scorer import OnnxScorer
from ranking.ranker import HybridRanker
from training.export import export_ranker

NUM_ITEMS, LENGTH, DIM = 60, 6, 16


def ranker(length=LENGTH, with_graph=True):
    torch.manual_seed(0)
    vectors = torch.cat([torch.zeros(1, 5), torch.randn(NUM_ITEMS, 5)])
    options = {"graph_vectors": vectors, "item_degrees": torch.arange(NUM_ITEMS + 1.0)}
    model = HybridRanker(
        SASRec(length + 1, dim=DIM, num_blocks=2, num_heads=2),
        **(options if with_graph else {"num_items": NUM_ITEMS}),
    )
    with torch.no_grad():  # as after training: nothing is at its special initial value
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.embedding.weight[0] = 0
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return (the ranker, its file, its scorer)."""
    path = tmp_path_factory.mktemp("export") / "ranker.onnx"
    model = ranker()
    export_ranker(model, path)
    return model, path, OnnxScorer(path)


def histories(batch_size, length, width=LENGTH):
    rows = np.zeros((batch_size, width), np.int64)
    rows[:, width - length :] = np.random.default_rng(length).integers(1, NUM_ITEMS + 1, (batch_size, length))
    return rows


def by_torch(model, history, candidates):
    with torch.no_grad():
        scores, state = model(torch.from_numpy(history), torch.from_numpy(candidates))
    return scores.numpy(), state.numpy()


@pytest.mark.parametrize("num_candidates", [1, 7, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH])
def test_the_same_scores_as_torch(exported, length, batch_size, num_candidates):
    model, _, scorer = exported
    candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (batch_size, num_candidates))
    for width in {max(length, 1), LENGTH}:  # without padding and with it
        history = histories(batch_size, length, width)
        scores, states = by_torch(model, history, candidates)
        found = scorer.score(history, candidates)
        assert found.shape == (batch_size, num_candidates)
        assert np.abs(found - scores).max() <= 1e-4
        assert np.abs(scorer.user_states(history) - states).max() <= 1e-4
        assert np.isfinite(found).all()


def test_histories_of_many_lengths_in_one_batch(exported):
    model, _, scorer = exported
    history = np.concatenate([histories(1, length) for length in range(LENGTH + 1)])
    candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (LENGTH + 1, 9))
    scores, _ = by_torch(model, history, candidates)
    assert np.abs(scorer.score(history, candidates) - scores).max() <= 1e-4
    assert np.ptp(scores) > 1  # and they are no constants


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_candidates", [1, 7])
def test_one_row_of_candidates_serves_every_history(exported, batch_size, num_candidates):
    _, _, scorer = exported
    history = histories(batch_size, 4)
    candidates = np.arange(1, num_candidates + 1)[None]
    each = scorer.score(history, np.repeat(candidates, batch_size, axis=0))
    shared = scorer.score(history, candidates)
    assert shared.shape == (batch_size, num_candidates)
    np.testing.assert_allclose(shared, each, atol=1e-6)


def test_candidates_never_see_each_other(exported):
    _, _, scorer = exported
    history, candidates = histories(1, 4), np.random.default_rng(0).permutation(NUM_ITEMS)[None] + 1
    together = scorer.score(history, candidates)
    alone = [scorer.score(history, candidates[:, [c]])[0, 0] for c in range(NUM_ITEMS)]
    np.testing.assert_allclose(together[0], alone, atol=1e-5)
    order = np.random.default_rng(1).permutation(NUM_ITEMS)
    np.testing.assert_allclose(scorer.score(history, candidates[:, order]), together[:, order], atol=1e-5)


def test_of_a_longer_history_the_newest_count(exported):
    model, _, scorer = exported
    history, candidates = histories(2, 3 * LENGTH, 3 * LENGTH), np.arange(1, 9)[None].repeat(2, axis=0)
    scores, _ = by_torch(model, history[:, -LENGTH:], candidates)
    assert np.abs(scorer.score(history, candidates) - scores).max() <= 1e-4


def test_the_file_says_what_it_is_and_stands_alone(exported):
    _, path, scorer = exported
    assert (scorer.history_length, scorer.num_items) == (LENGTH, NUM_ITEMS)
    assert [file.name for file in path.parent.iterdir()] == ["ranker.onnx"]
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model)
    shapes = {
        node.name: [axis.dim_param or axis.dim_value for axis in node.type.tensor_type.shape.dim]
        for node in [*model.graph.input, *model.graph.output]
    }
    assert shapes["history"] == ["batch", "length"]
    assert shapes["candidates"] == ["batch_or_1", "num_candidates"]
    assert shapes["state"] == ["batch", DIM]


@pytest.mark.parametrize(("length", "with_graph"), [(1, True), (2, False)])
def test_the_shortest_histories_and_no_graph(tmp_path, length, with_graph):
    # As a training run leaves it: dropout on, and perhaps in half precision.
    model = ranker(length, with_graph).train().to(torch.bfloat16)
    export_ranker(model, tmp_path / "ranker.onnx")
    scorer = OnnxScorer(tmp_path / "ranker.onnx")
    assert scorer.history_length == length
    candidates = np.arange(1, NUM_ITEMS + 1)[None]
    for events in range(length + 1):
        history = histories(1, events, length)
        scores, _ = by_torch(model.float().eval(), history, candidates)
        assert np.abs(scorer.score(history, candidates) - scores).max() <= 1e-4
