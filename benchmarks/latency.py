"""How long the whole request takes, beside what its kernels take alone.

    python -m benchmarks.latency --plot latency.png   the table, on simulated bundles
    python -m benchmarks.latency bundles              one bundle, one client
    python -m benchmarks.latency reranking            the rules alone (benchmarks/reranking_latency.py)

The table has a cell for each size of the catalog, number of candidates and number of processes. In each, with
a server (`trirank serve`) in processes of its own on the same machine:

1. kernels and one client, in turns of a few seconds. The kernels of real requests, played back alone
   (benchmarks/kernels.py): index searches, sparse look-ups, ONNX, rules, an empty gRPC call. Calls of a bare
   server, which makes a request's kernel calls and nothing else. Then whole requests, one after the other,
   from request bytes to response bytes. The ratio is that of the medians: whole request / sum of kernels.
2. open-loop load (benchmarks/load.py) at rising rates until the server saturates; then three times the best
   goodput, and half of it right behind, to see how soon the server recovers.

Bundles are made where they are missing (benchmarks/simulated_bundle.py). A cell takes about a minute beside
the server's start; the whole table of 18 cells with its bundles over half an hour. Finished cells are kept in
--out: the same command goes on where it was interrupted. The generator shares the machine with the server and
its processor time is given; with two cores it takes what the server could use, and more of it at three times
the peak. With --apart it has a core of its own during the load, and the server has the others.

One bundle: `Recommend` calls one after the other, for users of the bundle in a fixed random order; what the
client saw and what the server says of its stages.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import kernels, load, reranking_latency
from benchmarks.server_process import running_server
from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from engine.client import RecommenderClient, visitor
from engine.pipeline import RecommendationPipeline
from protos.trirank.v1 import recommender_pb2 as pb
from training.commit import source_commit

WARM_UP = 50
NUM_RECORDED = 100  # requests whose kernels are played back
MAX_RATES = 12  # of a sweep
stderr = Console(stderr=True, highlight=False)

Figures = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a cell does; cells of one directory agree in it.

    Attributes:
        limit: items of a slate.
        turns: of kernels and one client.
        turn_s: seconds of each of a turn's two parts.
        rate_s: seconds of each rate of the load; 0 leaves the load out.
        growth: each rate is so many times the last.
        objective_ms: an answer within this is goodput.
        apart: whether the generator of the load has a core of its own, and the server the others.
        dim: of the simulated vectors.
        serve_options: more options of trirank serve.
        seed: of users and arrivals.
    """

    limit: int = 50
    turns: int = 3
    turn_s: float = 2.0
    rate_s: float = 4.0
    growth: float = 1.2
    objective_ms: float = 50.0
    apart: bool = False
    dim: int = 64
    serve_options: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, order=True)
class Cell:
    """One row of the table."""

    num_items: int
    num_candidates: int
    num_processes: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.num_items}-items-{self.num_candidates}-candidates-{self.num_processes}-processes"

    @property
    def title(self) -> str:
        """For a person."""
        return f"{self.num_items:,} items, {self.num_candidates:,} candidates, {self.num_processes} processes"


