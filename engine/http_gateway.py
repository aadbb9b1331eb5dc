"""JSON over HTTP for those who cannot speak gRPC: `python -m engine.http_gateway --server 127.0.0.1:50051`.

    POST /v1/recommend          {"visitor": {"user_id": "u1"}, "limit": 5}
    GET  /docs  /openapi.json  /healthz

Every unary call of the service is a path, made from the descriptors as is the OpenAPI document, so that a
change of the .proto needs no change here. Fields are spelled as in the .proto; 64-bit numbers are strings, as
protobuf's JSON mapping has it. The gateway only translates: limits, keys and deadlines are the server's. As
clients should, it asks all addresses of the server's name in turn, and comes back where the server says so.
A caller who goes away takes the call along, unless it records events. Large bodies are parsed in a thread,
one at a time; where many wait for that, more are refused.

Needs the extra `http`, aiohttp: HTTP/1.1 that may face a network, in one package, which PyTorch Geometric
brings along anyway. Starlette would need uvicorn and h11; the standard library says of its own server that it
is not for production.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.arguments import ArgumentParser
from engine.client import aio_channels
from engine.messages import MAX_MESSAGE_BYTES
from engine.telemetry import read_request_id
from engine.tls import client_credentials
from protos.trirank.v1 import recommender_pb2 as pb

NO_PACKAGE = "the HTTP gateway needs a package more, that of the extra http: pip install aiohttp"
try:
    from aiohttp import web
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise ModuleNotFoundError(NO_PACKAGE, name=error.name) from error
    print(f"error: {NO_PACKAGE}", file=sys.stderr)
    sys.exit(2)

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["RecommenderService"]
WRITES = {"RecordEvents"}
GONE_S = 0.05  # how often a call that takes long is asked whether anybody waits for it
DEFAULT_TIMEOUT_S = 5.0
MAX_TIMEOUT_MS = 999_999
# protobuf parses JSON in Python, 1 us a byte at worst: a body of LARGE_BYTES takes up to 40 ms, and one of
# MAX_MESSAGE_BYTES 7 s and 300 MB, which is why no two of them are parsed at once.
LARGE_BYTES = 32 << 10
MAX_WAITING = 16  # large bodies that wait to be parsed
RETRY_AFTER_S = 1.0  # for those that are refused
SWITCH_INTERVAL_S = 0.0005  # of the interpreter's lock, which the thread that parses keeps as long
REQUEST_ID = "x-request-id"
# Passed on as metadata, beside the request's id.
HEADERS = ("authorization", "x-api-key", "traceparent", "tracestate")
# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
SCALARS: dict[int, dict[str, str]] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "format": "int64"},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_UINT64: {"type": "string", "format": "uint64"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
}

# What a caller may say of each call, as OpenAPI words it; keys are security schemes there.
PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "x-timeout-ms",
        "in": "header",
        "description": "How long the answer may take, from the arrival of the request's headers on; what the "
        "body leaves of it the server's stages share.",
        "schema": {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_TIMEOUT_MS,
            "default": round(DEFAULT_TIMEOUT_S * 1000),
        },
    },
    {
        "name": REQUEST_ID,
        "in": "header",
        "description": "A name for the request, which the server's log and the answer have too: "
        "1 to 64 letters, digits and ._:/+=-; anything else is replaced by a new name.",
        "schema": {"type": "string"},
    },
    {
        "name": "traceparent",
        "in": "header",
        "description": "The trace that the request belongs to (W3C Trace Context).",
        "schema": {"type": "string"},
    },
    {
        "name": "tracestate",
        "in": "header",
        "description": "What goes with traceparent.",
        "schema": {"type": "string"},
    },
]
ANSWER_HEADERS: dict[str, Any] = {
    REQUEST_ID: {
        "description": "The request's name: the caller's, or a new one.",
        "schema": {"type": "string"},
    }
}
ERROR_HEADERS: dict[str, Any] = ANSWER_HEADERS | {
    "Retry-After": {
        "description": "Seconds after which to ask again, where the server says so.",
        "schema": {"type": "integer"},
    }
}
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin-bottom: 1rem }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top }
h2 { border-top: 2px solid #ccc; padding-top: 1rem }
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NAME = web.RequestKey("name", str)  # of a request


class TooManyWaitError(RuntimeError):
    """As many large bodies wait to be parsed as may."""


class Parser:
    """Parses bodies of JSON; large ones in a thread, one at a time, and other calls go on meanwhile."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def parse(self, body: bytes, charset: str | None, message: Message) -> None:
        """Read a body into a message.

        Args:
            body: of a request; an empty one is an empty message.
            charset: that its header names.
            message: gets the fields.

        Raises:
            ValueError, json_format.ParseError: it is not JSON, not of that charset, or has other fields.
            TooManyWaitError: it is large, and MAX_WAITING others wait.
        """
        if len(body) <= LARGE_BYTES:
            _parse(body, charset, message)
            return
        if self._num_waiting >= MAX_WAITING:
            raise TooManyWaitError(f"too many large requests wait; try again in {RETRY_AFTER_S:.2f} s")
        self._num_waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._num_waiting -= 1
        parsing = asyncio.create_task(asyncio.to_thread(_parse, body, charset, message))
        parsing.add_done_callback(lambda _: self._turn.release())
        # It goes on where nobody waits for it any more, and keeps its turn: threads cannot be ended.
        await asyncio.shield(parsing)


