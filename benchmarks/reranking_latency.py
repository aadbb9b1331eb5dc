"""How long re-ranking takes: `python -m benchmarks.latency reranking`.

500 ranked items become a slate of 50 on one thread, from item rows to item rows: gathering what the rules
read, applying them, everything but the ranking itself. The shop is simulated (random columns, vectors in
clusters); the policy is FULL_POLICY below, with each of its rules alone, and with other rules for variety.
Medians and 99th percentiles over requests, of wall-clock time and of the thread's own processor time; the
best of several rounds counts, as other work on the machine only ever adds time. The JSON has all rounds.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.arguments import ArgumentParser
from reranking.items import DAY_MS, ItemFacts, Request
from reranking.policy import single_policy
from reranking.reranker import Funnel, Purchases, Reranker

NOW_MS = 1_700_000_000_000
NUM_RANKED = 500
NUM_RESERVE = 500
DIM = 64
PINNED = 77
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
COLUMNS = ("p50_ms", "p99_ms", "cpu_p50_ms", "cpu_p99_ms")

FULL_POLICY = """
policies:
  home:
    rules:
      - {rule: in_stock}
      - {rule: available}
      - {rule: bought_within, days: 30}
      - {rule: deny, brand: [brand-1, brand-2]}
      - {rule: price_range, min_price: 1}
      - {rule: freshness, weight: 0.1, half_life_days: 14}
      - {rule: margin, relevance_per_unit: 0.01}
      - {rule: mmr, relevance_weight: 0.8}
      - {rule: sponsored, places: [5], seller_id: [seller-1, seller-2, seller-3], min_relevance: 0.2}
      - {rule: cap, field: category, level: 0, max_items: 4, window: 10}
      - {rule: cap, field: seller_id, max_items: 8}
      - {rule: drop_seen}
      - {rule: pin, item_id: item-77, place: 3}
"""
VARIANTS: dict[str, dict[str, Any]] = {
    "dpp": {"rule": "dpp", "relevance_weight": 0.8},
    "max_sum": {"rule": "max_sum", "relevance_weight": 0.97},
}
ALONE: list[dict[str, Any]] = [
    {"rule": "allow", "seller_id": [f"seller-{number}" for number in range(1, 30)]},
    {"rule": "region"},
    {"rule": "min_age"},
    {"rule": "dampen_popularity", "weight": 0.1},
    {"rule": "boost", "brand": "brand-3", "by": 0.2},
    {"rule": "bury", "brand": "brand-4", "by": 0.2},
    {"rule": "exposure"},
    {"rule": "explore", "places": [8, 16], "newer_than_days": 30},
]


def simulated_shop(num_items: int, seed: int = 0) -> ItemFacts:
    """Return a catalog of random columns; item ids are item-1, item-2, ...; some values are missing."""
    random = np.random.default_rng(seed)

    def column(drawn: Any, missing: float, dtype: type[np.generic], share_missing: float = 0.05) -> Any:
        filled = np.where(random.random(num_items) < share_missing, missing, drawn)
        return np.concatenate([[missing], filled]).astype(dtype)

    category = column(random.integers(1, 201, num_items), 0, np.int32)
    brand = column(random.integers(1, 61, num_items), 0, np.int32)
    brand[PINNED] = 3
    groups = {
        "category": category,
        "category/0": ((category + 9) // 10).astype(np.int32),
        "brand": brand,
        "seller_id": column(random.integers(1, 51, num_items), 0, np.int32),
    }
    having = {
        name: {
            f"{prefix}-{code}": np.flatnonzero(groups[name] == code).astype(np.int32)
            for code in np.unique(groups[name])
            if code
        }
        for name, prefix in (("category", "category"), ("brand", "brand"), ("seller_id", "seller"))
    }
    every = np.arange(1, num_items + 1, dtype=np.int32)
    having["attribute"] = {
        "age:18": every[random.random(num_items) < 0.05],
        "region:DE": every[random.random(num_items) < 0.2],
        "region:FR": every[random.random(num_items) < 0.2],
    }
    centres = random.normal(size=(201, DIM))
    vectors = centres[category] + 0.7 * random.normal(size=(num_items + 1, DIM))
    vectors[category == 0] = 0
    shown = column(random.integers(0, 200, num_items), 0, np.int64, 0)
    prices = column(random.lognormal(3, 1, num_items), np.nan, np.float64)
    prices[PINNED] = 20.0  # nothing forbids the item that FULL_POLICY pins
    return ItemFacts(
        num_items=num_items,
        groups=groups,
        having=having,
        row_of={f"item-{row}": row for row in range(1, num_items + 1)},
        vectors=vectors.astype(np.float32),
        prices=prices,
        margins=column(random.beta(4, 8, num_items), np.nan, np.float64),
        available_from=column(NOW_MS - random.integers(-5, 365, num_items) * DAY_MS, 0, np.int64),
        available_until=column(NOW_MS + random.integers(-5, 365, num_items) * DAY_MS, 0, np.int64, 0.5),
        stock=column(random.integers(0, 20, num_items), -1, np.int64),
        popularity=column(random.geometric(0.05, num_items), 0, np.int64),
        shown=shown,
        clicked=shown // 20,
    )


def simulated_funnel(
    facts: ItemFacts, random: np.random.Generator, num_ranked: int, num_reserve: int
) -> Funnel:
    """Return what a request's earlier stages might have found, with items of a few categories in front."""
    liked = random.permutation(201)
    score = random.normal(size=facts.num_items) - 0.02 * liked[facts.groups["category"][1:]]
    rows = (np.argsort(-score)[: num_ranked + num_reserve] + 1).astype(np.int32)
    scores = score[rows - 1].astype(np.float32)
    seen = np.zeros(facts.num_items + 1, np.bool_)
    seen[random.choice(rows, min(20, len(rows)), replace=False)] = True
    bought = random.choice(rows, min(10, len(rows)), replace=False)
    return Funnel(
        rows=rows[:num_ranked],
        scores=scores[:num_ranked],
        reserve_rows=rows[num_ranked:],
        reserve_scores=scores[num_ranked:],
        seen=seen,
        eligible=np.ones(facts.num_items + 1, np.bool_),
        purchases=Purchases(bought, NOW_MS - random.integers(0, 60, len(bought)) * DAY_MS),
    )


