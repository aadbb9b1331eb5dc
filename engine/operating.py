"""The commands of those who run a server: serve, key, rollback.

Each takes its arguments and returns an exit code: 0 done, 2 what was asked for is wrong; `serve` ends with 1
where a worker does not come back from its request. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from engine.admission import RateLimit
from engine.arguments import ArgumentParser
from engine.auth import KEY, ROLES, ApiKeys, KeyFile, create_key, remove_key
from engine.bundle import (
    MANIFEST,
    Bundle,
    bundle_to_serve,
    bundles_in,
    bundles_to_serve,
    pin_bundle,
    pinned_but_gone,
    resolve_bundle,
)
from engine.commands import DEFAULT_ADDRESS, fail, stderr, stdout
from engine.event_log import EventLog, LogInUseError
from engine.event_store import LocalEventStore, MemoryEventStore
from engine.events import EventStore
from engine.following import first_to_serve, log_policies, other_lacks, prepared
from engine.memory import set_up_for_serving
from engine.policy_files import PolicyFiles
from engine.response_cache import ResponseCache
from engine.server import serve as run_server
from engine.shared_events import SharedEventStore
from engine.telemetry import Metrics, log_as_json
from engine.tls import server_tls
from engine.variants import OTHER, SHADOW, Split
from engine.workers import ListenError, Worker, supervise, told
from ranking.onnx_scorer import Provider

logger = logging.getLogger(__name__)

# After how long a thread that runs Python lets another one. By default, 5 ms, the event loop waits for the
# threads of the pool in turn: past saturation, on two crowded cores, refusals took 400 to 740 ms at the
# median, and 80 to 180 ms with this, with 10% more answers.
SWITCH_INTERVAL_S = 0.0005
REDIS_URL = "TRIRANK_REDIS_URL"  # of the environment: what is in an argument all processes can read
MEMORY = "memory"  # in place of a directory of events
WILDCARDS = ("0.0.0.0", "[::]")
WORKER_END_S = 5.0  # beside the drain, for one of several servers to end
GIVE_UP_S = 60.0  # without a worker, for a single server to end
FIRST_FREE_PORT = 1024  # those below take a right on most systems


def serve(argv: list[str]) -> int:
    """Answer gRPC requests from a bundle until SIGTERM or SIGINT."""
    args = _serve_parser().parse_args(argv)
    args.redis_url = args.redis_url or os.environ.get(REDIS_URL)
    args.events = MEMORY if args.events is None else args.events  # as option files of before have it
    worker = told()
    if args.json_logs:
        log_as_json(fields={"worker": worker.number} if worker else None)
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        # With --check 0 would mean that it could be served.
        with _ending_on_signals(128 + signal.SIGTERM if args.check else 0), contextlib.ExitStack() as closing:
            have_ended = _serve(args, argv, worker, closing)
    except (ValueError, OSError) as error:  # such as a BundleError, a PolicyError, an AddressError
        if not args.json_logs:
            return fail(str(error), 2)
        logger.error("%s", error)
        return 2
    if not have_ended:
        _end_without_workers()
    return 0


@contextlib.contextmanager
def _ending_on_signals(code: int) -> Iterator[None]:
    """End with a code on SIGTERM, and pass over SIGHUP, until the server has handlers of its own.

    The first process of a container ignores a SIGTERM for which it has no handler, and would begin to serve.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_without_workers() -> None:
    logger.error("a worker has not come back from its request; the process ends without it")
    logging.shutdown()
    os._exit(1)  # the interpreter would wait for it, for ever


