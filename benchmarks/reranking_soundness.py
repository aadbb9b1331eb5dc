"""Never empty, never wrong: `python -m benchmarks.reranking_soundness --requests 10000`.

Random shops, policies, filters and requests. Of every slate, plain loops that share no code with the rules
check: no item that a filter forbids, none twice, none short while eligible items are left, pins and caps kept
or named as given up, and the same slate when asked again.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.reranking_latency import NOW_MS, simulated_funnel, simulated_shop
from engine.arguments import ArgumentParser
from reranking.items import DAY_MS, ItemFacts, Request
from reranking.policy import PolicyError, policies_from_config
from reranking.rerank import Reranked
from reranking.reranker import Funnel, Reranker

REQUESTS_OF_A_SHOP = 100
FIELDS = {"category": "category", "brand": "brand", "seller_id": "seller"}


def random_rules(facts: ItemFacts, random: np.random.Generator) -> list[dict[str, Any]]:
    """Return the rules of a random policy; it may contradict itself."""

    def values(field: str, most: int) -> list[str]:
        drawn: list[str] = random.choice(list(facts.having[field]), random.integers(1, most + 1)).tolist()
        return drawn

    def field() -> str:
        return str(random.choice(list(FIELDS)))

    def selection(most: int) -> dict[str, list[str]]:
        chosen = field()
        return {chosen: values(chosen, most)}

    def number(low: float, high: float) -> float:
        return float(random.uniform(low, high))

    def places(most: int) -> list[int]:
        drawn = random.choice(20, random.integers(1, most + 1), replace=False)
        return [int(place) + 1 for place in drawn]

    def cap() -> dict[str, Any]:
        most = int(random.integers(1, 5))
        window = {"window": most + int(random.integers(1, 8))} if random.random() < 0.5 else {}
        level = {"level": 0} if (chosen := field()) == "category" and random.random() < 0.5 else {}
        return {"rule": "cap", "field": chosen, "max_items": most, **window, **level}

    makers = [
        lambda: {"rule": "in_stock", "min_stock": int(random.integers(1, 15))},
        lambda: {"rule": "available"},
        lambda: {"rule": "allow", **selection(30)},
        lambda: {"rule": "deny", **selection(10)},
        lambda: {"rule": "price_range", "min_price": number(0, 20), "max_price": number(15, 80)},
        lambda: {"rule": "bought_within", "days": number(1, 60)},
        lambda: {"rule": "region"},
        lambda: {"rule": "min_age"},
        lambda: {"rule": "freshness", "weight": number(0.01, 1), "half_life_days": number(1, 60)},
        lambda: {"rule": "margin", "relevance_per_unit": number(0.001, 0.1)},
        lambda: {"rule": "dampen_popularity", "weight": number(0.01, 1)},
        lambda: {"rule": "boost", **selection(5), "by": number(0.01, 1)},
        lambda: {"rule": "bury", **selection(5), "by": number(0.01, 1)},
        lambda: {"rule": str(random.choice(["mmr", "dpp", "max_sum"])), "relevance_weight": number(0, 1)},
        cap,
        cap,
        lambda: {"rule": "exposure", "strength": number(0.1, 1)},
        lambda: {"rule": "sponsored", "places": places(3), **selection(5), "min_relevance": number(0, 1)},
        lambda: {"rule": "explore", "places": places(3), "newer_than_days": number(1, 200)},
        lambda: {"rule": "drop_seen"},
        lambda: {"rule": "pin", "item_id": f"item-{random.integers(1, 300)}", "place": places(1)[0]},
        lambda: {"rule": "pin", "item_id": f"item-{random.integers(1, 300)}", "place": places(1)[0]},
    ]
    chosen = random.permutation(len(makers))[: random.integers(1, 12)]
    return [makers[one]() for one in chosen]


def may_show(facts: ItemFacts, rule: dict[str, Any], row: int, funnel: Funnel, request: Request) -> bool:
    """Return whether a filter lets one item through, as the documentation says it in words."""

    def is_selected() -> bool:
        return all(
            any(row in facts.having[field][value] for value in rule[field])
            for field in FIELDS
            if field in rule
        )

    def columns() -> tuple[Any, ...]:
        assert facts.stock is not None
        assert facts.prices is not None
        assert facts.available_from is not None
        assert facts.available_until is not None
        return facts.stock[row], facts.prices[row], facts.available_from[row], facts.available_until[row]

    stock, price, since, until = columns()
    match rule["rule"]:
        case "in_stock":
            return bool(stock == -1 or stock >= rule["min_stock"])
        case "available":
            return bool(since <= NOW_MS and (until == 0 or until > NOW_MS))
        case "allow":
            return is_selected()
        case "deny":
            return not is_selected()
        case "price_range":
            return bool(rule["min_price"] <= price <= rule["max_price"])
        case "bought_within":
            days = [
                (NOW_MS - at) / DAY_MS for bought, at in zip(*funnel.purchases, strict=True) if bought == row
            ]
            return not any(ago < rule["days"] for ago in days)
        case "region":
            regions = {r for r in ("DE", "FR") if row in facts.having["attribute"][f"region:{r}"]}
            return not regions or request.context.get("region") in regions
        case "min_age":
            return row not in facts.having["attribute"]["age:18"] or int(request.context.get("age", 0)) >= 18
    return True


def faults(
    facts: ItemFacts,
    rules: list[dict[str, Any]],
    funnel: Funnel,
    limit: int,
    request: Request,
    found: Reranked,
) -> list[str]:
    """Return what is wrong with a slate; nothing where it is right."""
    slate: list[int] = found.rows.tolist()
    assert funnel.eligible is not None
    pins = {facts.row_of[rule["item_id"]]: rule["place"] for rule in rules if rule["rule"] == "pin"}
    pins = {row: place for row, place in pins.items() if place <= limit and funnel.eligible[row]}
    known = dict.fromkeys([*funnel.rows.tolist(), *funnel.reserve_rows.tolist(), *pins])
    eligible = {row for row in known if all(may_show(facts, rule, row, funnel, request) for rule in rules)}
    wrong = []
    if set(slate) - eligible:
        wrong.append(f"forbidden: {set(slate) - eligible}")
    if len(set(slate)) < len(slate):
        wrong.append("an item twice")
    if len(slate) != min(limit, len(eligible)):
        wrong.append(f"{len(slate)} items; {len(eligible)} are eligible and {limit} asked for")
    for row, place in pins.items():
        if row in eligible and place <= len(slate) and len(slate) == limit and slate[place - 1] != row:
            wrong.append(f"pin {row} is not at {place}")
    for rule in rules:
        if rule["rule"] == "cap":
            group = rule["field"] if "level" not in rule else "category/0"
            codes = facts.groups[group][slate].tolist()
            window = min(rule.get("window", limit), limit)
            most = max(
                (Counter(c for c in codes[at : at + window] if c).most_common(1) or [(0, 0)])[0][1]
                for at in range(max(1, len(codes)))
            )
            if most > rule["max_items"] and not any(name.startswith("cap:") for name in found.relaxed):
                wrong.append(f"{rule}: {most} of one group, and no cap yielded")
        if rule["rule"] == "drop_seen" and "drop_seen" not in found.relaxed:
            assert funnel.seen is not None
            if any(funnel.seen[row] and row not in pins for row in slate):
                wrong.append("a seen item, and drop_seen did not yield")
    return wrong


def check(num_requests: int, seed: int = 0) -> dict[str, Any]:
    """Return counts over random requests, and every fault found."""
    random = np.random.default_rng(seed)
    counts = Counter[str]()
    wrong: list[str] = []
    facts = simulated_shop(300, seed)
    begin = time.perf_counter()
    for number in track(range(num_requests), "requests", console=Console(stderr=True)):
        if number % REQUESTS_OF_A_SHOP == 0:
            facts = simulated_shop(int(random.integers(300, 1500)), seed + number)
        while True:
            rules = random_rules(facts, random)
            try:
                reranker = Reranker(policies_from_config({"policies": {"one": {"rules": rules}}}), facts)
                break
            except PolicyError:
                counts["policies refused"] += 1
        sizes = int(random.integers(0, 150)), int(random.integers(0, 150))
        funnel = simulated_funnel(facts, random, *sizes)
        eligible = random.random(facts.num_items + 1) < random.choice([0.5, 1.0])
        kept, kept_reserve = eligible[funnel.rows], eligible[funnel.reserve_rows]
        funnel = replace(
            funnel,
            eligible=eligible,
            rows=funnel.rows[kept],
            scores=funnel.scores[kept],
            reserve_rows=funnel.reserve_rows[kept_reserve],
            reserve_scores=funnel.reserve_scores[kept_reserve],
        )
        context = [{}, {"region": "DE"}, {"region": "FR", "age": "17"}, {"age": "40"}][random.integers(4)]
        request = Request(now_ms=NOW_MS, seed=int(random.integers(1000)), context=context)
        limit = int(random.integers(1, 60))
        policy = reranker.policy()
        found = reranker.slate(policy, funnel, limit, request)
        problems = faults(facts, rules, funnel, limit, request, found)
        again = reranker.slate(policy, funnel, limit, request, explain=number % 10 == 0)
        if again.rows.tolist() != found.rows.tolist() or again.relaxed != found.relaxed:
            problems.append("another slate when asked again")
        wrong += [f"request {number}: {problem}; {rules}" for problem in problems]
        counts["short"] += len(found.rows) < limit
        counts["empty"] += len(found.rows) == 0
        counts["with a rule that yielded"] += bool(found.relaxed)
        counts["with items of the reserve"] += bool((found.order >= len(funnel.rows)).any())
    return {
        "requests": num_requests,
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
        **counts,
        "faults": wrong,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the check, print what was found as JSON, and return 1 where something was wrong."""
    parser = ArgumentParser(prog="python -m benchmarks.reranking_soundness", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="Random requests.")
    parser.add_argument("--seed", type=int, default=0, help="Of all that is random.")
    options = parser.parse_args(argv)
    result = check(options.requests, options.seed)
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
