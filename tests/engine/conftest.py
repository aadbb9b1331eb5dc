"""A small bundle made by hand: I items, five users, and a scorer whose answers a loop can check."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import onnx
import polars as pl
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from engine.bundle import (
    RANKER_INDEX,
    RANKER_SCORES,
    RANKER_STATE,
    RANKER_WEIGHTS,
    TRANSITIONS,
    write_bundle,
    write_users,
)
from engine.catalog import CATALOG_SCHEMA
from engine.client import visitor
from engine.history import USERS_SCHEMA
from engine.pipeline import RecommendationPipeline
from engine.server import SERVICE, Health, RecommenderService, add_to_server
from engine.telemetry import LimitedLog
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc
from ranking.onnx_scorer import write_models
from retrieval.item_index import ItemIndex
from retrieval.sparse import SparseRows
from tests.engine.command import SERVE

ROOT = Path(__file__).parents[2]
DIM = 8
POLICY = [
    {"rule": "mmr", "relevance_weight": 0.8},
    {"rule": "cap", "field": "brand", "max_items": 3},
    {"rule": "drop_seen"},
]


SOURCES = [
    {"source": "sequence", "quota": 0.4},
    {"source": "embedding", "quota": 0.3},
    {"source": "neighbours", "quota": 0.1},
    {"source": "popular", "quota": 0.1},
    {"source": "fresh", "quota": 0.1},
]
CLOCK = 30_000  # items 31 and up (their number * 1000) are not on sale yet


def toy_neighbours(num_items: int) -> SparseRows:
    """The items behind and before each, by row, and the one three further on; weights .5, .25, .125."""
    rows = []
    for item in range(num_items + 1):
        near = [(item + 1, 0.5), (item - 1, 0.25), (item + 3, 0.125)] if item else []
        kept = [(row, weight) for row, weight in near if 1 <= row <= num_items]
        columns, weights = zip(*kept, strict=True) if kept else ((), ())
        rows.append((np.array(columns, np.int32), np.array(weights, np.float32)))
    return SparseRows.from_rows(rows, num_items + 1)


def item_ids(num_items: int) -> list[str]:
    """The first ids are the awkward ones."""
    awkward = ["with space", "emoji 🎉🛒", "comma,semicolon;", "[markup]", "0042", "null", "ü/ö?=&"]
    return [*awkward, *(f"item-{number}" for number in range(len(awkward), num_items))][:num_items]


def catalog_frame(num_items: int) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    numbers = range(num_items)
    return pl.DataFrame(
        {
            "item_id": item_ids(num_items),
            "title": [None if number % 5 == 0 else f"Title [b]{number}[/b]" for number in numbers],
            "category": [None if number % 7 == 0 else ["all", f"c{number % 3}"] for number in numbers],
            "brand": [None if number % 4 == 0 else f"brand {number % 6}" for number in numbers],
            "seller_id": [f"s{number % 2}" for number in numbers],
            "price": [None if number % 6 == 0 else float(number) for number in numbers],
            "margin": [0.1 for _ in numbers],
            "available_from": [number * 1000 if number % 3 else 0 for number in numbers],
            "available_until": [None for _ in numbers],
            "stock": [None if number % 9 else number % 2 for number in numbers],
            "attributes": [
                ["age:18"] if number == 8 else ["region:DE"] * (number % 10 == 4) for number in numbers
            ],
            "popularity": rng.integers(0, 30, num_items),
        },
        schema=CATALOG_SCHEMA,
    )


def scorer_models(vectors: np.ndarray, history_length: int = 6) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """state = mean of the history's vectors, padding (the start token) among them; score = state . item"""
    table = vectors.copy()
    table[0] = 0.05
    dim = vectors.shape[1]

    def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], arrays: dict[str, Any]) -> Any:
        initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
        graph = helper.make_graph(nodes, "scorer", inputs, outputs, initializers)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        metadata = {"history_length": str(history_length), "num_items": str(len(vectors) - 1)}
        helper.set_model_props(made, metadata)
        return made

    state = helper.make_tensor_value_info("state", TensorProto.FLOAT, ["B", dim])
    return model(
        [
            helper.make_node("Gather", ["table", "history"], ["history_vectors"]),
            helper.make_node("ReduceMean", ["history_vectors", "axis_1"], ["state"], keepdims=0),
        ],
        [helper.make_tensor_value_info("history", TensorProto.INT64, ["B", "T"])],
        [state],
        {"table": table, "axis_1": [1]},
    ), model(
        [
            helper.make_node("Gather", ["table", "candidates"], ["candidate_vectors"]),
            helper.make_node("Unsqueeze", ["state", "axis_2"], ["state_column"]),
            helper.make_node("MatMul", ["candidate_vectors", "state_column"], ["product"]),
            helper.make_node("Squeeze", ["product", "axis_2"], ["scores"]),
        ],
        [state, helper.make_tensor_value_info("candidates", TensorProto.INT64, ["B", "C"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", "C"])],
        {"table": table, "axis_2": [2]},
    )


def users_frame(num_items: int) -> pl.DataFrame:
    """ "loyal" knows items 2, 3 and 5; "new" has no events; "everything" has touched each item."""
    histories: dict[str, list[int]] = {
        "loyal": [2, 3, 3, 5],
        "new": [],
        "user with spaces 🎉": [1],
        "everything": list(range(1, num_items + 1)),
        "reader": [4, 6],
    }
    histories = {user: [row for row in rows if row <= num_items] for user, rows in histories.items()}
    return pl.DataFrame(
        {
            "user_id": list(histories),
            "items": list(histories.values()),
            "event_types": [[1] * len(rows) for rows in histories.values()],
            "timestamps": [[100 * (place + 1) for place in range(len(rows))] for rows in histories.values()],
        },
        schema=USERS_SCHEMA,
    )


def fill_bundle(
    directory: Path,
    *,
    num_items: int = 40,
    ranker: str = "ordered",
    repeats: bool = False,
    policy: Sequence[dict[str, Any]] = POLICY,
    policies: dict[str, Any] | None = None,
    num_candidates: int = 20,
    num_ranked: int = 10,
    sources: Sequence[dict[str, Any]] = SOURCES,
    **settings: Any,
) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    items = catalog_frame(num_items)
    users = users_frame(num_items)
    vectors = rng.normal(size=(num_items + 1, DIM)).astype(np.float32)
    vectors[0] = 0
    if num_items > 12:
        vectors[12] = 0  # an item that training never saw
    user_vectors = rng.normal(size=(users.height + 1, DIM)).astype(np.float32)
    user_vectors[[0, 2]] = 0  # the unknown user, and "new"
    items.write_parquet(directory / "catalog.parquet")
    write_users(users, directory)
    ItemIndex.build(vectors).save(directory / "item_index.faiss")
    save_file(
        {
            "item_vectors": vectors,
            "user_vectors": user_vectors,
            "item_degrees": np.concatenate([[0], items["popularity"]]).astype(np.float32),
            "content_vectors": np.roll(vectors, 1, axis=1),
        },
        directory / "embeddings.safetensors",
    )
    neighbours = toy_neighbours(num_items)
    save_file(
        {
            "neighbour_offsets": neighbours.offsets,
            "neighbour_rows": neighbours.columns,
            "neighbour_weights": neighbours.values,
            "recent_popularity": np.concatenate([[0], items["popularity"] % 7]).astype(np.int64),
        },
        directory / "sources.safetensors",
    )
    if ranker != "none":
        save_file(
            {
                "transition_offsets": neighbours.offsets,
                "transition_rows": neighbours.columns,
                "transition_weights": neighbours.values,
            },
            directory / TRANSITIONS,
        )
        files = (directory / name for name in (RANKER_STATE, RANKER_SCORES, RANKER_WEIGHTS))
        write_models(*files, scorer_models(vectors))
        ItemIndex.build(vectors).save(directory / RANKER_INDEX)
    return {
        "commit": None,
        "data": {
            "name": "toy",
            "simulated": True,
            "time": "unix",
            "repeats": repeats,
            "num_items": num_items,
            "clock": CLOCK,
        },
        "ranker": {"kind": ranker, "history_length": 6},
        "pipeline": {
            "num_candidates": num_candidates,
            "num_ranked": num_ranked,
            "default_limit": 10,
            "sources": list(sources),
            "event_weights": {},
            "half_life_events": None,
            "half_life_days": None,
            "num_neighbours": 4,
            "popular_window_days": None,
        }
        | settings,
        "policies": policies or {"policies": {"toy": {"rules": list(policy)}}},
        "recipe": {},
        "metrics": {},
        "shapes": {},
    }


class Held:
    """A method whose calls wait until they may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.num_calls = 0
        self.begun, self.may_end = threading.Event(), threading.Event()
        method = getattr(owner, name)

        def held(*words: Any) -> Any:
            self.num_calls += 1
            self.begun.set()
            assert self.may_end.wait(60)
            return method(*words)

        monkeypatch.setattr(owner, name, held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], Held]:
    """Hold the calls of an object's method."""
    return functools.partial(Held, monkeypatch)


@pytest.fixture(autouse=True)
def log_afresh() -> None:
    """What another test logged a moment ago keeps nothing of this one out of the log."""
    for name, module in list(sys.modules.items()):
        if name.startswith("engine.") and isinstance(seldom := getattr(module, "seldom", None), LimitedLog):
            seldom._next_at.clear()
            seldom._num_left_out.clear()


@pytest.fixture(scope="session")
def fill() -> Callable[..., dict[str, Any]]:
    """Write the files of a toy bundle into a directory and return its manifest fields."""
    return fill_bundle


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a toy bundle, with the options of fill_bundle, and return its directory."""

    def make(**options: Any) -> Path:
        root = tmp_path_factory.mktemp("bundles")
        return write_bundle(root, lambda directory: fill_bundle(directory, **options))

    return make


@pytest.fixture(scope="session")
def bundle_path(make_bundle: Callable[..., Path]) -> Path:
    """The toy bundle as most tests use it; do not change its files."""
    return make_bundle()


@pytest.fixture(scope="session")
def server_address(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server, as `trirank serve` starts it, in a process of its own."""
    command = [*SERVE, str(bundle_path), "--address", "127.0.0.1:0", "--json"]
    log = tmp_path_factory.mktemp("server") / "stderr.txt"
    with log.open("w") as errors, start(command, errors) as (process, ready):
        assert ready, f"the server did not start:\n{log.read_text()}"
        yield json.loads(ready)["address"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()


@contextmanager
def start(command: list[str], errors: Any = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a command beside the test, and yield it with the first line that it printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def start_process() -> Callable[..., Any]:
    """Run a command beside the test: see `start`."""
    return start


class Served:
    """A service in the test's own loop, and a client that speaks to it."""

    def __init__(self, service: RecommenderService, channel: grpc.aio.Channel, address: str) -> None:
        self.service = service
        self.address = address
        self.channel = channel
        self.stub: Any = pb_grpc.RecommenderServiceStub(channel)  # type: ignore[arg-type]

    def recommend(self, user: str = "", timeout: float = 60.0, **options: Any) -> Any:
        """Begin a call."""
        request = pb.RecommendRequest(visitor=visitor(user))
        return self.stub.Recommend(request, timeout=timeout, **options)

    def value(self, name: str, **labels: str) -> float | None:
        """What /metrics would say."""
        return self.service.metrics.registry.get_sample_value(f"trirank_{name}", labels)

    async def until(self, happens: Callable[[], bool]) -> None:
        """Let the loop go on until something is so."""
        async with asyncio.timeout(60):
            while not happens():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serve_in_process(
    pipeline: RecommendationPipeline,
    num_threads: int = 2,
    credentials: grpc.ServerCredentials | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    with ThreadPoolExecutor(num_threads) as pool:
        service = RecommenderService(pipeline, pool, **options)
        del pipeline
        server = grpc.aio.server()
        add_to_server(service, server)
        servicer = Health()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        for name in ("", SERVICE):
            await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        if credentials:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        else:
            port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as channel:
            yield Served(service, channel, address)
        await server.stop(None)
        service.close()


@pytest.fixture(scope="session")
def served() -> Callable[..., Any]:
    """Serve a pipeline, with the options of RecommenderService, in an `async with` block."""
    return serve_in_process


@pytest.fixture(scope="session")
def refused() -> Callable[..., Any]:
    """Await a call that must fail, and return its error."""

    async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value

    return refused


class Certificates(NamedTuple):
    """Files of what a TLS server and its clients have."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    other_ca: Path
    renewed_cert: Path  # its own authority
    renewed_key: Path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make certificates of two days; skip where there is no openssl."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("openssl is not installed: TLS is not tested")
    home = tmp_path_factory.mktemp("certificates")

    def make(name: str, *options: str) -> tuple[Path, Path]:
        cert, key = home / f"{name}.pem", home / f"{name}.key"
        new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        files = ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
        subprocess.run([openssl, *new, *files, *options], check=True, capture_output=True)
        return cert, key

    ca, ca_key = make("authority")
    signed = ["-CA", str(ca), "-CAkey", str(ca_key), "-addext", "basicConstraints=CA:FALSE"]
    cert, key = make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    client_cert, client_key = make("client", *signed)
    renewed = make("renewed", "-addext", "subjectAltName=IP:127.0.0.1")
    return Certificates(ca, cert, key, client_cert, client_key, make("other")[0], *renewed)
