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

from engine.bundle import RANKER_INDEX, RANKER_SCORES, RANKER_STATE, Bundle, write_bundle
from engine.history import EMPTY_HISTORY, USERS_SCHEMA
from engine.pipeline import DAY_MS, RecommendationPipeline, Visitor
from ranking.ranker import HybridRanker
from retrieval.item_index import ItemIndex
from retrieval.neighbours import item_neighbours
from retrieval.new_items import content_vectors, tfidf
from retrieval.sparse import SparseRows
from training.data.dataset import Dataset
from training.data.interactions import Interactions
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


# Where a bundle's candidates come from unless the recipe says otherwise. A first guess, not tuned: merged so,
# they find more than any source alone on Amazon Beauty and MovieLens-1M (benchmarks/results/README.md).
DEFAULT_SOURCES: list[dict[str, Any]] = [
    {"source": "sequence", "quota": 0.4},
    {"source": "embedding", "quota": 0.3},
    {"source": "neighbours", "quota": 0.2},
    {"source": "popular", "quota": 0.05},
    {"source": "fresh", "quota": 0.05},
]


class _State(nn.Module):
    """The half of a HybridRanker that reads a history."""

    def __init__(self, ranker: HybridRanker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, history: Tensor) -> Tensor:
        return self.ranker.states(history)[:, -1]


class _Scores(nn.Module):
    """The half that scores, with the items' fused vectors worked out: a request only looks them up."""

    def __init__(self, ranker: HybridRanker) -> None:
        super().__init__()
        self.register_buffer("table", ranker.item_vectors().detach().clone())

    def forward(self, state: Tensor, candidates: Tensor) -> Tensor:
        scores: Tensor = (self.table[candidates] @ state.unsqueeze(-1)).squeeze(-1)  # type: ignore[index]
        return scores


def export_ranker(ranker: HybridRanker, directory: Path) -> None:
    """Write a ranker into a directory: two ONNX graphs and an index over the vectors that it scores with.

    ranker_state.onnx takes history [B, T] to state [B, D]; ranker_scores.onnx takes state [B, D] and
    candidates [B or 1, C] to scores [B, C]. All axes but D are dynamic. A single row of candidates is scored
    for every state of the batch.
    """
    ranker = ranker.float().cpu().eval()
    batch = torch.export.Dim("batch")
    history = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        vectors = ranker.item_vectors().detach()
        _export_onnx(
            _State(ranker),
            {"history": history},
            "state",
            {"history": {0: batch, 1: torch.export.Dim("length")}},
            directory / RANKER_STATE,
            {"history_length": ranker.history_length, "num_items": ranker.num_items},
        )
        _export_onnx(
            _Scores(ranker),
            {"state": torch.zeros(2, vectors.shape[1]), "candidates": torch.ones(2, 4, dtype=torch.int64)},
            "scores",
            {"state": {0: batch}, "candidates": {0: batch, 1: torch.export.Dim("num_candidates")}},
            directory / RANKER_SCORES,
            {"num_items": ranker.num_items},
        )
    ItemIndex.build(vectors.numpy()).save(directory / RANKER_INDEX)


def _export_onnx(
    module: nn.Module,
    inputs: dict[str, Tensor],
    output: str,
    dynamic_shapes: dict[str, Any],
    path: Path,
    metadata: dict[str, int],
) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of every operator torchvision lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised by the exporter about itself
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # inputs share the batch axis
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.input:
        if node.name == "candidates":
            # The product broadcasts, so one row serves a whole batch; say so in the signature.
            node.type.tensor_type.shape.dim[0].dim_param = "batch_or_1"
    for key, value in metadata.items():
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
    pipeline: dict[str, Any],
    policy: list[dict[str, Any]],
    training: dict[str, Any],
    recipe: dict[str, Any],
    metrics: dict[str, Any],
) -> Path:
    """Write, verify and publish a bundle; return its directory.

    Args:
        root: the directory of bundles.
        dataset: the data set directory, for the catalog.
        data: its events, and a split whose `train` is what the model has learned from.
        vectors: item_vectors [I+1, D], user_vectors [U+1, D] and item_degrees [I+1] of stage one.
        ranker: of stage two; None where the data has no order to learn from.
        pipeline: the fields of training.train.PipelineOptions, but for the policy.
        policy: the rules, in order.
        training: the protocol ("strict" or "refit") and the epochs of each stage, for the record.
        recipe: the settings of the training run, for the record.
        metrics: validation metrics, for the record.

    Raises:
        ValueError: ONNX differs from torch, or FAISS from brute force. Nothing is published then.
    """
    items, train = dataset.items.collect(), data.split.train
    clock = int(train.timestamps.max(initial=0)) if data.info.time == "unix" else 0
    vectors = vectors | {
        "item_vectors": with_new_items(items, vectors["item_vectors"], vectors["item_degrees"], clock)
    }

    def fill(directory: Path) -> dict[str, Any]:
        popularity = pl.Series("popularity", vectors["item_degrees"][1:], pl.Int64)
        items.with_columns(popularity).write_parquet(directory / "catalog.parquet")
        _users_table(data).write_parquet(directory / "users.parquet")
        ItemIndex.build(vectors["item_vectors"]).save(directory / "item_index.faiss")
        save_file(vectors, directory / "embeddings.safetensors")
        edges = train.edges()
        neighbours = item_neighbours(
            edges.users, edges.items, train.num_users, train.num_items, pipeline["num_neighbours"]
        )
        window = pipeline.get("popular_window_days") if clock else None
        save_file(
            {
                "neighbour_offsets": neighbours.offsets,
                "neighbour_rows": neighbours.columns,
                "neighbour_weights": neighbours.values,
                "recent_popularity": recent_popularity(train, window),
            },
            directory / "sources.safetensors",
        )
        if ranker is not None:
            export_ranker(ranker, directory)
        info = asdict(data.info)
        kept = ("name", "fingerprint", "simulated", "time", "repeats", "num_users", "num_items", "num_events")
        return {
            "commit": _commit(),
            "data": {key: info[key] for key in kept} | {"split": data.split.name, "clock": clock},
            "ranker": {
                "kind": "none" if ranker is None else "ordered",
                "history_length": 0 if ranker is None else ranker.history_length,
            },
            "pipeline": pipeline,
            "policy": policy,
            "training": training,
            "recipe": recipe,
            "metrics": metrics,
            "shapes": {name: list(array.shape) for name, array in vectors.items()},
        }

    return write_bundle(root, fill, lambda bundle: verify_bundle(bundle, ranker, data))


