"""Export: the trained parts become one bundle, checked against each other before it is published."""

from __future__ import annotations

import logging
import subprocess
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from engine.bundle import Bundle, write_bundle
from engine.history import EMPTY_HISTORY, USERS_SCHEMA
from engine.pipeline import RecommendationPipeline, Visitor
from ranking.ranker import HybridRanker
from retrieval.item_index import ItemIndex
from training.data.dataset import Dataset
from training.data.splits import SplitData

OPSET = 20
MAX_SCORE_DIFFERENCE = 1e-4  # torch against ONNX, float32, relative to the largest score where that is over 1

# What a bundle serves with unless the recipe says otherwise. A later rule overrules an earlier one.
DEFAULT_POLICY: list[dict[str, Any]] = [
    {"rule": "mmr", "relevance_weight": 0.9},
    {"rule": "cap", "field": "category", "max_items": 5},
    {"rule": "cap", "field": "seller_id", "max_items": 10},
    {"rule": "drop_seen"},
]


class _Served(nn.Module):
    """HybridRanker with the items' fused vectors worked out, so that a request only looks them up."""

    def __init__(self, ranker: HybridRanker) -> None:
        super().__init__()
        self.ranker = ranker
        self.register_buffer("table", ranker.item_vectors().detach().clone())

    def forward(self, history: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        state = self.ranker.states(history)[:, -1]
        scores = (self.table[candidates] @ state.unsqueeze(-1)).squeeze(-1)  # type: ignore[index]
        return scores, state


def export_ranker(ranker: HybridRanker, path: Path) -> None:
    """Write a ranker as ONNX: history [B, T], candidates [B or 1, C] -> scores [B, C], state [B, D].

    All axes are dynamic. A single row of candidates is scored for every history of the batch.
    """
    ranker = ranker.float().cpu().eval()
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of every operator torchvision lacks
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised by the exporter about itself
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # both inputs share the batch axis
        program = torch.onnx.export(
            _Served(ranker).eval(),
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)),
            dynamo=True,
            input_names=["history", "candidates"],
            output_names=["scores", "state"],
            dynamic_shapes={
                "history": {0: batch, 1: torch.export.Dim("length")},
                "candidates": {0: batch, 1: torch.export.Dim("num_candidates")},
            },
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The product broadcasts, so one row of candidates serves a whole batch; say so in the signature.
    candidates = next(node for node in model.graph.input if node.name == "candidates")
    candidates.type.tensor_type.shape.dim[0].dim_param = "batch_or_1"
    for key, value in {"history_length": ranker.history_length, "num_items": ranker.num_items}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, str(value)
    onnx.save(model, str(path))


def export_bundle(
    root: Path,
    dataset: Dataset,
    data: SplitData,
    vectors: dict[str, NDArray[np.float32]],
    ranker: HybridRanker | None,
    *,
    pipeline: dict[str, int],
    policy: list[dict[str, Any]],
    recipe: dict[str, Any],
    metrics: dict[str, Any],
) -> Path:
    """Write, verify and publish a bundle; return its directory.

    Args:
        root: the directory of bundles.
        dataset: the data set directory, for the catalog.
        data: its events and split.
        vectors: item_vectors [I+1, D], user_vectors [U+1, D] and item_degrees [I+1] of stage one.
        ranker: of stage two; None where the data has no order to learn from.
        pipeline: num_candidates, num_ranked and default_limit.
        policy: the rules, in order.
        recipe: the settings of the training run, for the record.
        metrics: validation metrics, for the record.

    Raises:
        ValueError: ONNX differs from torch, or FAISS from brute force. Nothing is published then.
    """

    def fill(directory: Path) -> dict[str, Any]:
        popularity = pl.Series("popularity", vectors["item_degrees"][1:], pl.Int64)
        dataset.items.collect().with_columns(popularity).write_parquet(directory / "catalog.parquet")
        _users_table(data).write_parquet(directory / "users.parquet")
        ItemIndex.build(vectors["item_vectors"]).save(directory / "item_index.faiss")
        save_file(vectors, directory / "embeddings.safetensors")
        if ranker is not None:
            export_ranker(ranker, directory / "ranker.onnx")
        info = asdict(data.info)
        kept = ("name", "fingerprint", "simulated", "time", "repeats", "num_users", "num_items", "num_events")
        return {
            "commit": _commit(),
            "data": {key: info[key] for key in kept} | {"split": data.split.name},
            "ranker": {
                "kind": "none" if ranker is None else "ordered",
                "history_length": 0 if ranker is None else ranker.history_length,
            },
            "pipeline": pipeline,
            "policy": policy,
            "recipe": recipe,
            "metrics": metrics,
            "shapes": {name: list(array.shape) for name, array in vectors.items()},
        }

    return write_bundle(root, fill, lambda bundle: verify_bundle(bundle, ranker, data))


