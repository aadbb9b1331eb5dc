"""JSON over HTTP for those who cannot speak gRPC: `python -m engine.http_gateway --server 127.0.0.1:50051`.

    POST /v1/recommend          {"visitor": {"user_id": "u1"}, "limit": 5}
    GET  /openapi.json  /healthz

Every unary call of the service is a path, made from the descriptors as is the OpenAPI document, so that a
change of the .proto needs no change here. Fields are spelled as in the .proto; 64-bit numbers are strings, as
protobuf's JSON mapping has it. The gateway only translates: limits, keys and deadlines are the server's. As
clients should, it asks all addresses of the server's name in turn, and comes back where the server says so.

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
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.arguments import ArgumentParser
from engine.client import aio_channels
from engine.messages import MAX_MESSAGE_BYTES
from engine.tls import client_credentials
from protos.trirank.v1 import recommender_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["RecommenderService"]
DEFAULT_TIMEOUT_S = 5.0
# Passed on as metadata.
HEADERS = ("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate")
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

Handler = Callable[[web.Request], Awaitable[web.Response]]


def gateway(channels: Sequence[grpc.aio.Channel]) -> web.Application:
    """Return the application that answers from the servers at the other end of channels, used in turn."""
    application = web.Application(client_max_size=MAX_MESSAGE_BYTES)
    document = openapi()

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(document)

    async def health(request: web.Request) -> web.Response:
        stub = health_pb2_grpc.HealthStub(channels[0])
        try:
            found = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE.full_name), timeout=2.0)
        except grpc.aio.AioRpcError as error:
            return _refusal(503, error.code().name, error.details() or "")
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(found.status)
        return web.json_response({"status": status}, status=200 if status == "SERVING" else 503)

    application.router.add_get("/openapi.json", describe)
    application.router.add_get("/healthz", health)
    for method in SERVICE.methods:
        application.router.add_post(path_of(method), _handler(channels, method))
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
                "requestBody": {"required": True, "content": _json(_reference(method.input_type.name))},
                "responses": {
                    "200": {
                        "description": "The answer",
                        "content": _json(_reference(method.output_type.name)),
                    },
                    "default": {
                        "description": "What is wrong, with the gRPC status code",
                        "content": _json(_reference("Error")),
                    },
                },
                "security": [{}, {"key": []}],
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": SERVICE.full_name, "version": SERVICE.full_name.split(".")[-2]},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _handler(channels: Sequence[grpc.aio.Channel], method: MethodDescriptor) -> Handler:
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
        try:
            timeout_s = _timeout_s(request)
            message = json_format.Parse(await _text(request) or "{}", request_class())
        except (json_format.ParseError, ValueError) as error:  # not JSON, not UTF-8, or not these fields
            return _refusal(400, "INVALID_ARGUMENT", str(error))
        metadata = [(name, request.headers[name]) for name in HEADERS if name in request.headers]
        for name, value in metadata:
            if not (value.isascii() and value.isprintable()):  # gRPC takes no other
                return _refusal(400, "INVALID_ARGUMENT", f"{name} is not of printable ASCII characters")
        try:
            response = await next(asks)(message, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return _refusal(
                HTTP_STATUS.get(error.code(), 500),
                error.code().name,
                error.details() or "",
                error.trailing_metadata() or (),  # type: ignore[arg-type]  # pairs, unlike the stubs say
            )
        text = json_format.MessageToJson(response, preserving_proto_field_name=True, indent=None)
        return web.Response(text=text, content_type="application/json")

    return handle


async def _text(request: web.Request) -> str:
    try:
        return await request.text()
    except LookupError as error:
        raise ValueError(f"charset is {request.charset!r}; expected utf-8") from error


def _timeout_s(request: web.Request) -> float:
    """Return the deadline that the header x-timeout-ms asks for."""
    given = request.headers.get("x-timeout-ms")
    if given is None:
        return DEFAULT_TIMEOUT_S
    if not re.fullmatch(r"[0-9]{1,6}", given) or not int(given):
        raise ValueError(f"x-timeout-ms is {given[:20]!r}; expected 1 to 999999")
    return int(given) / 1000


def _refusal(
    status: int, code: str, message: str, metadata: Iterable[tuple[str, str | bytes]] = ()
) -> web.Response:
    headers = {}
    for name, value in metadata:
        if name == "retry-after-ms":
            headers["Retry-After"] = str(-(-int(value) // 1000))  # whole seconds, rounded up
    return web.json_response({"code": code, "message": message}, status=status, headers=headers)


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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    async def application() -> web.Application:
        channels = aio_channels(options.server, credentials, options.num_channels)
        made = gateway(channels)

        async def close(_: web.Application) -> None:
            await asyncio.gather(*(channel.close(None) for channel in channels))

        made.on_cleanup.append(close)
        return made

    web.run_app(application(), host=options.host, port=options.port, access_log=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
