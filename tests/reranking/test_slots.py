"""Pins, sponsored and exploration slots."""

from collections import Counter

import numpy as np
import pytest

from reranking.constraints import Cap, DropSeen
from reranking.items import DAY_MS, RankedItems, Request
from reranking.rerank import rerank
from reranking.slots import Explore, Pin, Sponsored

NOW = 1000 * DAY_MS


def ranked(n=6, *, brand=None, seed=0, seen=(), **columns) -> RankedItems:
    return RankedItems(
        rows=np.arange(1, n + 1, dtype=np.int32),
        scores=np.arange(n, 0, -1).astype(np.float32),
        vectors=None,
        groups={"brand": np.zeros(n, np.int32) if brand is None else np.array(brand, np.int32)},
        seen=np.isin(np.arange(n), seen),
        request=Request(now_ms=NOW, seed=seed),
        **{name: np.array(column) for name, column in columns.items()},
    )


def order(rules, items, limit=4):
    return rerank(items, rules, limit).order.tolist()


def pin(place, row):
    return Pin(item_id=f"item-{row}", place=place, row=row)


def sponsored(places, *positions, n=6, **options):
    selected = np.isin(np.arange(n + 1), np.array(positions) + 1)
    return Sponsored(places=places, brand="x", selected=selected, **options)


# --- pins


def test_pins_stand_on_their_places():
    assert order([pin(2, 6)], ranked()) == [0, 5, 1, 2]
    assert order([pin(4, 1), pin(1, 3)], ranked()) == [2, 1, 3, 0]
    assert order([pin(5, 6)], ranked()) == [0, 1, 2, 3]  # beyond the slate


def test_a_pin_beats_every_soft_rule():
    items = ranked(brand=[7] * 6, seen=[5])
    rules = [pin(1, 6), Cap(field="brand", max_items=1), DropSeen()]
    assert order(rules, items, 1) == [5]


def test_a_pinned_item_that_is_not_there_is_named():
    result = rerank(ranked(), [pin(2, 77)], 4)
    assert (result.order.tolist(), result.relaxed) == ([0, 1, 2, 3], ["pin@2"])


def test_pins_of_a_short_slate_close_ranks():
    assert order([pin(9, 1), pin(10, 2)], ranked(4), limit=10) == [2, 3, 0, 1]


def test_a_pin_needs_a_catalog():
    with pytest.raises(ValueError, match="pin@1 names an item and is not bound to a catalog"):
        order([Pin(item_id="a", place=1)], ranked())


# --- sponsored


def test_a_sponsored_slot_takes_the_best_paid_item():
    assert order([sponsored([2], 3, 4)], ranked()) == [0, 3, 1, 2]
    assert order([sponsored([2, 4], 3, 4)], ranked()) == [0, 3, 1, 4]
    # Item 0 stands in front by itself; the slot shows the next.
    assert order([sponsored([2], 0, 4)], ranked()) == [0, 4, 1, 2]


def test_the_relevance_floor():
    # Relevances are 1, .8, .6, .4, .2, 0.
    assert order([sponsored([1], 3, min_relevance=0.39)], ranked()) == [3, 0, 1, 2]
    result = rerank(ranked(), [sponsored([1], 3, min_relevance=0.41)], 4)
    assert (result.order.tolist(), result.relaxed) == ([0, 1, 2, 3], ["sponsored:brand=x"])


def test_the_reserve_is_never_sponsored():
    reserve = RankedItems(
        rows=np.array([7], np.int32),
        scores=np.array([9], np.float32),
        vectors=None,
        groups={"brand": np.zeros(1, np.int32)},
        seen=np.zeros(1, bool),
    )
    rule = sponsored([1], 6, n=7)
    result = rerank(ranked(), [rule], 7, reserve=lambda: reserve)
    assert result.order.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert result.yields == {"sponsored:brand=x": 1}


