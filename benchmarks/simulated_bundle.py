"""Bundles of any size without training: `python -m benchmarks.simulated_bundle --num_items 100000`.

What is simulated: the catalog, the users' histories, and what training would have learned. The bundle itself
is the real thing, written by training/export.py as `trirank train` writes it: the indexes are chosen and
tuned by their own rules, ONNX is checked against torch, FAISS against brute force.

Items cluster as trained ones do (benchmarks/index_frontier.py, made_items), in 2,000 clusters. The
ranker's vectors are the graph's, turned, with noise: they cluster alike. A leaf category is ten neighbouring
clusters; brands, sellers, prices, margins, dates of sale and stock are random: 3% are out of stock, 2% not on
sale any more. A user has one to four clusters, drawn by their size, and a history of 2 + lognormal events
(median 8, mean 12, at most 300), each an item of one of these clusters, drawn by popularity. An item without
an event counts as trained on one, or its vector would be replaced by one made of its content.

The ranker is a HybridRanker with a SASRec of one block. Its weights are those of its start, but for the item
vectors and an attention that adds the mean of the history to its last item, so that states lie among the
items as trained ones do. It costs what a trained one costs, and what it recommends means nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from benchmarks.index_frontier import DIM, made_items
from engine.arguments import ArgumentParser
from engine.bundle import BUNDLE_FORMAT, BundleError, resolve_bundle
from engine.history import EVENT_CODE
from ranking.context import ContextKey, ContextTable
from ranking.encoders.sasrec import SASRec
from ranking.ranker import HybridRanker
from training.data.dataset import Dataset, DatasetInfo
from training.data.interactions import EventLog, Interactions
from training.data.splits import SplitData, final_split, make_split
from training.export import export_bundle
from training.train import PipelineOptions, add_graph_scores

DAY_MS = 86_400_000
NOW_MS = 1_700_000_000_000  # the end of the log
DAYS = 365
HISTORY_LENGTH = 50  # events that the ranker reads
CLUSTERS_A_LEAF, LEAVES_A_DEPARTMENT = 10, 10
EVENT_SHARES = {"view": 0.75, "cart": 0.1, "purchase": 0.15}


@dataclass(frozen=True, kw_only=True)
class SimulatedShop:
    """How large a simulated bundle is.

    Attributes:
        num_items: items of the catalog.
        num_candidates: that a request ranks; the indexes are tuned to find so many.
        num_users: with a history; None: twice the items, at most 200,000.
        dim: of the vectors of both stages.
        seed: of everything random.
    """

    num_items: int = 100_000
    num_candidates: int = 10_000
    num_users: int | None = None
    dim: int = DIM
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_items", "num_candidates", "num_users", "dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")

    @property
    def name(self) -> str:
        """Of its directory of bundles: equal names hold equal shops, served alike."""
        users = self.num_users or min(2 * self.num_items, 200_000)
        settings = json.dumps(asdict(self.pipeline), sort_keys=True).encode()
        return (
            f"{self.num_items}-items-{self.num_candidates}-candidates-{users}-users-{self.dim}-dim-"
            f"seed-{self.seed}-format-{BUNDLE_FORMAT}-{hashlib.sha256(settings).hexdigest()[:6]}"
        )

    @property
    def pipeline(self) -> PipelineOptions:
        """How it is served: as `trirank train` would have it, with all that may count in the scores."""
        return PipelineOptions(num_candidates=self.num_candidates, graph_weight=0.1, transition_weight=1.0)


def simulated_bundle(root: Path, shop: SimulatedShop) -> Path:
    """Return the bundle of a shop below `root`, made where it is not there yet.

    A million items take about 3 minutes of one core and 6 GB.
    """
    directory = root / shop.name
    try:
        return resolve_bundle(directory)
    except BundleError:
        _say(f"making a bundle of {shop.num_items:,} items for {shop.num_candidates:,} candidates")
    rng = np.random.default_rng(shop.seed)
    vectors, cluster, popularity = made_items(shop.num_items, rng, shop.dim)
    num_users = shop.num_users or min(2 * shop.num_items, 200_000)
    data = simulated_events(num_users, cluster, popularity, rng)
    degrees = np.maximum(data.split.train.item_counts(), 1)
    degrees[0] = 0
    learned = {
        "item_vectors": _with_padding(vectors),
        "user_vectors": np.zeros((num_users + 1, shop.dim), np.float32),  # which serving does not search with
        "item_degrees": degrees.astype(np.float32),
    }
    pipeline = asdict(shop.pipeline)
    ranker = simulated_ranker(learned, rng)
    add_graph_scores(ranker, learned, pipeline["graph_weight"], pipeline["half_life_events"])
    policies = pipeline.pop("policies")
    with tempfile.TemporaryDirectory() as folder:
        simulated_items(cluster, rng).write_parquet(Path(folder) / "items.parquet")
        return export_bundle(
            directory,
            Dataset(Path(folder), data.info),
            data,
            learned,
            ranker,
            pipeline=copy.deepcopy(pipeline),
            policies=policies,
            training={"protocol": "simulated", "epochs": {}, "content": "none"},
            recipe={"simulated": asdict(shop)},
            metrics={},
        )


def simulated_items(cluster: NDArray[np.int64], rng: np.random.Generator) -> pl.DataFrame:
    """Return a catalog of items of these clusters [I], in columns of training.data.dataset.ITEM_SCHEMA."""
    num_items = len(cluster)
    leaf = cluster // CLUSTERS_A_LEAF
    department = leaf // LEAVES_A_DEPARTMENT
    brand = _zipf(rng, 1_000, num_items)
    texts = {
        "item_id": pl.format("item-{}", "row"),
        "title": pl.format("Brand {} model {} of leaf {}", "brand", pl.col("row") % 997, "leaf"),
        "category": pl.concat_list(pl.format("department {}", "department"), pl.format("leaf {}", "leaf")),
        "brand": pl.format("brand {}", "brand"),
        "seller_id": pl.format("seller {}", "seller"),
    }
    is_over = rng.random(num_items) < 0.02
    stock = np.where(rng.random(num_items) < 0.03, 0, rng.integers(1, 200, num_items))
    age = rng.integers(1, 3 * DAYS, num_items)
    table = pl.DataFrame(
        {
            "row": np.arange(1, num_items + 1),
            "leaf": leaf,
            "department": department,
            "brand": brand,
            "seller": _zipf(rng, 300, num_items),
            "price": np.round(rng.lognormal(3, 1, num_items), 2) + 0.5,
            "margin": np.round(rng.beta(4, 8, num_items), 3),
            "available_from": NOW_MS - age * DAY_MS,
            "available_until": np.where(is_over, NOW_MS - DAY_MS, 0),
            "stock": stock,
        }
    )
    numbers = ("price", "margin", "available_from", "available_until", "stock")
    return table.select(*(text.alias(name) for name, text in texts.items()), *numbers)


def simulated_events(
    num_users: int, cluster: NDArray[np.int64], popularity: NDArray[np.float64], rng: np.random.Generator
) -> SplitData:
    """Return the histories of users, refit as `trirank train` leaves them: all but the test event learned."""
    num_items = len(cluster)
    lengths = np.minimum(2 + rng.lognormal(np.log(6), 1.0, num_users).astype(np.int64), 300)
    users = np.repeat(np.arange(1, num_users + 1), lengths)
    num_events = len(users)

    # Items in the order of their clusters: a draw within a cluster is a number within its part of the sums.
    order = np.argsort(cluster, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(popularity[order])])
    begins = np.searchsorted(cluster[order], np.arange(cluster.max() + 2))
    liked = cluster[rng.integers(0, num_items, (num_users + 1, 4))]  # by their size
    liked[:, 1:] = np.where(rng.random((num_users + 1, 3)) < 0.6, liked[:, 1:], liked[:, :1])
    wanted = liked[users, rng.integers(0, 4, num_events)]
    low, high = sums[begins[wanted]], sums[begins[wanted + 1]]
    place = np.searchsorted(sums, low + rng.random(num_events) * (high - low), side="right") - 1
    items = order[np.clip(place, begins[wanted], begins[wanted + 1] - 1)] + 1

    times = NOW_MS - rng.integers(0, DAYS * DAY_MS, num_events)
    by_time = np.lexsort((times, users))
    codes = np.array([EVENT_CODE[name] for name in EVENT_SHARES], np.uint8)
    events = Interactions(
        users.astype(np.int32),
        items[by_time].astype(np.int32),
        rng.choice(codes, num_events, p=list(EVENT_SHARES.values())),
        times[by_time],
        num_users=num_users,
        num_items=num_items,
    )
    log = EventLog(
        events,
        [f"user-{number}" for number in range(1, num_users + 1)],
        [f"item-{number}" for number in range(1, num_items + 1)],
        None,
    )
    info = DatasetInfo(
        name=f"simulated-{num_items}",
        source={"format": "simulated"},
        time="unix",
        simulated=True,
        num_users=num_users,
        num_items=num_items,
        num_events=num_events,
    )
    data = SplitData(info, log, make_split(log))
    return dataclasses.replace(data, split=final_split(data))


def simulated_ranker(learned: dict[str, NDArray[np.float32]], rng: np.random.Generator) -> HybridRanker:
    """Return a ranker over the graph's vectors and degrees, with item vectors that cluster as they do."""
    num_rows, dim = learned["item_vectors"].shape
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = SASRec(HISTORY_LENGTH + 1, dim=dim)
        ranker = HybridRanker(
            encoder,
            graph_vectors=torch.from_numpy(learned["item_vectors"]),
            item_degrees=torch.from_numpy(learned["item_degrees"]),
            context=ContextTable(
                (
                    ContextKey(name="hour", kind="clock", values=tuple(map(str, range(24)))),
                    ContextKey(name="weekday", kind="clock", values=tuple(map(str, range(7)))),
                )
            ),
        )
        # The graph's vectors, turned: near items stay near, and no inner product is the same.
        turn, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
        turned = learned["item_vectors"][1:] @ turn.astype(np.float32)
        noise = 0.1 * rng.standard_normal((num_rows - 1, dim), dtype=np.float32)
        ranker.embedding.weight[1:-1] = torch.from_numpy(turned + noise)
        assert ranker.item_projection is not None
        ranker.item_projection.weight *= 0.1
        encoder.position.weight *= 0.1
        weights = encoder.blocks[0].state_dict()  # the tensors themselves
        weights["query_key_value.weight"][2 * dim :] = torch.eye(dim)
        weights["attention_out.weight"].copy_(0.5 * dim**-0.5 * torch.eye(dim))
        weights["feed_forward.2.weight"].mul_(0.1)
        for layer in ("query_key_value", "attention_out", "feed_forward.2"):
            weights[f"{layer}.bias"].zero_()
    return ranker.eval()


def _zipf(rng: np.random.Generator, num_values: int, size: int) -> NDArray[np.int64]:
    shares = 1 / np.arange(1, num_values + 1)
    return rng.choice(num_values, size, p=shares / shares.sum())


def _with_padding(items: NDArray[Any]) -> NDArray[np.float32]:
    return np.concatenate([np.zeros((1, items.shape[1])), items]).astype(np.float32)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Make a bundle, or find the one made before; its directory on stdout."""
    parser = ArgumentParser(prog="python -m benchmarks.simulated_bundle", description=__doc__)
    parser.add_argument(
        "--bundles", type=Path, default=Path("data/simulated"), help="Where bundles are kept."
    )
    parser.add_class_arguments(SimulatedShop)
    options = parser.parse_args(argv)
    fields = {field.name: options[field.name] for field in dataclasses.fields(SimulatedShop)}
    try:
        print(simulated_bundle(options.bundles, SimulatedShop(**fields)))
    except (ValueError, OSError) as error:
        print(f"benchmarks.simulated_bundle: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
