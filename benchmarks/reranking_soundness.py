"""Never empty, never wrong: `python -m benchmarks.reranking_soundness --requests 10000`.

Random shops, policies, filters and requests. Of every slate, plain loops that share no code with the rules
check: no item that a filter forbids, none twice, none short while eligible items are left, pins and caps kept
or named as given up, and the same slate when asked again.

With --bundle the requests go through the whole pipeline of that bundle, some of them with a stage that fails;
then eligible is what the whole catalog has. The loops look at every item: a catalog of thousands takes time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.reranking_latency import NOW_MS, simulated_funnel, simulated_shop
from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from engine.deadline import Budget
from engine.history import EVENT_CODE, EVENT_TYPES, History, not_asked_for
from engine.pipeline import Filters, RecommendationPipeline, Visitor
from ranking.context import ContextTable
from reranking.families import Filter
from reranking.items import DAY_MS, ItemFacts, Request
from reranking.policy import PolicyError, policies_from_config
from reranking.reranker import Funnel, Purchases, Reranker
from reranking.rules import RULES

REQUESTS_OF_A_SHOP = 100
FIELDS = {"category": "category", "brand": "brand", "seller_id": "seller"}


def random_rules(facts: ItemFacts, random: np.random.Generator) -> list[dict[str, Any]]:
    """Return the rules of a random policy; it may contradict itself."""

    def values(field: str, most: int) -> list[str]:
        drawn = random.choice(list(facts.having[field]), random.integers(1, most + 1))
        return list(dict.fromkeys(map(str, drawn)))

    known = [name for name in FIELDS if facts.having[name]]
    items = list(facts.row_of)[:300]

    def field() -> str:
        return str(random.choice(known))

    def pin() -> dict[str, Any]:
        return {"rule": "pin", "item_id": str(random.choice(items)), "place": places(1)[0]}

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
        pin,
        pin,
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

    def fact(column: NDArray[Any] | None, missing: float) -> Any:
        return missing if column is None else column[row]

    def tags(prefix: str) -> set[str]:
        having = facts.having["attribute"].items()
        return {tag.removeprefix(prefix) for tag, rows in having if tag.startswith(prefix) and row in rows}

    stock, price = fact(facts.stock, -1), fact(facts.prices, np.nan)
    since, until = fact(facts.available_from, 0), fact(facts.available_until, 0)
    now = request.now_ms
    match rule["rule"]:
        case "in_stock":
            return bool(stock == -1 or stock >= rule["min_stock"])
        case "available":
            return now is None or bool(since <= now and (until == 0 or until > now))
        case "allow":
            return is_selected()
        case "deny":
            return not is_selected()
        case "price_range":
            return bool(rule["min_price"] <= price <= rule["max_price"])
        case "bought_within":
            times = [at for bought, at in zip(*funnel.purchases, strict=True) if bought == row]
            return not any(now is None or at == 0 or (now - at) / DAY_MS < rule["days"] for at in times)
        case "region":
            return not tags("region:") or request.context.get("region") in tags("region:")
        case "min_age":
            return int(request.context.get("age", 0)) >= max(map(int, tags("age:")), default=0)
    return True


def faults(
    facts: ItemFacts,
    rules: list[dict[str, Any]],
    funnel: Funnel,
    limit: int,
    request: Request,
    rows: NDArray[np.int32],
    relaxed: list[str],
) -> list[str]:
    """Return what is wrong with a slate (rows) of which some rules yielded; nothing where it is right."""
    slate: list[int] = rows.tolist()
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
            if most > rule["max_items"] and not any(name.startswith("cap:") for name in relaxed):
                wrong.append(f"{rule}: {most} of one group, and no cap yielded")
        if rule["rule"] == "drop_seen" and "drop_seen" not in relaxed:
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
            dim = int(random.choice([2, 16, 64]))
            facts = simulated_shop(int(random.integers(300, 1500)), seed + number, dim)
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
        if number % 2:  # as the pipeline's, whose reserve is all that was scored
            funnel = replace(
                funnel,
                reserve_rows=np.concatenate([funnel.reserve_rows, funnel.rows]),
                reserve_scores=np.concatenate([funnel.reserve_scores, funnel.scores]),
            )
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
        problems = faults(facts, rules, funnel, limit, request, found.rows, found.relaxed)
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


class _Broken:
    """A part of a pipeline that fails whatever is asked of it."""

    name = "broken"
    history_length = 1
    context = ContextTable()
    heads = ()

    def find(self, *asked: object) -> Any:
        raise RuntimeError("broken")

    score_states = user_states = find


def check_pipeline(bundle: Bundle, num_requests: int, seed: int = 0) -> dict[str, Any]:
    """Return counts over random requests to a bundle's pipeline, and every fault found."""
    random = np.random.default_rng(seed)
    logging.disable(logging.ERROR)  # stages fail on purpose
    whole = RecommendationPipeline(bundle)
    facts, catalog = whole.reranker.facts, bundle.catalog
    scorerless = RecommendationPipeline(dataclasses.replace(bundle, scorer=_Broken()))  # type: ignore[arg-type]
    sourceless = RecommendationPipeline(bundle)
    sourceless.sources = [_Broken() for _ in sourceless.sources]
    variants = [whole, whole, scorerless, sourceless]
    counts = Counter[str]()
    wrong: list[str] = []
    every = np.arange(1, facts.num_items + 1, dtype=np.int32)
    clock = bundle.manifest["data"]["clock"]
    for number in track(range(num_requests), "requests", console=Console(stderr=True)):
        while True:
            rules = random_rules(facts, random)
            try:
                policies = policies_from_config({"policies": {"one": {"rules": rules}}})
                pipeline = variants[random.integers(len(variants))].with_policies(policies)
                break
            except PolicyError:
                counts["policies refused"] += 1
        items = random.choice(every, random.integers(0, min(60, len(every))))
        history = History(
            items,
            random.integers(0, len(EVENT_TYPES), len(items)).astype(np.uint8),
            (clock - random.integers(0, 90, len(items)) * DAY_MS).clip(0),
        )
        filters = Filters()
        if random.random() < 0.3:
            filters = Filters(
                min_price=float(random.choice([0, 5, 20])), max_price=float(random.choice([30, 90]))
            )
        excluded = random.choice(every, random.integers(0, min(30, len(every))))
        context = [{}, {"region": "DE"}, {"region": "FR", "age": "17"}, {"age": "40"}][random.integers(4)]
        limit = int(random.integers(1, 60))
        ask: dict[str, Any] = {
            "filters": filters,
            "excluded": excluded,
            "now": clock + int(random.integers(-30, 30)) * DAY_MS,
            "seed": int(random.integers(1000)),
            "context": context,
            "budget": Budget(0.0) if random.random() < 0.1 else None,
        }
        answer, trace = pipeline.recommend(Visitor(history), limit, **ask)
        eligible = catalog.matching(min_price=filters.min_price, max_price=filters.max_price)
        eligible[excluded] = False
        bought = history.event_types == EVENT_CODE["purchase"]
        seen = np.zeros(facts.num_items + 1, np.bool_)
        seen[not_asked_for(history.items, pipeline.has_repeats)] = True
        funnel = Funnel(
            rows=np.flatnonzero(eligible).astype(np.int32),
            scores=np.zeros(0, np.float32),
            seen=seen,
            eligible=eligible,
            purchases=Purchases(history.items[bought], history.timestamps[bought]),
        )
        assert trace.arrangement is not None
        request = Request(now_ms=trace.arrangement.now_ms, seed=ask["seed"], context=context)
        degraded = "reranking" in trace.degraded_stages
        kept = [rule for rule in rules if issubclass(RULES[rule["rule"]], Filter)] if degraded else rules
        problems = faults(facts, kept, funnel, limit, request, answer.rows, trace.relaxed_rules)
        again, _ = pipeline.recommend(Visitor(history), limit, **ask | {"explain": number % 10 == 0})
        if again.rows.tolist() != answer.rows.tolist():
            problems.append("another slate when asked again")
        wrong += [f"request {number}: {problem}; {rules}" for problem in problems]
        counts["short"] += len(answer) < limit
        counts["with a rule that yielded"] += bool(trace.relaxed_rules)
        counts["with a failing stage"] += bool(trace.degraded_stages)
    logging.disable(logging.NOTSET)
    return {"requests": num_requests, "bundle": bundle.version, "seed": seed, **counts, "faults": wrong}


def main(argv: list[str] | None = None) -> int:
    """Run the check, print what was found as JSON, and return 1 where something was wrong."""
    parser = ArgumentParser(prog="python -m benchmarks.reranking_soundness", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="Random requests.")
    parser.add_argument("--seed", type=int, default=0, help="Of all that is random.")
    parser.add_argument(
        "--bundle", type=Path | None, default=None, help="Ask the pipeline of this bundle, or of the newest."
    )
    options = parser.parse_args(argv)
    if options.bundle is None:
        result = check(options.requests, options.seed)
    else:
        try:
            bundle = Bundle.load(resolve_bundle(options.bundle))
        except ValueError as error:
            print(f"benchmarks.reranking_soundness: {error}", file=sys.stderr)
            return 2
        result = check_pipeline(bundle, options.requests, options.seed)
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