def policies(rules: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return what is timed: the full policy, with other rules for variety, and every rule alone."""
    timed = {f"full policy ({len(rules)} rules)": rules}
    for name, variant in VARIANTS.items():
        timed[f"full policy, {name} for mmr"] = [variant if r["rule"] == "mmr" else r for r in rules]
    timed["no rules"] = []
    for rule in [*rules, *VARIANTS.values(), *ALONE]:
        timed[single_policy([rule])[None].rules[0].name.split("=")[0] + " alone"] = [rule]
    return timed


def measure(num_requests: int, rounds: int, num_items: int) -> dict[str, Any]:
    """Return p50 and p99 in ms of each policy: of the best round, and of all."""
    facts = simulated_shop(num_items)
    random = np.random.default_rng(1)
    funnels = [
        simulated_funnel(facts, random, NUM_RANKED, NUM_RESERVE) for _ in range(min(num_requests, 100))
    ]
    request = Request(now_ms=NOW_MS, seed=7, context={"region": "DE", "age": "30"})
    rules = yaml.safe_load(FULL_POLICY)["policies"]["home"]["rules"]
    times: dict[str, Any] = {}
    for name, chosen in track(policies(rules).items(), "policies", console=Console(stderr=True)):
        reranker = Reranker(single_policy(chosen), facts)
        policy = reranker.policy()
        found = []
        for round_ in range(rounds + 1):
            elapsed: list[tuple[float, float]] = []
            for number in range(num_requests if round_ else 20):  # the first round warms up
                funnel = funnels[number % len(funnels)]
                begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
                reranker.slate(policy, funnel, 50, request)
                elapsed.append((time.perf_counter_ns() - begin, time.thread_time_ns() - begin_cpu))
            if round_:
                percentiles = np.percentile(elapsed, [50, 99], axis=0).T.ravel() / 1e6
                found.append({key: round(float(ms), 4) for key, ms in zip(COLUMNS, percentiles, strict=True)})
        best = {key: min(one[key] for one in found) for key in COLUMNS}
        times[name] = {**best, "rounds": found}
    return {
        "num_ranked": NUM_RANKED,
        "limit": 50,
        "dimension": DIM,
        "requests": num_requests,
        "rounds": rounds,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}",
        "load": os.getloadavg()[0],
        "latency": times,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, or JSON with --json; in a process with one thread a library."""
    argv = sys.argv[1:] if argv is None else argv
    if any(os.environ.get(name) != "1" for name in ONE_THREAD):  # read when NumPy is loaded: too late here
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
        command = [sys.executable, "-m", "benchmarks.latency", "reranking", *argv]
        return subprocess.run(command, env=environment, check=False).returncode
    parser = ArgumentParser(prog="python -m benchmarks.latency reranking", description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help="Requests of a round.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds; the best counts.")
    parser.add_argument("--num_items", type=int, default=100_000, help="Items of the simulated catalog.")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    result = measure(options.requests, options.rounds, options.num_items)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    table = Table(
        title=f"{NUM_RANKED} ranked items to 50, best of {result['rounds']} rounds of "
        f"{result['requests']} requests, {result['machine']}, load {result['load']:.1f}"
    )
    for heading in ("", "p50 ms", "p99 ms", "CPU p50 ms", "CPU p99 ms"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, figures in result["latency"].items():
        table.add_row(name, *(f"{figures[key]:.3f}" for key in COLUMNS))
    Console().print(table)
    return 0
