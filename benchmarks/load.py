"""What a server does under load: `python -m benchmarks.load bundles/beauty --out load.json --plot load.png`.

Starts `trirank serve` in a process of its own (or takes --address) and sends `Recommend` calls at rising
rates until it saturates, then at a multiple of what it could do at most. The load is open-loop: calls arrive
as a Poisson process whether or not earlier ones were answered, and a call's latency counts from the moment it
was meant to be sent. A generator that waits for answers would send less just when the server is slow, and
would not see the wait ("coordinated omission"; Tene, "How NOT to Measure Latency", 2013).

The generator shares the machine with the server: what it takes of a core at three times the load, the server
lacks there. With --apart it has the first core to itself, and the server has the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import selectors
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import polars as pl
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.server_process import running_server
from engine.arguments import ArgumentParser
from engine.bundle import resolve_bundle
from engine.client import visitor
from engine.messages import MAX_MESSAGE_BYTES
from protos.trirank.v1 import recommender_pb2 as pb

METHOD = "/trirank.v1.RecommenderService/Recommend"
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
SATURATED_AT = 0.9  # of the offered rate: a server with less goodput than this has more than it can do
DRAIN_S = 2.0  # between two rates, so that no queue of one is seen by the next
RECOVERY_S = 4.0  # how long calls go on after an overload, to see when the server is itself again
RECOVERED_AT = 0.99  # of the calls of a second that are good

stderr = Console(stderr=True, highlight=False)

# A call takes the request's bytes and returns the status code's name and the response's bytes.
Call = Callable[[bytes], Awaitable[tuple[str, bytes]]]


class Outcome(NamedTuple):
    """One call; moments in seconds from the first moment that a call was meant for."""

    intended_s: float
    sent_s: float
    done_s: float
    code: str
    response: bytes


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent and what counts as good."""

    seconds: float = 10.0  # of each rate, the warm-up included
    warm_up_s: float = 1.0  # of each rate; its calls are sent and not counted
    timeout_s: float = 1.0  # the deadline that each call carries
    objective_ms: float = 50.0  # an answer within this is goodput
    num_channels: int = 32  # connections: the system deals them to the processes of a server by chance
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up_s < self.seconds:
            raise ValueError(
                f"warm_up_s is {self.warm_up_s}; expected 0 to less than seconds, {self.seconds}"
            )


@dataclass(frozen=True)
class Result:
    """One rate. Latencies in ms, of calls answered OK; None where a percentile has too few calls."""

    target_per_s: float
    offered_per_s: float  # what chance made of it
    num_calls: int
    goodput_per_s: float  # answered OK within the objective
    answered_per_s: float  # answered OK
    num_degraded: int  # answered OK with a stage left out
    codes: dict[str, int]
    latency_ms: dict[str, float | None]
    rejected_ms: dict[str, float | None]  # RESOURCE_EXHAUSTED alone
    late_ms: float | None  # p99 of how late the generator sent; large where it could not keep up itself
    generator_cores: float  # processor seconds a second
    server_cores: float | None  # with its child processes; None where its process id is unknown
    server_rss_mb: float | None  # the most that was seen
    recovery_s: float | None = None  # after an overload (see `recovery`); None too where it took too long