def measure_cell(bundle_path: Path, cell: Cell, settings: Settings) -> dict[str, Any]:
    """Return the figures of one cell."""
    requests = load.recommend_requests(bundle_path, settings.limit, seed=settings.seed)
    options = ["--num_processes", str(cell.num_processes), *settings.serve_options]
    bundle = Bundle.load(bundle_path)
    recordings = kernels.record(RecommendationPipeline(bundle), requests[:NUM_RECORDED])
    response_bytes = round(float(np.mean([one.response_bytes for one in recordings])))
    kernels.play(recordings, settings.turn_s / 4)
    kernel_ms: dict[str, list[float]] = {}
    echo_ms: list[float] = []
    bare_ms: list[float] = []
    whole_ms: list[float] = []
    stage_ms: dict[str, list[float]] = {}
    one_client: list[dict[str, float | None]] = []
    with (
        running_server(bundle_path, options) as (address, pid),
        kernels.running_echo(response_bytes) as (echo_address, _),
        kernels.running_echo(response_bytes, bundle_path) as (bare_address, _),
    ):
        kernels.call_times(address, load.METHOD, requests[-WARM_UP:], settings.turn_s / 4)
        for request in requests[:NUM_RECORDED]:
            kernels.call_times(bare_address, kernels.ECHO, [request], 0.0)
        for turn in range(settings.turns):
            _merge(kernel_ms, kernels.play(recordings, settings.turn_s))
            asked_with = requests[:NUM_RECORDED], settings.turn_s / 2
            echo_ms += kernels.call_times(echo_address, kernels.ECHO, *asked_with)[0]
            bare_ms += kernels.call_times(bare_address, kernels.ECHO, *asked_with)[0]
            with load.watched(pid) as usage:
                asked = requests[turn * NUM_RECORDED :] + requests[: turn * NUM_RECORDED]
                times, responses = kernels.call_times(address, load.METHOD, asked, settings.turn_s)
            one_client.append(usage)
            whole_ms += times
            _merge(stage_ms, stage_times(responses, settings.limit))
        del bundle, recordings  # the load has the machine to itself
        results = sweep(address, pid, requests, settings, float(np.median(whole_ms)), cell.num_processes)
    sums = kernels.summed(kernel_ms)
    floor = float(np.median(sums) + np.median(echo_ms))
    return {
        "cell": asdict(cell),
        "bundle": bundle_path.name,
        "indexes": json.loads((bundle_path / "manifest.json").read_text(encoding="utf-8"))["indexes"],
        "commit": source_commit(),
        "load_average": os.getloadavg()[0],
        "kernels": {name: percentiles(values) for name, values in kernel_ms.items()}
        | {kernels.ECHO_KERNEL: percentiles(echo_ms)},
        "sum_of_kernels": percentiles(sums.tolist()) | {"p50": floor},
        "bare_server": percentiles(bare_ms),
        "whole": percentiles(whole_ms),
        "ratio": float(np.median(whole_ms)) / floor,
        "stages": {name: percentiles(values) for name, values in stage_ms.items()},
        "server_cores": float(np.mean([usage["server_cores"] or 0.0 for usage in one_client])),
        "server_rss_mb": max(usage["server_rss_mb"] or 0.0 for usage in one_client),
        "load": [asdict(result) for result in results],
        "load_summary": summary(results, settings.objective_ms),
    }


def sweep(
    address: str,
    pid: int,
    requests: Sequence[bytes],
    settings: Settings,
    whole_ms: float,
    num_processes: int,
) -> list[load.Result]:
    """Return what came of each rate, from half of what one client reached on; none without a load."""
    if not settings.rate_s:
        return []
    offered = load.Load(
        seconds=settings.rate_s,
        warm_up_s=settings.rate_s / 5,
        objective_ms=settings.objective_ms,
        seed=settings.seed,
    )
    start = 0.5 * 1000 / whole_ms * num_processes
    with load.apart(pid) if settings.apart else nullcontext():
        return load.sweep(
            load.rate_by_rate(address, requests, offered, server_pid=pid, pause_s=load.DRAIN_S / 2),
            start_rate=start,
            growth=settings.growth,
            max_rate=start * settings.growth**MAX_RATES,
            overload=3.0,
        )


def summary(results: Sequence[load.Result], objective_ms: float) -> dict[str, float | None]:
    """Return what the load comes to.

    Keys:
        sustained_per_s: the highest rate of which all was answered with a p99 within the objective; p99_ms,
            cores (the server's and the generator's together) and rss_mb are of that rate.
        peak_per_s: the best goodput of any rate.
        overload_...: of three times that: goodput relative to the peak, p99 of what was admitted, median of
            the refusals; recovery_s as benchmarks/load.py has it.
    """
    rising = [result for result in results if result.recovery_s is None and result is not _overload(results)]
    sustained = [
        result
        for result in rising
        if result.codes.get("OK", 0) == result.num_calls
        and (result.latency_ms["p99"] or np.inf) <= objective_ms
    ]
    best = max(sustained, key=lambda result: result.offered_per_s, default=None)
    peak = max((result.goodput_per_s for result in rising), default=0.0)
    found: dict[str, float | None] = {
        "sustained_per_s": best.offered_per_s if best else None,
        "p99_ms": best.latency_ms["p99"] if best else None,
        "cores": (best.server_cores or 0.0) + best.generator_cores if best else None,
        "rss_mb": best.server_rss_mb if best else None,
        "peak_per_s": peak,
    }
    overload = _overload(results)
    if overload and peak:
        found |= {
            "overload_goodput": overload.goodput_per_s / peak,
            "overload_p99_ms": overload.latency_ms["p99"],
            "overload_rejected_p50_ms": overload.rejected_ms["p50"],
            "recovery_s": overload.recovery_s,
        }
    return found


