"""The calls for a Python program that has item ids and wants items: thin clients, one synchronous, one for
asyncio.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from engine.messages import MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES
from protos.trirank.v1 import recommender_pb2 as pb
from protos.trirank.v1 import recommender_pb2_grpc as pb_grpc

# What clients of all languages should do: balance, and retry. Every call may be made twice.
SERVICE_CONFIG = Path(pb.__file__).parent / "service_config.json"


class RecommenderClient:
    """Connections to `trirank serve`; close it, or use it in a `with` block. Any thread may call it.

    Every call raises grpc.RpcError, whose code() and details() say what went wrong.
    Calls go in turn to all addresses that a name has. One that finds a server UNAVAILABLE, or full and with
    time left to come back when the server says so, is made up to five times; where many calls fail, once.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 5.0,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        num_channels: int = 1,
    ) -> None:
        """Make ready to connect, which the first calls do.

        Args:
            address: host:port.
            timeout_s: of each call that is given none of its own.
            api_key: sent with each call, for a server that wants one.
            credentials: for TLS (see engine.tls.client_credentials); None for a connection in the clear.
            num_channels: connections, which calls take in turn: a server of several processes is dealt them.
        """
        self._timeout_s = timeout_s
        self._metadata = _metadata(api_key)
        options = _options(num_channels)
        self._channels = [
            grpc.secure_channel(address, credentials, options=options)
            if credentials
            else grpc.insecure_channel(address, options=options)
            for _ in range(num_channels)
        ]
        self._stubs = itertools.cycle([pb_grpc.RecommenderServiceStub(one) for one in self._channels])

    def recommend(
        self,
        visitor: pb.Visitor,
        *,
        limit: int | None = None,
        exclude_item_ids: Sequence[str] = (),
        filters: pb.Filters | None = None,
        policy: str = "",
        overrides: Mapping[str, float] | None = None,
        seed: int | None = None,
        now_ms: int | None = None,
        explain: bool = False,
        head_weights: Mapping[str, float] | None = None,
        timeout_s: float | None = None,
    ) -> pb.RecommendResponse:
        """Return the best items for a visitor."""
        request = pb.RecommendRequest(
            visitor=visitor,
            limit=limit,
            exclude_item_ids=exclude_item_ids,
            filters=filters,
            policy=policy,
            overrides=overrides,
            seed=seed,
            now_ms=now_ms,
            explain=explain,
            head_weights=head_weights,
        )
        return next(self._stubs).Recommend(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    def similar_items(
        self,
        item_id: str,
        *,
        limit: int | None = None,
        exclude_item_ids: Sequence[str] = (),
        filters: pb.Filters | None = None,
        policy: str = "",
        now_ms: int | None = None,
        context: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> pb.SimilarItemsResponse:
        """Return the items nearest to an item."""
        request = pb.SimilarItemsRequest(
            item_id=item_id,
            limit=limit,
            exclude_item_ids=exclude_item_ids,
            filters=filters,
            policy=policy,
            now_ms=now_ms,
            context=context,
        )
        return next(self._stubs).SimilarItems(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    def rank(
        self,
        visitor: pb.Visitor,
        candidate_item_ids: Sequence[str],
        *,
        now_ms: int | None = None,
        head_weights: Mapping[str, float] | None = None,
        timeout_s: float | None = None,
    ) -> pb.RankResponse:
        """Return the candidates, best first."""
        request = pb.RankRequest(
            visitor=visitor,
            candidate_item_ids=candidate_item_ids,
            now_ms=now_ms,
            head_weights=head_weights,
        )
        return next(self._stubs).Rank(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    def record_events(
        self, events: Sequence[pb.RecordedEvent], *, timeout_s: float | None = None
    ) -> pb.RecordEventsResponse:
        """Have the server remember what users did; after an error the same events may be sent again."""
        request = pb.RecordEventsRequest(events=events)
        return next(self._stubs).RecordEvents(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncRecommenderClient:
    """RecommenderClient for asyncio: the same calls, to be awaited, in an `async with` block.

    It belongs to the event loop in which it is made. Any number of calls may be under way; a task that is
    cancelled cancels its call, on the server too.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 5.0,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        num_channels: int = 1,
    ) -> None:
        """Make ready to connect, which the first calls do; the arguments are those of RecommenderClient."""
        self._timeout_s = timeout_s
        self._metadata = _metadata(api_key)
        self._channels = aio_channels(address, credentials, num_channels)
        self._stubs = itertools.cycle([pb_grpc.RecommenderServiceStub(one) for one in self._channels])

    async def recommend(
        self,
        visitor: pb.Visitor,
        *,
        limit: int | None = None,
        exclude_item_ids: Sequence[str] = (),
        filters: pb.Filters | None = None,
        policy: str = "",
        overrides: Mapping[str, float] | None = None,
        seed: int | None = None,
        now_ms: int | None = None,
        explain: bool = False,
        head_weights: Mapping[str, float] | None = None,
        timeout_s: float | None = None,
    ) -> pb.RecommendResponse:
        """Return the best items for a visitor."""
        request = pb.RecommendRequest(
            visitor=visitor,
            limit=limit,
            exclude_item_ids=exclude_item_ids,
            filters=filters,
            policy=policy,
            overrides=overrides,
            seed=seed,
            now_ms=now_ms,
            explain=explain,
            head_weights=head_weights,
        )
        return await next(self._stubs).Recommend(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    async def similar_items(
        self,
        item_id: str,
        *,
        limit: int | None = None,
        exclude_item_ids: Sequence[str] = (),
        filters: pb.Filters | None = None,
        policy: str = "",
        now_ms: int | None = None,
        context: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> pb.SimilarItemsResponse:
        """Return the items nearest to an item."""
        request = pb.SimilarItemsRequest(
            item_id=item_id,
            limit=limit,
            exclude_item_ids=exclude_item_ids,
            filters=filters,
            policy=policy,
            now_ms=now_ms,
            context=context,
        )
        return await next(self._stubs).SimilarItems(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    async def rank(
        self,
        visitor: pb.Visitor,
        candidate_item_ids: Sequence[str],
        *,
        now_ms: int | None = None,
        head_weights: Mapping[str, float] | None = None,
        timeout_s: float | None = None,
    ) -> pb.RankResponse:
        """Return the candidates, best first."""
        request = pb.RankRequest(
            visitor=visitor,
            candidate_item_ids=candidate_item_ids,
            now_ms=now_ms,
            head_weights=head_weights,
        )
        return await next(self._stubs).Rank(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    async def record_events(
        self, events: Sequence[pb.RecordedEvent], *, timeout_s: float | None = None
    ) -> pb.RecordEventsResponse:
        """Have the server remember what users did; after an error the same events may be sent again."""
        request = pb.RecordEventsRequest(events=events)
        return await next(self._stubs).RecordEvents(
            request, timeout=_timeout(timeout_s, self._timeout_s), metadata=self._metadata
        )

    async def close(self) -> None:
        """Close the connections; calls under way are cancelled."""
        for channel in self._channels:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _timeout(timeout_s: float | None, usual_s: float) -> float:
    return usual_s if timeout_s is None else timeout_s


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def aio_channels(
    address: str, credentials: grpc.ChannelCredentials | None, num_channels: int
) -> list[grpc.aio.Channel]:
    """Return channels that balance and retry as SERVICE_CONFIG says; for the event loop they are made in."""
    options = _options(num_channels)
    return [
        grpc.aio.secure_channel(address, credentials, options=options)
        if credentials
        else grpc.aio.insecure_channel(address, options=options)
        for _ in range(num_channels)
    ]


def _options(num_channels: int) -> list[tuple[str, Any]]:
    if num_channels < 1:
        raise ValueError(f"num_channels is {num_channels}; expected at least 1")
    return [
        ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.service_config", SERVICE_CONFIG.read_text(encoding="utf-8")),
        # Channels of equal options to one address would share one connection.
        ("grpc.use_local_subchannel_pool", int(num_channels > 1)),
    ]


def visitor(
    user_id: str = "", history: Sequence[str] = (), context: Mapping[str, str] | None = None
) -> pb.Visitor:
    """Return a visitor; the items of `history` (oldest first) count as touched just now."""
    return pb.Visitor(
        user_id=user_id, history=[pb.Event(item_id=item_id) for item_id in history], context=context or {}
    )
