from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from engine import messages
from engine.catalog import Catalog
from engine.events import Recorded, UserEvent
from engine.item_list import ItemList
from engine.messages import InvalidRequestError
from engine.pipeline import Event, Filters
from engine.policies import Arrangement, Exposure
from engine.trace import StageTiming, Trace, VisitorKind
from protos.trirank.v1 import recommender_pb2 as pb


@pytest.mark.parametrize("limit", [0, -1, 501, 2**31 - 1])
@pytest.mark.parametrize("request_type", [pb.RecommendRequest, pb.SimilarItemsRequest])
def test_limits_out_of_range(limit: int, request_type: type[pb.RecommendRequest]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^limit is {limit}; expected 1 to 500$"):
        messages.read_limit(request_type(limit=limit), 10)


def test_limits() -> None:
    assert messages.read_limit(pb.RecommendRequest(), 10) == 10
    assert messages.read_limit(pb.RecommendRequest(limit=1), 10) == 1
    assert messages.read_limit(pb.RecommendRequest(limit=500), 10) == 500


def test_visitor() -> None:
    assert messages.read_visitor(pb.Visitor()) == ("", [])
    visitor = pb.Visitor(
        user_id=" a b 🎉 ",
        history=[
            pb.Event(item_id="x y"),
            pb.Event(item_id="🛒", event_type="cart", timestamp_ms=7),
            pb.Event(item_id="x y"),
        ],
        context={"hour": "9"},
    )
    events = [Event("x y", "interaction", 0), Event("🛒", "cart", 7), Event("x y", "interaction", 0)]
    assert messages.read_visitor(visitor) == (" a b 🎉 ", events)


@pytest.mark.parametrize(
    ("visitor", "message"),
    [
        (pb.Visitor(user_id="  "), "visitor.user_id is '  '; expected an id, or nothing"),
        (pb.Visitor(user_id="x" * 257), "length of visitor.user_id is 257; expected at most 256 characters"),
        (
            pb.Visitor(history=[pb.Event(item_id="a"), pb.Event()]),
            r"visitor.history\[1\].item_id is ''; expected a non-empty string",
        ),
        (
            pb.Visitor(history=[pb.Event(item_id="a", event_type="buy")]),
            r"visitor.history\[0\].event_type is 'buy'; expected one of interaction, view, click",
        ),
        (
            pb.Visitor(history=[pb.Event(item_id="a", timestamp_ms=-5)]),
            r"visitor.history\[0\].timestamp_ms is -5; expected 0 or more",
        ),
    ],
)
def test_bad_visitors(visitor: pb.Visitor, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        messages.read_visitor(visitor)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (
            {str(number): "" for number in range(65)},
            "number of keys in visitor.context is 65; expected at most 64",
        ),
        ({"": "x"}, "key of visitor.context is ''"),
        ({"hour": "x" * 300}, r"length of visitor.context\['hour'\] is 300"),
    ],
)
def test_bad_context(context: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        messages.read_context(pb.Visitor(context=context).context)


def test_what_a_request_asks_of_the_rules() -> None:
    request = pb.RecommendRequest(policy="home", overrides={"mmr.relevance_weight": 0.5}, seed=0, now_ms=7)
    assert messages.read_policy(request) == "home"
    assert messages.read_overrides(request) == {"mmr.relevance_weight": 0.5}
    assert messages.read_seed(request) == 0
    assert messages.read_now(request) == 7
    assert messages.read_now(pb.RecommendRequest()) is None
    asked = [pb.RecommendRequest(visitor=pb.Visitor(user_id=user)) for user in ("a", "a", "b")]
    seeds = [messages.read_seed(request) for request in asked]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: messages.read_policy(pb.RecommendRequest(policy="x" * 300)), "length of policy is 300"),
        (lambda: messages.read_now(pb.RecommendRequest(now_ms=-1)), "now_ms is -1; expected milliseconds"),
        (
            lambda: messages.read_overrides(
                pb.RecommendRequest(overrides={str(number): 1 for number in range(65)})
            ),
            "number of overrides is 65; expected at most 64",
        ),
        (lambda: messages.read_overrides(pb.RecommendRequest(overrides={"": 1})), "key of overrides is ''"),
    ],
)
def test_what_a_request_may_not_ask_of_the_rules(read: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read()


def test_an_arrangement_without_reasons() -> None:
    arrangement = Arrangement("home", 5, None, {"drop_seen": 2}, [Exposure("exposure:brand", "", 0, 0.25)])
    catalog = Catalog(pl.DataFrame({"item_id": ["a"]}))
    written = pb.Arrangement()
    messages.write_arrangement(written, arrangement, catalog)
    assert written == pb.Arrangement(
        policy="home",
        seed=5,
        yielded={"drop_seen": 2},
        exposure=[pb.Exposure(rule="exposure:brand", due=0, given=0.25)],
    )


def test_filters() -> None:
    assert messages.read_filters(pb.RecommendRequest()) == Filters()
    assert messages.read_filters(pb.SimilarItemsRequest(filters=pb.Filters())) == Filters(
        categories=[], brands=[], seller_ids=[]
    )
    filters = pb.Filters(categories=["a"], brands=["b c"], seller_ids=["🎉"], min_price=0, max_price=0)
    assert messages.read_filters(pb.RecommendRequest(filters=filters)) == Filters(
        categories=["a"], brands=["b c"], seller_ids=["🎉"], min_price=0.0, max_price=0.0
    )


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (pb.Filters(min_price=math.nan), "filters.min_price is nan; expected a finite number of at least 0"),
        (pb.Filters(max_price=math.inf), "filters.max_price is inf"),
        (pb.Filters(min_price=-0.01), "filters.min_price is -0.01"),
        (
            pb.Filters(min_price=3, max_price=1),
            "filters.min_price is 3.0; expected at most filters.max_price, 1.0",
        ),
        (pb.Filters(brands=["a", ""]), r"filters.brands\[1\] is ''; expected a non-empty string"),
        (pb.Filters(categories=["a"] * 1001), "number of filters.categories is 1001; expected at most 1000"),
    ],
)
def test_bad_filters(filters: pb.Filters, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        messages.read_filters(pb.RecommendRequest(filters=filters))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            lambda: messages.read_excluded(pb.RecommendRequest(exclude_item_ids=[""])),
            r"exclude_item_ids\[0\] is ''",
        ),
        (
            lambda: messages.read_excluded(pb.SimilarItemsRequest(exclude_item_ids=["a"] * 10_001)),
            "number of exclude_item_ids is 10001; expected at most 10000",
        ),
        (lambda: messages.read_item_id(pb.SimilarItemsRequest()), "item_id is ''"),
        (
            lambda: messages.read_candidates(pb.RankRequest()),
            r"candidate_item_ids is \[\]; expected 1 to 10000 ids",
        ),
        (
            lambda: messages.read_candidates(pb.RankRequest(candidate_item_ids=["a", "b", "a"])),
            r"candidate_item_ids\[2\] is 'a'; expected each id once, and it is candidate_item_ids\[0\]",
        ),
        (
            lambda: messages.read_candidates(
                pb.RankRequest(candidate_item_ids=[str(number) for number in range(10_001)])
            ),
            "number of candidate_item_ids is 10001",
        ),
        (
            lambda: messages.read_candidates(pb.RankRequest(candidate_item_ids=["a", ""])),
            r"candidate_item_ids\[1\] is ''",
        ),
    ],
)
def test_bad_ids(read: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read()


def test_a_history_that_is_too_long() -> None:
    history = [pb.Event(item_id="a")] * (messages.MAX_HISTORY + 1)
    with pytest.raises(
        InvalidRequestError, match=r"events in visitor\.history is 100001; expected at most 100000"
    ):
        messages.read_visitor(pb.Visitor(history=history))
    assert len(messages.read_visitor(pb.Visitor(history=history[1:]))[1]) == messages.MAX_HISTORY


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        messages.read_visitor(pb.Visitor(history=[pb.Event(item_id="a", event_type="x" * 100_000)]))
    assert len(str(caught.value)) < 400


def test_trace() -> None:
    trace = Trace(
        "v1",
        VisitorKind.HISTORY_ONLY,
        num_unknown_history_items=3,
        timings=[StageTiming("ranking", 3.0, 3.000012, 20, 10)],
        degraded_stages=["ranking"],
        relaxed_rules=["drop_seen"],
        total_us=20,
    )
    written = pb.Trace()
    messages.write_trace(written, trace, {"hour": "9", "device": "phone"})
    assert written == pb.Trace(
        bundle_version="v1",
        visitor_kind=pb.VISITOR_KIND_HISTORY_ONLY,
        degraded_stages=["ranking"],
        timings=[pb.StageTiming(stage="ranking", duration_us=12, num_in=20, num_out=10)],
        total_us=20,
        num_unknown_history_items=3,
        ignored_context_keys=["device", "hour"],
        relaxed_rules=["drop_seen"],
    )


def test_every_visitor_kind_is_on_the_wire() -> None:
    for kind in VisitorKind:
        written = pb.Trace()
        messages.write_trace(written, Trace("v1", kind))
        assert written.visitor_kind == kind.value
    assert len(VisitorKind) == len(pb.VisitorKind.keys())


def test_items_of_nothing() -> None:
    nothing = ItemList.of_one(np.zeros(0, np.int32), np.zeros(0, np.float32), "popular")
    response = pb.RankResponse()
    messages.write_items(response.items, nothing, Catalog(pl.DataFrame({"item_id": ["a"]})))
    assert not response.items


def test_head_weights() -> None:
    heads = ("next", "purchase")
    assert messages.read_head_weights(pb.RecommendRequest(), ()) == {}
    request = pb.RankRequest(head_weights={"purchase": 2.5, "next": 0})
    assert messages.read_head_weights(request, heads) == {"purchase": 2.5, "next": 0}


@pytest.mark.parametrize(
    ("weights", "heads", "message"),
    [
        ({"cart": 1}, ("next", "purchase"), "key of head_weights is 'cart'; expected one of next, purchase"),
        ({"cart": 1}, (), "key of head_weights is 'cart'; expected none"),
        ({"next": -1}, ("next",), r"head_weights\['next'\] is -1.0; expected 0 to 100"),
        ({"next": 101}, ("next",), r"head_weights\['next'\] is 101.0; expected 0 to 100"),
        ({"next": float("nan")}, ("next",), r"head_weights\['next'\] is nan; expected 0 to 100"),
        ({"next": 0}, ("next",), "expected at least one weight above 0"),
    ],
)
def test_bad_head_weights(weights: dict[str, float], heads: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        messages.read_head_weights(pb.RecommendRequest(head_weights=weights), heads)


def events(**changed: object) -> pb.RecordEventsRequest:
    good = {"event_id": "e 🎉", "user_id": "u", "item_id": "x y"}
    return pb.RecordEventsRequest(
        events=[pb.RecordedEvent(**good), pb.RecordedEvent(**good | changed)]  # type: ignore[arg-type]
    )


def test_events_to_record() -> None:
    first = UserEvent("e 🎉", "u", "x y", "interaction", 0)
    assert messages.read_events(events()) == [first, first]  # the store finds repeats
    changed = events(event_type="cart", timestamp_ms=253_402_300_799_999, user_id=" u ")
    assert messages.read_events(changed)[1] == UserEvent("e 🎉", " u ", "x y", "cart", 253_402_300_799_999)
    assert len(messages.read_events(pb.RecordEventsRequest(events=list(events().events) * 500))) == 1000
    response = messages.write_recorded(Recorded(2, 1, is_delayed=True))
    assert response == pb.RecordEventsResponse(num_new=2, num_repeated=1, delayed=True)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.RecordEventsRequest(), "^number of events is 0; expected 1 to 1000$"),
        (
            pb.RecordEventsRequest(events=list(events().events) * 501),
            "^number of events is 1002; expected 1 to 1000$",
        ),
        (events(event_id=""), r"^events\[1\].event_id is ''; expected a non-empty string$"),
        (events(event_id="x" * 257), r"^length of events\[1\].event_id is 257; expected at most 256 char"),
        (events(user_id=""), r"^events\[1\].user_id is ''; expected a non-empty string$"),
        (events(user_id="  "), r"^events\[1\].user_id is '  '; expected an id$"),
        (events(user_id="x" * 257), r"^length of events\[1\].user_id is 257"),
        (events(item_id=""), r"^events\[1\].item_id is ''"),
        (events(item_id="x" * 257), r"^length of events\[1\].item_id is 257"),
        (events(event_type="buy"), r"^events\[1\].event_type is 'buy'; expected one of interaction, view,"),
        (events(timestamp_ms=-1), r"^events\[1\].timestamp_ms is -1; expected milliseconds since 1970, 0 to"),
        (events(timestamp_ms=2**63 - 1), r"^events\[1\].timestamp_ms is 9223372036854775807; expected milli"),
    ],
)
def test_events_that_cannot_be_recorded(request_: pb.RecordEventsRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        messages.read_events(request_)


# Sizes


def test_a_request_that_is_too_large_or_none() -> None:
    with pytest.raises(InvalidRequestError, match=f"size is 6291457; expected at most {6 << 20} bytes"):
        messages.read_request(pb.RecommendRequest, b" " * (messages.MAX_MESSAGE_BYTES + 1))
    with pytest.raises(InvalidRequestError, match="expected a RankRequest"):
        messages.read_request(pb.RankRequest, b"\xff")
    request = pb.SimilarItemsRequest(item_id="a")
    assert messages.read_request(pb.SimilarItemsRequest, request.SerializeToString()) == request


@pytest.mark.parametrize("kind", [pb.RecommendRequest, pb.RankRequest])
def test_events_that_hold_nothing_are_counted_before_anything_waits(kind: type[pb.RankRequest]) -> None:
    """Two bytes of the message each, thirty times that in memory."""
    visitor = pb.Visitor(history=[pb.Event()] * (messages.MAX_HISTORY + 1))
    with pytest.raises(InvalidRequestError, match=r"visitor\.history is 100001; expected at most 100000"):
        messages.read_request(kind, kind(visitor=visitor).SerializeToString())


def test_recorded_events_that_hold_nothing_are_counted_too() -> None:
    data = pb.RecordEventsRequest(events=[pb.RecordedEvent()] * 1001).SerializeToString()
    with pytest.raises(InvalidRequestError, match="number of events is 1001; expected 1 to 1000"):
        messages.read_request(pb.RecordEventsRequest, data)