def _overload(results: Sequence[load.Result]) -> load.Result | None:
    """Return the last result, where it is the one past saturation."""
    is_there = len(results) > 1 and load.is_saturated(results[-2])
    return results[-1] if is_there else None


def stage_times(responses: Sequence[bytes], limit: int) -> dict[str, list[float]]:
    """Return what the server says of its stages, in ms.

    Raises ValueError where an answer is degraded or short: it would make a request look cheap.
    """
    times: dict[str, list[float]] = {}
    for data in responses:
        answer = pb.RecommendResponse.FromString(data)
        if answer.trace.degraded_stages or len(answer.items) != limit:
            raise ValueError(f"a degraded or short answer: {answer.trace}")
        for timing in answer.trace.timings:
            times.setdefault(timing.stage, []).append(timing.duration_us / 1e3)
        times.setdefault("all stages", []).append(answer.trace.total_us / 1e3)
    return times


def percentiles(values: Sequence[float]) -> Figures:
    """Return p50, p90, p99 and p99.9; None where there are too few values for one to lie above it."""
    array = np.asarray(values)
    return {name: load.percentile(array, p) for name, p in load.PERCENTILES.items()}


def _merge(times: dict[str, list[float]], more: Mapping[str, list[float]]) -> None:
    for name, values in more.items():
        times.setdefault(name, []).extend(values)


def run_table(bundles: Path, out: Path, cells: Sequence[Cell], settings: Settings) -> dict[str, Any]:
    """Measure the cells that `out` does not hold yet; return all that it holds.

    Raises ValueError where the directory holds cells of other settings.
    """
    from benchmarks.simulated_bundle import SimulatedShop, simulated_bundle  # which imports torch

    out.mkdir(parents=True, exist_ok=True)
    file = out / "settings.json"
    record = json.loads(json.dumps(asdict(settings)))
    # What a directory does not say was not there to be set when its cells were measured.
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else record
    if (before := {"apart": False} | said) != record:
        other = ", ".join(f"{key} {before.get(key)!r}" for key in record if before.get(key) != record[key])
        raise ValueError(f"{out} holds cells measured with {other}; expected the same, or another --out")
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for number, cell in enumerate(cells, start=1):
        path = out / f"{cell.name}.json"
        done = path.is_file()
        stderr.print(f"{number} of {len(cells)}: {cell.title}{', done before' if done else ''}")
        if done:
            continue
        shop = SimulatedShop(num_items=cell.num_items, num_candidates=cell.num_candidates, dim=settings.dim)
        figures = measure_cell(simulated_bundle(bundles, shop), cell, settings)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(path)
    return collect(out)


