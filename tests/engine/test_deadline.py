from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.deadline import STAGE_SHARES, AbandonedError, Budget, StageCosts

SHARES = {"first": 1, "second": 2, "reply": 1}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_shares_by_hand() -> None:
    clock = Clock()
    budget = Budget(0.4, SHARES, clock=clock)
    assert budget.allowance("first") == pytest.approx(0.1)
    clock.now += 0.1
    assert budget.allowance("second") == pytest.approx(0.2)
    clock.now += 0.05  # 0.25 are left, and 0.15 of the stage were not used
    assert budget.remaining() == pytest.approx(0.25)
    assert budget.allowance("reply") == pytest.approx(0.25)
    assert not budget.expired()
    clock.now += 0.2501
    assert budget.expired()
    assert (budget.remaining(), budget.allowance("second")) == (0, 0)
    clock.now += 5
    assert budget.remaining() == 0


def test_a_stage_that_was_quick_gives_its_time_to_those_after_it() -> None:
    clock = Clock()
    budget = Budget(0.4, SHARES, clock=clock)
    assert budget.allowance("second") == pytest.approx(0.4 * 2 / 3)
    clock.now += 0.3  # a slow one takes from all after it
    assert budget.allowance("second") == pytest.approx(0.1 * 2 / 3)


def test_no_deadline() -> None:
    budget = Budget(None)
    assert budget.remaining() == math.inf
    assert budget.allowance("ranking") == math.inf
    assert budget.affordable("ranking", 500, 1.0) == 500
    budget.cancel()
    assert budget.expired()
    assert budget.affordable("ranking", 500, 0.0) == 0


def test_how_much_of_its_work_a_stage_can_do() -> None:
    budget = Budget(0.4, SHARES, clock=Clock())
    assert budget.affordable("first", 100, 0.0) == 100
    assert budget.affordable("first", 100, 0.001) == 100
    assert budget.affordable("first", 100, 0.0041) == 24
    assert budget.affordable("first", 100, 1.0) == 0
    assert budget.affordable("first", 0, 1.0) == 0


def test_a_stage_may_take_what_no_later_one_needs() -> None:
    budget = Budget(0.4, SHARES, clock=Clock())
    assert budget.later("first") == ["second"]
    assert budget.later("second") == []
    assert budget.allowance("first", 0.05) == pytest.approx(0.25)  # but the reply's quarter and .05
    assert budget.allowance("first", 0.29) == pytest.approx(0.1)  # its share
    assert budget.affordable("first", 100, 0.0041, 0.05) == 60
    assert Budget(None).allowance("ranking", 0.05) == math.inf


def test_few_are_degraded_where_the_deadline_is_twice_what_the_slowest_take() -> None:
    """Stages whose times scatter as on a crowded machine; estimates lie far above what most take."""
    rng, costs, clock = random.Random(7), StageCosts(), Clock()
    stages = {"retrieval": 0.0025, "ranking": 0.0005, "reranking": 0.0025}
    times = [
        {stage: usual * rng.lognormvariate(0, 0.7) for stage, usual in stages.items()} for _ in range(3000)
    ]
    slowest = sorted(sum(one.values()) for one in times)[int(0.99 * len(times))]
    num_degraded = num_late = 0
    for one in times:
        budget = Budget(2 * slowest, clock=clock)
        begin, is_degraded = clock.now, False
        for stage, duration_s in one.items():
            if budget.affordable(stage, 1, costs.per_item(stage), costs.usual(budget.later(stage))):
                clock.now += duration_s
                costs.observe(stage, duration_s, 1)
            else:
                costs.ease(stage)
                is_degraded = True
        num_degraded += is_degraded
        num_late += clock.now - begin > 2 * slowest
    assert num_degraded < 0.02 * len(times)
    assert num_late < 0.002 * len(times)


@given(st.floats(0.001, 10), st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_stages_that_keep_to_their_allowance_leave_the_reply_its_share(
    total_s: float, used: list[float]
) -> None:
    clock = Clock()
    budget = Budget(total_s, clock=clock)
    for stage, part in zip(STAGE_SHARES, used, strict=False):
        clock.now += part * budget.allowance(stage)
    assert budget.allowance("reply") >= STAGE_SHARES["reply"] * total_s * (1 - 1e-6) - 1e-9


def test_bad_shares() -> None:
    with pytest.raises(ValueError, match=r"shares are \{'a': 0\}; expected a number above 0"):
        Budget(1.0, {"a": 0})
    with pytest.raises(KeyError):
        Budget(1.0).allowance("dessert")


def test_what_stages_usually_take() -> None:
    costs = StageCosts()
    assert costs.usual(["retrieval", "ranking"]) == 0
    costs.observe("ranking", 0.8, 100)
    costs.observe("ranking", 1.6, 10)
    costs.observe("retrieval", 1.0, 1)
    assert costs.usual(["ranking"]) == pytest.approx(0.9)
    assert costs.usual(["retrieval", "ranking", "reranking"]) == pytest.approx(1.9)


def test_costs_by_hand() -> None:
    costs = StageCosts()
    assert costs.per_item("ranking") == 0
    costs.observe("ranking", 5.0, 0)
    assert costs.per_item("ranking") == 0
    costs.observe("ranking", 1.0, 100)  # mean .01, deviation .005
    assert costs.per_item("ranking") == pytest.approx(0.02)
    costs.observe("ranking", 1.8, 100)  # deviation .005 + (.008 - .005) / 4, mean .01 + .008 / 8
    assert costs.per_item("ranking") == pytest.approx(0.011 + 2 * 0.00575)
    assert costs.per_item("retrieval") == 0


def test_the_estimate_is_seldom_too_low_and_not_much_too_high() -> None:
    rng, costs, num_low, estimates = random.Random(5), StageCosts(), 0, []
    for number in range(3000):
        cost = 0.001 * rng.lognormvariate(0, 0.3)
        if number > 100:
            num_low += costs.per_item("ranking") < cost
            estimates.append(costs.per_item("ranking"))
        costs.observe("ranking", cost * 50, 50)
    assert num_low / 2900 < 0.1
    assert sum(estimates) / len(estimates) < 0.002
    for _ in range(50):  # it follows a change
        costs.observe("ranking", 0.5, 50)
    assert costs.per_item("ranking") == pytest.approx(0.01, rel=0.1)


def test_what_was_passed_over_for_its_cost_gets_cheaper() -> None:
    costs = StageCosts()
    costs.ease("ranking")
    assert costs.per_item("ranking") == 0
    costs.observe("ranking", 1.0, 10)  # an estimate of .1 + 2 * .05
    costs.ease("ranking")
    assert costs.per_item("ranking") == pytest.approx(0.2 * 7 / 8)


def test_who_has_gone() -> None:
    budget = Budget(None)
    budget.check()
    budget.cancel()
    with pytest.raises(AbandonedError):
        budget.check()