def gateway(channels: Sequence[grpc.aio.Channel]) -> web.Application:
    """Return the application that answers from the servers at the other end of channels, used in turn."""
    application = web.Application(client_max_size=MAX_MESSAGE_BYTES, middlewares=[_name_and_word])
    document = openapi()
    page = html_page(document)
    parser = Parser()

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(document)

    async def show(request: web.Request) -> web.Response:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return web.Response(text=page, content_type="text/html", headers=policy)

    async def health(request: web.Request) -> web.Response:
        stub = health_pb2_grpc.HealthStub(channels[0])
        try:
            found = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE.full_name), timeout=2.0)
        except grpc.aio.AioRpcError as error:
            return _refusal(503, error.code().name, error.details() or "")
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(found.status)
        return web.json_response({"status": status}, status=200 if status == "SERVING" else 503)

    application.router.add_get("/openapi.json", describe)
    application.router.add_get("/docs", show)
    application.router.add_get("/healthz", health)
    for method in SERVICE.methods:
        application.router.add_post(path_of(method), _handler(channels, method, parser))
    return application


def path_of(method: MethodDescriptor) -> str:
    """Return a call's path: /v1/similar-items for SimilarItems."""
    return "/v1/" + re.sub(r"(?<!^)(?=[A-Z])", "-", method.name).lower()


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the service, made from its descriptors."""
    schemas: dict[str, Any] = {
        "Error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        }
    }
    paths = {}
    for method in SERVICE.methods:
        for message in (method.input_type, method.output_type):
            _add_schema(message, schemas)
        paths[path_of(method)] = {
            "post": {
                "operationId": method.name,
                "parameters": PARAMETERS,
                "requestBody": {"required": True, "content": _json(_reference(method.input_type.name))},
                "responses": {
                    "200": {
                        "description": "The answer",
                        "headers": ANSWER_HEADERS,
                        "content": _json(_reference(method.output_type.name)),
                    },
                    "default": {
                        "description": "What is wrong, with the gRPC status code",
                        "headers": ERROR_HEADERS,
                        "content": _json(_reference("Error")),
                    },
                },
                "security": [{}, {"key": []}, {"key_header": []}],
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": SERVICE.full_name, "version": SERVICE.full_name.split(".")[-2]},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "key_header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def html_page(document: Mapping[str, Any]) -> str:
    """Return the OpenAPI document as a page to read: one HTML text, without scripts and without links to
    anywhere else, as the gateway's callers may have no way out of their network.
    """
    schemas = document["components"]["schemas"]
    title = escape(f"{document['info']['title']}, {document['info']['version']}")
    parts = [
        f"<h1>{title}</h1>",
        '<p>For programs: <a href="openapi.json">openapi.json</a>. Every request and answer is JSON. Where '
        "the server wants a key: <code>authorization: Bearer KEY</code> or <code>x-api-key: KEY</code>.</p>",
    ]
    for path, calls in document["paths"].items():
        for verb, call in calls.items():
            parts.append(f"<h2>{escape(verb.upper())} {escape(path)}</h2>")
            parts.append(_table({one["name"]: one for one in call["parameters"]}, "header of the request"))
            parts.append(_message(call["requestBody"], "Request", schemas))
            for status, answer in call["responses"].items():
                words = "every other status" if status == "default" else f"status {status}"
                parts.append(_message(answer, f"{answer['description']} ({words})", schemas))
                parts.append(_table(answer["headers"], "header of the answer"))
    parts.append("<h2>Messages</h2>")
    for name, schema in schemas.items():
        parts.append(f'<h3 id="{escape(name)}">{escape(name)}</h3>')
        parts.append(_table(schema["properties"]))
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _message(content: Mapping[str, Any], heading: str, schemas: Mapping[str, Any]) -> str:
    """Return a heading that names a message, and the message's fields."""
    reference = content["content"]["application/json"]["schema"]
    fields = schemas[_name_of(reference)]["properties"]
    return f"<h3>{escape(heading)}: {_type(reference)}</h3>\n{_table(fields)}"


