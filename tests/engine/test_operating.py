"""The commands of those who run a server, most of them with the server in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from engine import commands, operating
from engine.auth import ApiKeys, create_key, remove_key
from engine.bundle import Bundle, bundle_to_serve, write_bundle
from engine.client import RecommenderClient, visitor
from engine.event_store import LocalEventStore
from engine.events import UserEvent
from engine.pipeline import RecommendationPipeline
from engine.tls import TlsError, client_credentials, server_tls
from engine.workers import ListenError
from protos.trirank.v1 import recommender_pb2 as pb
from tests.engine.command import SERVE

WAIT_S = 60


def event(number: object, user: str = "loyal", item: str = "null", **fields: Any) -> pb.RecordedEvent:
    return pb.RecordedEvent(event_id=str(number), user_id=user, item_id=item, **fields)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


class Running(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    metrics: str
    log: Path


@pytest.fixture(scope="module")
def serving(start_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run `trirank serve` with these words on a free port."""

    @contextmanager
    def serving(bundle: Path, *options: str) -> Iterator[Running]:
        log = tmp_path_factory.mktemp("server") / "log.txt"
        words = [str(bundle), "--address", "127.0.0.1:0", "--json", *options]
        command = [*SERVE, *words]
        with log.open("w") as errors, start_process(command, errors) as (process, ready):
            assert ready, log.read_text()
            said = json.loads(ready)
            yield Running(process, said["address"], said.get("metrics", ""), log)

    return serving


def until(happens: Callable[[], bool], server: Running) -> None:
    ends = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < ends
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)


# Events


def test_what_was_recorded_a_moment_ago_shapes_the_next_answer(server_address: str) -> None:
    with RecommenderClient(server_address, timeout_s=WAIT_S) as client:
        before = client.recommend(visitor("somebody new"))
        assert before.trace.visitor_kind == pb.VISITOR_KIND_ANONYMOUS
        events = [event(n, "somebody new", item) for n, item in enumerate(["item-9", "item-30"])]
        recorded = client.record_events(events)
        assert (recorded.num_new, recorded.num_repeated, recorded.delayed) == (2, 0, False)
        after = client.recommend(visitor("somebody new"))
        told = client.recommend(visitor(history=["item-9", "item-30"]))
        assert after.trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
        assert after.trace.unknown_user
        shown = [item.item_id for item in after.items]
        assert shown == [item.item_id for item in told.items] != [item.item_id for item in before.items]
        assert not {"item-9", "item-30"} & set(shown)
        again = client.record_events([*events, event(3, "somebody new", "of the next bundle")])
        assert (again.num_new, again.num_repeated) == (1, 2)
        code, details = refusal(lambda: client.record_events([event("", "u")]))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert details == "events[0].event_id is ''; expected a non-empty string"


