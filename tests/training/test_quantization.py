"""Quantized graphs against the float32 ones, and against arithmetic by hand."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.scoring import made_ranker, variants
from engine.bundle import RANKER_SCORES, RANKER_STATE
from training.export import export_ranker
from training.quantization import MAX_SCORE_DIFFERENCE, quantize

NUM_ITEMS, DIM, LENGTH = 300, 32, 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return (the directory of the float32 graphs, a scorer for each precision)."""
    directory = tmp_path_factory.mktemp("quantized")
    export_ranker(made_ranker(NUM_ITEMS, DIM, LENGTH), directory)
    return directory, variants(directory, num_threads=1)


def history(length: int) -> np.ndarray:
    rows = np.random.default_rng(length).integers(1, NUM_ITEMS + 1, (1, LENGTH))
    rows[:, : LENGTH - length] = 0
    return rows


@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH])
@pytest.mark.parametrize("num_candidates", [1, 500, 10_000])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_near_the_float32_scores(exported, precision, length, num_candidates):
    scorers = exported[1]
    candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (1, num_candidates))
    expected = scorers["float32"].score(history(length), candidates)
    found = scorers[precision].score(history(length), candidates)
    difference = np.abs(found - expected).max()
    # Not equal either: a variant that is the float32 graph would save nothing.
    assert 0 < difference <= MAX_SCORE_DIFFERENCE[precision] * max(1, np.abs(expected).max())


@pytest.mark.parametrize(("precision", "share"), [("float16", 0.5), ("int8", 0.25)])
def test_takes_less(exported, precision, share):
    directory, _ = exported
    whole = stored(directory / RANKER_SCORES)
    assert stored(directory / precision / RANKER_SCORES) == pytest.approx(share * whole, rel=0.15)


def stored(path):
    """Return the bytes of a graph's tables."""
    return sum(
        numpy_helper.to_array(tensor).nbytes
        for tensor in onnx.load(path).graph.initializer
        if len(tensor.dims) == 2 and tensor.dims[0] > NUM_ITEMS
    )


def test_int8_rows_have_scales_of_their_own(exported):
    """A code is the value over a 127th of its row's largest, rounded: off by half a step at most."""
    directory, _ = exported
    table = next(
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(directory / RANKER_SCORES).graph.initializer
        if len(tensor.dims) == 2
    )
    arrays = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(directory / "int8" / RANKER_SCORES).graph.initializer
    }
    codes = next(array for array in arrays.values() if array.dtype == np.int8)
    scale = next(array for name, array in arrays.items() if name.endswith("_row_scale"))
    assert np.abs(codes).max(axis=1)[1:].tolist() == [127] * NUM_ITEMS
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    assert (np.abs(codes * scale - table) <= 0.5001 * step).all()
    assert not codes[0].any()


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_nobody_counts_for_the_scores_of_another(exported, precision):
    scorer = exported[1][precision]
    batch = np.concatenate([history(length) for length in range(LENGTH + 1)])
    alone = np.concatenate([scorer.user_states(row[None]) for row in batch])
    np.testing.assert_allclose(scorer.user_states(batch), alone, atol=1e-5)


def test_float32_is_left_as_it_is(exported):
    model = onnx.load(exported[0] / RANKER_STATE)
    before = model.SerializeToString()
    quantize(model, "float32")
    assert model.SerializeToString() == before


def test_an_unknown_precision_is_told(exported):
    with pytest.raises(ValueError, match="precision is 'int4'; expected one of float32, float16, int8"):
        quantize(onnx.load(exported[0] / RANKER_STATE), "int4")


def test_the_same_metadata(exported):
    _, scorers = exported
    for scorer in scorers.values():
        assert (scorer.num_items, scorer.history_length, scorer.dim) == (NUM_ITEMS, LENGTH, DIM)