def arrivals_at(rate_per_s: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return moments [N] of a Poisson process, in seconds, ascending: N is what the rate gives on average."""
    return np.cumsum(rng.exponential(1 / rate_per_s, max(1, round(rate_per_s * seconds))))


async def offer(
    call: Sequence[Call], requests: Sequence[bytes], arrivals: NDArray[np.float64]
) -> list[Outcome]:
    """Send a request at each of the moments [N] (s, ascending), whatever became of those before it.

    Args:
        call: ways to send, used in turn.
        requests: used in turn.
        arrivals: seconds from the beginning.
    """
    outcomes: list[Outcome] = []
    begin = time.perf_counter()

    async def send(number: int, intended_s: float) -> None:
        sent_s = time.perf_counter() - begin
        code, response = await call[number % len(call)](requests[number % len(requests)])
        outcomes.append(Outcome(intended_s, sent_s, time.perf_counter() - begin, code, response))

    async with asyncio.TaskGroup() as group:
        for number, intended_s in enumerate(arrivals.tolist()):
            # Also where the moment has passed: the tasks made so far have to begin.
            await asyncio.sleep(max(0.0, intended_s - (time.perf_counter() - begin)))
            group.create_task(send(number, intended_s))
    return outcomes


def measure(
    address: str,
    requests: Sequence[bytes],
    rate_per_s: float,
    load: Load,
    *,
    server_pid: int | None = None,
    after_per_s: float | None = None,
) -> Result:
    """Load a server at one rate and return what came of it.

    Args:
        address: host:port.
        requests: serialized RecommendRequests, used in turn.
        rate_per_s: calls a second on average.
        load: see Load.
        server_pid: the process whose processor time and memory are measured, on this machine.
        after_per_s: a lower rate that follows without a pause, to see how soon the server recovers; its calls
            count for that alone.
    """
    rng = np.random.default_rng(load.seed)
    arrivals = arrivals_at(rate_per_s, load.seconds, rng)
    end_s = float(arrivals[-1])
    if after_per_s:
        arrivals = np.concatenate([arrivals, end_s + arrivals_at(after_per_s, RECOVERY_S, rng)])
    with watched(server_pid) as usage, asyncio.Runner(loop_factory=_precise_loop) as runner:
        outcomes = runner.run(offer_to(address, requests, arrivals, load))
    result = summarize([one for one in outcomes if one.intended_s <= end_s], rate_per_s, load, usage)
    return replace(result, recovery_s=recovery(outcomes, end_s, load)) if after_per_s else result


def recovery(outcomes: Sequence[Outcome], end_s: float, load: Load) -> float | None:
    """Return how long after an overload the server was itself again, in seconds; None where it was not.

    The earliest moment (in tenths of a second) from which on, for a second, 99 of 100 calls are answered
    within the objective.

    Args:
        outcomes: of the overload and of the calls after it.
        end_s: the moment that the last call of the overload was meant for.
        load: see Load.
    """
    after = sorted(one for one in outcomes if one.intended_s > end_s)
    moments = np.array([one.intended_s - end_s for one in after])
    good = np.array([one.code == "OK" and _latency_ms(one) <= load.objective_ms for one in after])
    for tenths in range(round(10 * (RECOVERY_S - 1)) + 1):
        within = good[(moments >= tenths / 10) & (moments < tenths / 10 + 1)]
        if len(within) and within.mean() >= RECOVERED_AT:
            return tenths / 10
    return None


def _latency_ms(outcome: Outcome) -> float:
    return 1000 * (outcome.done_s - outcome.intended_s)


def summarize(
    outcomes: Sequence[Outcome], rate_per_s: float, load: Load, usage: dict[str, float | None]
) -> Result:
    """Return the figures of one rate; calls meant for the warm-up are left out."""
    counted = [outcome for outcome in outcomes if outcome.intended_s >= load.warm_up_s]
    last = max((outcome.intended_s for outcome in counted), default=load.warm_up_s)
    window_s = max(last - load.warm_up_s, 1e-9)
    answered = [outcome for outcome in counted if outcome.code == "OK"]
    latencies = np.array([_latency_ms(outcome) for outcome in answered])
    rejected = [_latency_ms(outcome) for outcome in counted if outcome.code == "RESOURCE_EXHAUSTED"]
    late = [1000 * (outcome.sent_s - outcome.intended_s) for outcome in counted]
    return Result(
        target_per_s=rate_per_s,
        offered_per_s=len(counted) / window_s,
        num_calls=len(counted),
        goodput_per_s=float(np.count_nonzero(latencies <= load.objective_ms)) / window_s,
        answered_per_s=len(answered) / window_s,
        num_degraded=sum(
            bool(pb.RecommendResponse.FromString(outcome.response).trace.degraded_stages)
            for outcome in answered
        ),
        codes=dict(Counter(outcome.code for outcome in counted)),
        latency_ms={name: percentile(latencies, p) for name, p in PERCENTILES.items()},
        rejected_ms={name: percentile(np.array(rejected), p) for name, p in PERCENTILES.items()},
        late_ms=percentile(np.array(late), 99.0),
        generator_cores=usage["generator_cores"] or 0.0,
        server_cores=usage["server_cores"],
        server_rss_mb=usage["server_rss_mb"],
    )


def percentile(values: NDArray[np.float64], p: float) -> float | None:
    """Return a percentile, or None where there are too few values for one to lie above it."""
    return float(np.percentile(values, p)) if len(values) * (100 - p) >= 100 - 1e-9 else None


def sweep(
    measure_at: Callable[[float, float | None], Result],
    *,
    start_rate: float,
    growth: float,
    max_rate: float,
    overload: float | None,
) -> list[Result]:
    """Measure at rates that rise by a factor until the server saturates or max_rate is passed.

    Where `overload` is given, and the server saturates, a last measurement follows at that multiple of the
    best goodput seen, unless that is none.

    Args:
        measure_at: measures at a rate; the second number is None, or the rate that follows an overload.
        start_rate: calls a second.
        growth: each rate is so many times the last.
        max_rate: calls a second.
        overload: of the best goodput.
    """
    if start_rate <= 0 or growth <= 1:
        raise ValueError(f"start_rate is {start_rate}, growth {growth}; expected above 0 and above 1")
    results: list[Result] = []
    rate = start_rate
    while rate <= max_rate:
        results.append(measure_at(rate, None))
        if is_saturated(results[-1]):
            best = max(result.goodput_per_s for result in results)
            if overload and best:
                results.append(measure_at(overload * best, best / 2))
            break
        rate *= growth
    return results


def rate_by_rate(
    address: str, requests: Sequence[bytes], load: Load, *, server_pid: int | None = None, pause_s: float
) -> Callable[[float, float | None], Result]:
    """Return what `sweep` measures with: `measure`, a line on stderr, and a pause before the next rate."""

    def measure_at(rate_per_s: float, after_per_s: float | None) -> Result:
        result = measure(address, requests, rate_per_s, load, server_pid=server_pid, after_per_s=after_per_s)
        stderr.print(f"{rate_per_s:.0f} calls/s: goodput {result.goodput_per_s:.0f}")
        time.sleep(pause_s)
        return result

    return measure_at


def is_saturated(result: Result) -> bool:
    """Return whether a rate was more than the server can do."""
    return result.goodput_per_s < SATURATED_AT * result.offered_per_s


def recommend_requests(bundle: Path, limit: int, num_requests: int = 2000, seed: int = 0) -> list[bytes]:
    """Return serialized requests for users of a bundle, drawn at random."""
    users = pl.read_parquet(bundle / "users.parquet", columns=["user_id"])["user_id"].to_numpy()
    asked = np.random.default_rng(seed).choice(users, num_requests)
    return [
        pb.RecommendRequest(visitor=visitor(str(user)), limit=limit).SerializeToString() for user in asked
    ]


def plot(results: Sequence[Result], path: Path, objective_ms: float) -> None:
    """Draw latency and goodput over the offered rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ordered = sorted(results, key=lambda result: result.offered_per_s)
    rates = [result.offered_per_s for result in ordered]
    for name in PERCENTILES:
        values = [result.latency_ms[name] for result in ordered]
        left.plot(rates, [np.nan if value is None else value for value in values], marker="o", label=name)
    left.axhline(objective_ms, color="gray", linestyle="--", label="objective")
    left.set(xlabel="offered calls/s", ylabel="latency of answered calls, ms", yscale="log", xscale="log")
    right.plot(rates, rates, color="gray", linestyle="--", label="offered")
    right.plot(rates, [result.answered_per_s for result in ordered], marker="o", label="answered")
    right.plot(rates, [result.goodput_per_s for result in ordered], marker="o", label="within the objective")
    right.set(xlabel="offered calls/s", ylabel="calls/s", yscale="log", xscale="log")
    for axes in (left, right):
        axes.legend(loc="upper left")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, JSON and a plot where they are asked for."""
    parser = ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("bundle", type=Path, help="A bundle, or a directory of bundles: the newest one.")
    parser.add_argument("--address", type=str | None, default=None, help="A server that runs already.")
    parser.add_argument("--limit", type=int, default=50, help="Items of a slate.")
    parser.add_argument("--start_rate", type=float, default=25.0, help="Calls a second to begin with.")
    parser.add_argument("--growth", type=float, default=1.4, help="Each rate is this many times the last.")
    parser.add_argument("--max_rate", type=float, default=10_000.0, help="Calls a second to end with.")
    parser.add_argument("--overload", type=float, default=3.0, help="Of the best goodput, once saturated.")
    parser.add_argument("--apart", action="store_true", help="Keep the generator on a core of its own.")
    parser.add_argument("--serve_options", type=list[str], default=[], help="More options of trirank serve.")
    parser.add_class_arguments(Load, "load")
    parser.add_argument("--out", type=Path | None, default=None, help="Write the figures as JSON.")
    parser.add_argument("--plot", type=Path | None, default=None, help="Write a plot as PNG.")
    options = parser.parse_args(argv)
    try:
        load = Load(**options.load.as_dict())
        bundle = resolve_bundle(options.bundle)
        requests = recommend_requests(bundle, options.limit, seed=load.seed)
        with ExitStack() as stack:
            server = _server(bundle, options.address, options.serve_options)
            address, pid = stack.enter_context(server)
            if options.apart:
                stack.enter_context(apart(pid))
            results = sweep(
                rate_by_rate(address, requests, load, server_pid=pid, pause_s=DRAIN_S),
                start_rate=options.start_rate,
                growth=options.growth,
                max_rate=options.max_rate,
                overload=options.overload,
            )
    except ValueError as error:
        print(f"benchmarks.load: {error}", file=sys.stderr)
        return 2
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if options.out:
        content = {
            "bundle": bundle.name,
            "machine": machine,
            "limit": options.limit,
            "apart": options.apart,
            "serve_options": options.serve_options,
            "load": asdict(load),
            "results": [asdict(result) for result in results],
        }
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(results, options.plot, load.objective_ms)
    Console(highlight=False).print(table(results, machine))
    return 0


def table(results: Sequence[Result], machine: str) -> Table:
    """Return the figures for a person."""
    shown = Table(title=f"open-loop Recommend calls, {machine}")
    headings = ["offered/s", "goodput/s", "rejected", "failed", *(f"{name} ms" for name in PERCENTILES)]
    for heading in [*headings, "reject p50 ms", "recovery s", "late p99 ms", "cores", "RSS MB"]:
        shown.add_column(heading, justify="right")
    for result in results:
        num_rejected = result.codes.get("RESOURCE_EXHAUSTED", 0)
        num_failed = result.num_calls - num_rejected - result.codes.get("OK", 0)
        shown.add_row(
            f"{result.offered_per_s:.0f}",
            f"{result.goodput_per_s:.0f}",
            str(num_rejected),
            str(num_failed),
            *(_figure(value) for value in result.latency_ms.values()),
            _figure(result.rejected_ms["p50"]),
            _figure(result.recovery_s),
            _figure(result.late_ms),
            _figure(result.server_cores),
            _figure(result.server_rss_mb),
        )
    return shown


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _precise_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose timers are exact to microseconds; epoll's count whole milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


@contextmanager
def _server(
    bundle: Path, address: str | None, serve_options: Sequence[str]
) -> Iterator[tuple[str, int | None]]:
    if address:
        yield address, None
    else:
        with running_server(bundle, serve_options) as found:
            yield found


async def offer_to(
    address: str,
    requests: Sequence[bytes],
    arrivals: NDArray[np.float64],
    load: Load,
    *,
    service_config: str = "{}",
) -> list[Outcome]:
    """Offer requests to a server (see `offer`), over channels that are all connected before the first.

    The service config says whether a call that was refused is made again; a call is one outcome either way.
    """
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 1),  # a connection for each channel
        ("grpc.service_config", service_config),
    ]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(load.num_channels)]

    def caller(channel: grpc.aio.Channel) -> Call:
        ask = channel.unary_unary(METHOD, None, None)  # bytes: parsing is left for after the load

        async def call(request: bytes) -> tuple[str, bytes]:
            try:
                return "OK", await ask(request, timeout=load.timeout_s)
            except grpc.aio.AioRpcError as error:
                return error.code().name, b""

        return call

    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        return await offer([caller(channel) for channel in channels], requests, arrivals)
    finally:
        await asyncio.gather(*(channel.close(None) for channel in channels))


@contextmanager
def watched(server_pid: int | None) -> Iterator[dict[str, float | None]]:
    """Yield what fills, at the end of the block, with the processor time and memory used during it."""
    usage: dict[str, float | None] = {"server_cores": None, "server_rss_mb": None}
    stop = threading.Event()
    peak_bytes = [0]

    def watch() -> None:
        while not stop.wait(0.1):
            peak_bytes[0] = max(peak_bytes[0], rss(server_pid))

    begin, own, served = time.perf_counter(), time.process_time(), _processor_s(server_pid)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield usage
    finally:
        stop.set()
        watcher.join()
        elapsed = time.perf_counter() - begin
        usage["generator_cores"] = (time.process_time() - own) / elapsed
        if server_pid is not None:
            usage["server_cores"] = (_processor_s(server_pid) - served) / elapsed
            usage["server_rss_mb"] = max(peak_bytes[0], rss(server_pid)) / 1e6


@contextmanager
def apart(server_pid: int | None) -> Iterator[None]:
    """Keep the generator on the machine's first core and the server on the others, while the block lasts.

    Raises:
        ValueError: there is one core alone, the server is not of this machine, or the system is not Linux.
    """
    if server_pid is None or not hasattr(os, "sched_setaffinity"):
        raise ValueError("apart is set; expected a server that was started here, on Linux")
    allowed = os.sched_getaffinity(0)
    first, *others = sorted(allowed)
    if not others:
        raise ValueError("apart is set; expected two cores or more, found one")
    server = _family(server_pid)
    _keep_on([first], [psutil.Process()])
    _keep_on(others, server)
    try:
        yield
    finally:
        _keep_on(allowed, [psutil.Process(), *server])


def _keep_on(cores: Collection[int], processes: Sequence[psutil.Process]) -> None:
    """Let all threads of processes run on these cores alone; those that they start later follow them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with suppress(ProcessLookupError):  # it has ended since
                    os.sched_setaffinity(thread.id, cores)


def _family(pid: int | None) -> list[psutil.Process]:
    if pid is None:
        return []
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _processor_s(pid: int | None) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in _family(pid)))


def rss(pid: int | None) -> int:
    """Return the resident memory of a process and of those it started, in bytes; 0 of None."""
    return int(sum(process.memory_info().rss for process in _family(pid)))


if __name__ == "__main__":
    sys.exit(main())