def collect(out: Path) -> dict[str, Any]:
    """Return the finished cells of a directory, in order, with its settings."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*-processes.json")]
    return {
        "machine": machine(),
        "settings": json.loads((out / "settings.json").read_text(encoding="utf-8")),
        "cells": sorted(found, key=lambda one: Cell(**one["cell"])),
    }


def machine() -> str:
    """Return what the figures were measured on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the figures for a person: unloaded, and under load."""
    unloaded = Table(
        title=f"one client, ms, {result['machine']}",
        caption="kernels: medians of each played back alone; sum: their p50 and the echo's; "
        "bare server: p50 of a call that makes the kernels' calls alone; ratio: p50 of the whole call / sum",
    )
    names = list(dict.fromkeys(name for one in result["cells"] for name in one["kernels"]))
    where = ["items", "candidates", "processes"]
    whole = ["whole p50", "p90", "p99", "p99.9", "ratio", "cores", "RSS MB"]
    headings = [*where, *names, "sum", "bare server", *whole]
    loaded = Table(
        title=f"open-loop load, {result['machine']}",
        caption=f"sustained: all answered, p99 within {result['settings']['objective_ms']:g} ms; cores: the "
        "server's and the generator's; 3x: three times the peak",
    )
    load_names = {
        "sustained/s": "sustained_per_s",
        "p99 ms": "p99_ms",
        "cores": "cores",
        "RSS MB": "rss_mb",
        "peak/s": "peak_per_s",
        "3x: goodput/peak": "overload_goodput",
        "3x: p99 ms": "overload_p99_ms",
        "3x: reject p50 ms": "overload_rejected_p50_ms",
        "recovery s": "recovery_s",
    }
    for table, columns in ((unloaded, headings), (loaded, [*where, *load_names])):
        for heading in columns:
            table.add_column(heading, justify="right")
    for one in result["cells"]:
        cell = [f"{one['cell'][name]:,}" for name in ("num_items", "num_candidates", "num_processes")]
        unloaded.add_row(
            *cell,
            *(_figure(one["kernels"].get(name, {}).get("p50")) for name in names),
            _figure(one["sum_of_kernels"]["p50"]),
            _figure(one["bare_server"]["p50"]),
            *(_figure(one["whole"][name]) for name in load.PERCENTILES),
            _figure(one["ratio"]),
            _figure(one["server_cores"]),
            f"{one['server_rss_mb']:.0f}",
        )
        loaded.add_row(*cell, *(_figure(one["load_summary"].get(name)) for name in load_names.values()))
    return [unloaded, loaded]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw each cell's request beside its kernels, and latency over the offered rate."""
    from matplotlib.figure import Figure

    cells = result["cells"]
    figure = Figure(figsize=(14, 2 + 0.45 * len(cells)), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [Cell(**one["cell"]).title for one in cells]
    begins = np.zeros(len(cells))
    for name in dict.fromkeys(name for one in cells for name in one["kernels"]):
        lengths = np.array([one["kernels"].get(name, {}).get("p50") or 0.0 for one in cells])
        left.barh(labels, lengths, left=begins, label=name)
        begins += lengths
    left.plot([one["whole"]["p50"] for one in cells], labels, "k|", markersize=14, label="whole call, p50")
    p99s = [np.nan if one["whole"]["p99"] is None else one["whole"]["p99"] for one in cells]
    left.plot(p99s, labels, "rx", label="whole call, p99")
    left.invert_yaxis()
    left.set(xlabel="ms, one client")
    for one, label in zip(cells, labels, strict=True):
        points = sorted(
            (rate["offered_per_s"], rate["latency_ms"]["p99"])
            for rate in one["load"]
            if rate["latency_ms"]["p99"] is not None
        )
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=label)
            right.set(xscale="log", yscale="log")
    right.axhline(result["settings"]["objective_ms"], color="gray", linestyle="--", label="objective")
    right.set(xlabel="offered calls/s", ylabel="p99 of answered calls, ms")
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


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
    return {
        "bundle": bundle.name,
        "requests": num_requests,
        "limit": limit,
        "machine": machine(),
        "latency": {
            name: {f"p{p}_ms": round(float(np.percentile(values, p)), 3) for p in (50, 90, 99)}
            for name, values in times.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: tables on stdout."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["reranking"]:
        return reranking_latency.main(argv[1:])
    try:
        if argv and not argv[0].startswith("-"):
            return _one_bundle(argv)
        return _table(argv)
    except (ValueError, OSError) as error:
        print(f"benchmarks.latency: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; go on with the same command", file=sys.stderr)
        return 130


def _table(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    add = parser.add_argument
    add("--num_items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="Of the catalogs.")
    add("--num_candidates", type=int, nargs="+", default=[500, 1_000, 10_000], help="That are ranked.")
    add("--num_processes", type=int, nargs="+", default=[1, 2], help="Of the server.")
    add("--bundles", type=Path, default=Path("data/simulated"), help="Where simulated bundles are kept.")
    add("--out", type=Path, default=Path("data/latency"), help="Directory of the finished cells.")
    add("--plot", type=Path | None, default=None, help="Write a plot as PNG.")
    parser.add_class_arguments(Settings)
    options = parser.parse_args(argv)
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    wanted = [
        Cell(num_items, num_candidates, num_processes)
        for num_items in options.num_items
        for num_candidates in options.num_candidates
        for num_processes in options.num_processes
    ]
    for cell in wanted:
        if min(asdict(cell).values()) < 1:
            raise ValueError(f"cell is {cell}; expected numbers of at least 1")
    result = run_table(options.bundles, options.out, wanted, settings)
    (options.out / "latency.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(result, options.plot)
    for table in tables(result):
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 0


def _one_bundle(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--requests", type=int, default=1000, help="Calls to measure, after a warm-up.")
    parser.add_argument("--limit", type=int, default=10, help="Items of a slate.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    result = measure(resolve_bundle(options.bundle), options.requests, options.limit)
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
