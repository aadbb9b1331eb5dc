"""MMR, DPP and max-sum against plain loops, and the DPP against every set there is."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranking.constraints import Cap
from reranking.diversity import DPP, MMR, SMALLEST_VOLUME, MaxSum
from reranking.items import RankedItems
from reranking.rerank import rerank


def ranked(scores, vectors, content=None) -> RankedItems:
    n = len(scores)
    return RankedItems(
        rows=np.arange(1, n + 1, dtype=np.int32),
        scores=np.array(scores, np.float32),
        vectors=None if vectors is None else np.array(vectors, np.float32),
        groups={},
        seen=np.zeros(n, bool),
        content_vectors=None if content is None else np.array(content, np.float32),
    )


def slate(rule, items, limit):
    result = rerank(items, [rule], limit)
    assert result.relaxed == []
    return result.order.tolist()


def mmr(weight, **options):
    return MMR(relevance_weight=weight, **options)


def test_mmr_worked_out():
    # Item 1 is item 0 again; item 2 is at right angles to both. Relevance: 1, 0.9, 0.
    items = ranked([20, 19, 10], [[2, 0], [3, 0], [0, 1]])
    # w = 0.5: item 1 is worth 0.45 - 0.5 = -0.05, item 2 is worth 0 - 0 = 0.
    assert slate(mmr(0.5), items, 3) == [0, 2, 1]
    # w = 0.6: item 1 is worth 0.54 - 0.4 = 0.14, item 2 still 0.
    assert slate(mmr(0.6), items, 3) == [0, 1, 2]
    assert slate(mmr(0), items, 3) == [0, 2, 1]
    assert slate(mmr(1), items, 3) == [0, 1, 2]


def test_mmr_rewards_the_opposite():
    assert slate(mmr(0.5), ranked([3, 3, 3], [[1, 0], [0, 1], [-1, 0]]), 2) == [0, 2]


def test_mmr_far_apart_scores_do_not_overflow():
    assert slate(mmr(0.5), ranked([3e38, 0, -3e38], [[0], [0], [0]]), 3) == [0, 1, 2]


@pytest.mark.parametrize("rule", [mmr(0.5), DPP(relevance_weight=0.5), MaxSum(relevance_weight=0.5)])
def test_nothing_to_tell_items_apart_changes_nothing(rule):
    assert slate(rule, ranked([1, 1, 1], [[0], [0], [0]]), 3) == [0, 1, 2]  # no directions, equal scores
    assert slate(rule, ranked([3, 2, 1], None), 3) == [0, 1, 2]  # no vectors at all
    assert slate(rule, ranked([1], [[1]]), 5) == [0]
    assert slate(rule, ranked([], np.zeros((0, 2))), 5) == []


@pytest.mark.parametrize("rule", [MMR, DPP, MaxSum])
def test_over_says_which_vectors_count(rule):
    # By the graph, items 0 and 1 are alike; by content, items 0 and 2.
    items = ranked([2, 2, 2], [[1, 0], [1, 0], [0, 1]], content=[[1, 0], [0, 1], [1, 0]])
    assert sorted(slate(rule(relevance_weight=0.3), items, 2)) == [0, 2]
    assert sorted(slate(rule(relevance_weight=0.3, over="content"), items, 2)) == [0, 1]


# --- against loops


@st.composite
def cases(draw, most=9):
    n = draw(st.integers(1, most))
    number = st.integers(-2, 2)
    scores = sorted(draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n)), reverse=True)
    vectors = draw(st.lists(st.tuples(number, number, number), min_size=n, max_size=n))
    return ranked(scores, vectors), draw(st.integers(1, n + 2))


def relevance_of(items):
    scores = items.scores.astype(float)
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / (spread if spread else 1)


def cosines_of(items):
    vectors = items.vectors.astype(float)
    lengths = np.linalg.norm(vectors, axis=1)
    lengths[lengths == 0] = 1
    return (vectors @ vectors.T) / np.outer(lengths, lengths)


def assert_each_choice_is_a_best_one(chosen, n, limit, worth, tolerance):
    assert len(chosen) == min(limit, n)
    for step, pick in enumerate(chosen):
        before = chosen[:step]
        others = [worth(i, before) for i in range(n) if i not in before]
        assert worth(pick, before) >= max(others) - tolerance


@given(case=cases(), weight=st.sampled_from([0, 0.25, 0.5, 0.8, 1]))
@settings(deadline=None)
def test_mmr_agrees_with_a_loop(case, weight):
    items, limit = case
    relevance, cosines = relevance_of(items), cosines_of(items)

    def worth(i, before):
        likeness = max((cosines[i, j] for j in before), default=0.0)
        return weight * relevance[i] - (1 - weight) * likeness

    assert_each_choice_is_a_best_one(slate(mmr(weight), items, limit), len(items), limit, worth, 1e-5)


def kernel_of(items):
    kernel = (1 + cosines_of(items)) / 2
    np.fill_diagonal(kernel, 1)
    return kernel


def log_volume(kernel, chosen):
    return np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1] if len(chosen) else 0.0


@given(case=cases(), weight=st.sampled_from([0, 0.25, 0.5, 0.9, 1]))
@settings(deadline=None)
def test_dpp_adds_the_item_that_adds_most_to_the_determinant(case, weight):
    items, limit = case
    relevance, kernel = relevance_of(items), kernel_of(items)

    def worth(i, before):
        with np.errstate(all="ignore"):
            grows = log_volume(kernel, [*before, i]) - log_volume(kernel, before)
        if not math.isfinite(grows):
            grows = -math.inf
        return weight * relevance[i] + (1 - weight) * max(grows, math.log(SMALLEST_VOLUME))

    chosen = slate(DPP(relevance_weight=weight), items, limit)
    # Beyond the point where the chosen items span all there is, determinants are noise.
    with np.errstate(all="ignore"):
        while len(chosen) > 1 and log_volume(kernel, chosen) < math.log(1e-4):
            chosen.pop()
    assert_each_choice_is_a_best_one(chosen, len(items), len(chosen), worth, 1e-2)


@pytest.mark.parametrize("dim", [1, 2, 4, 16])
def test_dpp_beyond_what_its_vectors_span(dim):
    """A slate longer than the vectors: what is left comes by relevance, each item once."""
    random = np.random.default_rng(dim)
    items = ranked(np.arange(120, 0, -1), random.normal(size=(120, dim)))
    chosen = slate(DPP(relevance_weight=0.5), items, 120)
    assert sorted(chosen) == list(range(120))
    kernel = kernel_of(items)
    spanned = next(n for n in range(1, 121) if log_volume(kernel, chosen[:n]) < math.log(1e-12))
    assert spanned <= dim + 3
    rest = chosen[2 * dim + 20 :]
    assert rest == sorted(rest)


@given(case=cases(most=7), size=st.integers(1, 4))
@settings(deadline=None)
def test_dpp_against_every_set_of_a_size(case, size):
    """Against every set of that size: greed's is no better than the best, and its first item is the best."""
    items, _ = case
    size = min(size, len(items))
    relevance, kernel = relevance_of(items), kernel_of(items)

    def objective(chosen):
        # In one order: whether like items have a volume of 0 or of 1e-17 is a matter of the order.
        rows = sorted(chosen)
        with np.errstate(all="ignore"):
            return 0.5 * relevance[rows].sum() + 0.5 * log_volume(kernel, rows)

    best = max(objective(chosen) for chosen in itertools.combinations(range(len(items)), size))
    found = slate(DPP(relevance_weight=0.5), items, size)
    assert objective(found) <= best + 1e-6
    if size == 1:
        assert objective(found) == pytest.approx(best)