def _table(entries: Mapping[str, Any], of: str = "field") -> str:
    """Return a table of named schemas, or of parameters or headers, which have a schema each."""
    if not entries:
        return "<p>No fields.</p>"
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{_type(entry.get('schema', entry))}</td>"
        f"<td>{escape(entry.get('description', ''))}</td></tr>"
        for name, entry in entries.items()
    ]
    head = f"<tr><th>{escape(of)}</th><th>type</th><th></th></tr>"
    return f"<table>{head}\n" + "\n".join(rows) + "</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """Return in HTML what a value may be."""
    if "$ref" in schema:
        name = escape(_name_of(schema))
        return f'<a href="#{name}">{name}</a>'
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(values := schema.get("additionalProperties"), Mapping):
        return f"map of string to {_type(values)}"
    if "enum" in schema:
        return escape(" | ".join(schema["enum"]))
    words = f"{schema['type']} ({schema['format']})" if "format" in schema else schema["type"]
    if "minimum" in schema:
        words += f", {schema['minimum']} to {schema['maximum']}, {schema['default']} where none is given"
    return escape(words)


@web.middleware
async def _name_and_word(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request a name, and word what aiohttp refuses as the calls do: as an Error of the document.

    The name is given here and not left to the server, as an answer that does not come in time would lack it.
    """
    request[NAME] = read_request_id(request.headers.items())
    response: web.StreamResponse
    try:
        response = await handler(request)
    except web.HTTPMethodNotAllowed as error:
        expected = ", ".join(sorted(error.allowed_methods))
        response = _refusal(405, "UNIMPLEMENTED", f"the method is {error.method}; expected {expected}")
        response.headers["Allow"] = expected
    except web.HTTPNotFound:
        # gRPC's word for a call that is not there; NOT_FOUND is an item's.
        message = f"the path is {request.path[:100]!r}; expected one of those at /docs"
        response = _refusal(404, "UNIMPLEMENTED", message)
    except web.HTTPRequestEntityTooLarge:
        expected = f"at most {MAX_MESSAGE_BYTES} bytes"
        response = _refusal(413, "INVALID_ARGUMENT", f"the body is too large; expected {expected}")
    except web.HTTPException as error:
        response = _refusal(error.status, "INVALID_ARGUMENT", error.reason)
    except Exception:  # the caller is told in JSON here too, and the log what it was
        logger.exception("request %s failed", request[NAME])
        response = _refusal(500, "INTERNAL", f"the gateway failed; its log names {request[NAME]}")
    response.headers.setdefault(REQUEST_ID, request[NAME])
    return response


def _handler(channels: Sequence[grpc.aio.Channel], method: MethodDescriptor, parser: Parser) -> Handler:
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    asks = itertools.cycle(
        [
            channel.unary_unary(
                f"/{SERVICE.full_name}/{method.name}",
                request_serializer=request_class.SerializeToString,
                response_deserializer=response_class.FromString,
            )
            for channel in channels
        ]
    )

    async def handle(request: web.Request) -> web.Response:
        begin = time.monotonic()
        message = request_class()
        try:
            timeout_s = _timeout_s(request)
            async with asyncio.timeout(timeout_s):
                await parser.parse(await _body(request), request.charset, message)
        except (json_format.ParseError, ValueError) as error:  # not JSON, not UTF-8, or not these fields
            return _refusal(400, "INVALID_ARGUMENT", str(error))
        except TooManyWaitError as error:
            retry_after_ms = str(round(RETRY_AFTER_S * 1000))
            return _refusal(429, "RESOURCE_EXHAUSTED", str(error), [("retry-after-ms", retry_after_ms)])
        except TimeoutError:
            late = grpc.StatusCode.DEADLINE_EXCEEDED
            words = f"the body was not read and parsed within {timeout_s * 1000:.0f} ms, the call's deadline"
            return _refusal(HTTP_STATUS[late], late.name, words)
        metadata = [(name, request.headers[name]) for name in HEADERS if name in request.headers]
        metadata.append((REQUEST_ID, request[NAME]))
        for name, value in metadata:
            if not (value.isascii() and value.isprintable()):  # gRPC takes no other
                return _refusal(400, "INVALID_ARGUMENT", f"{name} is not of printable ASCII characters")
        time_left_s = max(0.0, begin + timeout_s - time.monotonic())
        call = next(asks)(message, timeout=time_left_s, metadata=metadata)
        try:
            response = await _answer(call, request, is_read=method.name not in WRITES)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            return _refusal(499, "CANCELLED", "the caller has gone")
        except grpc.aio.AioRpcError as error:
            return _refusal(
                HTTP_STATUS.get(error.code(), 500),
                error.code().name,
                error.details() or "",
                error.trailing_metadata() or (),  # type: ignore[arg-type]  # pairs, unlike the stubs say
            )
        text = json_format.MessageToJson(response, preserving_proto_field_name=True, indent=None)
        headers = _headers(await call.trailing_metadata())
        return web.Response(text=text, content_type="application/json", headers=headers)

    return handle


