"""What a server does when the world is unkind, with a real server and an open-loop load:

    python -m benchmarks.faults swaps bundles/beauty --share 0.6 --times 20
    python -m benchmarks.faults crashes bundles/beauty --times 20
    python -m benchmarks.faults soak bundles/beauty --minutes 30 --rate 50

`swaps` publishes one bundle after another under load: failed calls, p99 while a bundle takes over against
p99 before, and the memory when the last one has taken over against that before. With --share the load is a
share of what the server can do at most, which is found first. Its clients use the published service config,
so that a call that was refused is made again when the server said so; how many the server refused is
counted by itself, and a call's latency is that from its first attempt to its last. `crashes` kills the
server while events are recorded and --rate calls a second are answered, starts it again and asks for each
acknowledged event, in the end for those of all rounds: how many are lost, and how long until it answers.
`soak` goes on for long, with a constant load, events, a new bundle now and then and messages that are none:
what grows (memory, latency), and what fails.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import linregress

from benchmarks.load import (
    DRAIN_S,
    METHOD,
    Load,
    Outcome,
    arrivals_at,
    offer_to,
    percentile,
    rate_by_rate,
    recommend_requests,
    rss,
    sweep,
)
from benchmarks.server_process import free_port, running_server
from engine.arguments import ArgumentParser
from engine.bundle import MANIFEST, bundles_in, manifest_checksum, resolve_bundle
from engine.client import SERVICE_CONFIG, RecommenderClient, visitor
from protos.trirank.v1 import recommender_pb2 as pb

CHUNK_S = 10.0  # of a soak's load that is sent and looked at in one go
RATE_S = 4.0  # of each rate that is tried to find out what a server can do
GROWTH = 1.25  # of these rates
TAKE_OVER_S = 120.0  # at most, for the last bundle
SETTLE_S = 3.0  # for the memory of the one before it to be given back

stderr = Console(stderr=True, highlight=False)


def saturation(bundle: Path, options: Sequence[str]) -> float:
    """Return the best goodput of rising rates: answers a second within the objective of benchmarks.load."""
    requests = recommend_requests(bundle, 50)
    offered = Load(seconds=RATE_S, warm_up_s=RATE_S / 4)
    with running_server(bundle, options) as (address, _):
        measure_at = rate_by_rate(address, requests, offered, pause_s=DRAIN_S)
        found = sweep(measure_at, start_rate=60, growth=GROWTH, max_rate=10_000, overload=None)
    return max(result.goodput_per_s for result in found)


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
    arrivals = arrivals_at(rate, seconds, np.random.default_rng(0))
    with tempfile.TemporaryDirectory(prefix="bundles-", dir=bundle.parent) as folder:
        root = Path(folder)
        newest = copy_of(bundle, root, 0)
        metrics = free_port()
        words = [*options, "--metrics", f"127.0.0.1:{metrics}"]
        with running_server(root, words) as (address, pid):
            published: list[float] = []
            memory: list[int] = []
            begin = time.perf_counter()

            def publish() -> None:
                nonlocal newest
                for number in range(1, times + 1):
                    time.sleep(max(0.0, begin + number * interval_s - time.perf_counter()))
                    memory.append(rss(pid))
                    published.append(time.perf_counter() - begin)
                    newest = copy_of(bundle, root, number)

            publisher = threading.Thread(target=publish, daemon=True)
            publisher.start()
            config = SERVICE_CONFIG.read_text(encoding="utf-8")
            outcomes = asyncio.run(offer_to(address, requests, arrivals, load, service_config=config))
            publisher.join()
            _wait_until_served(address, newest.name)
            memory.append(rss(pid))
            num_refused = _num_refused(metrics)
    return (
        {"calls": len(outcomes), "refused_by_the_server": num_refused}
        | _swaps(outcomes, published, interval_s)
        | {
            "rss_mb_before": memory[0] / 1e6,
            "rss_mb_after": memory[-1] / 1e6,
        }
    )


def _num_refused(port: int) -> int:
    """Return how many requests a server has refused, by the metrics of its processes, at ports in a row."""
    text = ""
    for one in itertools.count(port):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{one}/metrics", timeout=10.0) as answer:
                text += answer.read().decode()
        except (OSError, http.client.HTTPException):  # nobody, or somebody else
            break
    return round(sum(map(float, re.findall(r'^trirank_rejected_total\{reason="limit"\} (.+)$', text, re.M))))


def _wait_until_served(address: str, version: str) -> None:
    """Wait for a bundle to take over, and for the memory of the one before it; ValueError if it does not."""
    ends = time.perf_counter() + TAKE_OVER_S
    with RecommenderClient(address, timeout_s=10.0) as client:
        while client.recommend(visitor(""), limit=1).trace.bundle_version != version:
            if time.perf_counter() > ends:
                raise ValueError(f"bundle {version} has not taken over within {TAKE_OVER_S:g} s")
            time.sleep(0.2)
    time.sleep(SETTLE_S)


def _swaps(outcomes: Sequence[Outcome], published: Sequence[float], interval_s: float) -> dict[str, Any]:
    answered = sorted((one for one in outcomes if one.code == "OK"), key=lambda one: one.done_s)
    first_of: dict[str, float] = {}
    for one in answered:
        first_of.setdefault(_version(one), one.done_s)
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


def _version(answered: Outcome) -> str:
    return pb.RecommendResponse.FromString(answered.response).trace.bundle_version


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


def crashes(
    bundle: Path, *, rate: float, times: int, seconds: float, options: Sequence[str]
) -> dict[str, Any]:
    """Return what became of acknowledged events when the server was killed.

    Args:
        bundle: what is served.
        rate: calls a second beside the events.
        times: how often it is killed.
        seconds: of recording before each kill.
        options: more options of trirank serve.
    """
    acknowledged: list[list[int]] = []  # of each round
    ready_s: list[float] = []
    codes: Counter[str] = Counter()
    lost = 0
    requests = recommend_requests(bundle, 50)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--events", folder, *options]
        for number in range(times + 1):
            begin = time.perf_counter()
            with running_server(bundle, words) as (address, pid):
                ready_s.append(time.perf_counter() - begin)
                with RecommenderClient(address, timeout_s=10.0) as client:
                    # What is found to be lost is recorded by that, so that nothing is counted twice.
                    asked = acknowledged[-1:] if number < times else acknowledged
                    lost += sum(_lost(client, of_round) for of_round in asked)
                    if number < times:
                        load = _Load(address, requests, rate, seconds)
                        acknowledged.append(_record_until_killed(client, pid, number, seconds))
                        codes += load.codes()
            num_events = sum(map(len, acknowledged))
            stderr.print(f"{number} of {times} kills: {num_events} events acknowledged, {lost} lost")
    return {
        "kills": times,
        "acknowledged": num_events,
        "lost": lost,
        "calls_answered": codes["OK"],
        "calls_cut_short": codes.total() - codes["OK"],
        "ready_s_max": max(ready_s),
        "ready_s_mean": float(np.mean(ready_s)),
    }


class _Load:
    """In a thread: calls at a rate until a time is over, or the server is gone."""

    def __init__(self, address: str, requests: Sequence[bytes], rate: float, seconds: float) -> None:
        self._outcomes: list[Outcome] = []
        arrivals = arrivals_at(rate, seconds, np.random.default_rng(0))
        load = Load(seconds=seconds, warm_up_s=0.0, timeout_s=10.0)

        def offer() -> None:
            self._outcomes = asyncio.run(offer_to(address, requests, arrivals, load))

        self._thread = threading.Thread(target=offer, daemon=True)
        self._thread.start()

    def codes(self) -> Counter[str]:
        """Return how the calls have ended."""
        self._thread.join()
        return Counter(one.code for one in self._outcomes)


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


def soak(
    bundle: Path, *, rate: float, minutes: float, interval_s: float, options: Sequence[str]
) -> dict[str, Any]:
    """Return what became of a server in the long run.

    Args:
        bundle: all that are published are copies of this one.
        rate: calls a second.
        minutes: how long; a tenth of it is warm-up, which the slope of the memory leaves out.
        interval_s: between two new bundles.
        options: more options of trirank serve.
    """
    requests = recommend_requests(bundle, 50)
    load = Load(seconds=CHUNK_S, warm_up_s=0.0, timeout_s=10.0)
    rng = np.random.default_rng(0)
    codes: Counter[str] = Counter()
    versions: set[str] = set()
    latencies: list[list[float]] = []  # ms, of each chunk
    late_ms: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="bundles-", dir=bundle.parent) as folder,
        tempfile.TemporaryDirectory() as events,
    ):
        copy_of(bundle, Path(folder), 0)
        with running_server(Path(folder), ["--events", events, *options]) as (address, pid):
            troubles = _Troubles(bundle, Path(folder), address, pid, interval_s)
            ends = time.perf_counter() + 60 * minutes
            while time.perf_counter() < ends:
                arrivals = arrivals_at(rate, CHUNK_S, rng)
                outcomes = asyncio.run(offer_to(address, requests, arrivals, load))
                codes.update(one.code for one in outcomes)
                versions.update(_version(one) for one in outcomes if one.code == "OK")
                latencies.append([1000 * (one.done_s - one.intended_s) for one in outcomes])
                late_ms += [1000 * (one.sent_s - one.intended_s) for one in outcomes]
                stderr.print(f"{(ends - time.perf_counter()) / 60:.1f} minutes left: {dict(codes)}")
            troubles.end()
    part = max(1, len(latencies) // 5)
    # The error is that of independent residuals; memory after one swap is like that before it, so that the
    # true one is larger.
    memory = linregress(*troubles.memory(minutes))
    return {
        "minutes": minutes,
        "rate": rate,
        "calls": codes.total(),
        "failed": codes.total() - codes["OK"],
        "codes": dict(codes),
        "bundles_published": 1 + troubles.num_published,
        "bundles_that_answered": len(versions),
        "events": troubles.num_events,
        "failed_events": dict(troubles.failed_events),
        "messages_that_are_none": sum(troubles.answers.values()),
        "answers_to_them": dict(troubles.answers),
        "p99_ms_first_fifth": percentile(np.concatenate(latencies[:part]), 99),
        "p99_ms_last_fifth": percentile(np.concatenate(latencies[-part:]), 99),
        "generator_late_ms_p99": percentile(np.array(late_ms), 99),
        "rss_mb_per_hour": float(memory.slope),
        "rss_mb_per_hour_standard_error": float(memory.stderr),
        "rss_mb_last": troubles.samples[-1][1],
    }


class _Troubles:
    """In a thread: ten events a second, a message a second that is none, a bundle now and then; and how much
    memory the server has.
    """

    def __init__(self, bundle: Path, root: Path, address: str, pid: int, interval_s: float) -> None:
        self.samples: list[tuple[float, float]] = []  # s from the beginning, MB
        self.num_published = self.num_events = 0
        self.answers: Counter[str] = Counter()
        self.failed_events: Counter[str] = Counter()
        self._bundle, self._root, self._address, self._interval_s = bundle, root, address, interval_s
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def memory(self, minutes: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        samples = np.array([sample for sample in self.samples if sample[0] > 6 * minutes])
        return samples[:, 0] / 3600, samples[:, 1]

    def _run(self) -> None:
        begin, rng = time.perf_counter(), np.random.default_rng(1)
        with (
            RecommenderClient(self._address, timeout_s=10.0) as client,
            grpc.insecure_channel(self._address) as channel,
        ):
            send = channel.unary_unary(METHOD, None, None)
            for tick in itertools.count():
                if self._is_over.wait(max(0.0, begin + tick / 10 - time.perf_counter())):
                    return
                user = f"user {rng.integers(10_000)}"
                event = pb.RecordedEvent(event_id=str(tick), user_id=user, item_id="any")
                try:
                    client.record_events([event])
                    self.num_events += 1
                except grpc.RpcError as error:
                    self.failed_events[error.code().name] += 1
                if tick % 10 == 0:
                    self.samples.append((time.perf_counter() - begin, rss(self._pid) / 1e6))
                    try:
                        send(rng.bytes(int(rng.integers(1, 1000))), timeout=10.0)
                        self.answers["OK"] += 1
                    except grpc.RpcError as error:
                        self.answers[error.code().name] += 1
                if tick / 10 >= (self.num_published + 1) * self._interval_s:
                    self.num_published += 1
                    copy_of(self._bundle, self._root, self.num_published)
                    for old in bundles_in(self._root)[:-3]:
                        shutil.rmtree(old)


def main(argv: list[str] | None = None) -> int:
    """Run one of the three: a table on stdout, or JSON with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("fault", type=Literal["swaps", "crashes", "soak"], help="swaps, crashes or soak")
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--times", type=int, default=20, help="Bundles to publish, or kills.")
    parser.add_argument("--rate", type=float, default=50.0, help="Calls a second.")
    parser.add_argument(
        "--share",
        type=float | None,
        default=None,
        help="swaps: of the most it can answer, not --rate.",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="soak: how long.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Between two swaps, or before a kill.")
    parser.add_argument("--serve_options", type=list[str], default=[], help="More options of trirank serve.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        bundle = resolve_bundle(options.bundle)
        words = options.serve_options
        if options.share is not None and not 0 < options.share <= 1:
            raise ValueError(f"share is {options.share}; expected above 0, up to 1")
        if options.fault == "swaps":
            most = saturation(bundle, words) if options.share else None
            rate = options.share * most if most else options.rate
            result = {"saturation_per_s": most, "rate": rate} | swaps(
                bundle, rate=rate, times=options.times, interval_s=options.seconds, options=words
            )
        elif options.fault == "soak":
            result = soak(
                bundle,
                rate=options.rate,
                minutes=options.minutes,
                interval_s=options.seconds,
                options=words,
            )
        else:
            result = crashes(
                bundle, rate=options.rate, times=options.times, seconds=options.seconds, options=words
            )
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
