"""Metrics against fractions worked out by hand, and against every order of the tied items."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import metrics
from training.metrics import METRICS, Places, accuracy, mean_accuracy, places_by_score, places_in_list

OUT = -np.inf


def score(scores, targets, cutoff):
    """Return the four metrics of one question; scores are of items 1..I."""
    row = np.array([OUT, *scores], np.float32)
    found = accuracy(places_by_score(row, np.array(targets, np.int32)), (cutoff,))
    return [found[f"{name}@{cutoff}"] for name in ("recall", "ndcg", "mrr", "hit")]


def discount(place):
    """Return the gain of a hit at a place that counts from 1."""
    return 1 / math.log2(place + 1)


@pytest.mark.parametrize(
    ("scores", "targets", "cutoff", "expected"),
    [
        # one target at the top, in third place, in third place of two, in last place
        ([9, 5, 4, 1], [1], 2, [1, 1, 1, 1]),
        ([9, 5, 4, 1], [3], 3, [1, discount(3), 1 / 3, 1]),
        ([9, 5, 4, 1], [3], 2, [0, 0, 0, 0]),
        ([9, 5, 4, 1], [4], 4, [1, discount(4), 1 / 4, 1]),
        # the order of rows means nothing
        ([1, 4, 5, 9], [2], 3, [1, discount(3), 1 / 3, 1]),
        # two targets in places 2 and 4: both, one, none found
        ([4, 3, 2, 1], [2, 4], 4, [1, (discount(2) + discount(4)) / (discount(1) + discount(2)), 1 / 2, 1]),
        ([4, 3, 2, 1], [2, 4], 3, [1 / 2, discount(2) / (discount(1) + discount(2)), 1 / 2, 1]),
        ([4, 3, 2, 1], [2, 4], 1, [0, 0, 0, 0]),
        # three targets and one place: the ideal list holds one
        ([4, 3, 2, 1], [1, 2, 3], 1, [1 / 3, 1, 1, 1]),
        # a cutoff beyond the catalog
        ([4, 3, 2, 1], [3], 100, [1, discount(3), 1 / 3, 1]),
        ([4, 3], [1, 2], 5, [1, 1, 1, 1]),
        # two tied for the first place
        ([7, 7, 1], [1], 1, [1 / 2, 1 / 2, 1 / 2, 1 / 2]),
        ([7, 7, 1], [1], 2, [1, (1 + discount(2)) / 2, (1 + 1 / 2) / 2, 1]),
        # three tied for places 2 to 4, one of them wanted, and the cutoff goes through them
        ([9, 5, 5, 5], [3], 3, [2 / 3, (discount(2) + discount(3)) / 3, (1 / 2 + 1 / 3) / 3, 2 / 3]),
        # three tied for all places, two of them wanted: first hit is first (2/3) or second (1/3)
        ([5, 5, 5], [1, 2], 1, [1 / 3, 2 / 3, 2 / 3, 2 / 3]),
        ([5, 5, 5], [1, 2], 2, [2 / 3, 2 / 3, 2 / 3 + 1 / 3 / 2, 1]),
        # one target above, one tied with another item below
        ([9, 5, 5], [1, 2], 2, [3 / 4, (1 + discount(2) / 2) / (1 + discount(2)), 1, 1]),
        # out of the ranking: alone, and beside one that is found
        ([OUT, 5, 5], [1], 3, [0, 0, 0, 0]),
        ([OUT, 5, 4], [1, 2], 3, [1 / 2, 1 / (1 + discount(2)), 1, 1]),
        ([OUT, OUT, 4], [1, 2], 3, [0, 0, 0, 0]),
        # infinitely good is not out of the ranking
        ([np.inf, 5, 4], [1], 1, [1, 1, 1, 1]),
    ],
)
def test_worked_out_answers(scores, targets, cutoff, expected):
    assert score(scores, targets, cutoff) == pytest.approx(expected)


def by_definition(ranked, targets, cutoff):
    """Return recall, ndcg, mrr and hit of one list without ties, as the textbooks say."""
    hits = [place for place, item in enumerate(ranked[:cutoff], start=1) if item in targets]
    ideal = sum(discount(place) for place in range(1, min(len(targets), cutoff) + 1))
    return [
        len(hits) / len(targets),
        sum(map(discount, hits)) / ideal,
        1 / hits[0] if hits else 0,
        1 if hits else 0,
    ]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from([OUT, 0.0, 1.0, 2.0]), min_size=1, max_size=5).flatmap(
        lambda scores: st.tuples(
            st.just(scores),
            st.lists(st.integers(1, len(scores)), min_size=1, unique=True),
            st.integers(1, len(scores) + 2),
        )
    )
)
def test_ties_count_by_their_mean_over_every_order(question):
    scores, targets, cutoff = question
    items = [item for item in range(1, len(scores) + 1) if scores[item - 1] > OUT]
    every_order = [
        by_definition(sorted(order, key=lambda item: -scores[item - 1]), targets, cutoff)
        for order in itertools.permutations(items)
    ]
    assert score(scores, targets, cutoff) == pytest.approx(np.mean(every_order, axis=0).tolist())


@pytest.mark.parametrize("constant", [0.0, -3.5, 1e30])
def test_a_model_that_scores_all_alike_gets_what_chance_gets(constant):
    alike = [constant] * 100
    harmonic = sum(1 / place for place in range(1, 11))
    gains = sum(map(discount, range(1, 11)))
    for target in (1, 50, 100):
        assert score(alike, [target], 10) == pytest.approx([0.1, gains / 100, harmonic / 100, 0.1])
    recall, _, _, hit = score(alike, [1, 50, 100], 10)
    assert recall == pytest.approx(0.1)
    assert hit == pytest.approx(1 - math.comb(97, 10) / math.comb(100, 10))


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="scores hold NaN"):
        places_by_score(np.array([OUT, 1, np.nan], np.float32), np.array([1], np.int32))


def test_places_in_a_list():
    places = places_in_list(np.array([7, 3, 9], np.int32), np.array([9, 7, 4], np.int32))
    assert places.first.tolist() == [2, 0, metrics.NOWHERE]
    assert places.width.tolist() == [1, 1, 1]
    assert metrics.recall(places, 3) == pytest.approx(2 / 3)
    assert metrics.mrr(places, 3) == 1
    nothing = places_in_list(np.zeros(0, np.int32), np.array([9, 4], np.int32))
    assert [metric(nothing, 10) for metric in METRICS.values()] == [0, 0, 0, 0]


def test_a_list_and_scores_without_ties_agree():
    rng = np.random.default_rng(0)
    ranked = rng.permutation(np.arange(1, 31)).astype(np.int32)
    scores = np.full(31, OUT, np.float32)
    scores[ranked] = -np.arange(30)
    targets = rng.choice(ranked, 5, replace=False)
    in_list, by_score = places_in_list(ranked, targets), places_by_score(scores, targets)
    assert in_list.first.tolist() == by_score.first.tolist()
    assert in_list.width.tolist() == by_score.width.tolist()


def test_all_metrics_at_all_cutoffs_have_a_name():
    found = accuracy(Places(np.array([1]), np.array([1])), (1, 5))
    assert found == {
        **{"recall@1": 0, "recall@5": 1, "ndcg@1": 0, "ndcg@5": pytest.approx(discount(2))},
        **{"mrr@1": 0, "mrr@5": 1 / 2, "hit@1": 0, "hit@5": 1},
    }


def questions(num_questions=40, num_items=12):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (num_questions, num_items + 1)).astype(np.float32)  # with many ties
    histories = [rng.integers(1, num_items + 1, rng.integers(0, 6)).astype(np.int32) for _ in scores]
    targets = [rng.permutation(np.arange(1, num_items + 1))[: rng.integers(1, 4)] for _ in scores]
    return scores, histories, [target.astype(np.int32) for target in targets]


@pytest.mark.parametrize("repeats", [False, True])
def test_the_order_of_the_questions_does_not_move_the_mean(repeats):
    scores, histories, targets = questions()
    order = np.random.default_rng(2).permutation(len(scores))
    straight = mean_accuracy(scores.copy(), histories, targets, (1, 5), repeats=repeats)
    shuffled = mean_accuracy(
        scores[order], [histories[q] for q in order], [targets[q] for q in order], (1, 5), repeats=repeats
    )
    assert shuffled == pytest.approx(straight, abs=1e-12)
    assert 0 < straight["recall@5"] < 1


def test_the_mean_of_worked_out_answers():
    scores = np.array([[99, 3, 2, 1], [99, 3, 2, 1], [99, 3, 2, 1]], np.float32)  # padding never takes part
    histories = [np.array(history, np.int32) for history in ([], [1], [1, 2])]
    targets = [np.array([target], np.int32) for target in (2, 2, 1)]
    # Item 2 is second, first with item 1 left out, and item 1 is left out itself.
    found = mean_accuracy(scores.copy(), histories, targets, (1, 2))
    assert found["recall@1"] == pytest.approx(1 / 3)
    assert found["recall@2"] == pytest.approx(2 / 3)
    assert found["mrr@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    # Where users return, the item of the last event alone is left out.
    again = mean_accuracy(scores.copy(), histories, targets, (1, 2), repeats=True)
    assert again["mrr@2"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert mean_accuracy(scores[:0], [], [], (1,)) == {}


def test_coverage():
    lists = [np.array([1, 2], np.int32), np.array([2, 5], np.int32), np.zeros(0, np.int32)]
    assert metrics.coverage(lists, 10) == pytest.approx(3 / 10)
    assert metrics.coverage([], 10) == 0
    assert metrics.coverage([], 0) == 0


def test_diversity():
    #                    padding   east    north   east, longer   zero
    vectors = np.array([[0, 0], [1, 0], [0, 1], [2, 0], [0, 0]], np.float32)

    def diversity(*ranked):
        return metrics.diversity(np.array(ranked, np.int32), vectors)

    assert diversity(1, 3) == pytest.approx(0)
    assert diversity(1, 2) == pytest.approx(1)
    assert diversity(1, 2, 3) == pytest.approx((1 + 0 + 1) / 3)
    assert diversity(1, 4) == pytest.approx(1)  # a zero vector is like none
    assert diversity(1) == diversity() == 0


def test_diversity_of_opposites_is_two():
    vectors = np.array([[0, 0], [3, 4], [-6, -8]], np.float32)
    assert metrics.diversity(np.array([1, 2], np.int32), vectors) == pytest.approx(2)


def test_novelty():
    popularity = np.array([0, 8, 1, 0, 2], np.int64)

    def novelty(*ranked):
        return metrics.novelty(np.array(ranked, np.int32), popularity, num_users=8)

    assert novelty(1) == pytest.approx(0)  # everybody knows it
    assert novelty(2) == pytest.approx(3)  # one in eight
    assert novelty(3) == pytest.approx(3)  # nobody counts as one
    assert novelty(1, 2, 4) == pytest.approx((0 + 3 + 2) / 3)
    assert novelty() == 0


#                  padding
GROUPS = np.array([0, 7, 7, 9, 4, 0], np.int32)


def rows(*ranked):
    return np.array(ranked, np.int32)


def test_group_coverage():
    assert metrics.group_coverage([rows(1, 2), rows(3), rows()], GROUPS) == pytest.approx(2 / 3)
    assert metrics.group_coverage([rows(5)], GROUPS) == 0  # an item without a group
    assert metrics.group_coverage([rows(1)], np.zeros(6, np.int32)) == 0


def test_group_entropy():
    assert metrics.group_entropy(rows(1, 2), GROUPS) == 0
    assert metrics.group_entropy(rows(1, 3), GROUPS) == pytest.approx(1)
    assert metrics.group_entropy(rows(1, 2, 3, 4), GROUPS) == pytest.approx(1 / 2 + 2 * 1 / 4 * 2)
    assert metrics.group_entropy(rows(1, 3, 5), GROUPS) == pytest.approx(1)  # item 5 has none
    assert metrics.group_entropy(rows(5), GROUPS) == metrics.group_entropy(rows(), GROUPS) == 0


def test_exposure():
    found = metrics.exposure([rows(2, 1), rows(2), rows()], 3)
    assert found.tolist() == pytest.approx([0, discount(2), 2 * discount(1), 0])


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [
        ([3, 3, 3], 0),
        ([0, 0, 5], 2 / 3),
        # mean absolute difference of all pairs, over twice the mean: (0+1+3+1+0+2+3+2+0) / 9 / (2 * 7/3)
        ([1, 2, 4], 12 / 9 / (14 / 3)),
        ([4, 1, 2], 12 / 9 / (14 / 3)),
        ([0, 0], 0),
        ([], 0),
    ],
)
def test_gini(amounts, expected):
    assert metrics.gini(np.array(amounts, float)) == pytest.approx(expected)


def test_serendipity():
    # Item 1 is wanted and expected, item 2 wanted, item 3 neither.
    assert metrics.serendipity(rows(1, 2, 3), rows(1, 2, 9), rows(1, 8)) == pytest.approx(1 / 3)
    assert metrics.serendipity(rows(1, 2), rows(1, 2), rows()) == 1
    assert metrics.serendipity(rows(), rows(1), rows()) == 0


def test_expected_margin():
    margins = np.array([9, 0.3, 0.1, np.nan])
    weights = discount(1) + discount(2) + discount(3)
    expected = (0.3 * discount(1) + 0.1 * discount(3)) / weights
    assert metrics.expected_margin(rows(1, 3, 2), margins) == pytest.approx(expected)
    assert metrics.expected_margin(rows(2), margins) == pytest.approx(0.1)
    assert metrics.expected_margin(rows(), margins) == 0


def test_freshness():
    day = 86_400_000
    since = np.array([0, 100 * day, 93 * day, 86 * day, 0, 105 * day])

    def freshness(*ranked):
        return metrics.freshness(rows(*ranked), since, now_ms=100 * day, half_life_days=7)

    assert freshness(1) == freshness(5) == 1  # today, and not yet
    assert freshness(2) == pytest.approx(1 / 2)
    assert freshness(1, 2, 3, 4) == pytest.approx((1 + 1 / 2 + 1 / 4 + 0) / 4)
    assert freshness() == 0
