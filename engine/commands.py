"""The commands around a bundle and a running server: inspect, policy, recommend, similar, rank, record.

Each takes its arguments and returns an exit code: 0 done, 1 the server failed, 2 what was asked for is wrong,
3 the server does not answer. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.arguments import ArgumentParser
from engine.bundle import Bundle, BundleError, resolve_bundle, verify_files
from engine.client import RecommenderClient, visitor
from engine.history import EVENT_TYPES
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from engine.tls import client_credentials
from protos.trirank.v1 import recommender_pb2 as pb
from reranking.families import settings_of

DEFAULT_ADDRESS = "127.0.0.1:50051"

Answer = pb.RecommendResponse | pb.SimilarItemsResponse | pb.RankResponse
Response = Answer | pb.RecordEventsResponse
WRONG_QUESTIONS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
API_KEY = "TRIRANK_API_KEY"  # of the environment, where no option gives a key

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def policy(argv: list[str]) -> int:
    """Check policies as `trirank serve --policies` would, and print what each of them does."""
    parser = ArgumentParser(prog="trirank policy", description=policy.__doc__)
    parser.add_argument("action", type=Literal["check"], help="check")
    parser.add_argument("policies", type=Path, help="a YAML file of policies, or a directory of such files")
    parser.add_argument(
        "--bundle",
        type=Path | None,
        default=None,
        help="check what they name against the catalog of this bundle, or of the newest in this directory",
    )
    args = parser.parse_args(argv)
    try:
        policies = PolicyFiles(args.policies).load()
        warnings = []
        if args.bundle:
            bundle = Bundle.load(resolve_bundle(args.bundle))
            warnings = RecommendationPipeline(bundle, policies).reranker.warnings
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    table = Table("policy", "rule", "settings", "overrides")
    for name, one in policies.by_name.items():
        for number, rule in enumerate(one.rules):
            title = "" if number else name + (" (default)" if name == policies.default else "")
            bounds = {
                key.removeprefix(f"{rule.name}."): f"{bound.min:g} to {bound.max:g}"
                for key, bound in one.overrides.items()
                if key.startswith(f"{rule.name}.")
            }
            settings = {s.name: getattr(rule, s.name) for s in settings_of(type(rule))}
            given = {key: value for key, value in settings.items() if value not in (None, ())}
            table.add_row(_plain(title), _plain(rule.name), *(_plain(_pairs(d)) for d in (given, bounds)))
        table.add_section()
    stdout.print(table)
    for warning in warnings:
        stderr.print(f"note: {warning}", markup=False)
    checked = f"against {bundle.version}" if args.bundle else "without a catalog (--bundle)"
    stderr.print(f"{len(policies.by_name)} policies are right, checked {checked}", markup=False)
    return 0


def _pairs(values: Mapping[str, object]) -> str:
    def shown(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return "; ".join(f"{key} {shown(value)}" for key, value in values.items())


def inspect(argv: list[str]) -> int:
    """Show what a bundle is, after checking the checksum of each of its files."""
    parser = ArgumentParser(prog="trirank inspect", description=inspect.__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle, or a directory of bundles: the newest is shown")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    args = parser.parse_args(argv)
    try:
        path = resolve_bundle(args.bundle)
        manifest = verify_files(path)
    except BundleError as error:
        return fail(str(error), 2)
    if args.json:
        stdout.print_json(data=manifest)
        return 0
    table = Table("field", "value", title=f"bundle {manifest['version']}", title_justify="left")
    for section, content in manifest.items():
        if section == "files":
            content = {name: f"{entry['bytes']:,} bytes, checksum right" for name, entry in content.items()}
        for key, value in _flattened(section, content):
            table.add_row(_plain(key), _plain(value))
    stdout.print(table)
    return 0


def recommend(argv: list[str]) -> int:
    """Ask a running server for the best items for a visitor."""
    parser = ArgumentParser(prog="trirank recommend", description=recommend.__doc__)
    add_recommend_arguments(parser)
    parser.add_argument(
        "--explain", action="store_true", help="say of every item which rules moved it (see trirank explain)"
    )
    add_client_arguments(parser)
    args = parser.parse_args(argv)
    return ask(args, lambda client: client.recommend(**recommend_arguments(args), explain=args.explain))


def similar(argv: list[str]) -> int:
    """Ask a running server for the items nearest to an item."""
    parser = ArgumentParser(prog="trirank similar", description=similar.__doc__)
    parser.add_argument("item", type=str, help="id of the item")
    _add_slate_arguments(parser)
    _add_context_argument(parser)
    add_client_arguments(parser)
    args = parser.parse_args(argv)
    return ask(
        args,
        lambda client: client.similar_items(
            args.item,
            limit=args.limit,
            exclude_item_ids=args.exclude,
            filters=_filters(args),
            policy=args.policy,
            now_ms=args.now_ms,
            context=_context(args.context),
        ),
    )


def rank(argv: list[str]) -> int:
    """Ask a running server to put given items in order for a visitor."""
    parser = ArgumentParser(prog="trirank rank", description=rank.__doc__)
    parser.add_argument("candidates", type=str, nargs="+", help="ids of the items to put in order")
    _add_visitor_arguments(parser)
    add_client_arguments(parser)
    args = parser.parse_args(argv)
    return ask(
        args,
        lambda client: client.rank(
            visitor(args.user, args.history, _context(args.context)),
            args.candidates,
            head_weights=_numbers("head_weight", "head", args.head_weights),
        ),
    )


def record(argv: list[str]) -> int:
    """Tell a running server what a user did, so that its next answer knows."""
    parser = ArgumentParser(prog="trirank record", description=record.__doc__)
    parser.add_argument("item_ids", type=str, nargs="+", help="ids of the items, oldest first")
    parser.add_argument("--user", type=str, required=True, help="user id")
    parser.add_argument(
        "--type",
        type=Literal[EVENT_TYPES],
        default=EVENT_TYPES[0],
        help="what the user did with them",
    )
    add_client_arguments(parser)
    args = parser.parse_args(argv)
    events = [
        pb.RecordedEvent(event_id=uuid.uuid4().hex, user_id=args.user, item_id=item, event_type=args.type)
        for item in args.item_ids
    ]
    return ask(args, lambda client: client.record_events(events), _print_recorded)


def _print_recorded(response: pb.RecordEventsResponse) -> None:
    delayed = ", delayed until Redis is back" if response.delayed else ""
    stdout.print(f"new events: {response.num_new}{delayed}", markup=False)


def _add_visitor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--user", type=str, default="", help="user id; nothing for an unknown visitor")
    parser.add_argument(
        "--history",
        type=str,
        nargs="+",
        default=[],
        help="ids of items that the visitor just touched, oldest first: --history B01 B02",
    )
    _add_context_argument(parser)
    parser.add_argument(
        "--head_weights",
        type=str,
        nargs="+",
        default=[],
        help="what the score is the mean of, weighed, where the ranker has heads: "
        "--head_weights next=1 purchase=3",
    )


def _add_context_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--context", type=str, nargs="+", default=[], help="what else is known: --context region=DE age=30"
    )


def add_recommend_arguments(parser: ArgumentParser) -> None:
    """Add what `recommend_arguments` reads: the question of Recommend."""
    _add_visitor_arguments(parser)
    _add_slate_arguments(parser)
    parser.add_argument(
        "--override",
        type=str,
        nargs="+",
        default=[],
        help="numbers of the policy to change, within its bounds: --override mmr.relevance_weight=0.7",
    )
    parser.add_argument(
        "--seed", type=int | None, default=None, help="of all that is random (default: the visitor)"
    )


def recommend_arguments(args: Any) -> dict[str, Any]:
    """Return the question as keywords of RecommenderClient.recommend; ValueError where it cannot be read."""
    return {
        "visitor": visitor(args.user, args.history, _context(args.context)),
        "limit": args.limit,
        "exclude_item_ids": args.exclude,
        "filters": _filters(args),
        "policy": args.policy,
        "overrides": _numbers("override", "rule.setting", args.override),
        "head_weights": _numbers("head_weight", "head", args.head_weights),
        "seed": args.seed,
        "now_ms": args.now_ms,
    }


def _add_slate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=int | None, default=None, help="how many items, 1 to 500 (default: the bundle's own)"
    )
    parser.add_argument("--exclude", type=str, nargs="+", default=[], help="ids of items not to show")
    parser.add_argument(
        "--category", type=str, nargs="+", default=[], help="only these categories, at any level of the path"
    )
    parser.add_argument("--brand", type=str, nargs="+", default=[], help="only these brands")
    parser.add_argument("--seller", type=str, nargs="+", default=[], help="only these sellers")
    parser.add_argument("--min_price", type=float | None, default=None, help="lowest price, inclusive")
    parser.add_argument("--max_price", type=float | None, default=None, help="highest price, inclusive")
    parser.add_argument(
        "--policy", type=str, default="", help="name of the policy (default: the default one)"
    )
    parser.add_argument(
        "--now_ms",
        type=int | None,
        default=None,
        help="time of the request, milliseconds since 1970 (default: now)",
    )


def add_client_arguments(parser: ArgumentParser) -> None:
    """Add what `ask` reads: where the server is, and how to print its answer."""
    parser.add_argument("--address", type=str, default=DEFAULT_ADDRESS, help="host:port of the server")
    parser.add_argument("--timeout_s", type=float, default=5.0, help="how long to wait for the answer")
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    parser.add_argument(
        "--tls_ca",
        type=Path | None,
        default=None,
        help="authority of the server's certificate, PEM (default: a connection without TLS)",
    )
    parser.add_argument(
        "--tls_cert", type=Path | None, default=None, help="own certificate, PEM, for a server that wants one"
    )
    parser.add_argument("--tls_key", type=Path | None, default=None, help="its key, PEM")
    parser.add_argument(
        "--api_key", type=str | None, default=None, help=f"API key (default: ${API_KEY} of the environment)"
    )


def _filters(args: Any) -> pb.Filters:
    return pb.Filters(
        categories=args.category,
        brands=args.brand,
        seller_ids=args.seller,
        min_price=args.min_price,
        max_price=args.max_price,
    )


def _context(pairs: list[str]) -> dict[str, str]:
    context = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"context is {pair!r}; expected key=value")
        context[key] = value
    return context


def _numbers(what: str, form: str, pairs: list[str]) -> dict[str, float]:
    numbers = {}
    for pair in pairs:
        key, equals, value = pair.rpartition("=")
        try:
            numbers[key] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{what} is {pair!r}; expected {form}=number")
    return numbers


def ask(
    args: Any,
    call: Callable[[RecommenderClient], Response],
    show: Callable[[Any], None] | None = None,
) -> int:
    """Make one call and print its answer, or one line about what went wrong.

    Args:
        args: what `add_client_arguments` added.
        call: makes the call.
        show: prints the answer where JSON is not asked for; as a table of items where None.
    """
    try:
        with RecommenderClient(
            args.address,
            timeout_s=args.timeout_s,
            api_key=args.api_key or os.environ.get(API_KEY),
            credentials=client_credentials(args.tls_ca, args.tls_cert, args.tls_key),
        ) as client:
            response = call(client)
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        if code in WRONG_QUESTIONS:
            return fail(details or "", 2)
        if code == grpc.StatusCode.UNAVAILABLE:
            return fail(f"no answer; is `trirank serve` running at {args.address}? ({details})", 3)
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return fail(f"no answer from {args.address} within {args.timeout_s:g} s", 3)
        return fail(f"{code.name}: {details}", 1)
    if args.json:
        stdout.print_json(data=MessageToDict(response, preserving_proto_field_name=True))
    else:
        printing: Callable[[Any], None] = show or _print_answer
        printing(response)
    return 0


def _print_answer(response: Answer) -> None:
    has_reasons = any(item.HasField("reasons") for item in response.items)
    items = Table("", "item", "title", "source", "score", *(["moved by"] if has_reasons else []))
    for place, item in enumerate(response.items, start=1):
        moves = [_plain(moves_of(item))] if has_reasons else []
        score = f"{item.score:.4g}"
        items.add_row(str(place), _plain(item.item_id), _plain(item.title), item.source, score, *moves)
    stdout.print(items)
    trace = response.trace
    stdout.print(timings_table(trace))
    kind = pb.VisitorKind.Name(trace.visitor_kind).removeprefix("VISITOR_KIND_").lower().replace("_", " ")
    notes = {
        "bundle": trace.bundle_version,
        "variant": trace.variant,
        "policy": response.arrangement.policy if isinstance(response, pb.RecommendResponse) else "",
        "visitor": ("" if kind == "unspecified" else kind)
        + (" (the user id is unknown: treated as new)" if trace.unknown_user else ""),
        "degraded stages": ", ".join(trace.degraded_stages),
        "relaxed rules": ", ".join(trace.relaxed_rules),
        "unknown items in the history": str(trace.num_unknown_history_items or ""),
        "ignored context": ", ".join(trace.ignored_context_keys),
        "unknown candidates": ", ".join(getattr(response, "unknown_item_ids", [])),
    }
    for name, text in notes.items():
        if text:
            stdout.print(f"{name}: {text}", markup=False)


def timings_table(trace: pb.Trace) -> Table:
    """Return the stages of a request with their times and counts."""
    timings = Table("stage", "ms", "items in", "items out")
    for timing in trace.timings:
        duration = f"{timing.duration_us / 1000:.2f}"
        timings.add_row(timing.stage, duration, f"{timing.num_in:,}", f"{timing.num_out:,}")
    timings.add_row("total", f"{trace.total_us / 1000:.2f}", "", "")
    return timings


def moves_of(item: pb.ScoredItem) -> str:
    """Return how rules moved an item, such as "max_sum 14 > 3, pin@1 3 > 4"."""

    def place(move: pb.Move, field: Literal["from_place", "to_place"]) -> str:
        return str(getattr(move, field)) if move.HasField(field) else "-"

    return ", ".join(
        f"{move.rule} {place(move, 'from_place')} > {place(move, 'to_place')}" for move in item.reasons.moves
    )


def _flattened(prefix: str, content: object) -> list[tuple[str, str]]:
    """Return nested mappings as (dotted key, value) lines."""
    if not isinstance(content, dict):
        return [(prefix, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))]
    return [line for key, value in content.items() for line in _flattened(f"{prefix}.{key}", value)]


def _plain(text: str) -> Text:
    """Return text that rich prints as it is: ids and titles may look like its markup."""
    return Text(text)


def fail(message: str, code: int) -> int:
    """Say what is wrong, and return the exit code."""
    stderr.print(f"error: {message}", markup=False)
    return code
