"""Several servers on one port: the system deals them the connections (SO_REUSEPORT; Linux 3.9).

One process of Python runs Python on one core. So `trirank serve --num_processes N` starts N servers and
watches over them: it restarts one that ends by itself, passes signals on, and keeps the recorded events,
which the servers ask it for (engine/shared_events.py). They end when it ends, however that may be.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from engine.events import EventStore
from engine.shared_events import EventServer

logger = logging.getLogger(__name__)

WORKER = "TRIRANK_WORKER"  # of the environment: what a worker is told, as JSON
POLL_S = 0.1
RESTART_S = 1.0  # between the end of a worker and its next start


class Worker(NamedTuple):
    """What one of several servers is told by the process that started it."""

    address: str  # host:port, shared
    metrics: str | None  # host:port, its own
    events: str  # path of an EventServer
    events_wait: bool  # EventStore.waits of its store
    number: int  # from 0, as the log counts them


class ListenError(ValueError):
    """An address that cannot be listened on: which option it is of, and what the system says."""

    def __init__(self, name: str, address: str, reason: Exception) -> None:
        said = reason.strerror if isinstance(reason, OSError) else None
        super().__init__(f"{name}: cannot listen on {address!r}: {said or reason}")


class WorkerError(ValueError):
    """A worker that could not start; its own message stands in the log."""


class _EndedError(Exception):
    """SIGTERM or SIGINT before the servers were ready."""


def told() -> Worker | None:
    """Return what this process was told as a worker; None where it is none.

    A worker gets SIGTERM when the process that started it ends.
    """
    text = os.environ.pop(WORKER, None)
    if text is None:
        return None
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    return Worker(**json.loads(text))


def _end_with_parent() -> None:
    # Not sys.stdin: its lock, held by this thread, would make the interpreter abort when it ends.
    while os.read(0, 1024):
        pass  # until the other end of the pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)


def supervise(
    argv: Sequence[str],
    address: tuple[str, int],
    metrics: tuple[str, int] | None,
    num_workers: int,
    events: EventStore,
    on_ready: Callable[[dict[str, Any]], None],
    end_s: float,
) -> None:
    """Run servers until SIGTERM or SIGINT.

    Args:
        argv: of `trirank serve`.
        address: host and port; port 0 takes a free one.
        metrics: host and port of the first server's metrics; the next one's port is one more.
        num_workers: how many servers.
        events: what they record in.
        on_ready: called with what a server says when it is ready, once all of them are.
        end_s: how long they may take to end.

    Raises:
        ListenError: the port is taken.
        WorkerError: a server could not start.
    """
    host, port = address
    with tempfile.TemporaryDirectory(prefix="trirank-") as folder, _reserved(host, port) as reserved:
        port = reserved.getsockname()[1]
        socket_path = str(Path(folder) / "events")
        server = EventServer(events, socket_path)

        def start(number: int) -> subprocess.Popen[str]:
            own = f"{metrics[0]}:{metrics[1] and metrics[1] + number}" if metrics else None
            told = json.dumps(Worker(f"{host}:{port}", own, socket_path, events.waits, number)._asdict())
            return subprocess.Popen(
                [sys.executable, "-m", "engine.cli", "serve", *argv, "--json"],
                env={**os.environ, WORKER: told},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

        signals: list[int] = []
        is_ready = False

        def note(number: int, frame: FrameType | None) -> None:
            signals.append(number)
            if number != signal.SIGHUP and not is_ready:
                raise _EndedError  # out of the wait for the workers

        workers: list[subprocess.Popen[str]] = []
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, note)
            workers.extend(start(number) for number in range(num_workers))
            said = [_said(worker) for worker in workers]
            is_ready = True
            on_ready(said[0] | ({"metrics": [one["metrics"] for one in said]} if metrics else {}))
            _watch(workers, start, signals)
        except _EndedError:
            logger.info("ended before all servers were ready")
        finally:
            is_ready = True  # once is enough
            _end(workers, end_s)
            server.close()


def _end(workers: Sequence[subprocess.Popen[str]], end_s: float) -> None:
    for worker in workers:
        worker.terminate()
    ends = time.monotonic() + end_s
    for number, worker in enumerate(workers):
        try:
            worker.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.error("worker %d has not ended within %g s; it is killed", number, end_s)
            worker.kill()
            worker.wait()


def _watch(
    workers: list[subprocess.Popen[str]], start: Callable[[int], subprocess.Popen[str]], signals: list[int]
) -> None:
    """Return when this process is to end."""
    ended_at: dict[int, float] = {}
    while True:
        while signals:
            if (received := signals.pop(0)) != signal.SIGHUP:
                return
            for worker in workers:
                worker.send_signal(received)
        for number, worker in enumerate(workers):
            if worker.poll() is None:
                continue
            if number not in ended_at:
                logger.error("worker %d has ended with %d; it is started again", number, worker.returncode)
                ended_at[number] = time.monotonic()
            elif time.monotonic() - ended_at[number] >= RESTART_S:
                try:
                    workers[number] = start(number)
                except OSError as error:  # no memory, process or descriptor is left, for now
                    logger.error("worker %d could not be started, and will be tried again: %s", number, error)
                    ended_at[number] = time.monotonic()
                else:
                    del ended_at[number]
        time.sleep(POLL_S)


def _said(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout
    line = worker.stdout.readline()
    if not line:
        raise WorkerError(f"a worker could not start; it ended with {worker.wait()}")
    return dict(json.loads(line))


def _reserved(host: str, port: int) -> socket.socket:
    """Return a socket that keeps a port for the workers, who alone listen on it. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = (host.strip("[]"), port)
    reserved = socket.socket(family)
    try:
        with socket.socket(family) as probe:  # would fail where anybody listens, others of our kind too
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(where)
    except OSError as error:
        reserved.close()
        raise ListenError("address", f"{host}:{port}", error) from error
    return reserved
