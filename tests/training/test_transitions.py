"""The weight of the transitions, chosen for a ranker that needs them and for one that does not."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.history import NEGATIVE_EVENT
from ranking.transitions import FLOOR
from retrieval.transitions import next_items
from training import transitions
from training.data.interactions import Interactions
from training.data.splits import Holdout, Split
from training.transitions import WEIGHTS, TransitionWeight, best_weight, bonuses

NUM_ITEMS = 30


def split_of(target_of) -> Split:
    """Return a split in which item i is followed by i + 1, and which asks for target_of(the last item)."""
    rng = np.random.default_rng(0)
    begins = rng.integers(1, NUM_ITEMS - 6, 200)
    items = (begins[:, None] + np.arange(5)).astype(np.int32)
    items[:, 4] = [target_of(int(last)) for last in items[:, 3]]
    users = np.repeat(np.arange(1, 201), 5).astype(np.int32)
    log = Interactions(users, items.ravel(), np.zeros(1000, np.uint8), np.arange(1000), 200, NUM_ITEMS)
    train = log.take(np.arange(1000) % 5 < 4)
    ends = np.arange(200) * 5 + 4
    asked = Holdout(log, np.arange(1, 201, dtype=np.int32), ends, items[:, 4].copy(), np.arange(201))
    before_test = np.arange(1000) % 5 < 4
    return Split("toy", train, asked, asked, True, False, before_test)


def choose(monkeypatch: pytest.MonkeyPatch, split: Split, shown_first: list[int]) -> TransitionWeight:
    def scores(holdout: Holdout) -> NDArray[np.float32]:
        return np.eye(NUM_ITEMS + 1, dtype=np.float32)[[shown_first[int(user) - 1] for user in holdout.users]]

    monkeypatch.setattr(transitions, "SCORES_AT_ONCE", 1000)  # several blocks
    return best_weight(scores, split, 10)


def test_a_ranker_that_knows_nothing_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(monkeypatch, split_of(lambda last: last + 1), [0] * 200)
    assert list(chosen.metrics) == [f"{weight:g}" for weight in WEIGHTS]
    assert chosen.metrics["0"] < 0.3
    assert chosen.weight == WEIGHTS[1]  # the least of those that find all
    assert chosen.metrics["0.25"] == chosen.metrics["1"] > 0.9


def test_a_ranker_that_knows_better_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_of(lambda last: NUM_ITEMS)
    chosen = choose(monkeypatch, split, [NUM_ITEMS] * 200)
    assert chosen.weight == 0
    assert chosen.metrics["0"] == 1 > chosen.metrics["1.5"]


def test_what_is_added() -> None:
    split = split_of(lambda last: last + 1)
    table = transitions.training_transitions(split.train, 10)
    added = bonuses(table, [history.wanted for _, history, _ in split.test])
    assert added.shape == (200, NUM_ITEMS + 1)
    items, probabilities = next_items(table, split.test.history(7).wanted)
    expected = np.zeros(NUM_ITEMS + 1)
    expected[items] = np.log(1 + probabilities / FLOOR)
    np.testing.assert_allclose(added[7], expected, rtol=1e-5)
    assert len(items) > 1


def test_events_that_say_not_this_are_no_steps() -> None:
    kinds = np.array([0, NEGATIVE_EVENT, 0, 0], np.uint8)
    log = Interactions(np.ones(4, np.int32), np.array([1, 2, 3, 3], np.int32), kinds, np.arange(4), 1, 3)
    table = transitions.training_transitions(log, 10)
    assert [table.row(item)[0].tolist() for item in range(4)] == [[], [3], [], []]


def test_it_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "weight.json"
    assert TransitionWeight.read(file) is None
    chosen = TransitionWeight(0.5, {"0": 0.1, "0.5": 0.2})
    chosen.write(file)
    assert TransitionWeight.read(file) == chosen
