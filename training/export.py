"""Export: the trained parts become one bundle, checked against each other before it is published."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Sequence
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

from engine.bundle import (
    ITEM_INDEX,
    RANKER_INDEX,
    RANKER_SCORES,
    RANKER_STATE,
    RANKER_WEIGHTS,
    TRANSITIONS,
    Bundle,
    write_bundle,
    write_users,
)
from engine.history import EMPTY_HISTORY, USERS_SCHEMA, History, left_padded
from engine.pipeline import DAY_MS, RecommendationPipeline, Visitor, weights_by_settings
from ranking.onnx_scorer import write_models
from ranking.ranker import HybridRanker
from retrieval.fold_in import fold_in
from retrieval.item_index import DEFAULT_K, EXACT_KINDS, TUNING_QUERIES, IndexOptions, ItemIndex
from retrieval.neighbours import item_neighbours
from retrieval.new_items import like_items
from training.answers import history_queries, queries_of_all_heads
from training.commit import source_commit
from training.compression import compression
from training.content import content_embedding, content_features
from training.data.dataset import Dataset
from training.data.interactions import Interactions
from training.data.splits import SplitData
from training.new_items import give_new_items_vectors, new_items, with_new_items
from training.quantization import MAX_SCORE_DIFFERENCE, Precision, quantize
from training.transitions import training_transitions

OPSET = 20
LEAST_K = 100  # that an index is tuned to where it only gives a share: alone it still fills a slate
NUM_CHECKED = 64  # histories that the published index is checked with
NUM_COMPRESSED = 5000  # histories after which compressed scores are to be what they were
NUM_EXAMPLES = 3 * TUNING_QUERIES  # histories that an index is tuned on, and a third that tells its recall
MAX_PRODUCT_DIFFERENCE = 1e-4  # FAISS against NumPy, relative to the largest product where that is over 1

# What a bundle serves with unless the recipe says otherwise, in the form of a policies file. On validation it
# costs 1.0% of NDCG@10 on Amazon Beauty and gives 4.2% more intra-list diversity
# (benchmarks/results/README.md).
DEFAULT_POLICIES: dict[str, Any] = {
    "default": "standard",
    "policies": {
        "standard": {
            "rules": [
                {"rule": "in_stock"},
                {"rule": "available"},
                {"rule": "max_sum", "relevance_weight": 0.985},
                {"rule": "cap", "field": "seller_id", "max_items": 8, "window": 10},
                {"rule": "cap", "field": "category", "max_items": 8, "window": 10},
                {"rule": "drop_seen"},
            ],
            "overrides": {"max_sum.relevance_weight": {"min": 0.9, "max": 1}},
        }
    },
}

# Where a bundle's candidates come from unless the recipe says otherwise: chosen on the validation splits of
# Amazon Beauty and Toys (benchmarks/results/README.md). The ranker's own search finds most of what it ranks
# high; the others find what it has not learned, the embedding nothing that they have not. A share that a
# source cannot give goes to those before it.
DEFAULT_SOURCES: list[dict[str, Any]] = [
    {"source": "sequence", "quota": 0.8},
    {"source": "transitions", "quota": 0.05},
    {"source": "embedding", "quota": 0.0},  # in place of sequence, where there is no ranker or it fails
    {"source": "neighbours", "quota": 0.05},
    {"source": "popular", "quota": 0.05},
    {"source": "fresh", "quota": 0.05},
]


class _State(nn.Module):
    """The half of a HybridRanker that reads a history, with the items' vectors worked out.

    Inputs behind the history: context_rows and context_weights where the ranker has a context, then
    head_weights where it has heads.
    """

    def __init__(self, ranker: HybridRanker) -> None:
        super().__init__()
        self.ranker = ranker
        self.register_buffer("table", ranker.all_vectors().detach().clone())

    def forward(self, history: Tensor, *more: Tensor) -> Tensor:
        rows, weights, heads = None, None, None
        if len(self.ranker.context):
            rows, weights, *more = more  # type: ignore[assignment]
        if more:
            heads = more[0]
        return self.ranker.query(history, rows, weights, heads, self.table)  # type: ignore[arg-type]


class _Scores(nn.Module):
    """The half that scores, with the items' fused vectors worked out: a request only looks them up."""

    def __init__(self, ranker: HybridRanker) -> None:
        super().__init__()
        self.register_buffer("table", ranker.item_vectors().detach().clone())

    def forward(self, state: Tensor, candidates: Tensor) -> Tensor:
        scores: Tensor = (self.table[candidates] @ state.unsqueeze(-1)).squeeze(-1)  # type: ignore[index]
        return scores