def verify_bundle(bundle: Bundle, ranker: HybridRanker | None, data: SplitData) -> None:
    """Raise ValueError unless FAISS agrees with brute force, ONNX with torch, and the pipeline answers."""
    rng = np.random.default_rng(0)
    items = bundle.item_vectors
    noise = 0.01 * rng.standard_normal((32, items.shape[1]))
    queries = (items[rng.integers(1, len(items), 32)] + noise).astype(np.float32)
    k = min(100, bundle.index.num_items)
    _, found = bundle.index.search(queries, k)
    expected = -np.sort(-(queries @ items[1:].T), axis=1)[:, :k]
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(f"FAISS differs from brute force by {np.abs(found - expected).max():.2e}")

    pipeline = RecommendationPipeline(bundle)
    for visitor in (
        Visitor(EMPTY_HISTORY),
        Visitor(data.split.train.history(int(data.split.train.users[0]))),
    ):
        answer = pipeline.recommend(visitor, pipeline.default_limit)
        if answer.trace.degraded_stages or not len(answer.items):
            raise ValueError(f"the pipeline fails on this bundle, in {answer.trace.degraded_stages}")

    if ranker is None or bundle.scorer is None:
        return
    longest = ranker.history_length
    lengths = [min(length, longest) for length in (0, 1, 2, longest - 1, longest)]
    history = np.zeros((len(lengths), longest), np.int64)
    known = data.split.train.items
    for row, length in zip(history, lengths, strict=True):
        if length > 0:
            row[-length:] = rng.choice(known, length)
    candidates = rng.integers(1, len(items), (len(lengths), min(200, len(items) - 1)))
    with torch.no_grad():
        expected = ranker(torch.from_numpy(history), torch.from_numpy(candidates))[0].numpy()
    difference = np.abs(bundle.scorer.score(history, candidates) - expected).max()
    if not difference <= MAX_SCORE_DIFFERENCE * max(1.0, np.abs(expected).max()):
        raise ValueError(f"ONNX scores differ from torch by {difference:.2e}")


def _users_table(data: SplitData) -> pl.DataFrame:
    """Every user's events, in user-row order, oldest first: what serving starts from."""
    events = data.log.events
    frame = pl.DataFrame(
        {
            "user": events.users,
            "items": events.items,
            "event_types": events.event_types,
            "timestamps": events.timestamps,
        }
    )
    lists = frame.group_by("user", maintain_order=True).agg("items", "event_types", "timestamps")
    users = pl.DataFrame({"user_id": data.log.user_ids, "user": np.arange(1, events.num_users + 1)})
    joined = users.with_columns(pl.col("user").cast(pl.Int32)).join(
        lists, on="user", how="left", maintain_order="left"
    )
    return joined.select(pl.col(name).cast(dtype) for name, dtype in USERS_SCHEMA.items())


def _commit() -> str | None:
    """The commit of the source that trained the bundle, where it runs from a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
