"""What adjustments add, in numbers."""

import numpy as np
import pytest

from reranking.adjustments import Boost, Bury, DampenPopularity, Freshness, Margin
from reranking.items import DAY_MS, ItemFacts, RankedItems, Request
from reranking.rerank import rerank

NOW = 1000 * DAY_MS


def items(n, *, now_ms=NOW, **columns) -> RankedItems:
    return RankedItems(
        rows=np.arange(1, n + 1, dtype=np.int32),
        scores=np.arange(n, 0, -1).astype(np.float32),
        vectors=None,
        groups={},
        seen=np.zeros(n, bool),
        request=Request(now_ms=now_ms),
        **{name: np.array(column) for name, column in columns.items()},
    )


def test_freshness():
    rule = Freshness(weight=0.4, half_life_days=10)
    since = [NOW, NOW - 10 * DAY_MS, NOW - 20 * DAY_MS, 0, NOW + DAY_MS]
    added = rule.added(items(5, available_from=since))
    assert added.dtype == np.float32
    assert added.tolist() == pytest.approx([0.4, 0.2, 0.1, 0, 0.4])
    assert not rule.added(items(5)).any()
    assert not rule.added(items(5, available_from=since, now_ms=None)).any()


def test_margin():
    columns = {"margins": [0.5, 0.1, np.nan, 0.2], "prices": [10.0, 100.0, 10.0, np.nan]}
    profit = Margin(relevance_per_unit=0.02).added(items(4, **columns))
    assert profit.tolist() == pytest.approx([0.1, 0.2, 0, 0])
    share = Margin(relevance_per_unit=0.02, of="share").added(items(4, **columns))
    assert share.tolist() == pytest.approx([0.01, 0.002, 0, 0.004])
    assert not Margin(relevance_per_unit=1).added(items(4, margins=[1.0] * 4)).any()
    assert Margin(relevance_per_unit=1, of="share").reads == ("margins",)


def test_the_exchange_rate_says_when_margin_beats_relevance():
    # Relevances are 1, 0.5 and 0; the last earns 2 of the currency.
    earning = items(3, margins=[0.0, 0.0, 0.2], prices=[10.0, 10.0, 10.0])
    assert rerank(earning, [Margin(relevance_per_unit=0.24)], 3).order.tolist() == [0, 1, 2]
    assert rerank(earning, [Margin(relevance_per_unit=0.26)], 3).order.tolist() == [0, 2, 1]
    assert rerank(earning, [Margin(relevance_per_unit=0.51)], 3).order.tolist() == [2, 0, 1]


def test_dampen_popularity():
    rule = DampenPopularity(weight=0.3)
    popular = items(3, popularity=[0, 9, 99])
    assert rule.added(popular).tolist() == pytest.approx([0, -0.15, -0.3])
    catalog = ItemFacts(
        num_items=4, groups={}, having={}, row_of={}, popularity=np.array([0, 0, 9, 99, 9999])
    )
    assert rule.bound_to(catalog).added(popular).tolist() == pytest.approx([0, -0.075, -0.15])
    assert not rule.added(items(3)).any()
    assert not rule.added(items(3, popularity=[0, 0, 0])).any()


def test_boost_and_bury():
    selected = np.array([False, True, False, True])
    assert Boost(brand="x", by=0.5, selected=selected).added(items(3)).tolist() == [0.5, 0, 0.5]
    assert Bury(brand="x", by=0.5, selected=selected).added(items(3)).tolist() == [-0.5, 0, -0.5]
    # By 1, the best falls behind the worst.
    assert rerank(items(3), [Bury(brand="x", by=1.1, selected=selected)], 3).order.tolist() == [1, 0, 2]


def test_adjustments_add_up_in_any_order():
    selected = np.array([False, False, False, True])
    rules = [Boost(brand="x", by=0.75, selected=selected), Bury(brand="y", by=0.5, selected=selected)]
    assert rerank(items(3), rules, 3).order.tolist() == [0, 1, 2]
    assert rerank(items(3), rules[:1], 3).order.tolist() == [0, 2, 1]
    assert rerank(items(3), rules[::-1], 3).order.tolist() == [0, 1, 2]