def index_options(pipeline: dict[str, Any], source: str, *, has_ranker: bool) -> IndexOptions:
    """Return the options of the index that a candidate source searches.

    Without a k of its own it is tuned to what the source is asked for while all of them work (see
    RecommendationPipeline._find): the first one for all candidates, another for its share, but
    LEAST_K at least, and one without a share, which stands in for others, for all.

    Args:
        pipeline: the recipe's settings.
        source: "sequence" or "embedding".
        has_ranker: without one there is no "sequence".
    """
    settings = pipeline.get("index", {})
    quotas = {entry["source"]: entry["quota"] for entry in pipeline["sources"]}
    if not has_ranker:
        quotas.pop("sequence", None)
    k = pipeline["num_candidates"]
    if quotas.get(source) and source != next(iter(quotas)):
        k = min(k, max(LEAST_K, math.ceil(k * quotas[source])))
    return IndexOptions(**settings | {"k": settings.get("k") or k})


@torch.no_grad()
def compress(ranker: HybridRanker, histories: Sequence[NDArray[np.int32]]) -> None:
    """Let a ranker's scores, the graph's own among them, be products of D numbers, as they are without these.

    A request searches and ranks as fast as without, for one more table.

    Args:
        ranker: on the CPU and in evaluation mode; without the graph's own scores it stays as it is.
        histories: examples of what will be asked with, item rows oldest first.
    """
    if ranker.graph_scores is None:
        return
    queries = queries_of_all_heads(ranker, histories)
    found = compression(queries, ranker.item_parts()[1:].numpy(), ranker.embedding.embedding_dim)
    ranker.compress(*map(torch.from_numpy, found))


def export_ranker(
    ranker: HybridRanker,
    directory: Path,
    options: IndexOptions | None = None,
    histories: Sequence[NDArray[np.int32]] = (),
    precision: Precision = "float32",
) -> dict[str, Any]:
    """Write a ranker into a directory: two ONNX graphs, their tables, and an index over the vectors
    that it scores with.

    ranker_state.onnx takes history [B, T], and where the ranker has them context_rows and context_weights
    [B, K] and head_weights [B, heads], to state [B, Q]; ranker_scores.onnx takes state [B, Q] and candidates
    [B or 1, C] to scores [B, C]. B, T and C are dynamic; Q is that of HybridRanker.query. A single row of
    candidates is scored for every state of the batch.

    Args:
        ranker: on any device; it is left on the CPU, in float32 and in evaluation mode.
        directory: gets the four files.
        options: of the index.
        histories: examples, item rows oldest first, to tune the index on.
        precision: of the two graphs (training/quantization.py).

    Returns:
        What the index is (see write_index).
    """
    ranker = ranker.float().cpu().eval()
    batch = torch.export.Dim("batch")
    history = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        vectors = ranker.item_vectors().detach()
        inputs = {"history": history}
        shapes: dict[str, Any] = {"history": {0: batch, 1: torch.export.Dim("length")}}
        metadata: dict[str, Any] = {"history_length": ranker.history_length, "num_items": ranker.num_items}
        if len(ranker.context):
            rows, weights = ranker.context.unknown(2)
            inputs |= {"context_rows": torch.from_numpy(rows), "context_weights": torch.from_numpy(weights)}
            metadata["context"] = ranker.context.to_json()
        if ranker.heads:
            inputs["head_weights"] = torch.ones(2, len(ranker.heads))
            metadata["heads"] = json.dumps(ranker.heads)
        if len(inputs) > 1:
            shapes["more"] = tuple({0: batch} for _ in range(len(inputs) - 1))
        state = _onnx(_State(ranker), inputs, "state", shapes, metadata)
        scores = _onnx(
            _Scores(ranker),
            {"state": torch.zeros(2, vectors.shape[1]), "candidates": torch.ones(2, 4, dtype=torch.int64)},
            "scores",
            {"state": {0: batch}, "candidates": {0: batch, 1: torch.export.Dim("num_candidates")}},
            {"num_items": ranker.num_items},
        )
        for model in (state, scores):
            quantize(model, precision)
        write_models(
            directory / RANKER_STATE,
            directory / RANKER_SCORES,
            directory / RANKER_WEIGHTS,
            (state, scores),
        )
        states = history_queries(ranker, histories)
    return write_index(directory / RANKER_INDEX, vectors.numpy(), options or IndexOptions(), states)


