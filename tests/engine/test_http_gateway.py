from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

pytest.importorskip("aiohttp", reason="the extra `http` is not installed")

from aiohttp import test_utils

from engine.client import RecommenderClient, aio_channels, visitor
from engine.http_gateway import SERVICE, _refusal, gateway, main, openapi, path_of
from protos.trirank.v1 import recommender_pb2 as pb

Ask = Callable[..., Awaitable[tuple[int, Any]]]


def through(address: str, work: Callable[[Ask], Awaitable[Any]]) -> Any:
    """Run `work` with a function that asks a gateway to the server at this address."""

    async def run() -> Any:
        async with (
            grpc.aio.insecure_channel(address) as channel,
            test_utils.TestClient(test_utils.TestServer(gateway([channel]))) as client,
        ):

            async def ask(method: str, path: str, **options: Any) -> tuple[int, Any]:
                async with client.request(method, path, **options) as response:
                    return response.status, await response.json()

            return await work(ask)

    return asyncio.run(run())


def test_the_same_answers_as_grpc(server_address: str) -> None:
    body = {"visitor": {"user_id": "loyal", "history": [{"item_id": "emoji 🎉🛒"}]}, "limit": 7}

    async def work(ask: Ask) -> list[tuple[int, Any]]:
        similar = {"item_id": "null", "limit": 3}
        ranked = {"candidate_item_ids": ["null", "0042", "nothing"]}
        return [
            await ask("POST", "/v1/recommend", json=body),
            await ask("POST", "/v1/recommend", data=b""),
            await ask("POST", "/v1/similar-items", json=similar),
            await ask("POST", "/v1/rank", json=ranked),
            await ask("GET", "/healthz"),
        ]

    recommended, empty, similar, ranked, health = through(server_address, work)
    with RecommenderClient(server_address, timeout_s=60) as client:
        expected = client.recommend(visitor("loyal", ["emoji 🎉🛒"]), limit=7)
    assert recommended[0] == 200
    assert [item["item_id"] for item in recommended[1]["items"]] == [item.item_id for item in expected.items]
    assert recommended[1]["trace"]["visitor_kind"] == "VISITOR_KIND_KNOWN_USER"
    assert isinstance(recommended[1]["trace"]["total_us"], str)
    assert (empty[0], len(empty[1]["items"])) == (200, 10)
    assert (similar[0], len(similar[1]["items"])) == (200, 3)
    assert (ranked[0], ranked[1]["unknown_item_ids"]) == (200, ["nothing"])
    assert health == (200, {"status": "SERVING"})


def test_refusals(server_address: str) -> None:
    async def work(ask: Ask) -> list[tuple[int, Any]]:
        return [
            await ask("POST", "/v1/recommend", json={"limit": 501}),
            await ask("POST", "/v1/recommend", data=b"{"),
            await ask("POST", "/v1/recommend", data=b"\xff\xfe"),
            await ask("POST", "/v1/recommend", json={"limmit": 5}),
            await ask("POST", "/v1/recommend", json={}, headers={"x-timeout-ms": "soon"}),
            await ask("POST", "/v1/similar-items", json={"item_id": "🤷"}),
            await ask("POST", "/v1/recommend", json={}, headers={"authorization": "Bearer ключ"}),
            await ask(
                "POST", "/v1/recommend", data=b"{}", headers={"content-type": "text/x; charset=klingon"}
            ),
        ]

    answers = through(server_address, work)
    assert [status for status, _ in answers] == [400, 400, 400, 400, 400, 404, 400, 400]
    assert answers[0][1] == {"code": "INVALID_ARGUMENT", "message": "limit is 501; expected 1 to 500"}
    assert "limmit" in answers[3][1]["message"]
    assert answers[4][1]["message"] == "x-timeout-ms is 'soon'; expected 1 to 999999"
    assert answers[5][1]["code"] == "NOT_FOUND"
    assert answers[6][1]["message"] == "authorization is not of printable ASCII characters"
    assert answers[7][1]["message"] == "charset is 'klingon'; expected utf-8"


