"""What a request cannot do without: its kernels, each called by itself with what a real request passes.

Requests are recorded and played back. A pipeline answers some users while every call of an index's search, of
the sparse look-ups of two candidate sources, of the ONNX graphs and of the rules is noted with its arguments;
then these calls are made again, request by request in their order, and nothing else, so that filters cost
what they cost. To these comes an empty gRPC call of like sizes through the server's own stack, grpc.aio, in a
process of its own.

A loop that never waits finds its core awake and its caches warm; a server does not. What that costs shows a
bare server of the same stack, in a process of its own: a call of it makes a request's kernel calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import grpc
import numpy as np
from numpy.typing import NDArray

import engine.pipeline
from engine.bundle import Bundle
from engine.deadline import Budget
from engine.memory import set_up_for_serving
from engine.messages import MAX_MESSAGE_BYTES
from engine.pipeline import RecommendationPipeline
from engine.server import recommend
from protos.trirank.v1 import recommender_pb2 as pb
from retrieval.sources import NeighbourSource

ECHO = "/trirank.benchmarks.Echo/Echo"
ECHO_KERNEL = "gRPC echo"


class KernelCall(NamedTuple):
    """One call of a kernel, as a request made it."""

    kernel: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    keywords: dict[str, Any]


class Recording(NamedTuple):
    """One request: the kernels' calls in their order, and the sizes of the messages."""

    calls: list[KernelCall]
    request_bytes: int
    response_bytes: int


def record(pipeline: RecommendationPipeline, requests: Sequence[bytes]) -> list[Recording]:
    """Return the kernels' calls of some requests (serialized RecommendRequests)."""
    recordings = []
    for data in requests:
        with _noted(pipeline) as calls:
            reply = recommend(pipeline, pb.RecommendRequest.FromString(data), Budget(None))
        recordings.append(Recording(list(calls), len(data), reply.response.ByteSize()))
    return recordings


def play(recordings: Sequence[Recording], seconds: float) -> dict[str, list[float]]:
    """Make the recorded calls again, all of a request and then those of the next, for about so long.

    Returns:
        Milliseconds of each kernel in each request, 0 where it made no such call: equally long lists.
    """
    kernels = list(dict.fromkeys(call.kernel for one in recordings for call in one.calls))
    times: dict[str, list[float]] = {kernel: [] for kernel in kernels}
    end = time.perf_counter() + seconds
    number = 0
    while not number or time.perf_counter() < end:
        elapsed = dict.fromkeys(kernels, 0.0)
        for call in recordings[number % len(recordings)].calls:
            begin = time.perf_counter()
            call.function(*call.args, **call.keywords)
            elapsed[call.kernel] += (time.perf_counter() - begin) * 1e3
        for kernel in kernels:
            times[kernel].append(elapsed[kernel])
        number += 1
    return times


@contextmanager
def _noted(pipeline: RecommendationPipeline) -> Iterator[list[KernelCall]]:
    """Note the calls of a pipeline's kernels while the block runs."""
    bundle = pipeline.bundle
    kernels: list[tuple[str, Any, str]] = [
        ("search graph vectors", bundle.index, "search"),
        ("transitions", engine.pipeline, "next_items"),
        ("rules", pipeline.reranker, "slate"),
    ]
    kernels += [
        ("neighbours", source, "find") for source in pipeline.sources if isinstance(source, NeighbourSource)
    ]
    if bundle.ranker_index and bundle.scorer:
        kernels += [
            ("search ranker vectors", bundle.ranker_index, "rough_search"),
            ("ONNX state", bundle.scorer, "user_states"),
            ("ONNX scores", bundle.scorer, "score_states"),
        ]
    calls: list[KernelCall] = []

    def noting(kernel: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **keywords: Any) -> Any:
            # Copies: the pipeline goes on with some of them, and changes them.
            kept = tuple(arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args)
            calls.append(KernelCall(kernel, function, kept, keywords))
            return function(*args, **keywords)

        return noted

    with contextlib.ExitStack() as patches:
        for kernel, owner, method in kernels:
            patches.enter_context(mock.patch.object(owner, method, noting(kernel, getattr(owner, method))))
        yield calls


@contextmanager
def running_echo(response_bytes: int, bundle: Path | None = None) -> Iterator[tuple[str, int]]:
    """Run a grpc.aio server that answers every call with so many bytes; yield its address and process id.

    Args:
        response_bytes: of an answer.
        bundle: makes it the bare server of the module's docstring. What it is asked with are serialized
            RecommendRequests; when one comes for the first time, its kernels' calls are recorded.
    """
    command = [sys.executable, "-m", "benchmarks.kernels", str(response_bytes)]
    server = subprocess.Popen(
        [*command, str(bundle)] if bundle else command, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip(), server.pid
    finally:
        server.terminate()
        server.wait(timeout=60)


async def serve_echo(
    response_bytes: int, on_ready: Callable[[str], None], bundle: Path | None = None
) -> None:
    """Answer calls of ECHO until cancelled; see running_echo."""
    answer = bytes(response_bytes)
    pipeline = RecommendationPipeline(Bundle.load(bundle)) if bundle else None
    recordings: dict[bytes, Recording] = {}

    async def echo(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        if pipeline is not None:
            if request not in recordings:
                (recordings[request],) = record(pipeline, [request])
            for call in recordings[request].calls:
                call.function(*call.args, **call.keywords)
        return answer

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    service, method = ECHO.strip("/").split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    on_ready(f"127.0.0.1:{port}")
    await server.wait_for_termination()


def call_times(
    address: str, method: str, requests: Sequence[bytes], seconds: float, timeout_s: float = 10.0
) -> tuple[list[float], list[bytes]]:
    """Call a server with one request after the other for about so long, over one connection.

    Returns:
        Milliseconds from request bytes to response bytes, and the responses.
    """
    times: list[float] = []
    responses: list[bytes] = []
    with grpc.insecure_channel(
        address, options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    ) as channel:
        ask = channel.unary_unary(method, None, None)
        ask(requests[0], timeout=timeout_s, wait_for_ready=True)
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            request = requests[len(times) % len(requests)]
            begin = time.perf_counter()
            response = ask(request, timeout=timeout_s)
            times.append((time.perf_counter() - begin) * 1e3)
            responses.append(response)
    return times, responses


def summed(times: dict[str, list[float]]) -> NDArray[np.float64]:
    """Return what the kernels of each request take together: [N] ms."""
    return np.asarray(np.sum(list(times.values()), axis=0))


def main(response_bytes: str, bundle: str = "") -> None:
    """Run the server of running_echo."""
    path = Path(bundle) if bundle else None
    if path:
        set_up_for_serving()  # as `trirank serve` does
    asyncio.run(serve_echo(int(response_bytes), lambda address: print(address, flush=True), path))


if __name__ == "__main__":
    main(*sys.argv[1:])
