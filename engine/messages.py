"""Between the wire and the pipeline: requests are checked and taken apart here, answers put together.

Nothing behind this file sees a request that breaks the contract of protos/trirank/v1/recommender.proto.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import DecodeError, Message

from engine.catalog import Catalog
from engine.events import Recorded, UserEvent
from engine.history import EVENT_CODE, EVENT_TYPES
from engine.item_list import ItemList
from engine.pipeline import MAX_CANDIDATES, MAX_HEAD_WEIGHT, MAX_LIMIT, NO_FILTERS, Event, Filters
from engine.policies import Arrangement, Explanation, ItemReasons
from engine.trace import Trace, VisitorKind
from protos.trirank.v1 import recommender_pb2 as pb

MAX_EXCLUDED = 10_000
MAX_HISTORY = 100_000  # events of a visitor
MAX_FILTER_VALUES = 1_000
MAX_CONTEXT_KEYS = 64
MAX_OVERRIDES = 64
MAX_EVENTS = 1_000  # of one RecordEvents call
MAX_TIMESTAMP_MS = 253_402_300_799_999  # the end of the year 9999: later times are other units than ms
MAX_CHARACTERS = 256  # of an id, a filter value, a context key or value
MAX_MESSAGE_BYTES = 6 << 20  # a history of 100,000 events takes 3 to 5 MB


MAX_ANSWER_BYTES = 16 << 20  # that clients take: 10,000 items with long titles
VISITOR_KINDS = {kind: pb.VisitorKind.Value(f"VISITOR_KIND_{kind.name}") for kind in VisitorKind}
Request = TypeVar("Request", bound=Message)
Written = RepeatedCompositeFieldContainer[pb.ScoredItem]


class InvalidRequestError(ValueError):
    """A request that breaks the contract: which field, its value, and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 100:  # the message travels in a header, which has little room
            shown = shown[:100] + "..."
        super().__init__(f"{field} is {shown}; expected {allowed}")