def _serve_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="trirank serve", description=serve.__doc__)
    add = parser.add_argument
    add(
        "bundle",
        type=Path,
        help="a bundle, or a directory of bundles: the newest is served, and a newer one takes over "
        "when it is published (see trirank rollback)",
    )
    add(
        "--address", type=str, default=DEFAULT_ADDRESS, help="host:port to listen on; port 0 takes a free one"
    )
    add(
        "--num_workers",
        type=int,
        default=1,
        help="requests that each process works on at once; several wait for the interpreter's lock, so that "
        "cores are better used by --num_processes",
    )
    add("--num_threads", type=int, default=1, help="threads of the ranker, and of an index, for one request")
    add(
        "--provider",
        type=Provider,
        default="auto",
        help="what runs the ranker: cpu, cuda or tensorrt; auto takes cuda where onnxruntime has it",
    )
    add(
        "--num_processes",
        type=int,
        default=1,
        help="servers on one port, each with its workers; the metrics of the second are at the next port",
    )
    add(
        "--policies",
        type=Path | None,
        default=None,
        help="policies instead of the bundle's own: a YAML file, or a directory of such files; "
        "what changes is loaded again, at once on SIGHUP",
    )
    add(
        "--cache_s",
        type=float,
        default=0.0,
        help="seconds for which the same question gets the same slate again, unless there is a new event, "
        "bundle or policy (default: none)",
    )
    add(
        "--other",
        type=Path | None,
        default=None,
        help="another bundle, or the newest of another directory, for a share of the users (A/B)",
    )
    add("--share", type=float, default=0.5, help="of the users, whom --other answers: 0 to 1, by user id")
    add(
        "--shadow",
        type=Path | None,
        default=None,
        help="a bundle that is asked what was answered, and compared; nobody sees its answers",
    )
    add(
        "--events",
        type=Literal[MEMORY] | Path,
        default=Path("events"),
        help="directory of a log that keeps recorded events through crashes; with --redis_url: of those that "
        'Redis does not have yet; "memory" keeps them in memory alone',
    )
    add(
        "--redis_url",
        type=str | None,
        default=None,
        help="Redis that keeps recorded events for several servers: redis://[user:password@]host:port/db; "
        f"{REDIS_URL} of the environment where it is not given",
    )
    add(
        "--api_keys",
        type=Path | None,
        default=None,
        help="key file (see trirank key); callers must have one of its keys (default: nobody needs one)",
    )
    add(
        "--requests_per_s",
        type=float | None,
        default=None,
        help="calls a second that a key without a limit of its own may make, or without --api_keys an "
        "address (default: no limit)",
    )
    add("--burst", type=float | None, default=None, help="of these, calls at once (default: one second's)")
    add("--tls_cert", type=Path | None, default=None, help="certificate of the server, PEM")
    add("--tls_key", type=Path | None, default=None, help="its key, PEM")
    add(
        "--tls_client_ca",
        type=Path | None,
        default=None,
        help="authority whose certificates clients must have (mTLS), PEM",
    )
    add("--metrics", type=str | None, default=None, help="host:port of Prometheus metrics at /metrics")
    add("--json_logs", type=bool, default=False, help="true: one JSON object for each line of the log")
    add("--drain_s", type=float, default=10.0, help="seconds that requests under way get after SIGTERM")
    add("--json", action="store_true", help="print one JSON line to stdout when ready")
    add(
        "--check",
        action="store_true",
        help="find out whether all of this could be served, and end: 0 it could, 2 it could not",
    )
    return parser


