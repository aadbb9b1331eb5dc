"""HybridRanker, served: the exported ONNX files in onnxruntime, with the checks that a graph cannot make.

Two graphs, so that what a history comes to is worked out once in a request: retrieval searches with it, and
scoring goes on from it. Neither holds a weight that the other has.

Shape legend: B batch, T history, C candidates, D dimension, I items, K keys of the context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ranking.context import ContextTable, Encoded

if TYPE_CHECKING:
    from onnx import ModelProto

# The two graphs' inputs and outputs.
STATE_INPUTS = ["history"]  # int64 [B, T], left-padded with 0
CONTEXT_INPUTS = ["context_rows", "context_weights"]  # int64 and float32 [B, K], where K is not 0
HEAD_INPUTS = ["head_weights"]  # float32 [B, heads], where there are several
STATE_OUTPUTS = ["state"]  # float32 [B, D]
SCORES_INPUTS = ["state", "candidates"]  # float32 [B, D]; int64 [B or 1, C]
SCORES_OUTPUTS = ["scores"]  # float32 [B, C]
LARGE_BYTES = 1 << 10  # of a table that stands outside its graph
PAGE_BYTES = 1 << 12  # that memory is mapped by

Provider = Literal["auto", "tensorrt", "cuda", "cpu"]
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}


class OnnxScorer:
    """One score per candidate, in order; several threads may share a scorer.

    onnxruntime itself refuses a model whose weights lie outside the folder of its file.
    """

    def __init__(
        self,
        state_path: str | Path,
        scores_path: str | Path,
        num_threads: int = 1,
        provider: Provider = "auto",
    ) -> None:
        """Open a ranker.

        Args:
            state_path: an ONNX file from STATE_INPUTS to STATE_OUTPUTS, with the metadata "history_length"
                and "num_items". Where it has the metadata "context" (ContextTable.to_json), CONTEXT_INPUTS
                are inputs too, and where it has "heads" (a JSON list of names), HEAD_INPUTS.
            scores_path: an ONNX file from SCORES_INPUTS to SCORES_OUTPUTS, with the metadata "num_items".
            num_threads: CPU threads of one call. Calls that run at once fight for them: under load 1 is best.
            provider: what runs the graphs; what it cannot run falls to the next of tensorrt, cuda, cpu.
                "auto" takes cuda where onnxruntime has it. tensorrt builds an engine for each range of shapes
                that it meets, which takes seconds, so it has to be asked for.

        Raises:
            ValueError: on models with other inputs, outputs or metadata, or that do not belong together, on
                num_threads below 1, and on a provider that is not there.
        """
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; expected at least 1")
        self._state = _open(state_path, num_threads, provider)
        told = self._state.get_modelmeta().custom_metadata_map.get("context", "[]")
        self.context = ContextTable.from_json(told)  # what the ranker knows of the moment
        # What a score is the weighted sum of; the first alone where nobody says. Empty: there is one score.
        self.heads = _names(self._state, state_path, "heads")
        sizes = dict.fromkeys(CONTEXT_INPUTS if len(self.context) else [], len(self.context))
        sizes |= dict.fromkeys(HEAD_INPUTS if self.heads else [], len(self.heads))
        inputs = [*STATE_INPUTS, *sizes]
        _check_nodes(self._state, state_path, inputs, STATE_OUTPUTS)
        for node in self._state.get_inputs():
            if node.shape[1] != (expected := sizes.get(node.name, node.shape[1])):
                raise ValueError(
                    f"{state_path}: {node.name} has {node.shape[1]} columns; expected {expected}"
                )
        self._scores = _open(scores_path, num_threads, provider)
        _check_nodes(self._scores, scores_path, SCORES_INPUTS, SCORES_OUTPUTS)
        self.history_length = _number(self._state, state_path, "history_length")  # events it looks at
        self.num_items = _number(self._scores, scores_path, "num_items")  # I: rows 1..I have scores
        found = _number(self._state, state_path, "num_items")
        if found != self.num_items:
            raise ValueError(f"{state_path} has {found} items; expected {self.num_items}, as {scores_path}")
        self.dim = self._state.get_outputs()[0].shape[1]  # D
        if (found := self._scores_dim()) != self.dim:
            raise ValueError(f"{scores_path} takes a state of {found} numbers; expected {self.dim}")

    @property
    def providers(self) -> tuple[str, ...]:
        """What runs both graphs, of PROVIDERS, the preferred one first."""
        used = {*self._state.get_providers()} & {*self._scores.get_providers()}
        return tuple(name for name, full in PROVIDERS.items() if full in used)

    def score(
        self,
        history: NDArray[np.integer],
        candidates: NDArray[np.integer],
        context: Encoded | None = None,
        head_weights: NDArray[np.floating] | None = None,
    ) -> NDArray[np.float32]:
        """Return the score of each candidate: [B, C] float32, higher is better.

        Args:
            history: [B, T] item rows, oldest first, left-padded with 0; of more than `history_length`
                the newest count. A row of zeros, or T = 0, is a visitor without a history: scored as well.
            candidates: [B, C] item rows in any order, or [1, C]: the same for every history.
            context: of the moment, [B, K] each (`self.context`); None where nothing is known of it.
            head_weights: [B, heads], of each of `self.heads`; None asks for the first alone.

        Raises:
            ValueError: on other shapes, numbers that are no integers, or rows outside 0..I.
        """
        if candidates.ndim == 2 and len(candidates) not in (1, len(history)):
            raise ValueError(f"history is for {len(history)} users, candidates for {len(candidates)}")
        return self.score_states(self.user_states(history, context, head_weights), candidates)

    def user_states(
        self,
        history: NDArray[np.integer],
        context: Encoded | None = None,
        head_weights: NDArray[np.floating] | None = None,
    ) -> NDArray[np.float32]:
        """Return what the model makes of each history: [B, D] float32. Takes all as `score` does."""
        history = self._check_rows("history", history)
        history = (
            history[:, -self.history_length :] if history.shape[1] else np.zeros((len(history), 1), np.int64)
        )
        states: NDArray[np.float32]
        inputs: dict[str, NDArray[np.generic]] = {"history": np.ascontiguousarray(history)}
        if len(self.context):
            inputs |= self._checked(context or self.context.unknown(len(history)), len(history))
        if self.heads:
            if head_weights is None:
                head_weights = np.tile(np.eye(1, len(self.heads)), (len(history), 1))
            if head_weights.shape != (len(history), len(self.heads)):
                raise ValueError(
                    f"head_weights has shape {head_weights.shape}; expected {(len(history), len(self.heads))}"
                )
            inputs["head_weights"] = np.ascontiguousarray(head_weights, np.float32)
        if not len(history):  # onnxruntime fails, or ends the process, on some graphs
            return np.zeros((0, self.dim), np.float32)
        (states,) = self._state.run(STATE_OUTPUTS, inputs)
        return states

    def score_states(
        self, states: NDArray[np.float32], candidates: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Return the score of each candidate: [B, C] float32, as `score` gives it for the states' histories.

        Args:
            states: [B, D] float32, from `user_states`.
            candidates: [B, C] item rows in any order, or [1, C]: the same for every state.

        Raises:
            ValueError: on other shapes, numbers that are no integers, or rows outside 0..I.
        """
        candidates = self._check_rows("candidates", candidates)
        if states.ndim != 2 or states.shape[1] != self.dim:
            raise ValueError(f"states has shape {states.shape}; expected [B, {self.dim}]")
        if len(candidates) not in (1, len(states)):
            raise ValueError(f"states is for {len(states)} users, candidates for {len(candidates)}")
        if not len(states) or not candidates.size:
            return np.zeros((len(states), candidates.shape[1]), np.float32)
        inputs = {"state": np.ascontiguousarray(states, np.float32), "candidates": candidates}
        scores: NDArray[np.float32]
        (scores,) = self._scores.run(SCORES_OUTPUTS, inputs)
        return scores

    def _checked(self, context: Encoded, batch_size: int) -> dict[str, NDArray[np.generic]]:
        expected = (batch_size, len(self.context))
        rows, weights = context
        if rows.shape != expected or weights.shape != expected:
            raise ValueError(f"context has the shapes {rows.shape} and {weights.shape}; expected {expected}")
        if rows.size and not 0 <= rows.min() <= rows.max() < self.context.num_rows:
            raise ValueError(
                f"context holds rows {rows.min()} to {rows.max()}; expected 0 to {self.context.num_rows - 1}"
            )
        return {
            "context_rows": np.ascontiguousarray(rows, np.int64),
            "context_weights": np.ascontiguousarray(weights, np.float32),
        }

    def _scores_dim(self) -> int:
        return int(next(node.shape[1] for node in self._scores.get_inputs() if node.name == "state"))

    def _check_rows(self, name: str, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        if rows.ndim != 2:
            raise ValueError(f"{name} has shape {rows.shape}; expected two axes")
        if rows.dtype.kind not in "iu":
            raise ValueError(f"{name} is {rows.dtype}; expected integers")
        if rows.size:
            lowest, highest = int(rows.min()), int(rows.max())
            if lowest < 0 or highest > self.num_items:
                row = lowest if lowest < 0 else highest
                raise ValueError(f"{name} holds row {row}; expected 0 to {self.num_items}")
        return np.ascontiguousarray(rows, np.int64)


def write_models(state: Path, scores: Path, weights: Path, models: tuple[ModelProto, ModelProto]) -> None:
    """Write the two graphs, and what is large in them to a third file.

    onnxruntime opens such a file ("external data") as a memory map, so that processes share its pages and do
    not copy them; what stands inside a graph each session copies. A table of items that both graphs have
    stands there once.

    Args:
        state: gets the first model,
        scores: the second,
        weights: their tables; in the same folder.
        models: changed: they lose what is in `weights`.
    """
    import onnx

    written: list[tuple[bytes, int]] = []  # and where it begins
    tables = [table for model in models for table in model.graph.initializer]
    with weights.open("wb") as stream:
        for table in sorted(tables, key=lambda table: -len(table.raw_data)):
            data = table.raw_data
            if len(data) < LARGE_BYTES:
                continue
            offset = next((offset for other, offset in written if other.startswith(data)), -1)
            if offset < 0:
                stream.write(bytes(-stream.tell() % PAGE_BYTES))
                offset = stream.tell()
                stream.write(data)
                written.append((data, offset))
            table.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", weights.name), ("offset", offset), ("length", len(data))):
                table.external_data.add(key=key, value=str(value))
            table.ClearField("raw_data")
    for path, model in zip((state, scores), models, strict=True):
        path.write_bytes(model.SerializeToString())


def available_providers() -> tuple[str, ...]:
    """Return which of PROVIDERS this onnxruntime has, by their short names."""
    has = ort.get_available_providers()
    return tuple(name for name, full in PROVIDERS.items() if full in has)


def _open(path: str | Path, num_threads: int, provider: Provider) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    available = available_providers()
    wanted = ("cuda" if "cuda" in available else "cpu") if provider == "auto" else provider
    if wanted not in available:
        raise ValueError(f"provider is {provider!r}; this onnxruntime has {', '.join(available)}")
    names = list(PROVIDERS)
    fallbacks = [name for name in names[names.index(wanted) :] if name in available]
    session = ort.InferenceSession(str(path), options, providers=[PROVIDERS[name] for name in fallbacks])
    # Where its libraries are missing, onnxruntime goes on without a provider.
    if provider != "auto" and PROVIDERS[wanted] not in session.get_providers():
        raise ValueError(
            f"provider is {provider!r}; onnxruntime could not start it and has {session.get_providers()}"
        )
    return session


def _check_nodes(
    session: ort.InferenceSession, path: str | Path, inputs: list[str], outputs: list[str]
) -> None:
    for kind, nodes, expected in (
        ("inputs", session.get_inputs(), inputs),
        ("outputs", session.get_outputs(), outputs),
    ):
        found = [node.name for node in nodes]
        if sorted(found) != sorted(expected):
            raise ValueError(f"{path} has the {kind} {', '.join(found)}; expected {', '.join(expected)}")


def _number(session: ort.InferenceSession, path: str | Path, key: str) -> int:
    text = session.get_modelmeta().custom_metadata_map.get(key, "")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{path} has the metadata {key} {text!r}; expected a number of at least 1")
    return int(text)


def _names(session: ort.InferenceSession, path: str | Path, key: str) -> tuple[str, ...]:
    text = session.get_modelmeta().custom_metadata_map.get(key, "[]")
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has the metadata {key} {text!r}; expected a JSON list of names")
    return tuple(names)
