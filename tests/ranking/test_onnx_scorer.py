"""OnnxScorer against a model to be worked out by hand: mean vector of the history, inner product."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ranking.onnx_scorer import OnnxScorer

TABLE = np.array([[0, 0], [1, 0], [0, 1], [2, 2], [-1, 3]], np.float32)  # rows 0..4: four items
METADATA = {"history_length": "3", "num_items": "4"}


def tiny_model(metadata=METADATA, inputs=("history", "candidates"), outputs=("scores", "state")):
    """Return a model with dynamic B, T and C; the mean runs over T, so it sees how many columns it gets."""
    history, candidates = inputs
    scores, state = outputs
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", history], ["history_vectors"]),  # [B, T, D]
            helper.make_node("ReduceMean", ["history_vectors", "axis_t"], [state], keepdims=0),  # [B, D]
            helper.make_node("Unsqueeze", [state, "axis_last"], ["state_column"]),  # [B, D, 1]
            helper.make_node("Gather", ["table", candidates], ["candidate_vectors"]),  # [B, C, D]
            helper.make_node("MatMul", ["candidate_vectors", "state_column"], ["scores_column"]),
            helper.make_node("Squeeze", ["scores_column", "axis_last"], [scores]),  # [B, C]
        ],
        "tiny",
        [
            helper.make_tensor_value_info(history, TensorProto.INT64, ["B", "T"]),
            helper.make_tensor_value_info(candidates, TensorProto.INT64, ["B", "C"]),
        ],
        [
            helper.make_tensor_value_info(scores, TensorProto.FLOAT, ["B", "C"]),
            helper.make_tensor_value_info(state, TensorProto.FLOAT, ["B", 2]),
        ],
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(np.array([1], np.int64), "axis_t"),
            numpy_helper.from_array(np.array([2], np.int64), "axis_last"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, metadata)
    return model


@pytest.fixture
def scorer(tmp_path: Path) -> OnnxScorer:
    onnx.save(tiny_model(), tmp_path / "ranker.onnx")
    return OnnxScorer(tmp_path / "ranker.onnx")


def test_worked_out_answer(scorer):
    history = np.array([[0, 1, 3], [2, 2, 2]])  # means (1, 2/3) and (0, 1)
    scores = scorer.score(history, np.array([[3, 2], [4, 1]]))
    np.testing.assert_allclose(scores, [[10 / 3, 2 / 3], [3, 0]], rtol=1e-6)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scorer.user_states(history), [[1, 2 / 3], [0, 1]], rtol=1e-6)


def test_what_the_model_says_of_itself(scorer):
    assert (scorer.history_length, scorer.num_items) == (3, 4)
    assert "CPUExecutionProvider" in scorer.providers


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_histories_go_in_as_they_are(scorer, length):
    history = np.full((1, length), 3)
    expected = 4.0 if length else 0.0  # no history is one column of zeros
    assert scorer.score(history, np.array([[1, 2]])).sum() == expected


def test_of_a_long_history_the_newest_count(scorer):
    history = np.array([[4, 4, 1, 2, 3]])
    candidates = np.array([[1, 2, 3, 4]])
    newest = history[:, -3:]
    assert scorer.score(history, candidates).tolist() == scorer.score(newest, candidates).tolist()
    assert scorer.user_states(history).tolist() == scorer.user_states(newest).tolist()


def test_one_by_one_together_and_permuted_agree(scorer):
    history, candidates = np.array([[1, 2, 4]]), np.array([[3, 1, 4, 2]])
    together = scorer.score(history, candidates)[0]
    alone = [scorer.score(history, candidates[:, i : i + 1])[0, 0] for i in range(4)]
    permuted = scorer.score(history, candidates[:, [2, 0, 3, 1]])[0]
    assert alone == together.tolist()
    assert permuted.tolist() == together[[2, 0, 3, 1]].tolist()


def test_no_candidates_and_no_users(scorer):
    assert scorer.score(np.ones((2, 3), int), np.ones((2, 0), int)).shape == (2, 0)
    assert scorer.score(np.ones((0, 3), int), np.ones((0, 5), int)).shape == (0, 5)
    assert scorer.user_states(np.ones((0, 3), int)).shape == (0, 2)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_any_integers_will_do(scorer, dtype):
    assert scorer.score(np.array([[1]], dtype), np.array([[3]], dtype)).tolist() == [[2]]


def test_arrays_need_not_be_contiguous(scorer):
    history, candidates = np.array([[1, 9], [2, 9]]).T[:1], np.array([[3, 4, 1, 4]])[:, ::2]
    assert scorer.score(history, candidates).tolist() == [[2, 0.5]]


@pytest.mark.parametrize(
    ("history", "candidates", "message"),
    [
        ([[5]], [[1]], "history holds row 5; expected 0 to 4"),
        ([[1]], [[1, 5]], "candidates holds row 5; expected 0 to 4"),
        ([[1]], [[-1]], "candidates holds row -1; expected 0 to 4"),
        ([[-1, 1, 1, 1]], [[1]], "history holds row -1"),  # also in the part that is cut off
        ([1], [[1]], r"history has shape \(1,\); expected two axes"),
        ([[1]], [1], r"candidates has shape \(1,\); expected two axes"),
        ([[1]], [[1], [2]], "history is for 1 users, candidates for 2"),
        ([[1.0]], [[1]], "history is float64; expected integers"),
        ([[1]], [[1.0]], "candidates is float64; expected integers"),
        ([[True]], [[1]], "history is bool; expected integers"),
    ],
)
def test_what_a_model_would_answer_with_nonsense_is_refused(scorer, history, candidates, message):
    with pytest.raises(ValueError, match=message):
        scorer.score(np.array(history), np.array(candidates))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            tiny_model(inputs=("items", "candidates")),
            "has the inputs items, candidates; expected history, cand",
        ),
        (tiny_model(outputs=("scores", "hidden")), "has the outputs scores, hidden; expected scores, state"),
        (tiny_model({"num_items": "4"}), "has the metadata history_length ''; expected a number"),
        (
            tiny_model({**METADATA, "history_length": "0"}),
            "history_length '0'; expected a number of at least 1",
        ),
        (tiny_model({**METADATA, "num_items": "-4"}), "num_items '-4'; expected a number of at least 1"),
    ],
)
def test_another_model_is_refused(tmp_path, model, message):
    onnx.save(model, tmp_path / "ranker.onnx")
    with pytest.raises(ValueError, match=message):
        OnnxScorer(tmp_path / "ranker.onnx")


def test_num_threads_is_checked(tmp_path):
    with pytest.raises(ValueError, match="num_threads is 0; expected at least 1"):
        OnnxScorer(tmp_path / "ranker.onnx", num_threads=0)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_weights_outside_the_folder_are_not_read(tmp_path, kind):
    """onnxruntime's own check; this test keeps watch over it."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    outside = tmp_path / "weights.bin"
    outside.write_bytes(TABLE.tobytes())
    location = {"parent": "../weights.bin", "absolute": str(outside), "link": "weights.bin"}[kind]
    if kind == "link":
        (bundle / "weights.bin").symlink_to(outside)
    model = tiny_model()
    table = model.graph.initializer[0]
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value=location)
    (bundle / "ranker.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="External data path validation failed"):
        OnnxScorer(bundle / "ranker.onnx")