def _serve(args: Any, argv: list[str], worker: Worker | None, closing: contextlib.ExitStack) -> bool:
    """Return whether nothing is left that would keep the process from ending."""
    _check_options(args)
    if worker is None:  # for all who may follow
        _check_machine(args)
    rate_limit = _rate_limit(args.requests_per_s, args.burst)
    tls = server_tls(args.tls_cert, args.tls_key, args.tls_client_ca)
    if tls:
        tls.credentials()
    keys = KeyFile(args.api_keys) if args.api_keys else None
    if keys and not len(keys.load()):
        logger.warning("%s holds no key: every call will be refused", keys.path)
    if args.num_processes > 1 and worker is None and not args.check:
        _serve_from_many(args, argv, closing)
        return True
    num_cores = os.cpu_count() or 1
    if worker is None and num_cores > 1:
        logger.info("one process, %d cores: --num_processes %d would use them", num_cores, num_cores)
    address, metrics_address = (worker.address, worker.metrics) if worker else (args.address, args.metrics)
    set_up_for_serving()
    open_bundle = functools.partial(Bundle.load, num_threads=args.num_threads, provider=args.provider)
    bundles = [bundle_to_serve(args.bundle)] if args.check else bundles_to_serve(args.bundle)
    if gone := pinned_but_gone(args.bundle):
        logger.error("the pinned bundle %s is gone; what is older is served instead", gone)
    other_bundles = {
        name: open_bundle(resolve_bundle(path))
        for name, path in ((OTHER, args.other), (SHADOW, args.shadow))
        if path
    }
    policies = PolicyFiles(args.policies) if args.policies else None
    served_policies = policies.load() if policies else None
    if args.check:
        pipeline = prepared(open_bundle(bundles[0]), served_policies)
        others = {name: prepared(one, served_policies) for name, one in other_bundles.items()}
        if told := other_lacks(pipeline, others):
            raise ValueError(told)
        log_policies(pipeline, str(args.policies or bundles[0]))
        _say(args, f"events: {_check_events(args.events)}")
        _say(args, f"bundle {pipeline.bundle.version} could be served")
        return True

    events = (
        SharedEventStore(worker.events, waits=worker.events_wait)
        if worker
        else _event_store(args.events, args.redis_url)
    )
    closing.callback(events.close)
    pipeline = first_to_serve(bundles, open_bundle, served_policies, events)
    if pipeline.bundle.scorer is not None:
        logger.info("the ranker runs on %s", ", then ".join(pipeline.bundle.scorer.providers))
    others = {name: prepared(one, served_policies, events) for name, one in other_bundles.items()}
    if told := other_lacks(pipeline, others):
        logger.warning("%s", told)
    log_policies(pipeline, str(args.policies or pipeline.bundle.path))
    metrics = Metrics()
    ready = {"bundle": pipeline.bundle.version}
    if metrics_address:
        host, port = _host_and_port("metrics", metrics_address)
        try:
            port, stop = metrics.serve(port, host)
        except OSError as error:
            raise ListenError("metrics", metrics_address, error) from error
        closing.callback(stop)
        ready["metrics"] = f"{host}:{port}"
        logger.info("metrics at http://%s:%d/metrics", host, port)

    def on_ready(address: str) -> None:
        _say(args, f"listening on {address}, bundle {ready['bundle']}")
        if args.json:
            print(json.dumps({"address": address} | ready), flush=True)
        if worker:  # nobody reads on: what some library prints would fill the pipe, and stop the server
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    is_one_bundle = (args.bundle / MANIFEST).is_file()
    serving = run_server(
        pipeline,
        address,
        num_workers=args.num_workers,
        drain_s=args.drain_s,
        on_ready=on_ready,
        policies=policies,
        bundles=None if is_one_bundle else args.bundle,
        open_bundle=open_bundle,
        keys=keys,
        rate_limit=rate_limit,
        tls=tls,
        metrics=metrics,
        others=others,
        share=args.share,
        cache=ResponseCache(args.cache_s) if args.cache_s else None,
        reuse_port=worker is not None,
        # One of several is started again by who watches them, and a probe would ask any of them; what watches
        # a single one may ask for its health, and then ends it in its own way.
        give_up=_end_without_workers,
        give_up_s=0.0 if worker else GIVE_UP_S,
    )
    del pipeline
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return asyncio.run(serving)


def _serve_from_many(args: Any, argv: list[str], closing: contextlib.ExitStack) -> None:
    """Have several processes answer, which ask this one for recorded events."""
    address = _host_and_port("address", args.address)
    metrics_address = _host_and_port("metrics", args.metrics) if args.metrics else None
    # All processes serve the same, also those that are started again when another bundle has been published.
    for option, path in (("--other", args.other), ("--shadow", args.shadow)):
        argv = [*argv, option, str(resolve_bundle(path))] if path else argv
    events = _event_store(args.events, args.redis_url)
    closing.callback(events.close)

    def on_ready(ready: dict[str, Any]) -> None:
        processes = f"{args.num_processes} processes"
        _say(args, f"listening on {ready['address']}, bundle {ready['bundle']}, {processes}")
        if args.json:
            print(json.dumps(ready), flush=True)

    end_s = args.drain_s + WORKER_END_S
    supervise(argv, address, metrics_address, args.num_processes, events, on_ready, end_s)


def _say(args: Any, text: str) -> None:
    """Tell who started the server, in the form of its log."""
    if args.json_logs:
        logger.info("%s", text)
    else:
        stderr.print(text, markup=False)