def test_a_cap_after_a_slot_has_the_last_word():
    items = ranked(brand=[7, 8, 9, 7, 8, 9])
    slot, cap = sponsored([2], 3), Cap(field="brand", max_items=1)
    assert order([slot, cap], items, 3) == [0, 1, 2]
    assert order([cap, slot], items, 3) == [0, 3, 1]
    assert order([cap, sponsored([2], 3, 4)], items, 3) == [0, 4, 2]  # one paid item keeps the cap


# --- explore


def new_items(*positions, seed=0, **columns):
    since = np.where(np.isin(np.arange(6), positions), NOW - DAY_MS, NOW - 99 * DAY_MS)
    return ranked(available_from=since, seed=seed, **columns)


def test_explore_shows_a_new_item():
    rule = Explore(places=[2], newer_than_days=7)
    assert order([rule], new_items(4)) == [0, 4, 1, 2]
    result = rerank(new_items(), [rule], 4)  # there is none
    assert (result.order.tolist(), result.relaxed) == ([0, 1, 2, 3], ["explore"])


def test_what_counts_as_new():
    young = Explore(places=[1], newer_than_days=7)
    rare = Explore(places=[1], fewer_events_than=5)
    both = Explore(places=[1], newer_than_days=7, fewer_events_than=5)
    items = new_items(3, 4, popularity=[9, 9, 9, 9, 4, 4])
    assert order([both], items)[0] == 4
    assert {order([young], new_items(3, 4, seed=s))[0] for s in range(30)} == {3, 4}
    assert {order([rare], ranked(popularity=[9, 9, 9, 9, 4, 4], seed=s))[0] for s in range(30)} == {4, 5}
    assert rerank(ranked(), [young], 4).relaxed == ["explore"]  # nothing is known of any age


def test_a_retry_shows_the_same_page_and_another_seed_another():
    rule = Explore(places=[1], newer_than_days=7)
    pages = [tuple(order([rule], new_items(1, 2, 3, 4, 5, seed=s))) for s in range(40)]
    again = [tuple(order([rule], new_items(1, 2, 3, 4, 5, seed=s))) for s in range(40)]
    assert pages == again
    assert len(set(pages)) == 5


def test_epsilon_explores_as_often_as_it_says():
    rule = Explore(places=[1], newer_than_days=7, method="epsilon", epsilon=0.3)
    firsts = Counter(order([rule], new_items(3, 4, seed=s), 1)[0] for s in range(1000))
    # 300 expected, with a standard deviation of 14.5; each of the two new items 150, with 11.3.
    assert 240 <= firsts[3] + firsts[4] <= 360
    assert min(firsts[3], firsts[4]) >= 100
    assert set(firsts) == {0, 3, 4}
    assert all(rerank(new_items(3, seed=s), [rule], 4).relaxed == [] for s in range(10))


def test_thompson_prefers_what_was_clicked_and_tries_what_is_unknown():
    rule = Explore(places=[1], newer_than_days=7)
    shown, clicked = [0, 0, 0, 1000, 1000, 0], [0, 0, 0, 500, 10, 0]

    def firsts(*positions):
        items = (new_items(*positions, seed=s, shown=shown, clicked=clicked) for s in range(300))
        return Counter(order([rule], one, 1)[0] for one in items)

    assert firsts(3, 4) == {3: 300}  # .5 against .01, both well known
    unknown = firsts(3, 5)  # a uniform draw is above .5 in half of the cases
    assert 110 <= unknown[5] <= 190


def test_explore_keeps_a_cap_where_it_can():
    items = new_items(3, 4, brand=[7, 8, 9, 7, 10, 9])
    rules = [Cap(field="brand", max_items=1), Explore(places=[2], newer_than_days=7)]
    for seed in range(20):
        items = new_items(3, 4, brand=[7, 8, 9, 7, 10, 9], seed=seed)
        assert order(rules, items, 3) == [0, 4, 1]
