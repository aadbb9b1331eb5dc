"""Between the wire and the pipeline: requests are checked and taken apart here, answers put together.

Nothing behind this file sees a request that breaks the contract of protos/trirank/v1/recommender.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from engine.catalog import Catalog
from engine.history import EVENT_CODE, EVENT_TYPES
from engine.pipeline import MAX_LIMIT, Event, Filters, ItemList
from engine.trace import Trace
from protos.trirank.v1 import recommender_pb2 as pb

MAX_CANDIDATES = 10_000
MAX_EXCLUDED = 10_000
MAX_FILTER_VALUES = 1_000
MAX_CONTEXT_KEYS = 64
MAX_CHARACTERS = 256  # of an id, a filter value, a context key or value
MAX_MESSAGE_BYTES = 16 << 20  # a history of 100,000 events takes 3 to 5 MB


class InvalidRequestError(ValueError):
    """A request that breaks the contract: which field, its value, and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 100:  # the message travels in a header, which has little room
            shown = shown[:100] + "..."
        super().__init__(f"{field} is {shown}; expected {allowed}")


def read_limit(request: pb.RecommendRequest | pb.SimilarItemsRequest, default: int) -> int:
    """Return how many items are asked for."""
    limit = request.limit if request.HasField("limit") else default
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequestError("limit", limit, f"1 to {MAX_LIMIT}")
    return limit


def read_visitor(visitor: pb.Visitor) -> tuple[str, list[Event]]:
    """Return the user id ("" where there is none) and the events of the request, in its order."""
    user_id = visitor.user_id
    if user_id and not user_id.strip():
        raise InvalidRequestError("visitor.user_id", user_id, "an id, or nothing for an unknown visitor")
    _check_length("visitor.user_id", user_id)
    events = []
    for place, event in enumerate(visitor.history):
        field = f"visitor.history[{place}]"
        event_type = event.event_type or EVENT_TYPES[0]
        _check_id(f"{field}.item_id", event.item_id)
        if event_type not in EVENT_CODE:
            raise InvalidRequestError(f"{field}.event_type", event_type, f"one of {', '.join(EVENT_TYPES)}")
        if event.timestamp_ms < 0:
            raise InvalidRequestError(f"{field}.timestamp_ms", event.timestamp_ms, "0 or more")
        events.append(Event(event.item_id, event_type, event.timestamp_ms))
    if len(visitor.context) > MAX_CONTEXT_KEYS:
        raise InvalidRequestError(
            "number of keys in visitor.context", len(visitor.context), f"at most {MAX_CONTEXT_KEYS}"
        )
    for key, value in visitor.context.items():
        _check_id("key of visitor.context", key)
        _check_length(f"visitor.context[{key!r}]", value)
    return user_id, events


def read_filters(filters: pb.Filters) -> Filters:
    """Return the hard conditions."""
    for field, values in {
        "filters.categories": filters.categories,
        "filters.brands": filters.brands,
        "filters.seller_ids": filters.seller_ids,
    }.items():
        _check_ids(field, values, MAX_FILTER_VALUES)
    min_price = filters.min_price if filters.HasField("min_price") else None
    max_price = filters.max_price if filters.HasField("max_price") else None
    for field, price in (("filters.min_price", min_price), ("filters.max_price", max_price)):
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise InvalidRequestError(field, price, "a finite number of at least 0")
    if min_price is not None and max_price is not None and min_price > max_price:
        raise InvalidRequestError("filters.min_price", min_price, f"at most filters.max_price, {max_price}")
    return Filters(
        categories=list(filters.categories),
        brands=list(filters.brands),
        seller_ids=list(filters.seller_ids),
        min_price=min_price,
        max_price=max_price,
    )


def read_excluded(request: pb.RecommendRequest | pb.SimilarItemsRequest) -> Sequence[str]:
    """Return the ids that must not be shown; ids that the catalog does not have are no error."""
    _check_ids("exclude_item_ids", request.exclude_item_ids, MAX_EXCLUDED)
    return request.exclude_item_ids


def read_item_id(request: pb.SimilarItemsRequest) -> str:
    """Return the id of the item whose neighbours are asked for."""
    _check_id("item_id", request.item_id)
    return request.item_id


def read_candidates(request: pb.RankRequest) -> Sequence[str]:
    """Return the ids to rank, each once."""
    ids = request.candidate_item_ids
    if not ids:
        raise InvalidRequestError("candidate_item_ids", [], f"1 to {MAX_CANDIDATES} ids")
    _check_ids("candidate_item_ids", ids, MAX_CANDIDATES)
    first_place: dict[str, int] = {}
    for place, item_id in enumerate(ids):
        first = first_place.setdefault(item_id, place)
        if first != place:
            allowed = f"each id once, and it is candidate_item_ids[{first}] as well"
            raise InvalidRequestError(f"candidate_item_ids[{place}]", item_id, allowed)
    return ids


def write_items(items: ItemList, catalog: Catalog) -> Iterable[pb.ScoredItem]:
    """Yield the items of an answer, best first."""
    for row, score, source in zip(
        items.rows.tolist(), items.scores.tolist(), items.sources.tolist(), strict=True
    ):
        yield pb.ScoredItem(item_id=catalog.ids[row], score=score, source=source, title=catalog.titles[row])


def write_trace(trace: Trace, context: Iterable[str] = ()) -> pb.Trace:
    """Return the trace of an answer.

    Args:
        trace: what the pipeline recorded.
        context: the context keys of the request; no ranker of bundle format 2 uses any.
    """
    return pb.Trace(
        bundle_version=trace.bundle_version,
        visitor_kind=pb.VisitorKind.Value(f"VISITOR_KIND_{trace.visitor_kind.name}"),
        degraded_stages=trace.degraded_stages,
        timings=[
            pb.StageTiming(
                stage=timing.stage,
                duration_us=timing.duration_us,
                num_in=timing.num_in,
                num_out=timing.num_out,
            )
            for timing in trace.timings
        ],
        total_us=trace.total_us,
        num_unknown_history_items=trace.num_unknown_history_items,
        ignored_context_keys=sorted(context),
        relaxed_rules=trace.relaxed_rules,
        unknown_user=trace.unknown_user,
    )


def _check_ids(field: str, ids: Sequence[str], max_ids: int) -> None:
    if len(ids) > max_ids:
        raise InvalidRequestError(f"number of {field}", len(ids), f"at most {max_ids}")
    for place, item_id in enumerate(ids):
        _check_id(f"{field}[{place}]", item_id)


def _check_id(field: str, item_id: str) -> None:
    if not item_id:
        raise InvalidRequestError(field, item_id, "a non-empty string")
    _check_length(field, item_id)


def _check_length(field: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequestError(f"length of {field}", len(text), f"at most {MAX_CHARACTERS} characters")