def with_new_items(
    items: pl.DataFrame,
    item_vectors: NDArray[np.float32],
    item_degrees: NDArray[np.float32],
    clock: int,
) -> NDArray[np.float32]:
    """Return the item vectors [I+1, D], those of items without a training edge made from their content.

    The ranker is not trained on these: they are for search, for folding in and for likeness alone. An item
    that goes on sale after the clock gets none, so that search does not offer it.

    Args:
        items: the data set's items, in row order.
        item_vectors: [I+1, D] float32, of stage one.
        item_degrees: [I+1] float32.
        clock: time of the newest training event; 0 where the data has no times.
    """
    is_new = item_degrees == 0
    is_new[0] = False
    if clock and "available_from" in items.columns:
        is_new[1:] &= items["available_from"].fill_null(0).to_numpy() <= clock
    new = np.flatnonzero(is_new).astype(np.int32)
    completed = item_vectors.copy()
    completed[new] = content_vectors(item_vectors, item_degrees, content_features(items), new)
    return completed


def content_features(items: pl.DataFrame) -> SparseRows:
    """Return what each item is described by, as TF-IDF [I+1, F]: words of the title, category, brand, ..."""
    row = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("row")
    values = {
        "title": pl.col("title").str.to_lowercase().str.extract_all(r"\w+"),
        "category": pl.col("category"),
        "brand": pl.concat_list("brand"),
        "attributes": pl.col("attributes"),
    }
    described = [
        items.select(row, value.alias("value"))
        .explode("value")
        .drop_nulls()
        # The column is part of the feature: a brand is no word of a title.
        .select("row", pl.concat_str(pl.lit(f"{column} "), "value").alias("feature"))
        for column, value in values.items()
        if column in items.columns
    ]
    if not described:
        return tfidf(np.zeros(0, np.int32), np.zeros(0, np.int32), items.height, 0)
    features = pl.concat(described)
    codes = features["feature"].rank("dense").cast(pl.Int32).to_numpy() - 1
    return tfidf(features["row"].to_numpy(), codes, items.height, int(codes.max(initial=-1)) + 1)


def recent_popularity(train: Interactions, window_days: float | None) -> NDArray[np.int64]:
    """Return how many users touched each item in the last days of the training data, [I+1] int64.

    Args:
        train: the training events; with a window, at unix times in milliseconds.
        window_days: length of the window; None counts all of the training data.
    """
    if window_days is not None:
        train = train.take(train.timestamps > train.timestamps.max(initial=0) - window_days * DAY_MS)
    return train.item_counts()


def verify_bundle(bundle: Bundle, ranker: HybridRanker | None, data: SplitData) -> None:
    """Raise ValueError unless FAISS agrees with brute force, ONNX with torch, and the pipeline answers."""
    rng = np.random.default_rng(0)
    items = bundle.item_vectors
    noise = 0.01 * rng.standard_normal((32, items.shape[1]))
    queries = (items[rng.integers(1, len(items), 32)] + noise).astype(np.float32)
    _check_index("item_index.faiss", bundle.index, queries, items)

    pipeline = RecommendationPipeline(bundle)
    for visitor in (
        Visitor(EMPTY_HISTORY),
        Visitor(data.split.train.history(int(data.split.train.users[0]))),
    ):
        answer = pipeline.recommend(visitor, pipeline.default_limit)
        if answer.trace.degraded_stages or not len(answer.items):
            raise ValueError(f"the pipeline fails on this bundle, in {answer.trace.degraded_stages}")

    if ranker is None or bundle.scorer is None or bundle.ranker_index is None:
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
        scores, states = ranker(torch.from_numpy(history), torch.from_numpy(candidates))
        vectors = ranker.item_vectors().detach().numpy()
    _check_close("ONNX states differ from torch", bundle.scorer.user_states(history), states.numpy())
    _check_close("ONNX scores differ from torch", bundle.scorer.score(history, candidates), scores.numpy())
    _check_index(RANKER_INDEX, bundle.ranker_index, states.numpy(), vectors)


def _check_index(
    name: str, index: ItemIndex, queries: NDArray[np.float32], vectors: NDArray[np.float32]
) -> None:
    k = min(100, index.num_items)
    _, found = index.search(queries, k)
    expected = -np.sort(-(queries @ vectors[1:].T), axis=1)[:, :k]
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(f"{name}: FAISS differs from brute force by {np.abs(found - expected).max():.2e}")


def _check_close(what: str, found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    difference = np.abs(found - expected).max()
    if not difference <= MAX_SCORE_DIFFERENCE * max(1.0, np.abs(expected).max()):
        raise ValueError(f"{what} by {difference:.2e}")


def _users_table(data: SplitData) -> pl.DataFrame:
    """Every user's events, in user-row order, oldest first: what serving starts from.

    All of the log, test events too: nothing is learned from these, the evaluation asks with histories of its
    own, and a shop would not forget what was bought last.
    """
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
