"""The load generator's figures against calls whose times are known; nothing here is bound to be quick."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.load import (
    Load,
    Outcome,
    Result,
    apart,
    is_saturated,
    offer,
    percentile,
    plot,
    recovery,
    summarize,
    sweep,
)
from protos.trirank.v1 import recommender_pb2 as pb

USAGE: dict[str, float | None] = {"server_cores": 1.5, "server_rss_mb": 100.0, "generator_cores": 0.1}
ANSWER = pb.RecommendResponse().SerializeToString()
DEGRADED = pb.RecommendResponse(trace=pb.Trace(degraded_stages=["ranking"])).SerializeToString()


def test_figures_by_hand() -> None:
    load = Load(seconds=3.0, warm_up_s=1.0, objective_ms=50.0)
    outcomes = [
        Outcome(0.5, 0.5, 2.5, "OK", ANSWER),  # the warm-up
        Outcome(1.0, 1.0, 1.010, "OK", ANSWER),
        Outcome(1.5, 1.6, 1.700, "OK", DEGRADED),  # sent in time it would have been quick enough
        Outcome(2.0, 2.0, 2.004, "RESOURCE_EXHAUSTED", b""),
        Outcome(2.5, 2.5, 3.500, "DEADLINE_EXCEEDED", b""),
        Outcome(3.0, 3.0, 3.030, "OK", ANSWER),
    ]
    result = summarize(outcomes, 2.0, load, USAGE)
    assert result.num_calls == 5
    assert (result.target_per_s, result.offered_per_s) == (2.0, 2.5)
    assert (result.goodput_per_s, result.answered_per_s, result.num_degraded) == (1.0, 1.5, 1)
    assert result.codes == {"OK": 3, "RESOURCE_EXHAUSTED": 1, "DEADLINE_EXCEEDED": 1}
    assert result.latency_ms["p50"] == pytest.approx(30)
    assert result.latency_ms["p90"] is None
    assert result.rejected_ms["p50"] is None
    assert (result.server_cores, result.server_rss_mb) == (1.5, 100.0)
    assert is_saturated(result)


def test_a_percentile_needs_a_value_above_it() -> None:
    assert percentile(np.arange(999.0), 99.9) is None
    assert percentile(np.arange(1000.0), 99.9) == pytest.approx(998.001)
    assert percentile(np.array([1.0]), 50) is None
    assert percentile(np.array([]), 50) is None


def test_a_stall_is_seen_by_every_call_that_was_due_in_it() -> None:
    """The first call blocks everything, the generator too, for 0.3 s, in which ten more were due."""

    async def stalls_once(request: bytes) -> tuple[str, bytes]:
        if request == b"0":
            time.sleep(0.3)  # on purpose
        return "OK", request

    arrivals = np.arange(11) * 0.02
    outcomes = asyncio.run(offer([stalls_once], [str(n).encode() for n in range(11)], arrivals))
    assert sorted(int(outcome.response) for outcome in outcomes) == list(range(11))
    for outcome in outcomes:
        assert outcome.done_s - outcome.intended_s >= 0.29 - outcome.intended_s
        assert outcome.sent_s >= outcome.intended_s


def test_calls_do_not_wait_for_each_other() -> None:
    """All are under way at once: the last begins before any of them may end."""
    begun = asyncio.Event()
    count = [0]

    async def waits_for_all(request: bytes) -> tuple[str, bytes]:
        count[0] += 1
        if count[0] == 20:
            begun.set()
        await begun.wait()
        return "OK", b""

    outcomes = asyncio.run(offer([waits_for_all] * 3, [b""], np.full(20, 0.001)))
    assert len(outcomes) == 20


def result_at(rate: float, capacity: float) -> Result:
    goodput = min(rate, capacity)
    none = dict.fromkeys(("p50", "p90", "p99", "p99.9"))
    latency: dict[str, float | None] = {**none, "p50": 5.0}
    codes = {"OK": round(goodput), "RESOURCE_EXHAUSTED": round(rate - goodput)}
    return Result(rate, rate, round(rate), goodput, goodput, 0, codes, latency, none, 0.1, 0.2, 1.0, 50.0)


def test_rates_rise_until_the_server_saturates() -> None:
    results = sweep(
        lambda rate, after: result_at(rate, 100), start_rate=20, growth=2, max_rate=1e6, overload=3
    )
    assert [result.offered_per_s for result in results] == [20, 40, 80, 160, 300]
    rates: list[tuple[float, float | None]] = []

    def noting(rate: float, after: float | None) -> Result:
        rates.append((rate, after))
        return result_at(rate, 100)

    sweep(noting, start_rate=80, growth=2, max_rate=1e6, overload=3)
    assert rates == [(80, None), (160, None), (300, 50)]
    results = sweep(
        lambda rate, after: result_at(rate, 1e9), start_rate=20, growth=2, max_rate=100, overload=3
    )
    assert [result.offered_per_s for result in results] == [20, 40, 80]
    with pytest.raises(ValueError, match="growth 1"):
        sweep(lambda rate, after: result_at(rate, 100), start_rate=20, growth=1, max_rate=1e6, overload=None)


def test_recovery_is_when_calls_are_good_again() -> None:
    load = Load(seconds=1.0, warm_up_s=0.0, objective_ms=50.0)

    def calls(bad_until_s: float) -> list[Outcome]:
        """The overload, all of it refused, then a call each 10 ms for four seconds."""
        overload = [Outcome(at / 100, 0, at / 100, "RESOURCE_EXHAUSTED", b"") for at in range(1, 101)]
        after = [
            Outcome(1 + at / 100, 0, 1 + at / 100 + (0.2 if at / 100 < bad_until_s else 0.01), "OK", ANSWER)
            for at in range(1, 401)
        ]
        return [*after, *overload]

    assert recovery(calls(0.0), 1.0, load) == 0.0
    assert recovery(calls(0.55), 1.0, load) == 0.6  # a bad call in a hundred does not count
    assert recovery(calls(2.5), 1.0, load) == 2.5
    assert recovery(calls(4.0), 1.0, load) is None


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot([result_at(rate, 100) for rate in (50, 200)], tmp_path / "load.png", 50.0)
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="warm_up_s is 5; expected 0 to less than seconds, 5"):
        Load(seconds=5, warm_up_s=5)


def test_results_are_json() -> None:
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(result_at(10, 100))))["offered_per_s"] == 10


@pytest.fixture
def other_process() -> Iterator[int]:
    """The process id of one that waits."""
    waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield waiting.pid
    waiting.communicate(b"\n")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps processes on cores")
def test_generator_and_server_keep_apart(other_process: int) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core alone")
    with apart(other_process):
        assert os.sched_getaffinity(0) == {min(cores)}
        assert os.sched_getaffinity(other_process) == cores - {min(cores)}
    assert os.sched_getaffinity(0) == os.sched_getaffinity(other_process) == cores


def test_apart_wants_a_server_of_its_own() -> None:
    with pytest.raises(ValueError, match="a server that was started here"), apart(None):
        pass