def _check_options(args: Any) -> None:
    """Raise ValueError where the options cannot be meant, on whatever machine."""
    for name in ("num_workers", "num_threads", "num_processes"):
        if args[name] < 1:
            raise ValueError(f"{name} is {args[name]}; expected at least 1")
    for name in ("cache_s", "drain_s"):
        if not args[name] >= 0:  # NaN neither
            raise ValueError(f"{name} is {args[name]}; expected 0 or more")
    Split(args.share, "")  # raises where it is none
    host, port = _host_and_port("address", args.address)
    if args.metrics:
        metrics_host, first = _host_and_port("metrics", args.metrics)
        ports = range(first, first + args.num_processes) if first else range(0)
        if ports and ports[-1] > 65535:
            raise ValueError(
                f"metrics is {args.metrics!r}; expected a port of at most {65536 - len(ports)}: "
                f"the metrics of {len(ports)} processes take as many, from this on"
            )
        is_one_family = (":" in metrics_host) == (":" in host)
        is_wild = metrics_host in WILDCARDS or host in WILDCARDS
        is_one_host = metrics_host == host or (is_one_family and is_wild)
        if port in ports and is_one_host:
            raise ValueError(
                f"metrics is {args.metrics!r}; expected ports other than that of address, {args.address!r}"
            )
    if args.redis_url:
        if args.events == MEMORY:
            raise ValueError(
                f"events is {MEMORY!r} beside redis_url; "
                "expected a directory, for what Redis does not have yet"
            )
        _check_redis_url(args.redis_url)


def _check_machine(args: Any) -> None:
    """Raise ValueError where this machine could not do what the options say.

    What a server that runs already would have taken, its ports, is passed over.
    """
    _check_listening("address", args.address)
    if args.metrics:
        _check_listening("metrics", args.metrics)
    if args.events != MEMORY:
        _existing(args.events)
    if args.redis_url:
        from engine.redis_events import check_url

        try:
            check_url(args.redis_url)
        except ValueError as error:
            raise ValueError(f"redis_url: {error}") from error


def _check_listening(name: str, address: str) -> None:
    """Raise ListenError where the host of an address is not this machine. One that is binds, at any port."""
    host, port = _host_and_port(name, address)
    port = port if port < FIRST_FREE_PORT else 0
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name, by the rules for names
        raise ListenError(name, address, error) from error
    failures = []
    for family, kind, protocol, _, where in found:  # as the servers do, which are content with one
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(where)
            return
        except OSError as error:
            # Where the kernel has no IPv6, gRPC takes "[::]" for all of IPv4.
            if error.errno in (errno.EADDRINUSE, errno.EAFNOSUPPORT):
                return
            failures.append(error)
    raise ListenError(name, address, failures[0]) from failures[0]


def _check_redis_url(url: str) -> None:
    """Raise ValueError where the database is no number: redis-py would take database 0 instead.

    The message leaves the URL out, which may hold a password.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("redis", "rediss") and not re.fullmatch(r"(/[0-9]*)?", parts.path):
        raise ValueError("redis_url names no database by its number; expected the form redis://host:port/0")


def _existing(directory: Path) -> Path:
    """Return a directory of events, or the nearest above it that is there. Raises ValueError."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ValueError(
            f"events is {str(directory)!r}; expected a directory that can be written or made, or {MEMORY!r}: "
            "a restart forgets them then"
        )
    return existing


def _rate_limit(per_s: float | None, burst: float | None) -> RateLimit | None:
    if per_s is None:
        if burst is not None:
            raise ValueError("burst is given without requests_per_s; expected both")
        return None
    return RateLimit(per_s, max(1.0, per_s) if burst is None else burst)


def _host_and_port(name: str, address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and host != "*" and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"{name} is {address!r}; expected host:port")
    has_brackets = host[0] == "[" and host[-1] == "]"
    if has_brackets != (":" in host) and (has_brackets or name == "address"):  # gRPC takes no other
        raise ValueError(f"{name} is {address!r}; expected host:port, with an IPv6 address in brackets")
    return host, int(port)