def test_dpp_finds_the_best_set_of_all_where_items_form_groups():
    """Three directions, three items each: the best three are one of each direction, as every set is tried."""
    vectors = np.repeat(np.eye(3), 3, axis=0)
    items = ranked([9, 8.5, 8, 7.5, 7, 6.5, 6, 5.5, 5], vectors)
    relevance, kernel = relevance_of(items), kernel_of(items)

    def objective(chosen):
        volume = max(np.linalg.det(kernel[np.ix_(chosen, chosen)]), 1e-12)
        return 0.4 * relevance[list(chosen)].sum() + 0.6 * math.log(volume)

    best = max(itertools.combinations(range(9), 3), key=objective)
    assert sorted(slate(DPP(relevance_weight=0.4), items, 3)) == list(best) == [0, 3, 6]


def test_dpp_goes_on_when_the_space_is_used_up():
    items = ranked(range(60, 0, -1), np.random.default_rng(0).normal(size=(60, 3)))
    chosen = slate(DPP(relevance_weight=0.5), items, 60)
    assert sorted(chosen) == list(range(60))
    assert slate(DPP(relevance_weight=0.5), items, 20) == chosen[:20]


@given(case=cases(), weight=st.sampled_from([0.1, 0.5, 0.9, 1]), screen=st.integers(2, 4))
@settings(deadline=None)
def test_max_sum_agrees_with_a_loop(case, weight, screen):
    items, limit = case
    relevance, cosines = relevance_of(items), cosines_of(items)
    weights = np.exp(items.scores.astype(float) / 2)  # a temperature of 2
    chance = weights / weights.sum()
    chosen = slate(MaxSum(relevance_weight=weight, screen=screen, temperature=2), items, limit)
    assert len(chosen) == len(set(chosen)) == min(limit, len(items))

    def objective(group, pairs):
        alike = sum(cosines[i, j] for i, j in itertools.combinations(group, 2))
        gain = sum(chance[i] / math.log2(place + 2) for place, i in enumerate(group))
        return weight * gain - (1 - weight) * alike / max(pairs, 1)

    left = list(range(len(items)))
    for start in range(0, len(chosen), screen):
        places = min(screen, limit - start)
        pairs = places * (places - 1) / 2
        group = chosen[start : start + screen]
        assert [relevance[i] for i in group] == sorted(relevance[group], reverse=True)
        # Some order of the group is what greed would have chosen.
        assert any(
            all(
                objective(list(order[: k + 1]), pairs)
                >= max(objective([*order[:k], i], pairs) for i in left if i not in order[:k]) - 1e-5
                for k in range(len(order))
            )
            for order in itertools.permutations(group)
        )
        left = [i for i in left if i not in group]


