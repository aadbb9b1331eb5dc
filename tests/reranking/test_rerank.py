import numpy as np
import pytest

from reranking.rerank import rerank
from reranking.rules import MMR, Cap, DropSeen, RankedItems

# Six items, best first: three of brand 1, two of brand 2, one of none; the first was seen.
ITEMS = RankedItems(
    rows=np.array([11, 12, 13, 14, 15, 16], np.int32),
    scores=np.array([6, 5, 4, 3, 2, 1], np.float32),
    vectors=np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [-1, 0]], np.float32),
    groups={"brand": np.array([1, 1, 1, 2, 2, 0], np.int32)},
    seen=np.array([True, False, False, False, False, False]),
)
NO_ITEMS = RankedItems(
    rows=np.zeros(0, np.int32),
    scores=np.zeros(0, np.float32),
    vectors=np.zeros((0, 2), np.float32),
    groups={"brand": np.zeros(0, np.int32)},
    seen=np.zeros(0, bool),
)


def test_without_rules_the_ranking_stands():
    slate = rerank(ITEMS, [], limit=4)
    assert slate.order.tolist() == [0, 1, 2, 3]
    assert slate.order.dtype == np.int64
    assert slate.relaxed == []


def test_rules_apply_in_order():
    assert rerank(ITEMS, [DropSeen(), Cap("brand", 1)], limit=3).order.tolist() == [1, 3, 5]
    # Cap sees the seen item first, and lets it stand for its brand; then it is dropped.
    assert rerank(ITEMS, [Cap("brand", 1), DropSeen()], limit=3).order.tolist() == [3, 5, 1]


def test_a_cap_after_mmr_holds_and_keeps_its_order():
    by_mmr = rerank(ITEMS, [DropSeen(), MMR(0.9)], limit=3).order.tolist()
    assert by_mmr == [1, 2, 3]  # the score leads: two of brand 1
    slate = rerank(ITEMS, [DropSeen(), MMR(0.9), Cap("brand", 1)], limit=3)
    assert slate.order.tolist() == [1, 3, 5]
    assert slate.relaxed == []


def test_relaxed_names_the_rules_that_yielded():
    slate = rerank(ITEMS, [DropSeen(), MMR(0.5), Cap("brand", 1)], limit=6)
    assert slate.relaxed == ["drop_seen", "cap:brand"]
    assert sorted(slate.order.tolist()) == [0, 1, 2, 3, 4, 5]  # a full slate


def test_limit_beyond_the_items():
    assert len(rerank(ITEMS, [MMR(0.5)], limit=100).order) == 6


def test_no_items():
    slate = rerank(NO_ITEMS, [DropSeen(), MMR(0.5), Cap("brand", 1)], limit=5)
    assert slate.order.tolist() == []
    assert slate.order.dtype == np.int64
    assert slate.relaxed == []


def test_limit_is_checked():
    with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
        rerank(ITEMS, [], limit=0)