def _event_store(directory: Path | str, redis_url: str | None) -> EventStore:
    if redis_url:
        from engine.redis_events import RedisEventStore

        return RedisEventStore(redis_url, directory)
    if directory == MEMORY:
        logger.warning("events are kept in memory alone: a restart forgets them (--events DIR would not)")
        return MemoryEventStore()
    store = LocalEventStore(directory)
    logger.info("events of %s: %d", directory, store.num_events)
    return store


def _check_events(directory: Path | str) -> str:
    """Return what would be done with events. Raises ValueError or OSError where it could not be done."""
    if directory == MEMORY:
        return "in memory alone: a restart forgets them"
    directory = Path(directory)
    if _existing(directory) != directory:
        return f"{directory} would be made"
    try:
        log = EventLog(directory)
    except LogInUseError:
        return f"{directory} is in use, as it should be if the server runs already"
    try:
        num_records = sum(1 for _ in log.replay())
    finally:
        log.close()
    return f"{directory} has {num_records} records, and {log.num_lost_bytes} bytes that are none"


def key(argv: list[str]) -> int:
    """Make, list and remove the API keys that `trirank serve --api_keys` accepts.

    create prints the new key, this once: the file holds only what it hashes to.
    """
    parser = ArgumentParser(prog="trirank key", description=key.__doc__)
    parser.add_argument("action", type=Literal["create", "list", "remove"], help="create, list or remove")
    parser.add_argument("file", type=Path, help="the key file; create makes it where it is missing")
    parser.add_argument("--name", type=str, default="", help="whose key it is, for create")
    parser.add_argument(
        "--role",
        type=Literal[ROLES],
        default="client",
        help="for create: a reader may ask, a client record events too",
    )
    parser.add_argument(
        "--requests_per_s", type=float | None, default=None, help="calls a second that it may make"
    )
    parser.add_argument("--burst", type=float | None, default=None, help="of these, calls at once")
    parser.add_argument("--id", type=str, default="", help="of the key to remove, as list shows it")
    args = parser.parse_args(argv)
    try:
        if args.action == "create":
            if not args.name.strip():
                raise ValueError(f"name is {args.name!r}; expected whose key it is to be")
            rate_limit = _rate_limit(args.requests_per_s, args.burst)
            made = create_key(args.file, args.name, role=args.role, rate_limit=rate_limit)
            print(made)
            match = KEY.fullmatch(made)
            assert match
            stderr.print(
                f"key {match[1]} is in {args.file}; a server that runs takes it by itself", markup=False
            )
        elif args.action == "remove":
            remove_key(args.file, args.id)
            stderr.print(f"key {args.id} is no longer in {args.file}", markup=False)
        else:
            table = Table("id", "name", "role", "created", "requests/s", "burst")
            for one in ApiKeys.load(args.file):
                limit = one.rate_limit
                numbers = (f"{limit.per_s:g}", f"{limit.burst:g}") if limit else ("", "")
                table.add_row(one.id, one.name, one.role, one.created, *numbers)
            stdout.print(table, markup=False)
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    return 0


def rollback(argv: list[str]) -> int:
    """Have the servers of a directory of bundles serve an older one, until they are told otherwise.

    They notice within a second, and so does a server that starts later. What is published meanwhile waits.
    """
    parser = ArgumentParser(prog="trirank rollback", description=rollback.__doc__)
    parser.add_argument("bundles", type=Path, help="the directory of bundles")
    parser.add_argument(
        "--to",
        type=str | None,
        default=None,
        help="the bundle to serve (default: the one before the newest, or before that of the last rollback)",
    )
    parser.add_argument("--newest", action="store_true", help="serve the newest again, as without a rollback")
    args = parser.parse_args(argv)
    try:
        if args.newest and args.to:
            raise ValueError("newest is given with to; expected one of them")
        target = args.to
        if not args.newest and target is None:
            names = [bundle.name for bundle in bundles_in(args.bundles)]
            place = names.index(bundle_to_serve(args.bundles).name)
            if not place:
                raise ValueError(
                    f"{names[0]} is the oldest bundle of {args.bundles}; there is none before it"
                )
            target = names[place - 1]
        pin_bundle(args.bundles, target)
        stderr.print(f"to be served: {bundle_to_serve(args.bundles).name}", markup=False)
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    return 0
