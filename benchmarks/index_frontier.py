"""How fast each kind of index is, and what it finds: `python -m benchmarks.index_frontier`.

Every row is one kind at one catalog size, k and number of threads: build seconds, bytes of its file, p50 and
p99 of one query at a time, recall against exact search, and how many times faster it is than FAISS's
IndexFlatIP, which takes turns with it on as many threads. Nothing was tuned on the queries that are timed.

The whole table takes some 6 minutes of two quiet cores, half of them for hnsw; a part:
--sizes '[1000000]' --ks '[10000]' --kinds '["exact","ivf"]' (1 minute).

The vectors are made to cluster as trained ones do, or are those of a bundle (--vectors).

Made: items in 2,000 clusters whose sizes fall as 1 / rank^0.8. The clusters' means lie in 16 of the 64
dimensions, with a spread that falls from 1 to 0.2; around its mean an item spreads by 0.35 within these and
by 0.15 in all dimensions. Directions have length 1, and an item's length grows with its popularity, as
(1 + Pareto 2.5)^0.35. Queries are such items with noise of 0.3 times the mean size of a coordinate.

Trained: items of the file, drawn with replacement, each with noise of 0.3 times its own length. Queries are
the file's user vectors.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from engine.arguments import ArgumentParser
from retrieval.item_index import TUNING_QUERIES, IndexOptions, ItemIndex

DIM = 64
NOISE = 0.3
QUERIES_TO_TUNE = 2 * TUNING_QUERIES
# HNSW takes about 10 minutes of two cores to build for a million items, and longer to tune for a k of 10,000.
LARGEST_HNSW, LARGEST_HNSW_K = 100_000, 1_000

FloatArray = NDArray[np.float32]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, and all figures as JSON with --json FILE."""
    parser = ArgumentParser(prog="python -m benchmarks.index_frontier", description=__doc__)
    parser.add_argument("--sizes", type=list[int], default=[10_000, 100_000, 1_000_000], help="Items.")
    parser.add_argument("--ks", type=list[int], default=[100, 1_000, 10_000], help="Items asked for.")
    parser.add_argument("--threads", type=list[int], default=[1, 2], help="Threads of a search.")
    parser.add_argument("--kinds", type=list[str], default=["exact", "flat", "ivf", "hnsw", "sq8"])
    parser.add_argument("--queries", type=int, default=100, help="Timed queries of each row, all different.")
    parser.add_argument(
        "--recall_target", type=float, default=0.99, help="What ivf, hnsw and sq8 are tuned to."
    )
    parser.add_argument("--vectors", type=Path, help="A bundle's embeddings.safetensors.")
    parser.add_argument(
        "--hnsw_any_size",
        action="store_true",
        help=f"HNSW above {LARGEST_HNSW:,} items and k = {LARGEST_HNSW_K:,} too.",
    )
    parser.add_argument("--build_threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="Write every figure to this file.")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for num_items in options.sizes:
        rng = np.random.default_rng(options.seed)
        num_queries = QUERIES_TO_TUNE + options.queries
        try:
            items, queries = (
                trained_vectors(options.vectors, num_items, num_queries, rng)
                if options.vectors
                else made_vectors(num_items, num_queries, rng)
            )
            rows += measure(items, queries, options)
        except (ValueError, OSError) as error:
            print(f"benchmarks.index_frontier: {error}", file=sys.stderr)
            return 2
    result = {
        "machine": f"{_processor()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {"faiss": faiss.__version__, "numpy": np.__version__},
        "vectors": str(options.vectors) if options.vectors else "made",
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)
    return 0


def measure(items: FloatArray, queries: FloatArray, options: Any) -> list[dict[str, Any]]:
    """Return a row for each kind, setting, k and number of threads, on one catalog."""
    num_items = len(items) - 1
    tuning, asked = queries[:QUERIES_TO_TUNE], queries[QUERIES_TO_TUNE:]
    reference = faiss.IndexFlatIP(items.shape[1])
    reference.add(items[1:])
    rows = []
    for kind in options.kinds:
        ks = [k for k in options.ks if k <= num_items // 2]
        if kind == "hnsw" and not options.hnsw_any_size:
            ks = [k for k in ks if k <= LARGEST_HNSW_K and num_items <= LARGEST_HNSW]
        if not ks:
            continue
        _say(f"{num_items:,} items: building {kind}")
        wanted = IndexOptions(kind=kind, k=ks[0], recall_target=options.recall_target)
        begin = time.perf_counter()
        built = ItemIndex.build(items, wanted, queries=tuning, num_threads=options.build_threads)
        build_s = time.perf_counter() - begin
        for k in ks:
            if k != ks[0]:  # which build tunes to
                built.tune(tuning, k=k, recall_target=options.recall_target)
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "item_index.faiss"
                built.save(path)
                plain = kind if kind in ("exact", "flat") else None
                for threads in options.threads:
                    index = ItemIndex.load(path, num_threads=threads, kind=plain)
                    rows.append(
                        {"items": num_items, "k": k, "threads": threads, "kind": kind}
                        | {"setting": index.setting, "build_s": build_s, "bytes": path.stat().st_size}
                        | time_queries(index, reference, asked, k, threads)
                    )
    return rows


def time_queries(
    index: ItemIndex, reference: Any, queries: FloatArray, k: int, threads: int
) -> dict[str, float]:
    """Return latency and recall of one query at a time; IndexFlatIP takes its turn after each ten."""
    _say(f"  {index.kind} {index.setting}, k = {k:,}, {threads} threads")
    ours, flat, found = [], [], []
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    index.search(queries[:1], k)
    reference.search(queries[:1], k)
    for start in range(0, len(queries), 10):
        block = [query[np.newaxis] for query in queries[start : start + 10]]
        for query in block:
            begin = time.perf_counter()
            rows, _ = index.search(query, k)
            ours.append((time.perf_counter() - begin) * 1e3)
            found.append(rows[0])
        for number, query in enumerate(block, start):
            begin = time.perf_counter()
            _, true = reference.search(query, k)
            flat.append((time.perf_counter() - begin) * 1e3)
            found[number] = np.isin(found[number], true[0] + 1)
    faiss.omp_set_num_threads(before)
    p50, flat_p50 = float(np.median(ours)), float(np.median(flat))
    return {
        "p50_ms": p50,
        "p99_ms": float(np.percentile(ours, 99)),
        "flat_p50_ms": flat_p50,
        "flat_p99_ms": float(np.percentile(flat, 99)),
        "speedup": flat_p50 / p50,
        "recall": float(np.mean(found)),
    }


def made_vectors(num_items: int, num_queries: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Return items [I+1, 64] and queries [Q, 64] as the module's docstring says."""
    items, _, _ = made_items(num_items, rng)
    queries = items[rng.integers(0, num_items, num_queries)]
    queries = queries + NOISE * np.abs(items).mean() * rng.standard_normal(queries.shape)
    return _with_padding(items), queries.astype(np.float32)


def made_items(
    num_items: int, rng: np.random.Generator, dim: int = DIM
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return items as the module's docstring says: vectors [I, dim], clusters [I], popularities [I]."""
    clusters, rank = 2_000, 16
    basis = rng.standard_normal((rank, dim)) * np.linspace(1, 0.2, rank)[:, np.newaxis]
    means = rng.standard_normal((clusters, rank)) @ basis
    share = 1 / np.arange(1, clusters + 1) ** 0.8
    cluster = rng.choice(clusters, num_items, p=share / share.sum())
    items = means[cluster] + 0.35 * rng.standard_normal((num_items, rank)) @ basis
    items += 0.15 * rng.standard_normal((num_items, dim))
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    popularity = 1 + rng.pareto(2.5, num_items)
    items *= popularity[:, np.newaxis] ** 0.35
    return items, cluster, popularity


def trained_vectors(
    path: Path, num_items: int, num_queries: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return items [I+1, D] and queries [Q, D] as the module's docstring says."""
    stored = load_file(path)
    for name in ("item_vectors", "user_vectors"):
        if name not in stored or stored[name].ndim != 2 or len(stored[name]) < 2:
            raise ValueError(f"{path} has no {name} [rows, D]; expected a bundle's embeddings.safetensors")
    items, users = stored["item_vectors"][1:], stored["user_vectors"][1:]
    items = items[rng.integers(0, len(items), num_items)]
    length = np.linalg.norm(items, axis=1, keepdims=True)
    items = items + NOISE * length * rng.standard_normal(items.shape) / items.shape[1] ** 0.5
    return _with_padding(items), users[rng.integers(0, len(users), num_queries)].astype(np.float32)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{result['machine']}; vectors: {result['vectors']}")
    for heading in ("items", "k", "threads", "kind", "setting", "build s", "MB"):
        table.add_column(heading, justify="left" if heading in ("kind", "setting") else "right")
    for heading in ("p50 ms", "p99 ms", "IndexFlatIP p50", "times faster", "recall"):
        table.add_column(heading, justify="right")
    order = sorted(result["rows"], key=lambda row: (row["items"], row["k"], row["threads"]))
    for row in order:
        table.add_row(
            f"{row['items']:,}",
            f"{row['k']:,}",
            str(row["threads"]),
            row["kind"],
            row["setting"],
            f"{row['build_s']:.1f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['flat_p50_ms']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['recall']:.4f}",
        )
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def _with_padding(items: NDArray[Any]) -> FloatArray:
    return np.concatenate([np.zeros((1, items.shape[1])), items]).astype(np.float32)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