async def _answer(call: Any, request: web.Request, *, is_read: bool) -> Any:
    """Await a call; cancel it where it only reads, and nobody waits for it any more.

    aiohttp would cancel the handler, and with it what somebody sent and left, such as the last clicks on a
    page that closes.
    """
    answer = asyncio.ensure_future(_of(call))
    while not answer.done():
        await asyncio.wait([answer], timeout=GONE_S)
        if is_read and (request.transport is None or request.transport.is_closing()):
            call.cancel()
    return answer.result()


async def _of(call: Any) -> Any:
    return await call


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.RequestPayloadError as error:
        encoding = request.headers.get("content-encoding", "none")
        raise ValueError(f"the body cannot be read; its content-encoding is {encoding[:20]!r}") from error


def _parse(body: bytes, charset: str | None, message: Message) -> None:
    try:
        text = body.decode(charset or "utf-8")
    except LookupError as error:
        raise ValueError(f"charset is {charset!r}; expected utf-8") from error
    json_format.Parse(text or "{}", message)


def _timeout_s(request: web.Request) -> float:
    """Return the deadline that the header x-timeout-ms asks for."""
    given = request.headers.get("x-timeout-ms")
    if given is None:
        return DEFAULT_TIMEOUT_S
    if not re.fullmatch(r"[0-9]{1,6}", given) or not int(given):
        raise ValueError(f"x-timeout-ms is {given[:20]!r}; expected 1 to {MAX_TIMEOUT_MS}")
    return int(given) / 1000


def _refusal(
    status: int, code: str, message: str, metadata: Iterable[tuple[str, str | bytes]] = ()
) -> web.Response:
    return web.json_response({"code": code, "message": message}, status=status, headers=_headers(metadata))


def _headers(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """Return what HTTP's callers are told of a call's trailing metadata."""
    headers = {}
    for name, value in metadata:
        if name == "retry-after-ms":
            headers["Retry-After"] = str(-(-int(value) // 1000))  # whole seconds, rounded up
        elif name == REQUEST_ID:
            headers[REQUEST_ID] = str(value)
    return headers


def _add_schema(message: Descriptor, schemas: dict[str, Any]) -> None:
    if message.name in schemas:
        return
    schemas[message.name] = schema = {"type": "object", "properties": {}, "additionalProperties": False}
    schema["properties"] = {field.name: _schema(field, schemas) for field in message.fields}


def _schema(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        value = message.fields_by_name["value"]
        return {"type": "object", "additionalProperties": _schema(value, schemas)}
    one: dict[str, Any]
    if message is not None:
        _add_schema(message, schemas)
        one = _reference(message.name)
    elif field.enum_type is not None:
        one = {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    else:
        one = dict(SCALARS[field.type])
    return {"type": "array", "items": one} if field.is_repeated else one


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _name_of(reference: Mapping[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def main(argv: list[str] | None = None) -> int:
    """Answer HTTP requests until SIGTERM or SIGINT."""
    parser = ArgumentParser(prog="python -m engine.http_gateway", description=main.__doc__)
    parser.add_argument("--server", type=str, default="127.0.0.1:50051", help="host:port of `trirank serve`")
    parser.add_argument(
        "--num_channels",
        type=int,
        default=1,
        help="connections to each address of the server, which its --num_processes share",
    )
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on")
    parser.add_argument(
        "--tls_ca", type=Path | None, default=None, help="authority of the server's certificate, PEM"
    )
    parser.add_argument(
        "--tls_cert", type=Path | None, default=None, help="own certificate for the server, PEM"
    )
    parser.add_argument("--tls_key", type=Path | None, default=None, help="its key, PEM")
    parser.add_argument("--openapi", action="store_true", help="print the OpenAPI document and end")
    options = parser.parse_args(argv)
    if options.openapi:
        print(json.dumps(openapi(), indent=2))
        return 0
    try:
        if options.num_channels < 1:
            raise ValueError(f"num_channels is {options.num_channels}; expected at least 1")
        credentials = client_credentials(options.tls_ca, options.tls_cert, options.tls_key)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def application() -> web.Application:
        channels = aio_channels(options.server, credentials, options.num_channels)
        made = gateway(channels)

        async def close(_: web.Application) -> None:
            await asyncio.gather(*(channel.close(None) for channel in channels))

        made.on_cleanup.append(close)
        return made

    web.run_app(
        application(),
        host=options.host,
        port=options.port,
        access_log=None,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
