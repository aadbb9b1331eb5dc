"""OnnxScorer against a model to be worked out by hand: mean vector of the history, inner product."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ranking import onnx_scorer
from ranking.context import ContextKey, ContextTable, Encoded
from ranking.onnx_scorer import OnnxScorer, write_models

TABLE = np.array([[0, 0], [1, 0], [0, 1], [2, 2], [-1, 3]], np.float32)  # rows 0..4: four items
METADATA = {"history_length": "3", "num_items": "4"}


def tiny_models(metadata=METADATA, scores_metadata=METADATA, names=None, scores_dim=2):
    """Return both graphs with dynamic B, T and C; the mean runs over T, so it sees how many columns it gets.

    `names` renames inputs and outputs: {"history": "items"}.
    """

    def named(name):
        return (names or {}).get(name, name)

    def model(nodes, inputs, outputs, arrays, properties):
        initializers = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
        graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        helper.set_model_props(made, properties)
        return made

    def value(name, kind, shape):
        return helper.make_tensor_value_info(named(name), kind, shape)

    state = model(
        [
            helper.make_node("Gather", ["table", named("history")], ["history_vectors"]),  # [B, T, D]
            helper.make_node("ReduceMean", ["history_vectors", "axis_t"], [named("state")], keepdims=0),
        ],
        [value("history", TensorProto.INT64, ["B", "T"])],
        [value("state", TensorProto.FLOAT, ["B", 2])],
        {"table": TABLE, "axis_t": np.array([1], np.int64)},
        metadata,
    )
    scores = model(
        [
            helper.make_node("Unsqueeze", ["state", "axis_last"], ["state_column"]),  # [B, D, 1]
            helper.make_node("Gather", ["table", named("candidates")], ["candidate_vectors"]),  # [B, C, D]
            helper.make_node("MatMul", ["candidate_vectors", "state_column"], ["scores_column"]),
            helper.make_node("Squeeze", ["scores_column", "axis_last"], [named("scores")]),  # [B, C]
        ],
        [
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["B", scores_dim]),
            value("candidates", TensorProto.INT64, ["B", "C"]),
        ],
        [value("scores", TensorProto.FLOAT, ["B", "C"])],
        {"table": np.resize(TABLE, (5, scores_dim)), "axis_last": np.array([2], np.int64)},
        scores_metadata,
    )
    return state, scores


def opened(directory: Path, models=None, **options) -> OnnxScorer:
    paths = directory / "state.onnx", directory / "scores.onnx"
    for path, model in zip(paths, models or tiny_models(), strict=True):
        onnx.save(model, path)
    return OnnxScorer(*paths, **options)


@pytest.fixture
def scorer(tmp_path: Path) -> OnnxScorer:
    return opened(tmp_path)


def test_worked_out_answer(scorer):
    history = np.array([[0, 1, 3], [2, 2, 2]])  # means (1, 2/3) and (0, 1)
    scores = scorer.score(history, np.array([[3, 2], [4, 1]]))
    np.testing.assert_allclose(scores, [[10 / 3, 2 / 3], [3, 0]], rtol=1e-6)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scorer.user_states(history), [[1, 2 / 3], [0, 1]], rtol=1e-6)


def test_what_the_model_says_of_itself(scorer):
    assert (scorer.history_length, scorer.num_items) == (3, 4)
    assert scorer.providers[-1] == "cpu"


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


def test_states_can_be_scored_apart(scorer):
    history, candidates = np.array([[0, 1, 3], [2, 2, 2]]), np.array([[3, 2], [4, 1]])
    states = scorer.user_states(history)
    assert scorer.score_states(states, candidates).tolist() == scorer.score(history, candidates).tolist()
    shared = scorer.score_states(states, candidates[:1])
    assert shared.tolist() == scorer.score(history, candidates[:1]).tolist()
    assert scorer.score_states(np.array([[1, 0]], np.float64), candidates[:1]).tolist() == [[2, 0]]
    assert scorer.score_states(states[:0], candidates[:1]).shape == (0, 2)


@pytest.mark.parametrize(
    ("states", "candidates", "message"),
    [
        (np.ones((1, 3), np.float32), [[1]], r"states has shape \(1, 3\); expected \[B, 2\]"),
        (np.ones(2, np.float32), [[1]], r"states has shape \(2,\)"),
        (np.ones((1, 2), np.float32), [[1], [2]], "states is for 1 users, candidates for 2"),
        (np.ones((1, 2), np.float32), [[5]], "candidates holds row 5; expected 0 to 4"),
    ],
)
def test_wrong_states(scorer, states, candidates, message):
    with pytest.raises(ValueError, match=message):
        scorer.score_states(states, np.array(candidates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"history": "items"}}, "has the inputs items; expected history"),
        ({"names": {"state": "hidden"}}, "has the outputs hidden; expected state"),
        ({"names": {"candidates": "items"}}, "has the inputs state, items; expected state, candidates"),
        (
            {"metadata": {"num_items": "4"}},
            "state.onnx has the metadata history_length ''; expected a number",
        ),
        (
            {"metadata": METADATA | {"history_length": "0"}},
            "history_length '0'; expected a number of at least",
        ),
        ({"scores_metadata": {"num_items": "-4"}}, "scores.onnx has the metadata num_items '-4'; expected a"),
        ({"scores_metadata": {"num_items": "5"}}, "state.onnx has 4 items; expected 5, as .*scores.onnx"),
        ({"scores_dim": 3}, "scores.onnx takes a state of 3 numbers; expected 2"),
    ],
)
def test_other_models_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, tiny_models(**options))


def test_num_threads_is_checked(tmp_path):
    with pytest.raises(ValueError, match="num_threads is 0; expected at least 1"):
        opened(tmp_path, num_threads=0)


def test_a_context_that_does_not_fit_is_refused(tmp_path):
    table = ContextTable((ContextKey(name="device", kind="categorical", values=("phone",)),))
    state, scores = tiny_models(METADATA | {"context": table.to_json()})
    with pytest.raises(
        ValueError, match="has the inputs history; expected history, context_rows, context_weights"
    ):
        opened(tmp_path, (state, scores))
    for name, kind in (("context_rows", TensorProto.INT64), ("context_weights", TensorProto.FLOAT)):
        state.graph.input.append(helper.make_tensor_value_info(name, kind, ["B", 2]))
    with pytest.raises(ValueError, match="context_rows has 2 columns; expected 1"):
        opened(tmp_path, (state, scores))
    for node in state.graph.input[1:]:
        node.type.tensor_type.shape.dim[1].dim_value = 1
    scorer = opened(tmp_path, (state, scores))
    history = np.array([[1], [2]])
    assert scorer.user_states(history).tolist() == scorer.user_states(history, table.unknown(2)).tolist()
    with pytest.raises(ValueError, match=r"context has the shapes \(1, 1\) and \(1, 1\); expected \(2, 1\)"):
        scorer.user_states(history, table.unknown(1))
    with pytest.raises(ValueError, match="context holds rows 2 to 2; expected 0 to 1"):
        scorer.user_states(history, Encoded(np.full((2, 1), 2), np.ones((2, 1), np.float32)))


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
    models = tiny_models()
    table = models[0].graph.initializer[0]
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value=location)
    for name, model in zip(("state.onnx", "scores.onnx"), models, strict=True):
        (bundle / name).write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="External data path validation failed"):
        OnnxScorer(bundle / "state.onnx", bundle / "scores.onnx")


def test_weights_outside_the_graphs_change_nothing_and_equal_ones_stand_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ranking.onnx_scorer.LARGE_BYTES", 16)
    embedded = tmp_path / "embedded"
    embedded.mkdir()
    for name, model in zip(("state.onnx", "scores.onnx"), tiny_models(), strict=True):
        onnx.save(model, embedded / name)
    write_models(
        tmp_path / "state.onnx", tmp_path / "scores.onnx", tmp_path / "ranker.weights", tiny_models()
    )
    assert (tmp_path / "ranker.weights").read_bytes() == TABLE.tobytes()
    for name in ("state.onnx", "scores.onnx"):
        assert TABLE.tobytes() not in (tmp_path / name).read_bytes()
    history, candidates = np.array([[0, 1, 3], [2, 2, 4]]), np.array([[1, 2, 3, 4]])
    found, expected = (
        OnnxScorer(folder / "state.onnx", folder / "scores.onnx").score(history, candidates)
        for folder in (tmp_path, embedded)
    )
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "ranker.weights").write_bytes(b"short")
    with pytest.raises(Exception, match="External initializer: table"):
        OnnxScorer(tmp_path / "state.onnx", tmp_path / "scores.onnx")


def test_a_provider_that_is_there_is_taken(tmp_path):
    assert opened(tmp_path, provider="cpu").providers == ("cpu",)


@pytest.mark.parametrize(
    ("there", "asked", "taken"),
    [
        (("cpu",), "auto", ["cpu"]),
        (("cuda", "cpu"), "auto", ["cuda", "cpu"]),
        (("tensorrt", "cuda", "cpu"), "auto", ["cuda", "cpu"]),
        (("tensorrt", "cuda", "cpu"), "tensorrt", ["tensorrt", "cuda", "cpu"]),
        (("cuda", "cpu"), "cpu", ["cpu"]),
    ],
)
def test_what_is_tried_in_which_order(there, asked, taken, monkeypatch):
    class Session:
        def __init__(self, path, options, providers):
            self.providers = providers

        def get_providers(self):
            return self.providers

    monkeypatch.setattr("ranking.onnx_scorer.available_providers", lambda: there)
    monkeypatch.setattr("ranking.onnx_scorer.ort.InferenceSession", Session)
    session = onnx_scorer._open("ranker.onnx", 1, asked)
    assert session.providers == [onnx_scorer.PROVIDERS[name] for name in taken]


def test_what_runs_one_graph_alone_does_not_run_the_ranker(tmp_path, monkeypatch):
    scorer = opened(tmp_path)
    both = [onnx_scorer.PROVIDERS[name] for name in ("cuda", "cpu")]
    monkeypatch.setattr(scorer, "_state", SimpleNamespace(get_providers=lambda: both))
    assert scorer.providers == ("cpu",)


def test_a_provider_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("ranking.onnx_scorer.available_providers", lambda: ("cpu",))
    with pytest.raises(ValueError, match="provider is 'tensorrt'; this onnxruntime has cpu"):
        opened(tmp_path, provider="tensorrt")


def test_a_provider_that_cannot_start_is_told(tmp_path, monkeypatch):
    # onnxruntime itself goes on with the next one, and says so in a warning.
    monkeypatch.setattr("ranking.onnx_scorer.available_providers", lambda: ("cuda", "cpu"))
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ValueError, match="could not start it"),
    ):
        opened(tmp_path, provider="cuda")
