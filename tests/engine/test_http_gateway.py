from __future__ import annotations

import asyncio
import html
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

pytest.importorskip("aiohttp", reason="the extra `http` is not installed")

import aiohttp
from aiohttp import test_utils
from google.protobuf import json_format

from engine.client import RecommenderClient, aio_channels, visitor
from engine.http_gateway import (
    ERROR_HEADERS,
    HEADERS,
    LARGE_BYTES,
    NO_PACKAGE,
    PARAMETERS,
    REQUEST_ID,
    SERVICE,
    SWITCH_INTERVAL_S,
    Parser,
    _refusal,
    gateway,
    html_page,
    main,
    openapi,
    path_of,
)
from engine.messages import MAX_MESSAGE_BYTES
from protos.trirank.v1 import recommender_pb2 as pb

ROOT = Path(__file__).parents[2]

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


@asynccontextmanager
async def recommending(
    answer: Callable[[bytes, Any], Awaitable[bytes]], method: str = "Recommend"
) -> AsyncIterator[str]:
    """Answer a call in the test's own loop; yields the address."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    generic = grpc.method_handlers_generic_handler(SERVICE.full_name, {method: handler})
    server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


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


def test_a_caller_who_goes_away_takes_the_call_along(start_process: Any) -> None:
    """As it is started: aiohttp's own test server cancels handlers, whatever the gateway asks for."""

    async def run() -> None:
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def answer(_: bytes, context: Any) -> bytes:
            begun.set()
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return b""

        async with recommending(answer) as address:
            command = [sys.executable, "-u", "-m", "engine.http_gateway", "--server", address, "--port", "0"]
            with start_process(command) as (_, ready):
                (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)", ready)
                async with aiohttp.ClientSession() as caller:
                    patient = {"x-timeout-ms": "600000"}  # the deadline cancels nothing here
                    url = f"http://127.0.0.1:{port}/v1/recommend"
                    asking = asyncio.create_task(caller.post(url, json={}, headers=patient))
                    await begun.wait()
                    assert not cancelled.is_set()
                    asking.cancel()
                    await cancelled.wait()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_a_caller_has_sent_and_left_is_recorded(start_process: Any) -> None:
    """The last clicks on a page that closes: nobody waits for the answer."""

    async def run() -> None:
        num_recorded, all_recorded = 0, asyncio.Event()

        async def answer(_: bytes, context: Any) -> bytes:
            nonlocal num_recorded
            await asyncio.sleep(0.2)  # longer than a caller who has gone goes unnoticed
            num_recorded += 1
            if num_recorded == 5:
                all_recorded.set()
            return b""

        async with recommending(answer, "RecordEvents") as address:
            command = [sys.executable, "-u", "-m", "engine.http_gateway", "--server", address, "--port", "0"]
            with start_process(command) as (_, ready):
                (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)", ready)
                head = b"POST /v1/record-events HTTP/1.1\r\nHost: shop\r\nContent-Length: 2\r\n\r\n"
                for _ in range(5):
                    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
                    writer.write(head + b"{}")
                    writer.close()
                    await writer.wait_closed()
                await all_recorded.wait()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_requests_have_names() -> None:
    async def run() -> None:
        named: list[str] = []

        async def answer(request: bytes, context: Any) -> bytes:
            metadata = dict(context.invocation_metadata())
            named.append(metadata[REQUEST_ID])
            if metadata[REQUEST_ID] == "renamed":
                context.set_trailing_metadata(((REQUEST_ID, "the-server-s"),))
            if metadata[REQUEST_ID] == "refused":
                context.set_trailing_metadata(((REQUEST_ID, "refused"), ("retry-after-ms", "1200")))
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is at its limit")
            if metadata[REQUEST_ID] == "late":
                await asyncio.sleep(600)
            return b""

        async with (
            recommending(answer) as address,
            grpc.aio.insecure_channel(address) as channel,
            test_utils.TestClient(test_utils.TestServer(gateway([channel]))) as client,
        ):

            async def ask(name: str | None, path: str = "/v1/recommend", **more: str) -> tuple[int, str]:
                headers = more | ({} if name is None else {REQUEST_ID: name})
                async with client.post(path, json={}, headers=headers) as response:
                    await response.read()
                    assert ("Retry-After" in response.headers) == (response.status == 429)
                    return response.status, response.headers[REQUEST_ID]

            assert await ask("home-1") == (200, "home-1")
            assert await ask("renamed") == (200, "the-server-s")
            assert await ask("refused") == (429, "refused")
            # What never comes to the server, or back from it, has the name all the same.
            assert await ask("late", **{"x-timeout-ms": "50"}) == (504, "late")
            assert await ask("lost", "/v2/recommend") == (404, "lost")
            assert await ask("soon", **{"x-timeout-ms": "soon"}) == (400, "soon")
            assert named == ["home-1", "renamed", "refused", "late"]
            status, name = await ask(None)
            assert (status, name) == (200, named[-1])
            assert re.fullmatch("[0-9a-f]{32}", name)
            status, name = await ask("not a name")
            assert (status, name) == (200, named[-1])
            assert name != "not a name"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_server_s_own_names_come_back(server_address: str) -> None:
    async def run() -> None:
        async with (
            grpc.aio.insecure_channel(server_address) as channel,
            test_utils.TestClient(test_utils.TestServer(gateway([channel]))) as client,
        ):
            for body, status in (({}, 200), ({"limit": 501}, 400)):
                async with client.post(
                    "/v1/recommend", json=body, headers={REQUEST_ID: "page:7"}
                ) as response:
                    assert (response.status, response.headers[REQUEST_ID]) == (status, "page:7")

    asyncio.run(run())


