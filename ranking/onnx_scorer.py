"""HybridRanker, served: the exported ONNX file in onnxruntime, with the checks that a graph cannot make.

Shape legend: B batch, T history, C candidates, D dimension, I items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

INPUTS = ["history", "candidates"]  # int64 [B, T] left-padded with 0; int64 [B or 1, C]
OUTPUTS = ["scores", "state"]  # float32 [B, C]; float32 [B, D]


class OnnxScorer:
    """One score per candidate, in order; several threads may share a scorer.

    onnxruntime itself refuses a model whose weights lie outside the folder of its file.
    """

    def __init__(self, path: str | Path, num_threads: int = 1) -> None:
        """Open a model.

        Args:
            path: an ONNX file with INPUTS, OUTPUTS and the metadata "history_length" and "num_items".
            num_threads: CPU threads of one call. Calls that run at once fight for them: under load 1 is best.

        Raises:
            ValueError: on a model with other inputs, outputs or metadata, or num_threads below 1.
        """
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; expected at least 1")
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        available = ort.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        self._session = ort.InferenceSession(str(path), options, providers=providers)

        for kind, found, expected in (
            ("inputs", [node.name for node in self._session.get_inputs()], INPUTS),
            ("outputs", [node.name for node in self._session.get_outputs()], OUTPUTS),
        ):
            if sorted(found) != sorted(expected):
                raise ValueError(f"{path} has the {kind} {', '.join(found)}; expected {', '.join(expected)}")
        metadata = self._session.get_modelmeta().custom_metadata_map
        for key in ("history_length", "num_items"):
            text = metadata.get(key, "")
            if not text.isdecimal() or int(text) < 1:
                raise ValueError(f"{path} has the metadata {key} {text!r}; expected a number of at least 1")
        self.history_length = int(metadata["history_length"])  # events that the model looks at
        self.num_items = int(metadata["num_items"])  # I: rows 1..I have scores

    @property
    def providers(self) -> tuple[str, ...]:
        """The onnxruntime execution providers in use, the preferred one first."""
        return tuple(self._session.get_providers())

    def score(self, history: NDArray[np.integer], candidates: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the score of each candidate: [B, C] float32, higher is better.

        Args:
            history: [B, T] item rows, oldest first, left-padded with 0; of more than `history_length`
                the newest count. A row of zeros, or T = 0, is a visitor without a history: scored as well.
            candidates: [B, C] item rows in any order, or [1, C]: the same for every history.

        Raises:
            ValueError: on other shapes, numbers that are no integers, or rows outside 0..I.
        """
        history = self._check_history(history)
        candidates = self._check_rows("candidates", candidates)
        if len(candidates) not in (1, len(history)):
            raise ValueError(f"history is for {len(history)} users, candidates for {len(candidates)}")
        if not history.size or not candidates.size:
            return np.zeros((len(history), candidates.shape[1]), np.float32)
        scores: NDArray[np.float32]
        (scores,) = self._session.run(["scores"], {"history": history, "candidates": candidates})
        return scores

    def user_states(self, history: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return what the model makes of each history: [B, D] float32. Takes `history` as `score` does."""
        history = self._check_history(history)
        no_candidates = np.zeros((len(history), 1), np.int64)  # the graph wants some; the state ignores them
        states: NDArray[np.float32]
        (states,) = self._session.run(["state"], {"history": history, "candidates": no_candidates})
        return states

    def _check_history(self, history: NDArray[np.integer]) -> NDArray[np.int64]:
        rows = self._check_rows("history", history)
        if rows.shape[1] == 0:
            return np.zeros((len(rows), 1), np.int64)
        return np.ascontiguousarray(rows[:, -self.history_length :])

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
