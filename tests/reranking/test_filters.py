"""Hard filters, worked out item by item."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranking.filters import Allow, Available, BoughtWithin, Deny, InStock, MinAge, PriceRange, Region
from reranking.items import DAY_MS, NEVER, ItemFacts, RankedItems, Request, last_purchase

NOW = 100 * DAY_MS


def items(n=4, *, now_ms=NOW, context=None, **columns) -> RankedItems:
    return RankedItems(
        rows=np.arange(1, n + 1, dtype=np.int32),
        scores=np.arange(n, 0, -1).astype(np.float32),
        vectors=None,
        groups={},
        seen=np.zeros(n, bool),
        request=Request(now_ms=now_ms, context=context or {}),
        **{name: np.array(column) for name, column in columns.items()},
    )


def facts(attributes=None) -> ItemFacts:
    """Four items: two shoes of Acme and Apex, a hat of Acme, and something of nobody."""

    def rows(*numbers):
        return np.array(numbers, np.int32)

    return ItemFacts(
        num_items=4,
        groups={},
        having={
            "category": {"Wear": rows(1, 2, 3), "Shoes": rows(1, 2), "Hats": rows(3)},
            "brand": {"Acme": rows(1, 3), "Apex": rows(2)},
            "attribute": {name: rows(*numbers) for name, numbers in (attributes or {}).items()},
        },
        row_of={"a": 1, "b": 2, "c": 3, "d": 4},
    )


def test_in_stock():
    stock = [0, 1, 5, -1]  # the last is unknown
    assert InStock().allows(items(stock=stock)).tolist() == [False, True, True, True]
    assert InStock(min_stock=2).allows(items(stock=stock)).tolist() == [False, False, True, True]
    assert InStock().allows(items()).all()


def test_available():
    since = [0, NOW, NOW + 1, NOW - 1]
    until = [NOW, 0, 0, NOW + 1]
    shown = Available().allows(items(available_from=since, available_until=until))
    assert shown.tolist() == [False, True, False, True]
    assert Available().allows(items(available_from=since)).tolist() == [True, True, False, True]
    assert Available().allows(items(available_from=since, now_ms=None)).all()
    assert Available().allows(items()).all()


def test_allow_and_deny():
    shoes = Allow(category="Shoes").bound_to(facts())
    assert shoes.allows(items()).tolist() == [True, True, False, False]
    either = Allow(category=["Shoes", "Hats"]).bound_to(facts())
    assert either.allows(items()).tolist() == [True, True, True, False]
    both = Deny(category="Wear", brand="Acme").bound_to(facts())  # what is wear and of Acme
    assert both.allows(items()).tolist() == [False, True, False, True]
    assert Deny(item_id=("a", "d")).bound_to(facts()).allows(items()).tolist() == [False, True, True, False]


def test_a_selection_needs_a_catalog_that_knows_it():
    with pytest.raises(ValueError, match="deny:brand=Acme names items and is not bound to a catalog"):
        Deny(brand="Acme").allows(items())
    with pytest.raises(
        ValueError, match=r"deny: brand is 'Acne'; expected one of the catalog's 2 \(did you mean"
    ):
        Deny(brand="Acne").bound_to(facts())
    with pytest.raises(ValueError, match="allow: item_id is 'z'; expected one of the catalog's 4"):
        Allow(item_id="z").bound_to(facts())
    with pytest.raises(ValueError, match="deny: attribute is 'x'; the catalog has no attribute at all"):
        Deny(attribute="x").bound_to(facts())


def test_price_range():
    prices = [1.0, 2.0, 3.0, np.nan]
    assert PriceRange(min_price=2).allows(items(prices=prices)).tolist() == [False, True, True, False]
    assert PriceRange(max_price=2).allows(items(prices=prices)).tolist() == [True, True, False, False]
    both = PriceRange(min_price=2, max_price=2)
    assert both.allows(items(prices=prices)).tolist() == [False, True, False, False]
    assert not both.allows(items()).any()


def test_bought_within():
    bought = [NEVER, NOW - 7 * DAY_MS, NOW - 7 * DAY_MS + 1, 0]  # the last at an unknown time
    assert BoughtWithin(days=7).allows(items(bought_at=bought)).tolist() == [True, True, False, False]
    without_clock = BoughtWithin(days=7).allows(items(bought_at=bought, now_ms=None))
    assert without_clock.tolist() == [True, False, False, False]
    assert BoughtWithin(days=7).allows(items()).all()


@settings(deadline=None)
@given(
    bought=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=8),
    rows=st.lists(st.integers(1, 6), unique=True),
)
def test_last_purchase_agrees_with_a_loop(bought, rows):
    expected = []
    for row in rows:
        times = [time for item, time in bought if item == row]
        expected.append(NEVER if not times else 0 if 0 in times else max(times))
    found = last_purchase(
        np.array(rows, np.int32),
        np.array([item for item, _ in bought], np.int32),
        np.array([time for _, time in bought], np.int64),
    )
    assert found.tolist() == expected


def test_region():
    region = Region().bound_to(facts({"region:DE": [1, 2], "region:FR": [2], "red": [4]}))
    assert region.allows(items(context={"region": "DE"})).tolist() == [True, True, True, True]
    assert region.allows(items(context={"region": "FR"})).tolist() == [False, True, True, True]
    assert region.allows(items(context={"region": "US"})).tolist() == [False, False, True, True]
    assert region.allows(items()).tolist() == [False, False, True, True]


def test_min_age():
    rule = MinAge().bound_to(facts({"age:16": [1, 2], "age:18": [2]}))
    assert rule.allows(items(context={"age": "18"})).all()
    assert rule.allows(items(context={"age": "17"})).tolist() == [True, False, True, True]
    for context in ({}, {"age": "old"}, {"age": ""}, {"age": "-20"}):
        assert rule.allows(items(context=context)).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="attribute 'age:adult'; expected age:YEARS"):
        MinAge().bound_to(facts({"age:adult": [1]}))


@pytest.mark.parametrize("rule", [Region(), MinAge()])
def test_a_filter_that_is_not_bound_lets_nothing_pass(rule):
    with pytest.raises(ValueError, match="is not bound to a catalog"):
        rule.allows(items())
