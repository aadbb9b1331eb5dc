"""Events of users in Redis, for several servers that answer the same users.

Each user is one hash, so that a user's events are one round trip. While Redis is down, events are made safe
on this machine's disk and delivered when it is back; the event ids make it harmless to deliver one twice.
Requests find out that Redis is down; that it is back one thread finds out, which also delivers. Needs the
extra `redis`, and one server of Redis, no cluster.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.event_log import EventLog, private
from engine.event_store import encode, events_of
from engine.events import Recorded, StoreUnavailableError, UserEvent
from engine.group_commit import GroupCommit
from engine.telemetry import LimitedLog
from engine.workplaces import waiting

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

T = TypeVar("T")

KEY = "trirank:events:{user_id}"
DAY_MS = 86_400_000
RECORDING_TIMEOUT_S = 0.25  # at least, of an answer that may be for 500 events and more
DELIVERY_TIMEOUT_S = 1.0  # at least, of an answer that nobody waits for
EVENTS_AT_ONCE = 500  # of a round trip, about
SEGMENT_BYTES = 1 << 20  # of undelivered events, that are sent again where their delivery was cut short
CLOSE_S = 5.0  # for the thread that delivers; a name server may keep it for longer
# What an error begins with that is not of one key; others are classes of their own in redis-py.
OF_REDIS = ("MISCONF", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN", "OOM", "READONLY", "NOPERM")
REFUSED = "refused.jsonl"  # beside the log: what Redis will never take
NO_PACKAGE = "Redis needs a package more, that of the extra redis: pip install redis"

# KEYS: the user's hash. ARGV: events to keep, ms to keep them, now in ms, then id, type, item and time of
# each event. Fields: "n" how many events there ever were, "t" the newest time, and of each event
# "e" + its id -> "time n type item".
# Returns how many events were new. Atomic: Redis runs one script at a time.
RECORD = """
local key, keep, now = KEYS[1], tonumber(ARGV[1]), ARGV[3]
local newest, num_new = redis.call('HGET', key, 't') or '0', 0
for i = 4, #ARGV, 4 do
  local field, time = 'e' .. ARGV[i], ARGV[i + 3]
  if redis.call('HEXISTS', key, field) == 0 then
    if time == '0' then
      time = tonumber(now) > tonumber(newest) and now or newest
    end
    if tonumber(time) > tonumber(newest) then
      newest = time
    end
    local number = redis.call('HINCRBY', key, 'n', 1)
    redis.call('HSET', key, field, time .. ' ' .. number .. ' ' .. ARGV[i + 1] .. ' ' .. ARGV[i + 2])
    num_new = num_new + 1
  end
end
if num_new > 0 then
  redis.call('HSET', key, 't', newest)
  redis.call('PEXPIRE', key, ARGV[2])
end
-- Not at every event past the limit: sorting costs more than a quarter of room.
if redis.call('HLEN', key) - 2 > keep + keep / 4 then
  local all, events = redis.call('HGETALL', key), {}
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 1) == 'e' then
      local time, number = string.match(all[i + 1], '^(%d+) (%d+)')
      table.insert(events, {tonumber(time), tonumber(number), all[i]})
    end
  end
  table.sort(events, function(a, b)
    if a[1] ~= b[1] then return a[1] < b[1] end
    return a[2] < b[2]
  end)
  for i = 1, #events - keep do
    redis.call('HDEL', key, events[i][3])
  end