def test_max_sum_keeps_the_sure_and_varies_the_unsure():
    # Items 0 to 2 are alike, item 3 is different and as good as item 2.
    alike = [[1, 0], [1, 0], [1, 0], [0, 1]]
    rule = MaxSum(relevance_weight=0.9, screen=2)
    assert slate(rule, ranked([9, 8, 1, 1], alike), 2) == [0, 1]  # item 1 has a chance of 0.27
    assert slate(rule, ranked([9, 4, 4, 4], alike), 2) == [0, 3]  # the others have next to none


def test_max_sum_fills_no_screen_from_the_end_of_the_ranking():
    """The ranker is all but sure of one item: what is left of the screen is still the best, or near it."""
    scores = [30.0, *np.linspace(10, 1, 99)]
    vectors = [[1, 0]] * 50 + [[0, 1], [-1, 0]] * 25  # whatever is new to the eye stands behind place 50
    items = ranked(scores, vectors)
    for depth, weight, temperature in itertools.product((1, 2, 5), (0, 0.9), (0.1, 1)):
        rule = MaxSum(relevance_weight=weight, screen=10, depth=depth, temperature=temperature)
        chosen = slate(rule, items, 20)
        assert max(chosen[:10]) < depth * 10
        assert max(chosen) < (depth + 1) * 10
    assert max(slate(MaxSum(relevance_weight=0.9, screen=10, depth=10), items, 10)) >= 50


def test_where_a_rule_objects_the_next_is_one_of_the_best_too():
    scores = [30.0, *np.linspace(10, 1, 99)]
    items = replace(
        ranked(scores, [[1, 0]] * 50 + [[0, 1], [-1, 0]] * 25),
        groups={"brand": np.array([1, *[2] * 20, *range(3, 82)], np.int32)},
    )
    cap = Cap(field="brand", max_items=1)
    order = rerank(items, [MaxSum(relevance_weight=0.9, screen=4, depth=6), cap], 4).order
    assert max(order) < 24  # two of brands 3 to 5, where the screen had many of brand 2
    # Brand 2 is all that a screen of the best 16 has behind the first; what follows is the best of the rest.
    order = rerank(items, [MaxSum(relevance_weight=0.9, screen=4, depth=4), cap], 4).order
    assert order.tolist() == [0, 1, 21, 22]


def test_max_sum_shows_a_screen_by_relevance():
    items = ranked([4, 3, 2, 1], [[1, 0], [1, 0], [1, 0], [0, 1]])
    assert slate(MaxSum(relevance_weight=0.01, screen=3), items, 4) == [0, 1, 3, 2]
