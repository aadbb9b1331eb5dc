"""What a server does when the world is unkind, with a real server and an open-loop load:

    python -m benchmarks.faults swaps bundles/beauty --rate 60 --times 20
    python -m benchmarks.faults crashes bundles/beauty --times 20

`swaps` publishes one bundle after another under load: failed calls, p99 while a bundle takes over against p99
before, and the memory at the end against that before. `crashes` kills the server while events are recorded,
starts it again and asks for each acknowledged event: how many are lost, and how long until it answers.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load import Load, Outcome, offer_to, percentile, recommend_requests
from benchmarks.server_process import running_server
from engine.arguments import ArgumentParser
from engine.bundle import MANIFEST, manifest_checksum, resolve_bundle
from engine.client import RecommenderClient
from protos.trirank.v1 import recommender_pb2 as pb

stderr = Console(stderr=True, highlight=False)


def swaps(
    bundle: Path, *, rate: float, times: int, interval_s: float, options: Sequence[str]
) -> dict[str, Any]:
    """Return what became of calls while bundle after bundle took over.

    Args:
        bundle: all that are published are copies of this one.
        rate: calls a second.
        times: bundles to publish.
        interval_s: between two of them; also the time before the first.
        options: more options of trirank serve.
    """
    requests = recommend_requests(bundle, 50)
    seconds = (times + 1) * interval_s
    load = Load(seconds=seconds, warm_up_s=0.0, timeout_s=10.0)
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / rate, round(rate * seconds)))
    with tempfile.TemporaryDirectory(prefix="bundles-", dir=bundle.parent) as folder:
        root = Path(folder)
        copy_of(bundle, root, 0)
        with running_server(root, options) as (address, pid):
            process = psutil.Process(pid)
            published: list[float] = []
            memory: list[int] = []
            begin = time.perf_counter()

            def publish() -> None:
                for number in range(1, times + 1):
                    time.sleep(max(0.0, begin + number * interval_s - time.perf_counter()))
                    memory.append(process.memory_info().rss)
                    published.append(time.perf_counter() - begin)
                    copy_of(bundle, root, number)

            publisher = threading.Thread(target=publish, daemon=True)
            publisher.start()
            outcomes = asyncio.run(offer_to(address, requests, arrivals, load))
            publisher.join()
            memory.append(process.memory_info().rss)
    return (
        {"calls": len(outcomes)}
        | _swaps(outcomes, published, interval_s)
        | {
            "rss_mb_before": memory[0] / 1e6,
            "rss_mb_after": memory[-1] / 1e6,
        }
    )


def _swaps(outcomes: Sequence[Outcome], published: Sequence[float], interval_s: float) -> dict[str, Any]:
    answered = sorted((one for one in outcomes if one.code == "OK"), key=lambda one: one.done_s)
    versions = [pb.RecommendResponse.FromString(one.response).trace.bundle_version for one in answered]
    first_of: dict[str, float] = {}
    for one, version in zip(answered, versions, strict=True):
        first_of.setdefault(version, one.done_s)
    took_over = sorted(first_of.values())[1:]
    # From the moment of publishing to the first answer of the new bundle, and half a second more.
    windows = [
        (moment, next((done + 0.5 for done in took_over if done > moment), moment + interval_s))
        for moment in published
    ]

    def during(outcome: Outcome) -> bool:
        return any(begin <= outcome.intended_s <= end for begin, end in windows)

    latencies = {True: [], False: []}  # type: dict[bool, list[float]]
    for one in answered:
        latencies[during(one)].append(1000 * (one.done_s - one.intended_s))
    return {
        "swaps": len(took_over),
        "codes": dict(Counter(one.code for one in outcomes)),
        "failed": sum(one.code != "OK" for one in outcomes),
        "p50_ms_between": percentile(np.array(latencies[False]), 50),
        "p99_ms_between": percentile(np.array(latencies[False]), 99),
        "p50_ms_during": percentile(np.array(latencies[True]), 50),
        "p99_ms_during": percentile(np.array(latencies[True]), 99),
        "seconds_to_take_over": max((end - 0.5 - begin for begin, end in windows), default=None),
    }


def copy_of(bundle: Path, root: Path, number: int) -> Path:
    """Publish a bundle under another name, its files shared as hard links. Return its directory."""
    moment = datetime.now(UTC) + timedelta(seconds=number)  # each newer than the last
    name = f"{moment:%Y%m%d-%H%M%S}-{number:06x}"
    draft = root / f".tmp-{name}"
    draft.mkdir()
    for file in bundle.iterdir():
        if file.name != MANIFEST:
            os.link(file, draft / file.name)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8")) | {"version": name}
    manifest["checksum"] = manifest_checksum(manifest)
    (draft / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return draft.rename(root / name)


def crashes(bundle: Path, *, times: int, seconds: float, options: Sequence[str]) -> dict[str, Any]:
    """Return what became of acknowledged events when the server was killed.

    Args:
        bundle: what is served.
        times: how often it is killed.
        seconds: of recording before each kill.
        options: more options of trirank serve.
    """
    acknowledged: list[int] = []
    ready_s: list[float] = []
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        words = ["--events", folder, *options]
        for number in range(times + 1):
            begin = time.perf_counter()
            with running_server(bundle, words) as (address, pid):
                ready_s.append(time.perf_counter() - begin)
                with RecommenderClient(address, timeout_s=10.0) as client:
                    lost += _lost(client, acknowledged)
                    acknowledged = []
                    if number < times:
                        acknowledged = _record_until_killed(client, pid, number, seconds)
            stderr.print(f"{number + 1} of {times + 1}: {len(acknowledged)} events acknowledged, {lost} lost")
    return {
        "kills": times,
        "lost": lost,
        "ready_s_max": max(ready_s),
        "ready_s_mean": float(np.mean(ready_s)),
    }


def _event(number: int) -> pb.RecordedEvent:
    return pb.RecordedEvent(event_id=str(number), user_id=f"user {number // 100}", item_id="any")


def _lost(client: RecommenderClient, acknowledged: Sequence[int]) -> int:
    """Return how many events the server takes for new."""
    return sum(
        client.record_events([_event(number) for number in acknowledged[begin : begin + 1000]]).num_new
        for begin in range(0, len(acknowledged), 1000)
    )


def _record_until_killed(client: RecommenderClient, pid: int, round_number: int, seconds: float) -> list[int]:
    acknowledged: list[int] = []

    def record(numbers: Iterator[int]) -> None:
        try:
            for number in numbers:
                client.record_events([_event(number)])
                acknowledged.append(number)
        except grpc.RpcError:
            pass  # the server is gone

    # Numbers of its own for each round and thread; no user has more events than are kept.
    threads = [
        threading.Thread(target=record, args=(iter(range(first, first + 1_000_000)),))
        for first in (round_number * 10_000_000 + thread * 1_000_000 for thread in range(4))
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    psutil.Process(pid).kill()
    for thread in threads:
        thread.join()
    return acknowledged


def main(argv: list[str] | None = None) -> int:
    """Run one of the two: a table on stdout, or JSON with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("fault", type=str, choices=("swaps", "crashes"), help="swaps or crashes")
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--times", type=int, default=20, help="Bundles to publish, or kills.")
    parser.add_argument("--rate", type=float, default=50.0, help="swaps: calls a second.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Between two swaps, or before a kill.")
    parser.add_argument("--serve_options", type=list[str], default=[], help="More options of trirank serve.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        bundle = resolve_bundle(options.bundle)
        words = options.serve_options
        if options.fault == "swaps":
            result = swaps(
                bundle, rate=options.rate, times=options.times, interval_s=options.seconds, options=words
            )
        else:
            result = crashes(bundle, times=options.times, seconds=options.seconds, options=words)
    except ValueError as error:
        print(f"benchmarks.faults: {error}", file=sys.stderr)
        return 2
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    result = {"fault": options.fault, "bundle": bundle.name, "machine": machine} | result
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    table = Table("", "")
    for name, value in result.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
