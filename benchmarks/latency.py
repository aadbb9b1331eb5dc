"""How long a request takes: `python -m benchmarks.latency bundles/beauty`; re-ranking alone, on a simulated
shop: `python -m benchmarks.latency reranking` (benchmarks/reranking_latency.py).

Starts `trirank serve` in a process of its own and sends `Recommend` calls one after the other, for users of
the bundle in a fixed random order. Prints what the client saw and what the server says of its stages.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import reranking_latency
from benchmarks.server_process import running_server
from engine.arguments import ArgumentParser
from engine.bundle import resolve_bundle
from engine.client import RecommenderClient, visitor

WARM_UP = 50


def measure(bundle: Path, num_requests: int, limit: int) -> dict[str, Any]:
    """Return p50, p90, p99 in ms of the whole call and of each stage, one client, one call at a time."""
    users = pl.read_parquet(bundle / "users.parquet", columns=["user_id"])["user_id"].to_numpy()
    asked = np.random.default_rng(0).choice(users, WARM_UP + num_requests)
    times: dict[str, list[float]] = {"whole call": []}
    with running_server(bundle) as (address, _), RecommenderClient(address, timeout_s=10.0) as client:
        for number, user in enumerate(track(asked, "requests", console=Console(stderr=True))):
            begin = time.perf_counter()
            response = client.recommend(visitor(str(user)), limit=limit)
            elapsed_ms = (time.perf_counter() - begin) * 1e3
            if response.trace.degraded_stages or len(response.items) != limit:
                raise ValueError(f"user {user!r} got a degraded or short answer: {response.trace}")
            if number < WARM_UP:
                continue
            times["whole call"].append(elapsed_ms)
            for timing in response.trace.timings:
                times.setdefault(timing.stage, []).append(timing.duration_us / 1e3)
    percentiles = {f"p{p}_ms": p for p in (50, 90, 99)}
    return {
        "bundle": bundle.name,
        "requests": num_requests,
        "limit": limit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "latency": {
            name: {key: round(float(np.percentile(values, p)), 3) for key, p in percentiles.items()}
            for name, values in times.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, or JSON with --json."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["reranking"]:
        return reranking_latency.main(argv[1:])
    parser = ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--requests", type=int, default=1000, help="Calls to measure, after a warm-up.")
    parser.add_argument("--limit", type=int, default=10, help="Items of a slate.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        result = measure(resolve_bundle(options.bundle), options.requests, options.limit)
    except ValueError as error:
        print(f"benchmarks.latency: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    table = Table(title=f"{result['requests']:,} sequential Recommend calls, {result['machine']}")
    for heading in ("", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, figures in result["latency"].items():
        table.add_row(name, *(f"{value:.2f}" for value in figures.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