def test_the_record_command(server_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--user", "somebody else", "--address", server_address]
    assert commands.record(["item-9", "item-10", "--type", "cart", *ask]) == 0
    assert capsys.readouterr().out == "new events: 2\n"
    assert commands.recommend([*ask, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trace"]["visitor_kind"] == "VISITOR_KIND_HISTORY_ONLY"
    with pytest.raises(SystemExit):
        commands.record(["item-9", "--type", "buy", *ask])


def test_what_was_acknowledged_survives_kill_9(bundle_path: Path, serving: Any, tmp_path: Path) -> None:
    acknowledged: list[int] = []
    numbers = itertools.count()  # next() of it is atomic
    with (
        serving(bundle_path, "--events", str(tmp_path / "events")) as server,
        RecommenderClient(server.address, timeout_s=WAIT_S) as recording,
    ):

        def record() -> None:
            with contextlib.suppress(grpc.RpcError):  # the server is gone
                for number in numbers:
                    recording.record_events([event(number, f"user {number % 7}", "item-9")])
                    acknowledged.append(number)

        threads = [threading.Thread(target=record) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(acknowledged) >= 100, server)
        server.process.kill()
        for thread in threads:
            thread.join()
    store = LocalEventStore(tmp_path / "events", max_per_user=10_000)
    kept = {int(one.event_id) for user in range(7) for one in store.recent(f"user {user}")}
    store.close()
    assert len(acknowledged) >= 100
    assert set(acknowledged) <= kept
    with serving(bundle_path, "--events", str(tmp_path / "events")) as server:
        with RecommenderClient(server.address, timeout_s=WAIT_S) as client:
            repeated = acknowledged[-50:]
            answer = client.record_events([event(n, f"user {n % 7}", "item-9") for n in repeated])
            assert (answer.num_new, answer.num_repeated) == (0, 50)
            trace = client.recommend(visitor("user 3")).trace
            assert trace.visitor_kind == pb.VISITOR_KIND_HISTORY_ONLY
        assert "events of" in server.log.read_text()


# Keys, metrics, logs


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def guarded(bundle_path: Path, keys: Path, serving: Any) -> Iterator[tuple[Running, str]]:
    """A server that wants keys, with metrics and JSON logs; and a key."""
    key = create_key(keys, "storefront")
    options = ["--api_keys", str(keys), "--metrics", "127.0.0.1:0", "--json_logs", "true"]
    with serving(bundle_path, *options) as server:
        yield server, key
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0


def client(server: Running, key: str | None) -> RecommenderClient:
    return RecommenderClient(server.address, timeout_s=WAIT_S, api_key=key)


def scraped(server: Running) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=WAIT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (sample.name.removeprefix("trirank_"), *(value for name, value in sorted(sample.labels.items()))): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


def test_no_key_no_answer(guarded: tuple[Running, str], keys: Path) -> None:
    server, key = guarded
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    with (
        client(server, None) as nobody,
        client(server, key[:-1] + "!") as wrong,
        client(server, key) as known,
    ):
        code, details = refusal(lambda: nobody.recommend(visitor("loyal")))
        assert (code, details[:11]) == (unauthenticated, "no API key;")
        assert refusal(lambda: wrong.recommend(visitor("loyal"))) == (
            unauthenticated,
            "the API key is not one of this server's",
        )
        assert len(known.recommend(visitor("loyal")).items) == 10
        assert known.record_events([event(1)]).num_new == 1
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert found.status == health_pb2.HealthCheckResponse.SERVING

    reader, other = create_key(keys, "page", role="reader"), create_key(keys, "to go")
    server.process.send_signal(signal.SIGHUP)
    with client(server, reader) as reading, client(server, other) as removed:

        def answers(asking: RecommenderClient) -> bool:
            try:
                asking.recommend(visitor("loyal"))
            except grpc.RpcError:
                return False
            return True

        until(lambda: answers(reading) and answers(removed), server)
        code, details = refusal(lambda: reading.record_events([event(2)]))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert details == "the API key has the role reader; expected client for this call"
        remove_key(keys, other.split("_")[1])
        server.process.send_signal(signal.SIGHUP)
        until(lambda: not answers(removed), server)


def test_the_command_sends_a_key(
    guarded: tuple[Running, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, key = guarded
    ask = ["--address", server.address, "--user", "loyal"]
    assert commands.recommend(ask) == 2
    assert "error: no API key; expected one in the metadata" in capsys.readouterr().err
    assert commands.recommend([*ask, "--api_key", key]) == 0
    monkeypatch.setenv(commands.API_KEY, key)
    assert commands.recommend(ask) == 0


def test_metrics_count_real_requests(guarded: tuple[Running, str]) -> None:
    server, key = guarded
    with client(server, key) as known, client(server, None) as nobody:
        before = scraped(server)
        for _ in range(3):
            known.recommend(visitor("loyal"))
        known.similar_items("null")
        refusal(lambda: known.recommend(visitor("loyal"), limit=0))
        refusal(lambda: nobody.recommend(visitor("loyal")))
        known.record_events([event("m1"), event("m2"), event("m1")])
        after = scraped(server)

    def more(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("requests_total", "OK", "Recommend") == 3
    assert more("requests_total", "OK", "SimilarItems") == 1
    assert more("requests_total", "INVALID_ARGUMENT", "Recommend") == 1
    assert more("requests_total", "UNAUTHENTICATED", "Recommend") == 1
    assert more("rejected_total", "key") == 1
    assert more("request_seconds_count", "Recommend") == 4
    assert more("stage_seconds_count", "ranking") == 3
    assert more("stage_seconds_count", "reranking") == 3
    assert more("stage_seconds_count", "retrieval") == 4
    assert more("events_total", "new") == 2
    assert more("events_total", "repeated") == 1
    assert more("key_requests_total", "OK", key.split("_")[1]) == 5
    assert more("key_requests_total", "INVALID_ARGUMENT", key.split("_")[1]) == 1
    log = server.log.read_text()
    assert (
        f"an invalid request of API key {key.split('_')[1]} (storefront): limit is 0; expected 1 to 500"
        in log
    )
    assert "refused: no API key; expected one in the metadata" in log
    assert "; ipv4:127.0.0.1" in log
    assert after["in_flight",] == 0
    assert after["concurrency_limit",] >= 1
    assert [name[2] for name in after if name[0] == "bundle_info"] == [bundle_version(server)]


def test_a_request_that_is_too_large_is_told_so_and_counted(guarded: tuple[Running, str]) -> None:
    server, key = guarded
    metadata = (("x-api-key", key),)
    name = ("requests_total", "INVALID_ARGUMENT", "Recommend")
    before = scraped(server)
    with grpc.insecure_channel(server.address) as channel:
        ask = channel.unary_unary("/trirank.v1.RecommenderService/Recommend", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            ask(bytes((6 << 20) + 1), timeout=WAIT_S, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the request's size is 6291457; expected at most 6291456 bytes"
    assert "x-request-id" in dict(caught.value.trailing_metadata())
    assert scraped(server)[name] == before.get(name, 0) + 1


def test_who_has_no_key_costs_no_message(guarded: tuple[Running, str]) -> None:
    """What is no message at all is not looked at: the key comes first, and with it the rate."""
    server, key = guarded
    with grpc.insecure_channel(server.address) as channel:
        ask = channel.unary_unary("/trirank.v1.RecommenderService/Recommend", None, None)
        found = []
        for metadata in ((), (("x-api-key", key),)):
            with pytest.raises(grpc.RpcError) as caught:
                ask(b"\xff", timeout=WAIT_S, metadata=metadata)
            found.append(caught.value.code())
    assert found == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT]


def test_events_survive_a_kill_where_nothing_is_said_of_them(
    bundle_path: Path, start_process: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "engine.cli", "serve", str(bundle_path), "--address", "127.0.0.1:0"]
    event = pb.RecordedEvent(event_id="1", user_id="ann", item_id="item-7")

    def recorded() -> int:
        with start_process(["env", "-C", str(tmp_path), *command, "--json"]) as (process, ready):
            with RecommenderClient(json.loads(ready)["address"], timeout_s=WAIT_S) as client:
                num_new = client.record_events([event]).num_new
            process.kill()
            process.wait(WAIT_S)
        return num_new

    assert [recorded(), recorded()] == [1, 0]
    assert list((tmp_path / "events").iterdir())


def bundle_version(server: Running) -> str:
    with grpc.insecure_channel(server.address):
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    (policies,) = [line["message"] for line in lines if line["message"].startswith("policies of ")]
    return Path(policies.removeprefix("policies of ").split(": ")[0]).name


def test_the_log_is_json_and_names_requests(guarded: tuple[Running, str]) -> None:
    server, key = guarded
    with grpc.insecure_channel(server.address) as channel:
        ask = channel.unary_unary(
            "/trirank.v1.RecommenderService/Recommend", None, pb.RecommendResponse.FromString
        )
        code, _ = refusal(lambda: ask(b"", timeout=WAIT_S, metadata=(("x-request-id", "find-me"),)))
        assert code == grpc.StatusCode.UNAUTHENTICATED
        _, call = ask.with_call(
            b"", timeout=WAIT_S, metadata=(("x-api-key", key), ("x-request-id", "answered"))
        )
        assert ("x-request-id", "answered") in list(call.trailing_metadata())
    content = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set(content[0])
    assert any(line["message"].startswith(f"listening on {server.address}, ") for line in content)
    assert not any("worker" in line for line in content)
    assert any("request_id" in line and line["message"].startswith("refused: ") for line in content)


def test_an_error_is_a_line_of_the_log(tmp_path: Path) -> None:
    command = [*SERVE, str(tmp_path / "none"), "--json_logs", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    last = [json.loads(line) for line in done.stderr.splitlines()][-1]
    assert last["level"] == "ERROR"
    assert "none is not a directory" in last["message"]


def test_the_key_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.json")
    assert operating.key(["create", file, "--name", "shop [b]", "--requests_per_s", "5"]) == 0
    out, err = capsys.readouterr()
    made = ApiKeys.load(file).find(out.strip())
    assert made is not None
    assert (made.name, made.role, made.requests_per_s, made.burst) == ("shop [b]", "client", 5, 5)
    assert out.strip() not in Path(file).read_text() + err
    assert operating.key(["list", file]) == 0
    listed = capsys.readouterr().out
    assert made.id in listed
    assert "shop [b]" in listed
    assert operating.key(["remove", file, "--id", "22222222"]) == 2
    assert operating.key(["remove", file, "--id", made.id]) == 0
    assert len(ApiKeys.load(file)) == 0
    assert operating.key(["create", file]) == 2
    assert "name is ''; expected whose key it is to be" in capsys.readouterr().err
    assert operating.key(["create", file, "--name", "x", "--burst", "2"]) == 2
    assert "burst is given without requests_per_s" in capsys.readouterr().err


# TLS


def test_mtls(bundle_path: Path, certificates: Any, serving: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = certificates
    options = ["--tls_cert", str(files.cert), "--tls_key", str(files.key)]
    with serving(bundle_path, *options, "--tls_client_ca", str(files.ca)) as server:
        ask = ["--address", server.address, "--user", "loyal", "--json"]
        own = ["--tls_cert", str(files.client_cert), "--tls_key", str(files.client_key)]
        assert commands.recommend([*ask, *own, "--tls_ca", str(files.ca)]) == 0
        capsys.readouterr()
        for wrong in ([*own, "--tls_ca", str(files.other_ca)], ["--tls_ca", str(files.ca)], []):
            assert commands.recommend([*ask, *wrong]) == 3
        assert capsys.readouterr().out == ""


def test_tls(bundle_path: Path, certificates: Any, served: Any) -> None:
    tls = server_tls(certificates.cert, certificates.key, None)
    assert tls

    def ask(address: str, credentials: grpc.ChannelCredentials | None) -> int:
        with RecommenderClient(address, timeout_s=WAIT_S, credentials=credentials) as asking:
            return len(asking.recommend(visitor("loyal")).items)

    async def scene() -> None:
        pipeline = RecommendationPipeline(Bundle.load(bundle_path))
        async with served(pipeline, credentials=tls.credentials()) as shop:
            trusting = client_credentials(certificates.ca, None, None)
            assert await asyncio.to_thread(ask, shop.address, trusting) == 10
            for wrong in (None, client_credentials(certificates.other_ca, None, None)):
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(ask, shop.address, wrong)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scene())


def test_a_certificate_is_renewed_without_a_restart(
    bundle_path: Path,
    certificates: Any,
    served: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = certificates
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    shutil.copy(files.cert, cert)
    shutil.copy(files.key, key)
    tls = server_tls(cert, key, None)
    assert tls

    def is_trusted(address: str, ca: Path) -> bool:
        trusting = client_credentials(ca, None, None)
        with RecommenderClient(address, timeout_s=WAIT_S, credentials=trusting, num_channels=2) as asking:
            try:
                return len(asking.recommend(visitor("loyal")).items) == 10
            except grpc.RpcError:
                return False

    async def scene() -> None:
        pipeline = RecommendationPipeline(Bundle.load(bundle_path))
        async with served(pipeline, credentials=tls.credentials()) as shop:

            async def trusted() -> tuple[bool, bool]:
                old = await asyncio.to_thread(is_trusted, shop.address, files.ca)
                return old, await asyncio.to_thread(is_trusted, shop.address, files.renewed_cert)

            assert await trusted() == (True, False)
            shutil.copy(files.renewed_cert, cert)  # the key is to follow
            assert await trusted() == (True, False)
            shutil.copy(files.renewed_key, key)
            assert await trusted() == (False, True)
            cert.unlink()
            assert await trusted() == (False, True)

    asyncio.run(scene())
    assert caplog.text.count("the certificate in use stays") == 2


def test_wrong_certificates(certificates: Any, tmp_path: Path) -> None:
    files = certificates
    for make, message in (
        (lambda: server_tls(files.cert, None, None), "tls_cert is given without tls_key"),
        (lambda: server_tls(None, files.key, None), "tls_key is given without tls_cert"),
        (lambda: server_tls(None, None, files.ca), "tls_client_ca is given without tls_cert and tls_key"),
        (lambda: credentials(files.cert, files.client_key), "are no certificate and its key"),
        (lambda: credentials(tmp_path / "no.pem", files.key), "no.pem and .* are no certificate and its key"),
        (lambda: credentials(files.cert, files.key, files.key), "holds no certificates of an authority"),
        (lambda: client_credentials(files.ca, files.client_cert, None), "belong together"),
        (lambda: client_credentials(None, files.client_cert, files.client_key), "without tls_ca"),
        (lambda: client_credentials(tmp_path / "no.pem", None, None), "holds no certificates"),
    ):
        with pytest.raises(TlsError, match=message):
            make()
    assert client_credentials(None, None, None) is None
    assert server_tls(None, None, None) is None


def credentials(cert: Path, key: Path, client_ca: Path | None = None) -> object:
    tls = server_tls(cert, key, client_ca)
    assert tls
    return tls.credentials()


# --check


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = operating.serve([*map(str, words), "--check"])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_check_finds_nothing_wrong(
    bundle_path: Path, certificates: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(capsys, bundle_path.parent)[0] == 0
    create_key(tmp_path / "keys.json", "a")
    (tmp_path / "policies.yaml").write_text("policies: {home: {rules: []}}")
    store = LocalEventStore(tmp_path / "events")
    store.record([UserEvent("1", "u", "i")]).result(WAIT_S)
    words: Sequence[object] = (
        *(bundle_path, "--api_keys", tmp_path / "keys.json", "--policies", tmp_path / "policies.yaml"),
        *("--events", tmp_path / "events", "--tls_cert", certificates.cert, "--tls_key", certificates.key),
    )
    code, err = checked(capsys, *words)
    assert (code, "is in use, as it should be" in err) == (0, True)
    store.close()
    code, err = checked(capsys, *words)
    assert (code, "has 1 records, and 0 bytes that are none" in err) == (0, True)
    assert f"bundle {bundle_path.name} could be served" in err
    code, err = checked(capsys, bundle_path, "--events", tmp_path / "not" / "yet")
    assert (code, "not/yet would be made" in err) == (0, True)
    assert not (tmp_path / "not").exists()


def test_all_processes_have_the_other_bundle_of_the_start(
    bundle_path: Path, make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is started again would find another, which deals the users anew."""
    other = make_bundle()
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(operating, "supervise", lambda argv, *_: asked.append(argv))
    words = [str(bundle_path), "--other", str(other.parent), "--share", "0.1", "--num_processes", "2"]
    words += ["--events", "memory"]
    assert operating.serve([*words, "--address", "127.0.0.1:0"]) == 0
    assert asked == [[*words, "--address", "127.0.0.1:0", "--other", str(other)]]


def test_check_says_what_is_wrong(
    bundle_path: Path, make_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_toy = make_bundle(policies={"policies": {"home": {"rules": []}}})
    bad = tmp_path / "bad.yaml"
    bad.write_text("policies: {home: {rules: [{rule: drop_sen}]}}")
    broken = Path(shutil.copytree(bundle_path, tmp_path / bundle_path.name))
    (broken / "users.parquet").write_bytes(b"")
    for words, message in (
        ((tmp_path / "none",), "none is not a directory"),
        ((broken,), "users.parquet is damaged"),
        ((bundle_path, "--policies", bad), "rule is 'drop_sen'"),
        ((bundle_path, "--api_keys", bad), "bad.yaml cannot be read"),
        ((bundle_path, "--tls_cert", bad), "tls_cert is given without tls_key"),
        ((bundle_path, "--tls_cert", bad, "--tls_key", bad), "are no certificate and its key"),
        ((bundle_path, "--events", bad), "expected a directory that can be written or made"),
        (
            (bundle_path, "--redis_url", "redis://x", "--events", "memory"),
            "events is 'memory' beside redis_url; expected a directory",
        ),
        ((bundle_path, "--metrics", "9464"), "metrics is '9464'; expected host:port"),
        ((bundle_path, "--requests_per_s", "0"), "per_s is 0.0; expected a finite number above 0"),
        ((bundle_path, "--burst", "3"), "burst is given without requests_per_s"),
        ((bundle_path, "--other", without_toy, "--share", "0.1"), "which has no policy toy: a request"),
    ):
        code, err = checked(capsys, *words)
        assert (code, message in err) == (2, True), err
    pytest.importorskip("redis")
    code, err = checked(capsys, bundle_path, "--redis_url", "http://x", "--events", tmp_path / "events")
    assert code == 2
    assert "error: " in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--address 192.0.2.1:50051", "address: cannot listen on '192.0.2.1:50051': Cannot assign"),
        (
            "--num_processes 2 --address 192.0.2.1:50051",
            "address: cannot listen on '192.0.2.1:50051': Cannot assign",
        ),
        ("--address no-such-host.invalid:1", "address: cannot listen on 'no-such-host.invalid:1': "),
        ("--address a..b:1", "address: cannot listen on 'a..b:1': "),
        ("--address *:50051", "address is '*:50051'; expected host:port"),
        ("--address ::1:50051", "address is '::1:50051'; expected host:port, with an IPv6 address in brack"),
        ("--address [localhost]:1", "address is '[localhost]:1'; expected host:port, with an IPv6 address"),
        ("--metrics 192.0.2.1:9464", "metrics: cannot listen on '192.0.2.1:9464': Cannot assign"),
        ("--metrics no-such-host.invalid:1", "metrics: cannot listen on 'no-such-host.invalid:1': "),
        ("--metrics 127.0.0.1:65536", "metrics is '127.0.0.1:65536'; expected host:port"),
        (
            "--num_processes 3 --metrics 127.0.0.1:65534",
            "metrics is '127.0.0.1:65534'; expected a port of at most 65533: the metrics of 3 processes",
        ),
        (
            "--num_processes 2 --address 0.0.0.0:9465 --metrics 127.0.0.1:9464",
            "metrics is '127.0.0.1:9464'; expected ports other than that of address, '0.0.0.0:9465'",
        ),
        ("--drain_s -5", "drain_s is -5.0; expected 0 or more"),
        ("--cache_s -1", "cache_s is -1.0; expected 0 or more"),
        ("--share 2", "share is 2.0; expected 0 to 1"),
        ("--num_threads 0", "num_threads is 0; expected at least 1"),
        ("--events /dev/null", "events is '/dev/null'; expected a directory that can be written or made"),
        ("--events events --redis_url redis://h/abc", "redis_url names no database by its number; expected"),
        ("--events events --redis_url redis://h/1/2", "redis_url names no database by its number; expected"),
    ],
)
def test_options_that_cannot_be_are_found_before_anything_else(
    words: str, message: str, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By --check, and without it in the same words: here before a bundle that is none."""
    for command in ([str(bundle_path), *words.split(), "--check"], [str(tmp_path), *words.split()]):
        assert operating.serve(command) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_option_files_of_before_had_no_directory(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text("events: null\n")
    code, err = checked(capsys, bundle_path, "--config", tmp_path / "options.yaml")
    assert (code, "events: in memory alone" in err) == (0, True)


def test_the_redis_url_may_come_from_the_environment(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(operating.REDIS_URL, "redis://user:a secret@h/abc")
    code, err = checked(capsys, bundle_path, "--events", tmp_path / "events")
    assert (code, "redis_url names no database by its number" in err) == (2, True)
    assert "secret" not in err


def test_a_redis_url_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("redis")
    for url in ("http://x", "redis://h:x/0", "unix:///socket?db=abc"):
        assert operating.serve([str(tmp_path), "--events", str(tmp_path / "e"), "--redis_url", url]) == 2
        assert capsys.readouterr().err.startswith("error: redis_url: ")


def test_ports_that_are_taken(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They do not keep --check from its "could be": the server that runs already has them."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        address, metrics = (f"127.0.0.1:{taken.getsockname()[1]}" for taken in (one, other))
        assert checked(capsys, bundle_path, "--address", address, "--metrics", metrics)[0] == 0
        words = [str(bundle_path), "--address", "127.0.0.1:0", "--metrics", metrics, "--events", "memory"]
        assert operating.serve(words) == 2
    assert f"metrics: cannot listen on {metrics!r}: Address already in use" in capsys.readouterr().err


def test_a_port_that_this_process_may_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unprivileged(socket.socket):
        def bind(self, where: Any) -> None:
            if 0 < where[1] < 1024:
                raise PermissionError(13, "Permission denied")
            super().bind(where)

    monkeypatch.setattr(socket, "socket", Unprivileged)
    operating._check_listening("address", "127.0.0.1:8443")
    with pytest.raises(ListenError, match=r"^address: cannot listen on '\[::\]:443': Permission denied"):
        operating._check_listening("address", "[::]:443")


# Other bundles


def test_a_bundle_takes_over_under_fire(
    fill: Callable[..., dict[str, Any]], serving: Any, tmp_path: Path
) -> None:
    first = write_bundle(tmp_path, fill)
    answers: list[str] = []
    with serving(tmp_path) as server:
        stop = threading.Event()
        failures: list[object] = []

        def ask() -> None:
            with RecommenderClient(server.address, timeout_s=WAIT_S) as asking:
                while not stop.is_set():
                    try:
                        answer = asking.recommend(visitor("loyal"))
                        assert len(answer.items) == 10
                        assert not answer.trace.degraded_stages
                        answers.append(answer.trace.bundle_version)
                    except Exception as error:  # noqa: BLE001  # any at all
                        failures.append(error)
                        return

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        try:
            until(lambda: first.name in answers or bool(failures), server)
            second = write_bundle(tmp_path, fill)
            until(lambda: second.name in answers or bool(failures), server)
            assert operating.rollback([str(tmp_path)]) == 0
            num_before = len(answers)
            until(lambda: first.name in answers[num_before:] or bool(failures), server)
        finally:
            stop.set()
            for thread in asking:
                thread.join()
    assert failures == []
    assert set(answers) == {first.name, second.name}


def test_a_server_starts_beside_a_bad_bundle(
    fill: Callable[..., dict[str, Any]], serving: Any, tmp_path: Path
) -> None:
    good, bad = write_bundle(tmp_path, fill), write_bundle(tmp_path, fill)
    (bad / "manifest.json").write_text("{}")
    with serving(tmp_path) as server, RecommenderClient(server.address, timeout_s=WAIT_S) as asking:
        assert asking.recommend(visitor("loyal")).trace.bundle_version == good.name


def test_rollback(
    fill: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = [write_bundle(tmp_path, fill) for _ in range(3)]
    for words, expected in (
        ((), bundles[1]),
        ((), bundles[0]),
        (("--to", bundles[1].name), bundles[1]),
        (("--newest",), bundles[2]),
    ):
        assert operating.rollback([str(tmp_path), *words]) == 0
        assert bundle_to_serve(tmp_path) == expected
        assert capsys.readouterr().err == f"to be served: {expected.name}\n"
    for words, message in (
        (("--to", "x"), f"bundle is 'x'; expected one of {bundles[0].name}"),
        (("--to", "x", "--newest"), "newest is given with to"),
    ):
        assert operating.rollback([str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err
    assert operating.rollback([str(tmp_path), "--to", bundles[0].name]) == 0
    assert operating.rollback([str(tmp_path)]) == 2
    assert "is the oldest bundle" in capsys.readouterr().err
    assert operating.rollback([os.devnull]) == 2


def test_numpy_has_one_thread_in_a_server() -> None:
    """Said before it is imported, which reads it, and not where somebody says otherwise."""
    program = """
import importlib, os, sys
from engine import cli

def noted(name):
    print("numpy" in sys.modules, os.environ.get("OMP_NUM_THREADS"), os.environ.get("OPENBLAS_NUM_THREADS"))
    raise SystemExit

importlib.import_module = noted
cli.main([sys.argv[1]])
"""
    without = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for command, said, expected in (
        ("serve", {}, "False 1 1"),
        ("serve", {"OMP_NUM_THREADS": "3"}, "False 3 1"),
        ("train", {}, "False None None"),
    ):
        words = [sys.executable, "-c", program, command]
        done = subprocess.run(words, env=without | said, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