def write_index(
    path: Path, vectors: NDArray[np.float32], options: IndexOptions, queries: NDArray[np.float32]
) -> dict[str, Any]:
    """Write an index over vectors [I+1, D] and return its kind, its setting and what it finds of the best k.

    Of the queries [Q, D], the first ones tune it and those behind tell the recall. None of either, and the
    item vectors stand in for them.
    """
    if not len(queries):
        queries = np.random.default_rng(0).permutation(vectors[1:])[:NUM_EXAMPLES]
    index = ItemIndex.build(
        vectors, options, queries=queries[: 2 * TUNING_QUERIES] if len(queries) else None,
        num_threads=torch.get_num_threads(),
    )  # fmt: skip
    index.save(path)
    told: dict[str, Any] = {"kind": index.kind, "setting": index.setting}
    if index.kind not in EXACT_KINDS:
        held_out = queries[2 * TUNING_QUERIES :]
        recall = index.recall(held_out if len(held_out) else queries, options.k or DEFAULT_K)
        told |= {"k": options.k or DEFAULT_K, "recall": round(recall, 5)}
    return told


def example_histories(train: Interactions, num_histories: int, seed: int) -> list[History]:
    """Return the training events of some users, drawn at random from those who have any."""
    users = np.unique(train.users)
    rng = np.random.default_rng(seed)
    return [train.history(int(user)) for user in rng.permutation(users)[:num_histories]]


def compressed_for(train: Interactions) -> list[NDArray[np.int32]]:
    """Return the histories after which an export's scores are to be what they were before compression."""
    return [history.wanted for history in example_histories(train, NUM_COMPRESSED, seed=0)]


def folded_in(
    vectors: dict[str, NDArray[np.float32]],
    histories: Sequence[History],
    pipeline: dict[str, Any],
    time_kind: str,
) -> NDArray[np.float32]:
    """Return what the pipeline searches the graph vectors with after these histories: [Q, D]."""
    folded = [
        fold_in(
            vectors["item_vectors"],
            vectors["item_degrees"],
            history.wanted,
            weights_by_settings(pipeline, time_kind, history),
        )
        for history in histories
    ]
    found = np.array(folded, np.float32).reshape(-1, vectors["item_vectors"].shape[1])
    return found[found.any(axis=1)]  # the pipeline does not search with nothing


def _onnx(
    module: nn.Module,
    inputs: dict[str, Tensor],
    output: str,
    dynamic_shapes: dict[str, Any],
    metadata: dict[str, Any],
) -> onnx.ModelProto:
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
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.input:
        if node.name == "candidates":
            # The product broadcasts, so one row serves a whole batch; say so in the signature.
            node.type.tensor_type.shape.dim[0].dim_param = "batch_or_1"
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, str(value)
    return model