def test_without_a_server() -> None:
    async def work(ask: Ask) -> list[tuple[int, Any]]:
        return [await ask("POST", "/v1/recommend", json={}), await ask("GET", "/healthz")]

    (status, body), (health, _) = through("127.0.0.1:1", work)
    assert (status, body["code"], health) == (503, "UNAVAILABLE", 503)


def test_all_servers_are_asked() -> None:
    asked: list[int] = []

    async def run() -> None:
        servers, ports = [], []
        for number in range(2):
            server = grpc.aio.server()

            async def answer(_: bytes, context: Any, number: int = number) -> bytes:
                asked.append(number)
                return b""

            handler = grpc.unary_unary_rpc_method_handler(answer)
            generic = grpc.method_handlers_generic_handler(SERVICE.full_name, {"Recommend": handler})
            server.add_generic_rpc_handlers((generic,))
            ports.append(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
            servers.append(server)
        name = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        channels = aio_channels(name, None, 2)
        async with test_utils.TestClient(test_utils.TestServer(gateway(channels))) as client:
            while len(set(asked)) < 2:  # a second connection may come later than the first call
                async with client.post("/v1/recommend", json={}) as response:
                    assert response.status == 200
        for channel in channels:
            await channel.close(None)
        for server in servers:
            await server.stop(None)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_events_over_http(server_address: str) -> None:
    async def work(ask: Ask) -> list[tuple[int, Any]]:
        event = {"event_id": "1", "user_id": "from http", "item_id": "item-9", "timestamp_ms": "5"}
        return [
            await ask("POST", "/v1/record-events", json={"events": [event, event]}),
            await ask("POST", "/v1/recommend", json={"visitor": {"user_id": "from http"}}),
            await ask("POST", "/v1/record-events", json={"events": []}),
        ]

    recorded, recommended, none = through(server_address, work)
    assert recorded == (200, {"num_new": 1, "num_repeated": 1})
    assert recommended[1]["trace"]["visitor_kind"] == "VISITOR_KIND_HISTORY_ONLY"
    assert none == (400, {"code": "INVALID_ARGUMENT", "message": "number of events is 0; expected 1 to 1000"})


def test_when_to_come_back() -> None:
    refusal = _refusal(429, "RESOURCE_EXHAUSTED", "busy", [("other", "x"), ("retry-after-ms", "1200")])
    assert refusal.headers["Retry-After"] == "2"


def test_the_document_says_what_the_proto_says(capsys: pytest.CaptureFixture[str]) -> None:
    document = openapi()
    assert set(document["paths"]) == {path_of(method) for method in SERVICE.methods}
    assert {"/v1/recommend", "/v1/similar-items", "/v1/rank"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        if name != "Error":
            fields = pb.DESCRIPTOR.message_types_by_name[name].fields_by_name
            assert set(schema["properties"]) == set(fields)
    references = {word.split("/")[-1] for word in _values(document, "$ref")}
    assert references == set(schemas)
    assert schemas["Event"]["properties"]["timestamp_ms"] == {"type": "string", "format": "int64"}
    assert schemas["Visitor"]["properties"]["context"]["additionalProperties"] == {"type": "string"}
    assert schemas["RecommendRequest"]["properties"]["exclude_item_ids"]["items"] == {"type": "string"}
    assert "VISITOR_KIND_KNOWN_USER" in schemas["Trace"]["properties"]["visitor_kind"]["enum"]
    assert main(["--openapi"]) == 0
    assert json.loads(capsys.readouterr().out) == document


def _values(content: Any, key: str) -> list[str]:
    if isinstance(content, dict):
        own = [content[key]] if key in content else []
        return own + [value for part in content.values() for value in _values(part, key)]
    return [value for part in content for value in _values(part, key)] if isinstance(content, list) else []


def test_wrong_certificates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tls_cert", "own.pem"]) == 2
    assert "tls_cert and tls_key belong together" in capsys.readouterr().err