def test_what_http_refuses_is_worded_like_the_rest() -> None:
    async def work(ask: Ask) -> list[tuple[int, Any]]:
        return [
            await ask("POST", "/v2/recommend", json={}),
            await ask("GET", "/v1/recommend"),
            await ask("POST", "/v1/recommend", data=b" " * (MAX_MESSAGE_BYTES + 1)),
            await ask("POST", "/v1/recommend", data=b"no gzip", headers={"content-encoding": "gzip"}),
        ]

    lost, method, large, packed = through("127.0.0.1:1", work)  # of which none needs a server
    path = "the path is '/v2/recommend'; expected one of those at /docs"
    assert lost == (404, {"code": "UNIMPLEMENTED", "message": path})
    assert method == (405, {"code": "UNIMPLEMENTED", "message": "the method is GET; expected POST"})
    size = f"the body is too large; expected at most {MAX_MESSAGE_BYTES} bytes"
    assert large == (413, {"code": "INVALID_ARGUMENT", "message": size})
    encoding = "the body cannot be read; its content-encoding is 'gzip'"
    assert packed == (400, {"code": "INVALID_ARGUMENT", "message": encoding})


def test_what_nobody_foresaw_is_worded_like_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of ink")

    monkeypatch.setattr("engine.http_gateway.json_format.Parse", fail)

    async def work(ask: Ask) -> tuple[int, Any]:
        return await ask("POST", "/v1/recommend", json={}, headers={REQUEST_ID: "r1"})

    status, body = through("127.0.0.1:1", work)
    assert (status, body) == (500, {"code": "INTERNAL", "message": "the gateway failed; its log names r1"})
    assert "request r1 failed" in caplog.text
    assert "out of ink" in caplog.text