def export_bundle(
    root: Path,
    dataset: Dataset,
    data: SplitData,
    vectors: dict[str, NDArray[np.float32]],
    ranker: HybridRanker | None,
    *,
    pipeline: dict[str, Any],
    policies: dict[str, Any],
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
        ranker: of stage two; it is left on the CPU, in float32 and in evaluation mode, with vectors of new
            items (training/new_items.py). None where the data has no order to learn from.
        pipeline: the fields of training.train.PipelineOptions, but for the policies.
        policies: what a file of policies holds (reranking/policy.py).
        training: the protocol ("strict" or "refit") and the epochs of each stage, for the record.
        recipe: the settings of the training run, for the record.
        metrics: validation metrics, for the record.

    Raises:
        ValueError: ONNX differs from torch, or FAISS from brute force. Nothing is published then.
    """
    items, train = dataset.items.collect(), data.split.train
    clock = int(train.timestamps.max(initial=0)) if data.info.time == "unix" else 0
    features, degrees = content_features(items), vectors["item_degrees"]
    new = new_items(items, degrees, clock)
    like = like_items(degrees, features, new)
    vectors = vectors | {
        "item_vectors": with_new_items(vectors["item_vectors"], degrees, new, like),
        "content_vectors": content_embedding(features),
    }
    if ranker is not None:
        ranker.float().cpu().eval()
        compress(ranker, compressed_for(train))
        give_new_items_vectors(ranker, degrees, new, like)
    of_graph, of_ranker = (
        index_options(pipeline, source, has_ranker=ranker is not None) for source in ("embedding", "sequence")
    )

    def fill(directory: Path) -> dict[str, Any]:
        popularity = pl.Series("popularity", vectors["item_degrees"][1:], pl.Int64)
        histories = example_histories(train, NUM_EXAMPLES, seed=0)
        known = items.drop(
            "description", strict=False
        )  # what the content vectors were made from, and no more
        known.with_columns(popularity).write_parquet(directory / "catalog.parquet")
        write_users(_users_table(data), directory)
        queries = folded_in(vectors, histories, pipeline, data.info.time)
        indexes = {
            ITEM_INDEX: write_index(directory / ITEM_INDEX, vectors["item_vectors"], of_graph, queries)
        }
        save_file(vectors, directory / "embeddings.safetensors")
        edges = train.edges
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
            transitions = training_transitions(train, pipeline["num_neighbours"], data.split.repeats)
            save_file(
                {
                    "transition_offsets": transitions.after.offsets,
                    "transition_rows": transitions.after.columns,
                    "transition_weights": transitions.after.values,
                    "return_rate": np.array([transitions.return_rate], np.float32),
                },
                directory / TRANSITIONS,
            )
            items_of = [history.wanted for history in histories]
            precision = pipeline.get("ranker_precision", "float32")
            indexes[RANKER_INDEX] = export_ranker(ranker, directory, of_ranker, items_of, precision)
        info = asdict(data.info)
        kept = ("name", "fingerprint", "simulated", "time", "repeats", "num_users", "num_items", "num_events")
        return {
            "commit": source_commit(),
            "data": {key: info[key] for key in kept} | {"split": data.split.name, "clock": clock},
            "ranker": {
                "kind": "none" if ranker is None else "ordered",
                "history_length": 0 if ranker is None else ranker.history_length,
                "context": [] if ranker is None else list(ranker.context.names),
                "heads": [] if ranker is None else list(ranker.heads),
            },
            "pipeline": pipeline,
            "indexes": indexes,
            "policies": policies,
            "training": training,
            "recipe": recipe,
            "metrics": metrics,
            "shapes": {name: list(array.shape) for name, array in vectors.items()},
        }

    return write_bundle(root, fill, lambda bundle: verify_bundle(bundle, ranker, data))


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
    items, settings = bundle.item_vectors, bundle.manifest["pipeline"]
    of_graph, of_ranker = (
        index_options(settings, source, has_ranker=ranker is not None) for source in ("embedding", "sequence")
    )
    histories = example_histories(data.split.train, NUM_CHECKED, seed=1)
    vectors = {"item_vectors": items, "item_degrees": bundle.item_degrees}
    queries = folded_in(vectors, histories, settings, data.info.time)
    noise = 0.01 * rng.standard_normal((32, items.shape[1]))
    near_items = (items[rng.integers(1, len(items), 32)] + noise).astype(np.float32)
    _check_index(ITEM_INDEX, bundle.index, queries if len(queries) else near_items, items, of_graph)

    pipeline = RecommendationPipeline(bundle)
    for visitor in (
        Visitor(EMPTY_HISTORY),
        Visitor(data.split.train.history(int(data.split.train.users[0]))),
    ):
        answer = pipeline.recommend(visitor, pipeline.default_limit)
        if answer.trace.degraded_stages:
            failed = ", ".join(answer.trace.degraded_stages)
            raise ValueError(f"the pipeline fails on this bundle, in {failed}")
        if not len(answer.items):
            raise ValueError(
                "the bundle recommends nothing: the hard filters of the default policy let no item through, "
                "such as in_stock where no item has stock; mend the items, or give other pipeline.policies "
                "with --resume, which trains nothing again"
            )

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
    table = ranker.context
    context = table.unknown(len(history))
    for place, (key, default) in enumerate(zip(table.keys, table.defaults, strict=True)):
        context.rows[:, place] = default + rng.integers(0, key.num_rows, len(history))
        context.weights[:, place] = rng.uniform(0.5, 1.5, len(history))
    # Without heads there is nothing to weigh.
    weights = (
        rng.uniform(0, 1, (len(history), len(ranker.heads))).astype(np.float32) if ranker.heads else None
    )
    tensors = map(torch.from_numpy, (history, candidates, *context, *([weights] if ranker.heads else [])))
    with torch.no_grad():
        scores, states = ranker(*tensors)
        fused = ranker.item_vectors().detach().numpy()
    slack = MAX_SCORE_DIFFERENCE[settings.get("ranker_precision", "float32")]
    found_states = bundle.scorer.user_states(history, context, weights)
    _check_close("ONNX states differ from torch", found_states, states.numpy(), slack)
    found = bundle.scorer.score(history, candidates, context, weights)
    _check_close("ONNX scores differ from torch", found, scores.numpy(), slack)
    asked = bundle.scorer.user_states(left_padded([history.wanted for history in histories], longest))
    _check_index(RANKER_INDEX, bundle.ranker_index, asked, fused, of_ranker)


def _check_index(
    name: str,
    index: ItemIndex,
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    options: IndexOptions,
) -> None:
    """Raise ValueError unless scores are the products, and what brute force finds best is found.

    Of an approximate kind, recall_target of it. So few queries scatter: their mean recall may fall short by
    two standard errors.
    """
    k = min(options.k or DEFAULT_K, index.num_items)
    recalls = []
    for query in queries:
        products = vectors[1:] @ query
        slack = MAX_PRODUCT_DIFFERENCE * max(1.0, float(np.abs(products).max()))
        rows, scores = (found[0] for found in index.search(query[np.newaxis], k))
        difference = np.abs(scores - products[rows - 1]).max()
        if not difference <= slack:
            raise ValueError(f"{name}: scores of {index.kind} differ from brute force by {difference:.2e}")
        recalls.append(len(np.unique(rows[scores >= np.partition(products, -k)[-k] - slack])) / k)
    exact = index.kind in EXACT_KINDS
    target = 1.0 if exact else options.recall_target
    recall, scatter = float(np.mean(recalls)), float(np.std(recalls) / len(recalls) ** 0.5)
    if recall + (0 if exact else 2 * scatter) < target:
        raise ValueError(
            f"{name}: {index.kind} finds {recall:.4f} of the best {k}; expected {target:g}"
            + ("" if exact else " (pipeline.index.recall_target); pipeline.index.kind exact finds all")
        )


def _check_close(what: str, found: NDArray[np.float32], expected: NDArray[np.float32], slack: float) -> None:
    difference = np.abs(found - expected).max()
    if not difference <= (allowed := slack * max(1.0, float(np.abs(expected).max()))):
        raise ValueError(f"{what} by {difference:.2e}; expected at most {allowed:.2e}")


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
