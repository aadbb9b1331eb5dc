"""What adds to the ranker's scores, weighed for rankers that need it and for those that do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import score_weights
from training.data.interactions import Interactions
from training.data.splits import Holdout, Split
from training.score_weights import (
    GRAPH_WEIGHTS,
    TRANSITION_WEIGHTS,
    Chances,
    ScoreWeights,
    best_weights,
    questions_of,
)

NUM_ITEMS = 30


def split_of(target_of: Callable[[int], int]) -> Split:
    """Return a split in which item i is followed by i + 1, and which asks for target_of(the last item)."""
    rng = np.random.default_rng(0)
    begins = rng.integers(1, NUM_ITEMS - 6, 200)
    items = (begins[:, None] + np.arange(5)).astype(np.int32)
    items[:, 4] = [target_of(int(last)) for last in items[:, 3]]
    users = np.repeat(np.arange(1, 201), 5).astype(np.int32)
    log = Interactions(users, items.ravel(), np.zeros(1000, np.uint8), np.arange(1000), 200, NUM_ITEMS)
    before_test = np.arange(1000) % 5 < 4
    ends = np.arange(200) * 5 + 4
    asked = Holdout(log, np.arange(1, 201, dtype=np.int32), ends, items[:, 4].copy(), np.arange(201))
    return Split("toy", log.take(before_test), asked, asked, True, False, before_test)


FOLLOWED = split_of(lambda last: last + 1)  # as the transitions say
ELSEWHERE = split_of(lambda last: NUM_ITEMS)  # as they do not


def choose(
    monkeypatch: pytest.MonkeyPatch, split: Split, of_ranker: int, of_graph: int, **options: Any
) -> ScoreWeights:
    monkeypatch.setattr(score_weights, "SCORES_AT_ONCE", 1000)  # several blocks
    holdout = questions_of(split)
    # Scores of 1 for one item, whoever asks, and 0 for all others; item 0 is padding. Two numbers of the
    # ranker's, so that nothing is lost.
    items = np.zeros((NUM_ITEMS + 1, 3), np.float32)
    items[of_ranker, 0] = items[of_graph, 2] = 1
    queries = np.tile(np.array([1, 0, 1], np.float32), (len(holdout), 1))
    return best_weights(queries, items, 2, holdout, split, 10, **options)


def test_a_ranker_that_knows_nothing_needs_transitions(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(monkeypatch, FOLLOWED, 0, 0)
    # The least of those that find all.
    assert (chosen.graph, chosen.transitions) == (0, TRANSITION_WEIGHTS[1])
    assert chosen.alone < 0.3 < 0.9 < chosen.metric


def test_one_that_knows_better_needs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(monkeypatch, ELSEWHERE, NUM_ITEMS, 1)
    assert (chosen.graph, chosen.transitions, chosen.metric, chosen.alone) == (0, 0, 1.0, 1.0)
    # Sure as it may be; it says 1 where it could say more.
    assert chosen.temperature < 0.5
    assert choose(monkeypatch, ELSEWHERE, NUM_ITEMS, 1, temperature=1.5).temperature == 1.5


def test_the_graph_counts_where_it_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(monkeypatch, ELSEWHERE, 0, NUM_ITEMS)
    assert (chosen.graph, chosen.transitions, chosen.metric) == (GRAPH_WEIGHTS[1], 0, 1.0)
    assert chosen.alone < 0.3


def test_what_the_recipe_says_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(monkeypatch, ELSEWHERE, 0, NUM_ITEMS, graph_weights=(0.0,))
    assert chosen.graph == 0
    assert chosen.metric == chosen.alone < 0.3
    given = choose(monkeypatch, FOLLOWED, 0, 0, graph_weights=(0.7,), transition_weights=(2.0,))
    assert (given.graph, given.transitions) == (0.7, 2)
    assert given.alone < 0.3 < 0.9 < given.metric


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_scores_that_lie_too_far_apart_are_brought_together(factor: float) -> None:
    """What is drawn with chances of softmax(s) is likeliest at a temperature of f for scores of f * s."""
    rng = np.random.default_rng(0)
    chances = Chances()
    for _ in range(3000):
        scores = rng.standard_normal(31) * 2
        scores[:3] = -np.inf
        among = np.exp(scores) / np.exp(scores).sum()
        target = rng.choice(31, size=1, p=among).astype(np.int32)
        chances.add((factor * scores).astype(np.float32), target)
    assert chances.temperature() == pytest.approx(factor, rel=0.1)


def test_chances_are_those_of_the_best_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_weights, "CHANCES_AMONG", 2)
    chances = Chances()
    for _ in range(1000):
        chances.add(np.array([-np.inf, 5, 4, 3, 2], np.float32), np.array([3], np.int32))
    assert chances.temperature() == 1  # it was never among them: nothing is known
    for target in [1] * 731 + [2] * 269:  # as a softmax over these two says
        chances.add(np.array([-np.inf, 5, 4, 3, 2], np.float32), np.array([target], np.int32))
    assert chances.temperature() == 1
    few = Chances()
    few.add(np.array([-np.inf, 5, 4], np.float32), np.array([2], np.int32))
    assert few.temperature() < 1.2  # one question says little
    chances.add(np.full(5, -np.inf, np.float32), np.array([3], np.int32))


def test_they_are_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    assert ScoreWeights.read(file) is None
    chosen = ScoreWeights(0.1, 0.5, 0.3, 0.2, 2.0)
    chosen.write(file)
    assert ScoreWeights.read(file) == chosen
    # A version before looked for no temperature, and knew other transitions.
    file.write_text('{"graph": 0.1, "transitions": 3.0, "metric": 0.3, "alone": 0.2}')
    assert ScoreWeights.read(file) is None