LARGE = {"visitor": {"history": [{"item_id": "item-9"}] * 4000}}


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Hold what is parsed of large bodies, until `may_end`; `num_begun` counts them."""
    state = SimpleNamespace(begun=threading.Event(), may_end=threading.Event(), num_begun=0)
    parse = json_format.Parse

    def held(text: str, message: Any) -> Any:
        if len(text) > LARGE_BYTES:
            assert threading.current_thread() is not threading.main_thread()  # of the event loop
            state.num_begun += 1
            state.begun.set()
            assert state.may_end.wait(60)
        return parse(text, message)

    monkeypatch.setattr("engine.http_gateway.json_format.Parse", held)
    yield state
    state.may_end.set()


def test_other_calls_are_answered_while_a_large_body_is_parsed(
    server_address: str, parsing: SimpleNamespace
) -> None:
    async def work(ask: Ask) -> None:
        large = asyncio.create_task(ask("POST", "/v1/recommend", json=LARGE))
        assert await asyncio.to_thread(parsing.begun.wait, 60)
        assert await ask("GET", "/healthz") == (200, {"status": "SERVING"})
        assert (await ask("POST", "/v1/recommend", json={}))[0] == 200
        assert not large.done()
        parsing.may_end.set()
        status, answer = await large
        assert (status, answer["trace"]["visitor_kind"]) == (200, "VISITOR_KIND_HISTORY_ONLY")

    through(server_address, work)


def test_what_is_wrong_with_a_large_body_is_said(server_address: str) -> None:
    async def work(ask: Ask) -> list[tuple[int, Any]]:
        utf_8 = b'{"limit": 5}' + b" " * LARGE_BYTES
        klingon = {"content-type": "text/x; charset=klingon"}
        return [
            await ask("POST", "/v1/recommend", json={"limmit": "5" * LARGE_BYTES}),
            await ask("POST", "/v1/recommend", data=b"\xff" * (LARGE_BYTES + 1)),
            await ask("POST", "/v1/recommend", data=utf_8, headers=klingon),
            await ask("POST", "/v1/recommend", data=utf_8),
        ]

    answers = through(server_address, work)
    assert [status for status, _ in answers] == [400, 400, 400, 200]
    assert "limmit" in answers[0][1]["message"]
    assert answers[2][1]["message"] == "charset is 'klingon'; expected utf-8"


def test_where_many_large_bodies_wait_more_are_refused(
    server_address: str, parsing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.http_gateway.MAX_WAITING", 1)

    async def run() -> None:
        async with (
            grpc.aio.insecure_channel(server_address) as channel,
            test_utils.TestClient(test_utils.TestServer(gateway([channel]))) as client,
        ):

            async def ask() -> tuple[int, str | None, Any]:
                async with client.post("/v1/recommend", json=LARGE) as response:
                    return response.status, response.headers.get("Retry-After"), await response.json()

            first = asyncio.create_task(ask())
            assert await asyncio.to_thread(parsing.begun.wait, 60)
            others = {asyncio.create_task(ask()) for _ in range(2)}
            (refused,), (waiting,) = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            message = "too many large requests wait; try again in 1.00 s"
            assert refused.result() == (429, "1", {"code": "RESOURCE_EXHAUSTED", "message": message})
            assert parsing.num_begun == 1
            parsing.may_end.set()
            assert (await first)[0] == (await waiting)[0] == 200

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_large_body_keeps_its_turn_while_it_is_parsed_though_nobody_waits(parsing: SimpleNamespace) -> None:
    async def run() -> None:
        parser, body = Parser(), json.dumps(LARGE).encode()
        late, following = (pb.RecommendRequest() for _ in range(2))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await parser.parse(body, None, late)
        assert await asyncio.to_thread(parsing.begun.wait, 60)
        waiting = asyncio.create_task(parser.parse(body, None, following))
        await asyncio.sleep(0)
        assert (parser._turn.locked(), parser._num_waiting) == (True, 1)
        parsing.may_end.set()
        await waiting
        assert len(following.visitor.history) == 4000
        with pytest.raises(json_format.ParseError):
            await parser.parse(b"x" * len(body), None, late)
        assert (parser._turn.locked(), parser._num_waiting) == (False, 0)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    async def run() -> None:
        async with (
            grpc.aio.insecure_channel("127.0.0.1:1") as channel,
            test_utils.TestServer(gateway([channel])) as server,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            head = (
                b"POST /v1/recommend HTTP/1.1\r\nHost: shop\r\nContent-Length: 9\r\nx-timeout-ms: 50\r\n\r\n"
            )
            writer.write(head + b"{")
            status, _, rest = (await reader.readuntil(b"}")).partition(b"\r\n")
            assert status == b"HTTP/1.1 504 Gateway Timeout"
            message = "the body was not read and parsed within 50 ms, the call's deadline"
            assert json.loads(rest.split(b"\r\n\r\n")[1]) == {"code": "DEADLINE_EXCEEDED", "message": message}
            writer.close()
            await writer.wait_closed()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_call_gets_what_the_body_leaves_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1000.0, 1300.0])  # when the headers were there, and the message
    monkeypatch.setattr("engine.http_gateway.time", SimpleNamespace(monotonic=lambda: next(times)))
    left_s: list[float] = []

    async def run() -> None:
        async def answer(_: bytes, context: Any) -> bytes:
            left_s.append(context.time_remaining())
            return b""

        async with (
            recommending(answer) as address,
            grpc.aio.insecure_channel(address) as channel,
            test_utils.TestClient(test_utils.TestServer(gateway([channel]))) as client,
            client.post("/v1/recommend", json={}, headers={"x-timeout-ms": "600000"}) as response,
        ):
            assert response.status == 200

    asyncio.run(run())
    assert 0 < left_s[0] <= 301


def test_the_thread_that_parses_gives_the_lock_away_often(monkeypatch: pytest.MonkeyPatch) -> None:
    intervals: list[float] = []

    def run(application: Coroutine[Any, Any, Any], **_: Any) -> None:
        application.close()
        intervals.append(sys.getswitchinterval())

    monkeypatch.setattr("engine.http_gateway.web.run_app", run)
    before = sys.getswitchinterval()
    try:
        assert main([]) == 0
    finally:
        sys.setswitchinterval(before)
    assert intervals == [SWITCH_INTERVAL_S]


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
    for path in document["paths"].values():
        call = path["post"]
        assert {one["name"] for one in call["parameters"]} == {
            "x-timeout-ms",
            "x-request-id",
            "traceparent",
            "tracestate",
        }
        assert set(call["responses"]["200"]["headers"]) == {"x-request-id"}
        assert set(call["responses"]["default"]["headers"]) == {"x-request-id", "Retry-After"}
    keys = document["components"]["securitySchemes"]
    assert {name for one in call["security"] for name in one} == set(keys)
    said = {one["name"] for one in PARAMETERS} | {keys["key_header"]["name"], "authorization"}
    assert said == {*HEADERS, REQUEST_ID, "x-timeout-ms"}  # all that the gateway reads
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


class Page(HTMLParser):
    """What stands in an HTML text; raises where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.code: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            assert name in ("id", "href", "lang", "charset")
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.links.add(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["code"]:
            self.code.append(data)


def test_the_page_says_what_the_document_says() -> None:
    document = openapi()
    page = Page(html_page(document))
    schemas = document["components"]["schemas"]
    assert page.ids == list(schemas)  # each message once
    assert page.links == {f"#{name}" for name in schemas} | {"openapi.json"}
    assert {f"POST {path}" for path in document["paths"]} <= set(re.findall(r"POST /v1/[a-z-]+", page.text))
    fields = {field for schema in schemas.values() for field in schema["properties"]}
    assert fields | {one["name"] for one in PARAMETERS} | set(ERROR_HEADERS) <= set(page.code)
    assert "integer, 1 to 999999, 5000 where none is given" in page.text
    assert "map of string to string" in page.text
    assert "VISITOR_KIND_KNOWN_USER" in page.text
    assert not page.tags & {"script", "link", "img", "iframe", "form"}


def test_the_page_shows_what_is_no_html_of_its_own() -> None:
    evil = "<script>alert('1')</script>&\""
    text = {"schema": {"type": evil, "format": evil, "description": evil}, "description": evil}
    message = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{evil[:8]}"}}}}
    answer = {"description": evil, "headers": {evil: text}}
    call = {
        "parameters": [{"name": evil, **text}],
        "requestBody": message,
        "responses": {evil: answer | message},
    }
    fields = {evil: {"type": "array", "items": {"type": "string", "enum": [evil]}}}
    document = {
        "info": {"title": evil, "version": evil},
        "paths": {evil: {evil: call}},
        "components": {"schemas": {evil[:8]: {"properties": fields}}},
    }
    page = html_page(document)
    assert "<script" not in page
    assert html.escape(evil) in page
    assert "script" not in Page(page).tags


def test_the_page_is_served() -> None:
    async def run() -> None:
        async with (
            grpc.aio.insecure_channel("127.0.0.1:1") as channel,
            test_utils.TestClient(test_utils.TestServer(gateway([channel]))) as client,
            client.get("/docs") as response,
        ):
            assert (response.status, response.content_type) == (200, "text/html")
            assert await response.text() == html_page(openapi())
            # A browser would not load anything else, were there anything.
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")

    asyncio.run(run())


def test_without_its_package_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['aiohttp'] = None; "
    for rest, code in (
        ("import runpy; runpy.run_module('engine.http_gateway', run_name='__main__')", 2),
        ("import engine.http_gateway", 1),
    ):
        command = [sys.executable, "-c", program + rest]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert NO_PACKAGE in done.stderr.splitlines()[-1]
        assert ("Traceback" in done.stderr) == (code == 1)  # an importer's own mistake
    assert "pip install aiohttp" in NO_PACKAGE