end
return num_new
"""


class _Sent(NamedTuple):
    """What Redis said to the events of one user."""

    number: int  # of the batch that they are of
    events: list[UserEvent]
    answer: Any  # how many were new, or the error


class RedisEventStore:
    """An EventStore in Redis, with a log on disk for the time when Redis is down."""

    waits = True

    def __init__(
        self,
        url: str,
        buffer: str | Path,
        *,
        max_per_user: int = 200,
        keep_days: float = 90.0,
        timeout_s: float = 0.05,
        retry_s: float = 1.0,
        max_buffer_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make ready to talk to Redis, which may be down.

        Args:
            url: redis://[user:password@]host:port/db, or rediss:// or unix://.
            buffer: directory of the log for undelivered events. What a LocalEventStore has left there is
                delivered too.
            max_per_user: events of one user that are given back; up to a quarter more are kept.
            keep_days: a user's events go when there was none for this long.
            timeout_s: how long one answer may take that a request waits for.
            retry_s: how often it is asked whether it is back, once it has failed; until then requests are
                told at once that it does not answer.
            max_buffer_bytes: of undelivered events; more are refused.
            clock: seconds since 1970.

        Raises:
            ValueError: the url is none, or the redis package is not installed.
            LogInUseError: another process has the buffer open.
        """
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise ValueError(NO_PACKAGE) from error
        self._errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._refusal: type[Exception] = redis.ResponseError  # Redis is there, and does not do what is asked
        self._moved: type[Exception] = redis.exceptions.MovedError

        def client(answer_s: float) -> Any:
            times = {"socket_timeout": answer_s, "socket_connect_timeout": answer_s}
            return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **times)

        self._redis = client(timeout_s)
        self._recording = client(max(timeout_s, RECORDING_TIMEOUT_S))
        self._patient = client(max(timeout_s, DELIVERY_TIMEOUT_S))
        self._record_script = self._redis.register_script(RECORD)
        self._max_per_user = max_per_user
        self._keep_ms = round(keep_days * DAY_MS)
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._max_buffer_bytes = max_buffer_bytes
        self._clock = clock
        self._is_away = False  # it has failed, and has not answered since
        self._asked_again_at = float("-inf")

        self._buffer = EventLog(buffer, max_segment_bytes=SEGMENT_BYTES)
        self._buffering = threading.Lock()
        self._has_undelivered = any(True for _ in self._buffer.replay())
        self._is_closed = threading.Event()
        self._group = GroupCommit("redis-events", self._commit, max_together=EVENTS_AT_ONCE)
        self._reading = ThreadPoolExecutor(4, thread_name_prefix="redis-reading")
        self._delivery = threading.Thread(target=self._deliver_later, name="redis-delivery", daemon=True)
        self._delivery.start()

    @property
    def has_undelivered(self) -> bool:
        """Whether there are events that only this machine's disk has."""
        return self._has_undelivered

    def record(self, events: Sequence[UserEvent]) -> Future[Recorded]:
        """See EventStore. Safe in Redis to the degree that its `appendfsync` says.

        What comes while an answer is awaited shares the next round trip, or the next flush of the disk.
        """
        return self._group.submit(list(events))

    def recent(self, user_id: str, timeout_s: float = math.inf) -> Sequence[UserEvent]:
        """See EventStore."""
        if not user_id:
            return ()
        with waiting():
            fields: dict[bytes, bytes] = self._ask(lambda: self._hash(_key(user_id), timeout_s))
        found = []
        for field, value in fields.items():
            if field[:1] == b"e":
                timestamp, number, event_type, item_id = value.decode().split(" ", 3)
                event = UserEvent(field[1:].decode(), user_id, item_id, event_type, int(timestamp))
                found.append((event.timestamp, int(number), event))
        return [event for *_, event in sorted(found)[-self._max_per_user :]]

    def user_ids(self) -> None:
        """See EventStore: other machines record in the same Redis."""

    def deliver(self) -> int:
        """Send what was buffered; return how many events that were. Raises StoreUnavailableError.

        What is not there is left for the next time, and so is the rest when the store is closed. What Redis
        will never take is kept in REFUSED.
        """
        num_events = 0
        with self._buffering:
            parts = self._buffer.ended_parts()
        for number, payloads in parts:
            refused: list[dict[str, Any]] = []
            for events in _some_at_once(_readable(payloads, refused)):
                if self._is_closed.is_set():
                    return num_events
                self._send(events, refused)
                num_events += len(events)
                self._look_again()
            with self._buffering:
                if self._is_closed.is_set():
                    return num_events
                self._keep(refused)
                self._buffer.replace_before(number, [])
                self._has_undelivered = self._buffer.num_bytes > 0
        return num_events

    def close(self) -> None:
        """See EventStore. What is not delivered stays on disk for the next start."""
        self._is_closed.set()
        self._group.close()
        self._reading.shutdown(cancel_futures=True)
        self._delivery.join(CLOSE_S)
        with self._buffering:
            self._buffer.close()
        self._redis.close()
        self._recording.close()
        self._patient.close()

    def _hash(self, key: str, timeout_s: float) -> dict[bytes, bytes]:
        if timeout_s >= self._timeout_s:
            found: dict[bytes, bytes] = self._redis.hgetall(key)
            return found
        # In another thread, as a connection has one time for all of its answers; a late one stays there.
        ask = functools.partial(self._redis.hgetall, key)
        asked: Future[dict[bytes, bytes]] = self._reading.submit(self._asked, ask)
        try:
            return asked.result(max(0.0, timeout_s))
        except FutureTimeoutError as error:
            asked.cancel()
            # Not away, as far as is known: the next caller may have more time.
            message = "Redis did not answer in the time that a request had"
            seldom.warning(message)
            raise StoreUnavailableError(message) from error

    def _commit(self, batches: Sequence[Sequence[UserEvent]]) -> list[Recorded]:
        """Record batches in Redis; on disk where it is away, and those of which it refuses a key."""
        nums_new: list[int | None] = [None if events else 0 for events in batches]
        with contextlib.suppress(StoreUnavailableError):
            found = self._ask(lambda: self._sent(batches, self._recording))
            for number, sent in itertools.groupby(found, key=_number):
                answers = [one.answer for one in sent]
                if not any(isinstance(answer, Exception) for answer in answers):
                    nums_new[number] = sum(answers)
        aside = [events for events, num_new in zip(batches, nums_new, strict=True) if num_new is None]
        if aside:
            self._set_aside(aside)
        return [
            Recorded(len(events), 0, is_delayed=True)
            if num_new is None
            else Recorded(num_new, len(events) - num_new)
            for events, num_new in zip(batches, nums_new, strict=True)
        ]

    def _send(self, events: Sequence[UserEvent], refused: list[dict[str, Any]]) -> None:
        """Deliver events. Raises StoreUnavailableError.

        Args:
            events: in the order in which they came.
            refused: gets the events of users for whose keys the script fails, which somebody else must have
                made. Others are not to wait for them for ever.
        """
        refused += [
            {"why": str(one.answer), "events": one.events}
            for one in self._asked(lambda: self._sent([events], self._patient))
            if isinstance(one.answer, Exception)
        ]

    def _sent(self, batches: Sequence[Sequence[UserEvent]], client: Any) -> list[_Sent]:
        """Record batches in one round trip; raises what Redis raises, but for what is of one key alone."""
        now_ms = round(self._clock() * 1000)
        pipeline = client.pipeline(transaction=False)
        asked: list[tuple[int, list[UserEvent]]] = []
        for number, events in enumerate(batches):
            in_turn = sorted(events, key=_user)  # stable: of one user as they came
            for user_id, group in itertools.groupby(in_turn, key=_user):
                of_user = list(group)
                arguments: list[Any] = [self._max_per_user, self._keep_ms, now_ms]
                for event in of_user:
                    arguments += [event.event_id, event.event_type, event.item_id, event.timestamp]
                self._record_script(keys=[_key(user_id)], args=arguments, client=pipeline)
                asked.append((number, of_user))
        sent = []
        for (number, of_user), answer in zip(asked, pipeline.execute(raise_on_error=False), strict=True):
            if isinstance(answer, Exception) and not self._is_of_a_key(answer):
                raise answer
            sent.append(_Sent(number, of_user, answer))
        return sent

    def _is_of_a_key(self, error: Exception) -> bool:
        """Return whether the script failed for what stands under one key, and not for all of Redis."""
        text = str(error)
        return type(error) is self._refusal and "script" in text and not text.startswith(OF_REDIS)

    def _keep(self, refused: Sequence[dict[str, Any]]) -> None:
        if not refused:
            return
        path = self._buffer.directory / REFUSED
        with open(path, "a", encoding="utf-8", opener=private) as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in refused)
            file.flush()
            os.fsync(file.fileno())
        reasons = "; ".join(dict.fromkeys(one["why"] for one in refused))
        logger.error("events that Redis will never take are kept in %s: %s", path, reasons)

    def _set_aside(self, batches: Sequence[Sequence[UserEvent]]) -> None:
        """Make batches safe on disk, with one flush. Raises StoreUnavailableError."""
        now_ms = round(self._clock() * 1000)  # "just now" is now, not when they are delivered
        payloads = [
            encode([event._replace(timestamp=event.timestamp or now_ms) for event in events])
            for events in batches
        ]
        with self._buffering:
            try:
                if self._buffer.num_bytes > self._max_buffer_bytes:
                    raise StoreUnavailableError(
                        "Redis does not answer, and the buffer for its events is full"
                    )
                self._buffer.append(payloads)
            except OSError as error:
                raise StoreUnavailableError(
                    f"Redis does not answer, and the buffer cannot be written: {error}"
                ) from error
            self._has_undelivered = True

    def _deliver_later(self) -> None:
        while not self._is_closed.wait(self._retry_s):
            try:
                self._look_again()
                if self._has_undelivered and not self._is_away:
                    logger.info("%d delayed events are in Redis now", self.deliver())
            except StoreUnavailableError:
                pass  # was logged when Redis failed
            except Exception:
                logger.exception("delayed events could not be delivered; they stay on disk")

    def _look_again(self) -> None:
        """Let requests be answered again where Redis has failed and is back; asks at most every retry_s."""
        if not self._is_away or time.monotonic() < self._asked_again_at:
            return
        self._asked_again_at = time.monotonic() + self._retry_s
        try:
            self._redis.ping()
        except self._refusal:
            pass  # it answers
        except self._errors as error:
            seldom.warning("Redis does not answer", f": {error}")
            return
        self._is_away = False
        logger.info("Redis answers again")

    def _ask(self, call: Callable[[], T]) -> T:
        """Return what Redis says. Raises StoreUnavailableError, at once while it is away."""
        if self._is_away:
            raise StoreUnavailableError("Redis did not answer a moment ago")
        return self._asked(call)

    def _asked(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except self._refusal as error:  # a full memory, say: reads go on
            text = "Redis refuses"
            if isinstance(error, self._moved):
                text = "Redis is part of a cluster; expected one server that has all keys"
            seldom.warning(text, f": {error}")
            raise StoreUnavailableError(f"{text}: {error}") from error
        except self._errors as error:
            self._is_away = True
            seldom.warning("Redis does not answer", f": {error}")
            raise StoreUnavailableError(f"Redis does not answer: {error}") from error


def _readable(payloads: Sequence[bytes], refused: list[dict[str, Any]]) -> Iterator[list[UserEvent]]:
    """Yield the events of each record; `refused` gets what holds none."""
    for payload in payloads:
        try:
            events = events_of(payload)
        except (ValueError, TypeError, LookupError) as error:
            text = payload.decode(errors="replace")
            refused.append({"why": f"no record of events: {error}", "payload": text})
        else:
            yield events


def _some_at_once(batches: Iterator[list[UserEvent]]) -> Iterator[list[UserEvent]]:
    """Yield the events of batches, EVENTS_AT_ONCE or a little more together."""
    waiting: list[UserEvent] = []
    for events in batches:
        waiting += events
        if len(waiting) >= EVENTS_AT_ONCE:
            yield waiting
            waiting = []
    yield waiting


def check_url(url: str) -> None:
    """Raise ValueError where the url is none, or the redis package is not installed. Nothing is connected."""
    try:
        import redis
    except ModuleNotFoundError as error:
        raise ValueError(NO_PACKAGE) from error
    redis.Redis.from_url(url).close()


def _key(user_id: str) -> str:
    return KEY.format(user_id=user_id)


def _user(event: UserEvent) -> str:
    return event.user_id


def _number(sent: _Sent) -> int:
    return sent.number
