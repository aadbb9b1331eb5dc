"""Drop-seen, caps and exposure, worked out and against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranking.constraints import Cap, DropSeen, Exposure, attention
from reranking.items import ItemFacts, RankedItems
from reranking.rerank import rerank
from reranking.slots import Pin


def ranked(n, *, brand=None, seller=None, seen=None, scores=None) -> RankedItems:
    def column(values, dtype):
        return np.zeros(n, dtype) if values is None else np.array(values, dtype)

    return RankedItems(
        rows=np.arange(1, n + 1, dtype=np.int32),
        scores=np.arange(n, 0, -1).astype(np.float32) if scores is None else np.array(scores, np.float32),
        vectors=None,
        groups={"brand": column(brand, np.int32), "seller_id": column(seller, np.int32)},
        seen=column(seen, bool),
    )


def slate(rules, items, limit):
    result = rerank(items, rules, limit)
    return result.order.tolist(), result.yields


# --- drop_seen


@pytest.mark.parametrize(
    ("limit", "expected", "yields"),
    [
        (1, [1], {}),
        (2, [1, 3], {}),
        (3, [1, 3, 0], {"drop_seen": 1}),
        (9, [1, 3, 0, 2], {"drop_seen": 2}),
    ],
)
def test_drop_seen_fills_up_last(limit, expected, yields):
    assert slate([DropSeen()], ranked(4, seen=[1, 0, 1, 0]), limit) == (expected, yields)


# --- cap


def cap(most, **options):
    return Cap(field="brand", max_items=most, **options)


def test_cap_worked_out():
    items = ranked(6, brand=[7, 7, 7, 8, 0, 0])
    assert slate([cap(1)], items, 4) == ([0, 3, 4, 5], {})
    assert slate([cap(2)], items, 4) == ([0, 1, 3, 4], {})
    assert slate([cap(1)], items, 5) == ([0, 3, 4, 5, 1], {"cap:brand": 1})
    assert slate([cap(1)], items, 9) == ([0, 3, 4, 5, 1, 2], {"cap:brand": 2})


def test_cap_in_a_window_worked_out():
    items = ranked(6, brand=[7, 7, 7, 7, 8, 9])
    # Brand 7 may come back as soon as its item has left the window of three.
    assert slate([cap(1, window=3)], items, 4) == ([0, 4, 5, 1], {})
    # Then nothing is left but brand 7.
    assert slate([cap(1, window=3)], items, 6) == ([0, 4, 5, 1, 2, 3], {"cap:brand@3": 2})
    assert slate([cap(2, window=3)], items, 5) == ([0, 1, 4, 2, 3], {})


def test_cap_never_caps_a_missing_group():
    assert slate([cap(1)], ranked(3, brand=[0, 0, 0]), 3) == ([0, 1, 2], {})


def test_a_window_longer_than_the_slate_is_the_slate():
    items = ranked(5, brand=[7, 7, 8, 7, 9])
    assert slate([cap(1, window=40)], items, 3) == ([0, 2, 4], {})


def test_caps_look_ahead_to_pins():
    items = ranked(6, brand=[7, 8, 7, 9, 7, 10])
    pin = Pin(item_id="e", place=3, row=5)  # item 4, of brand 7
    assert slate([cap(1), pin], items, 4) == ([1, 3, 4, 5], {})
    # A window of two: brand 7 may stand at place 1, not at 2 and 4.
    assert slate([cap(1, window=2), pin], items, 5) == ([0, 1, 4, 3, 2], {})


def test_the_later_cap_has_the_last_word():
    # By brand only items 0 and 2 go together, by seller only items 0 and 1.
    items = ranked(3, brand=[7, 7, 8], seller=[4, 5, 4])
    by_brand, by_seller = cap(1), Cap(field="seller_id", max_items=1)
    assert slate([by_brand, by_seller], items, 2) == ([0, 1], {"cap:brand": 1})
    assert slate([by_seller, by_brand], items, 2) == ([0, 2], {"cap:seller_id": 1})


@st.composite
def cases(draw, most=10):
    n = draw(st.integers(0, most))
    brand = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return ranked(n, brand=brand), draw(st.integers(1, n + 3))


@settings(deadline=None)
@given(case=cases(), most=st.integers(1, 3), extra=st.none() | st.integers(1, 4))
def test_cap_agrees_with_a_loop(case, most, extra):
    """Place by place: the first item that keeps every window; else the first item."""
    items, limit = case
    window = None if extra is None else most + extra
    brands, chosen, num_yields = items.groups["brand"].tolist(), [], 0

    def fits(i):
        recent = chosen if window is None else chosen[max(0, len(chosen) - window + 1) :]
        return brands[i] == 0 or sum(brands[j] == brands[i] for j in recent) < most

    while len(chosen) < min(limit, len(items)):
        left = [i for i in range(len(items)) if i not in chosen]
        fitting = [i for i in left if fits(i)]
        num_yields += not fitting
        chosen.append((fitting or left)[0])
    rule = cap(most, window=window)
    assert slate([rule], items, limit) == (chosen, {rule.name: num_yields} if num_yields else {})


# --- exposure


def test_attention():
    assert attention(3).tolist() == pytest.approx([1, 1 / math.log2(3), 1 / 2])


def test_exposure_worked_out():
    # Seller 1 has the four best items, seller 2 the two worst: of six items a third is due to seller 2.
    items = ranked(6, seller=[1, 1, 1, 1, 2, 2])
    rule = Exposure(merit="items")
    result = rerank(items, [rule], 6)
    # Places give 1, .631, .5, .431, ...; a third of all so far is .333, .544, .710: at place 3 that is more
    # than the place gives. Then seller 2 has .5 of a due of .854 and .983, and place 5 gives .387.
    assert result.order.tolist() == [0, 1, 4, 2, 5, 3]
    assert result.relaxed == []
    (one, two) = result.exposure["exposure:seller_id"]
    worth = attention(6)
    assert (one.seller, two.seller) == (1, 2)
    assert (one.due, two.due) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert two.given == pytest.approx((worth[2] + worth[4]) / worth.sum())
    assert one.given + two.given == pytest.approx(1)


def test_exposure_merit_by_relevance():
    items = ranked(3, seller=[1, 2, 2], scores=[4, 2, 0])  # relevances 1, 1/2, 0
    (one, two) = rerank(items, [Exposure()], 3).exposure["exposure:seller_id"]
    assert (one.due, two.due) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_pins_that_close_ranks_have_the_exposure_of_where_they_stand():
    items = ranked(4, seller=[1, 1, 2, 2])
    pins = [Pin(item_id=f"{row}", place=place, row=row) for row, place in ((3, 9), (4, 10))]
    result = rerank(items, [Exposure(merit="items"), *pins], 10)
    assert result.order.tolist() == [0, 1, 2, 3]
    (one, two) = result.exposure["exposure:seller_id"]
    worth = attention(4) / attention(4).sum()
    assert (one.given, two.given) == (pytest.approx(worth[:2].sum()), pytest.approx(worth[2:].sum()))


def test_exposure_by_contract():
    facts = ItemFacts(
        num_items=4,
        groups={"seller_id": np.array([0, 1, 1, 1, 2], np.int32)},
        having={"seller_id": {"Big": np.array([1, 2, 3], np.int32), "Small": np.array([4], np.int32)}},
        row_of={},
    )
    items = ranked(4, seller=[1, 1, 1, 2])
    rule = Exposure(merit="shares", shares={"Small": 0.3})
    with pytest.raises(ValueError, match="names sellers and is not bound"):
        rerank(items, [rule], 3)
    result = rerank(items, [rule.bound_to(facts)], 3)
    # .3 of 1.631 is less than place 2 gives, .3 of 2.131 is more than place 3 gives.
    assert result.order.tolist() == [0, 1, 3]
    assert [one.due for one in result.exposure[rule.name]] == [0, pytest.approx(0.3)]
    with pytest.raises(
        ValueError, match=r"exposure: shares is 'smal'; expected .* \(did you mean 'Small'\?\)"
    ):
        Exposure(merit="shares", shares={"smal": 0.4}).bound_to(facts)


def test_a_seller_without_items_left_is_owed_nothing():
    items = ranked(4, seller=[1, 1, 1, 2], scores=[1, 1, 1, 1])
    rule = Exposure(merit="shares", shares={"x": 0.9}, share_of={2: 0.9})
    # .9 of 1.631 at place 2 is more than that place gives; afterwards there is nothing left to give.
    assert slate([rule], items, 4) == ([0, 3, 1, 2], {})


@settings(deadline=None)
@given(
    seller=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    strength=st.sampled_from([0.3, 0.7, 1.0]),
)
def test_exposure_agrees_with_its_definition(seller, strength):
    """Where a seller with items left is owed the place, such a seller stands there; else the best item."""
    n = len(seller)
    items = ranked(n, seller=seller)
    result = rerank(items, [Exposure(merit="items", strength=strength)], n)
    worth = attention(n)
    given_to = dict.fromkeys(seller, 0.0)
    chosen: list[int] = []
    for place, pick in enumerate(result.order.tolist()):
        left = [i for i in range(n) if i not in chosen]
        owed, doubtful = set(), set()
        for one in {seller[i] for i in left} - {0}:
            missing = strength * seller.count(one) / n * worth[: place + 1].sum() - given_to[one]
            if abs(missing - worth[place]) < 1e-9:
                doubtful.add(one)
            elif missing > worth[place]:
                owed.add(one)
        if not doubtful:
            assert pick == next((i for i in left if seller[i] in owed), left[0])
        given_to[seller[pick]] += worth[place]
        chosen.append(pick)
    assert result.relaxed == []
    for account in result.exposure["exposure:seller_id"]:
        assert account.given == pytest.approx(given_to[account.seller] / worth.sum())