def read_request(kind: type[Request], data: bytes) -> Request:
    """Return the request that bytes are.

    The lists whose entries take far more memory than bytes are counted at once: what has too many of them is
    gone before anything waits for a worker.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise InvalidRequestError("the request's size", len(data), f"at most {MAX_MESSAGE_BYTES} bytes")
    try:
        request = kind.FromString(data)
    except DecodeError as error:
        raise InvalidRequestError("the request", str(error), f"a {kind.DESCRIPTOR.name}") from None
    if isinstance(request, (pb.RecommendRequest, pb.RankRequest)):
        _check_history_size(request.visitor)
    elif isinstance(request, pb.RecordEventsRequest):
        _check_events_size(request)
    return request


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
    _check_history_size(visitor)
    events = []
    for place, event in enumerate(visitor.history):
        field = f"visitor.history[{place}]"
        _check_id(f"{field}.item_id", event.item_id)
        event_type = _event_type(field, event.event_type)
        if event.timestamp_ms < 0:
            raise InvalidRequestError(f"{field}.timestamp_ms", event.timestamp_ms, "0 or more")
        events.append(Event(event.item_id, event_type, event.timestamp_ms))
    return user_id, events


def read_events(request: pb.RecordEventsRequest) -> list[UserEvent]:
    """Return the events to record, in the order given."""
    _check_events_size(request)
    events = []
    for place, event in enumerate(request.events):
        field = f"events[{place}]"
        _check_id(f"{field}.event_id", event.event_id)
        _check_id(f"{field}.user_id", event.user_id)
        if not event.user_id.strip():
            raise InvalidRequestError(f"{field}.user_id", event.user_id, "an id")
        _check_id(f"{field}.item_id", event.item_id)
        event_type = _event_type(field, event.event_type)
        if not 0 <= event.timestamp_ms <= MAX_TIMESTAMP_MS:
            allowed = f"milliseconds since 1970, 0 to {MAX_TIMESTAMP_MS}"
            raise InvalidRequestError(f"{field}.timestamp_ms", event.timestamp_ms, allowed)
        events.append(UserEvent(event.event_id, event.user_id, event.item_id, event_type, event.timestamp_ms))
    return events


def read_filters(request: pb.RecommendRequest | pb.SimilarItemsRequest) -> Filters:
    """Return the hard conditions."""
    if not request.HasField("filters"):
        return NO_FILTERS
    filters = request.filters
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


def read_policy(request: pb.RecommendRequest | pb.SimilarItemsRequest) -> str:
    """Return the policy that is asked for; "" for the default one."""
    _check_length("policy", request.policy)
    return request.policy


def read_overrides(request: pb.RecommendRequest) -> dict[str, float]:
    """Return the numbers of the policy that are to be others; whether they may be, the policy says."""
    if len(request.overrides) > MAX_OVERRIDES:
        raise InvalidRequestError("number of overrides", len(request.overrides), f"at most {MAX_OVERRIDES}")
    for key in request.overrides:
        _check_id("key of overrides", key)
    return dict(request.overrides)


def read_head_weights(
    request: pb.RecommendRequest | pb.RankRequest, heads: Sequence[str]
) -> dict[str, float]:
    """Return how much each head of the ranker counts; nothing where the request does not say.

    Args:
        request: what was asked.
        heads: the names that the bundle's ranker knows; none where it has one score alone.
    """
    for name, weight in request.head_weights.items():
        if name not in heads:
            known = f"one of {', '.join(heads)}" if heads else "none: this ranker scores for one thing alone"
            raise InvalidRequestError("key of head_weights", name, known)
        if not 0 <= weight <= MAX_HEAD_WEIGHT:  # NaN too
            raise InvalidRequestError(f"head_weights[{name!r}]", weight, f"0 to {MAX_HEAD_WEIGHT}")
    weights = dict(request.head_weights)
    if weights and not any(weights.values()):
        raise InvalidRequestError("head_weights", weights, "at least one weight above 0")
    return weights


def read_seed(request: pb.RecommendRequest) -> int:
    """Return the seed of what is random; the visitor is one, so that a retry shows the same page."""
    if request.HasField("seed"):
        return request.seed
    return visitor_number(request.visitor)


def visitor_number(visitor: pb.Visitor) -> int:
    """Return a number that is the same for equal visitors."""
    return zlib.crc32(visitor.SerializeToString(deterministic=True))


def read_now(request: pb.RecommendRequest | pb.SimilarItemsRequest | pb.RankRequest) -> int | None:
    """Return the time of the request in ms; None where it does not say."""
    if not request.HasField("now_ms"):
        return None
    if request.now_ms <= 0:
        raise InvalidRequestError("now_ms", request.now_ms, "milliseconds since 1970, more than 0")
    return request.now_ms


def read_context(context: Mapping[str, str], field: str = "visitor.context") -> dict[str, str]:
    """Return what else is known of the request."""
    if len(context) > MAX_CONTEXT_KEYS:
        raise InvalidRequestError(f"number of keys in {field}", len(context), f"at most {MAX_CONTEXT_KEYS}")
    for key, value in context.items():
        _check_id(f"key of {field}", key)
        _check_length(f"{field}[{key!r}]", value)
    return dict(context)


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


def write_items(
    written: Written, items: ItemList, catalog: Catalog, explanation: Explanation | None = None
) -> None:
    """Add the items to an answer, best first; each with its reasons where there is an explanation."""
    rows = items.rows
    ids, titles = catalog.ids[rows].tolist(), catalog.titles[rows].tolist()
    for item_id, title, score, source in zip(
        ids, titles, items.scores.tolist(), items.source_of.tolist(), strict=True
    ):
        # In place: an item that is made first is copied into the answer, which takes twice as long.
        item = written.add()
        item.item_id = item_id
        item.title = title
        item.score = score
        item.source = items.names[source]
    if explanation:
        for item, row in zip(written, rows.tolist(), strict=True):
            item.reasons.CopyFrom(_reasons(explanation.items[row]))


def write_arrangement(written: pb.Arrangement, arrangement: Arrangement, catalog: Catalog) -> None:
    """Say in an answer how its slate was arranged."""
    written.policy = arrangement.policy
    written.seed = arrangement.seed
    if arrangement.now_ms is not None:
        written.now_ms = arrangement.now_ms
    written.yielded.update(arrangement.yields)
    for account in arrangement.exposure:
        written.exposure.add(rule=account.rule, group=account.group, due=account.due, given=account.given)
    explanation = arrangement.explanation
    if explanation:
        written.filters.extend(
            pb.FilterEffect(rule=one.rule, num_in=one.num_in, num_out=one.num_out)
            for one in explanation.filters
        )
        written.rules.extend(
            pb.RuleEffect(
                rule=one.rule,
                num_entered=one.num_entered,
                num_left=one.num_left,
                num_moved=one.num_moved,
                num_yielded=one.num_yielded,
            )
            for one in explanation.effects
        )
        for row in explanation.displaced:
            reasons = explanation.items[row]
            written.displaced.add(
                item_id=catalog.ids[row],
                score=reasons.ranking_score or 0.0,
                source=reasons.source,
                title=catalog.titles[row],
                reasons=_reasons(reasons),
            )


def _reasons(reasons: ItemReasons) -> pb.Reasons:
    return pb.Reasons(
        retrieval_place=reasons.retrieval_place,
        retrieval_score=reasons.retrieval_score,
        ranking_place=reasons.ranking_place,
        ranking_score=reasons.ranking_score,
        transition_score=reasons.transition_score,
        relevance=reasons.relevance,
        adjusted_relevance=reasons.adjusted_relevance,
        moves=[
            pb.Move(rule=move.rule, from_place=move.from_place, to_place=move.to_place)
            for move in reasons.moves
        ],
    )


def write_trace(written: pb.Trace, trace: Trace, context: Iterable[str] = ()) -> None:
    """Say in an answer how it came about.

    Args:
        written: of the answer.
        trace: what the pipeline recorded.
        context: the context keys of the request that nobody read.
    """
    written.bundle_version = trace.bundle_version
    written.visitor_kind = VISITOR_KINDS[trace.visitor_kind]
    written.degraded_stages.extend(trace.degraded_stages)
    written.num_unknown_history_items = trace.num_unknown_history_items
    written.ignored_context_keys.extend(sorted(context))
    written.relaxed_rules.extend(trace.relaxed_rules)
    written.unknown_user = trace.unknown_user
    written.variant = trace.variant
    write_times(written, trace)


def write_times(written: pb.Trace, trace: Trace) -> None:
    """Say in an answer how long things took."""
    for timing in trace.timings:
        written.timings.add(
            stage=timing.stage,
            duration_us=timing.duration_us,
            num_in=timing.num_in,
            num_out=timing.num_out,
        )
    written.total_us = trace.total_us


def write_recorded(recorded: Recorded) -> pb.RecordEventsResponse:
    """Return what became of recorded events."""
    return pb.RecordEventsResponse(
        num_new=recorded.num_new, num_repeated=recorded.num_repeated, delayed=recorded.is_delayed
    )


def _check_history_size(visitor: pb.Visitor) -> None:
    if len(visitor.history) > MAX_HISTORY:
        allowed = f"at most {MAX_HISTORY}, such as the newest"
        raise InvalidRequestError("number of events in visitor.history", len(visitor.history), allowed)


def _check_events_size(request: pb.RecordEventsRequest) -> None:
    if not 1 <= len(request.events) <= MAX_EVENTS:
        raise InvalidRequestError("number of events", len(request.events), f"1 to {MAX_EVENTS}")


def _event_type(field: str, event_type: str) -> str:
    if event_type and event_type not in EVENT_CODE:
        raise InvalidRequestError(f"{field}.event_type", event_type, f"one of {', '.join(EVENT_TYPES)}")
    return event_type or EVENT_TYPES[0]


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
