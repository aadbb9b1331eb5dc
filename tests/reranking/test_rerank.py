"""The one pass: its order, who yields, the reserve, reasons; and all of it against a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reranking.adjustments import Boost
from reranking.constraints import Cap, DropSeen
from reranking.diversity import MMR, MaxSum
from reranking.filters import Deny, InStock, PriceRange
from reranking.items import RankedItems, Request
from reranking.policy import single_policy
from reranking.rerank import Effect, Move, rerank
from reranking.slots import Pin, Sponsored

# Six items, best first: three of brand 1, two of brand 2, one of none; the first was seen.
ITEMS = RankedItems(
    rows=np.array([11, 12, 13, 14, 15, 16], np.int32),
    scores=np.array([6, 5, 4, 3, 2, 1], np.float32),
    vectors=np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [-1, 0]], np.float32),
    groups={"brand": np.array([1, 1, 1, 2, 2, 0], np.int32)},
    seen=np.array([True, False, False, False, False, False]),
)
ONE_OF_A_BRAND = Cap(field="brand", max_items=1)


def having(*rows, size=40):
    return np.isin(np.arange(size), rows)


def more(rows, scores, brand=None, seen=None, **columns) -> RankedItems:
    n = len(rows)
    return RankedItems(
        rows=np.array(rows, np.int32),
        scores=np.array(scores, np.float32),
        vectors=np.zeros((n, 2), np.float32),
        groups={"brand": np.zeros(n, np.int32) if brand is None else np.array(brand, np.int32)},
        seen=np.zeros(n, bool) if seen is None else np.array(seen, bool),
        **columns,
    )


def test_without_rules_the_ranking_stands():
    slate = rerank(ITEMS, [], limit=4)
    assert slate.order.tolist() == [0, 1, 2, 3]
    assert slate.order.dtype == np.int64
    assert slate.rows.tolist() == [11, 12, 13, 14]
    assert (slate.relaxed, slate.yields, slate.reasons) == ([], {}, None)


@pytest.mark.parametrize("rules", [[DropSeen(), ONE_OF_A_BRAND], [ONE_OF_A_BRAND, DropSeen()]])
def test_a_seen_item_does_not_use_up_a_cap(rules):
    assert rerank(ITEMS, rules, limit=3).order.tolist() == [1, 3, 5]


def test_the_earlier_rule_yields_first():
    # Three items keep both rules. The fourth place is for the seen item, or for a second one of a brand.
    drops_last = rerank(ITEMS, [ONE_OF_A_BRAND, DropSeen()], limit=6)
    assert drops_last.order.tolist() == [1, 3, 5, 2, 4, 0]
    assert drops_last.yields == {"cap:brand": 3, "drop_seen": 1}
    caps_last = rerank(ITEMS, [DropSeen(), ONE_OF_A_BRAND], limit=4)
    assert caps_last.order.tolist() == [1, 3, 5, 2]  # the seen item is of brand 1 too: it breaks both
    assert caps_last.yields == {"cap:brand": 1}


def test_relaxed_is_in_the_order_of_the_policy():
    assert rerank(ITEMS, [DropSeen(), ONE_OF_A_BRAND], limit=6).relaxed == ["drop_seen", "cap:brand"]
    assert rerank(ITEMS, [ONE_OF_A_BRAND, DropSeen()], limit=6).relaxed == ["cap:brand", "drop_seen"]


def test_a_diversity_rule_chooses_among_what_the_soft_rules_leave():
    by_mmr = rerank(ITEMS, [DropSeen(), MMR(relevance_weight=0.9)], limit=3)
    assert by_mmr.order.tolist() == [1, 2, 3]  # the score leads: two of brand 1
    slate = rerank(ITEMS, [DropSeen(), MMR(relevance_weight=0.9), ONE_OF_A_BRAND], limit=3)
    assert slate.order.tolist() == [1, 3, 5]
    assert slate.relaxed == []


@pytest.mark.parametrize("place", [1, 3, 11])
def test_what_holds_for_one_place_does_not_choose_the_screen(place):
    """Items 20 to 29 are paid for: one stands at the slot, and all others where they stood without it."""
    items = more(range(1, 41), range(40, 0, -1))
    slot = Sponsored(places=[place], brand="x", selected=having(*range(21, 31), size=41))
    slate = rerank(items, [MaxSum(relevance_weight=0.985), slot], limit=25)
    others = [*range(20), *range(21, 25)]
    assert slate.order.tolist() == [*others[: place - 1], 20, *others[place - 1 :]]


def test_a_full_window_does_not_choose_the_screen():
    # Two of brand 2 lead, eight of brand 1 follow: brand 1 may not stand at places 11 and 12, but at 13.
    brand = [2, 2, *[1] * 28, *[2] * 10]
    items = more(range(1, 41), range(40, 0, -1), brand=brand)
    cap = Cap(field="brand", max_items=8, window=10)
    expected = [*range(10), 30, 31, *range(10, 18)]
    assert rerank(items, [cap], limit=20).order.tolist() == expected
    assert rerank(items, [MaxSum(relevance_weight=0.985), cap], limit=20).order.tolist() == expected


@pytest.mark.parametrize("rule", [DropSeen(), Cap(field="brand", max_items=1)])
def test_a_screen_is_chosen_among_what_may_stay(rule):
    """Beside the first, which is seen and of the pinned item's brand, the last alone looks different."""
    items = RankedItems(
        rows=np.arange(1, 6, dtype=np.int32),
        scores=np.array([5, 4, 3, 2, 1], np.float32),
        vectors=np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 0]], np.float32),
        groups={"brand": np.array([1, 0, 0, 0, 1], np.int32)},
        seen=np.array([True, False, False, False, False]),
    )
    pin = Pin(item_id="e", place=4, row=5)
    slate = rerank(items, [MaxSum(relevance_weight=0.01, screen=2), rule, pin], limit=4)
    assert slate.order.tolist() == [1, 3, 2, 4]


def test_filters_are_absolute():
    items = more([1, 2, 3], [3, 2, 1], stock=np.array([0, 0, 4]), prices=np.array([1.0, 1.0, 9.0]))
    slate = rerank(items, [InStock()], limit=3)
    assert (slate.order.tolist(), slate.relaxed) == ([2], [])
    assert rerank(items, [InStock(), PriceRange(max_price=5)], limit=3).order.tolist() == []
    pin = Pin(item_id="a", place=1, row=1)
    assert rerank(items, [pin, InStock()], limit=3).order.tolist() == [2]


def test_relevance_is_scaled_over_all_ranked_items_not_over_those_left():
    """A filter of some items does not change what a boost is worth among the others."""
    boost = Boost(brand="x", by=0.3, selected=having(13))
    for denied in ([], [16], [11, 16]):
        deny = Deny(brand="y", selected=having(*denied))
        order = rerank(ITEMS, [boost, deny], limit=6).rows.tolist()
        assert order == [row for row in (11, 13, 12, 14, 15, 16) if row not in denied]


# --- the reserve


def test_the_reserve_fills_up_behind_the_ranked():
    reserve = more([21, 22], [99, 98])
    slate = rerank(ITEMS, [], limit=7, reserve=lambda: reserve)
    assert slate.rows.tolist() == [11, 12, 13, 14, 15, 16, 21]
    assert slate.order.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_the_reserve_comes_before_a_rule_yields():
    reserve = more([21, 22], [2, 1], brand=[1, 5])
    slate = rerank(ITEMS, [ONE_OF_A_BRAND], limit=4, reserve=lambda: reserve)
    assert slate.rows.tolist() == [11, 14, 16, 22]
    assert slate.relaxed == []


def test_the_reserve_is_not_asked_where_the_ranked_suffice():
    def fail():
        raise AssertionError("asked")

    assert len(rerank(ITEMS, [ONE_OF_A_BRAND, DropSeen()], limit=3, reserve=fail).order) == 3


def test_filters_hold_for_the_reserve_and_no_item_comes_twice():
    reserve = more([11, 21, 22], [3, 2, 1])
    slate = rerank(ITEMS, [Deny(brand="x", selected=having(21))], limit=9, reserve=lambda: reserve)
    assert slate.rows.tolist() == [11, 12, 13, 14, 15, 16, 22]


# --- reasons


def test_reasons_lead_from_the_ranking_to_the_slate():
    rules = [
        Deny(brand="x", selected=having(12)),
        Boost(brand="y", by=1.0, selected=having(15)),
        ONE_OF_A_BRAND,
        DropSeen(),
        Pin(item_id="p", place=1, row=16),
    ]
    plain = rerank(ITEMS, rules, limit=3)
    slate = rerank(ITEMS, rules, limit=3, explain=True)
    assert slate.order.tolist() == plain.order.tolist() == [5, 4, 2]
    assert slate.reasons is not None
    moves = slate.reasons.moves
    assert moves[12] == [Move("deny:brand=x", 2, None)]
    # 15 starts at place 5, gains one as 12 goes, and is first with its boost.
    assert moves[15] == [
        Move("deny:brand=x", 5, 4),
        Move("boost:brand=y", 4, 1),
        Move("pin@1", 1, 2),
    ]
    assert moves[16][-1] == Move("pin@1", 3, 1)
    deny, boost, cap, seen, pin = slate.reasons.effects
    # 11 12 13 -> 11 13 14 -> 15 11 13 -> 15 11 16 -> 15 13 16 -> 16 15 13
    assert deny == Effect("deny:brand=x", 1, 1, 1, 0)
    assert boost == Effect("boost:brand=y", 1, 1, 2, 0)
    assert cap == Effect("cap:brand", 1, 1, 0, 0)
    assert seen == Effect("drop_seen", 1, 1, 0, 0)
    assert pin == Effect("pin@1", 0, 0, 3, 0)


def test_reasons_without_rules():
    reasons = rerank(ITEMS, [], limit=2, explain=True).reasons
    assert reasons is not None
    assert (reasons.effects, reasons.moves) == ([], {11: [], 12: []})


# --- against a plain loop


@st.composite
def cases(draw):
    """Numbers are eighths and powers of two, so that no sum is ever rounded and no tie is in doubt."""
    n, m = draw(st.integers(0, 8)), draw(st.integers(0, 4))
    total = n + m
    axes = np.array([[0, 0], [1, 0], [-2, 0], [0, 1], [0, -3]], np.float32)

    def column(strategy):
        return draw(st.lists(strategy, min_size=total, max_size=total))

    def scores(length):
        inner = draw(st.lists(st.integers(0, 8), min_size=length, max_size=length))
        return sorted([*inner[: max(0, length - 2)], *[8, 0][:length]], reverse=True)

    columns = {
        "vectors": axes[np.array(column(st.integers(0, 4)), int)].reshape(total, 2),
        "stock": np.array(column(st.sampled_from([0, 1, 1, -1])), np.int64),
        "seen": np.array(column(st.booleans()), bool),
        "brand": np.array(column(st.integers(0, 3)), np.int32),
        "seller_id": np.array(column(st.integers(0, 2)), np.int32),
        "rows": np.arange(1, total + 1, dtype=np.int32),
        "scores": np.array([*scores(n), *scores(m)], np.float32),
    }

    def part(where):
        taken = {name: array[where] for name, array in columns.items()}
        groups = {name: taken.pop(name) for name in ("brand", "seller_id")}
        return RankedItems(groups=groups, request=Request(), **taken)

    rules = []
    if draw(st.booleans()):
        rules.append(InStock())
    if draw(st.booleans()):
        boosted = np.isin(np.arange(total + 1), column(st.integers(1, max(total, 1))))
        rules.append(Boost(brand="b", by=0.5, selected=boosted))
    if draw(st.booleans()):
        rules.append(MMR(relevance_weight=draw(st.sampled_from([0, 0.75, 1]))))
    if draw(st.booleans()):
        rules.append(DropSeen())
    for field in ("brand", "seller_id"):
        if draw(st.booleans()):
            most = draw(st.integers(1, 2))
            window = draw(st.none() | st.integers(most + 1, most + 4))
            rules.append(Cap(field=field, max_items=most, window=window))
    if draw(st.booleans()):
        paid = np.isin(np.arange(total + 1), column(st.integers(1, max(total, 1))))
        rules.append(
            Sponsored(places=[draw(st.integers(1, 4))], brand="s", selected=paid, min_relevance=0.25)
        )
    places = draw(st.lists(st.integers(1, 10), max_size=2, unique=True))
    pinned = draw(
        st.lists(st.integers(1, total + 2), min_size=len(places), max_size=len(places), unique=True)
    )
    rules += [Pin(item_id=f"{row}", place=place, row=row) for place, row in zip(places, pinned, strict=True)]
    return part(slice(0, n)), part(slice(n, total)), draw(st.permutations(rules)), draw(st.integers(1, 12))


def by_definition(items, reserve, rules, limit):
    """Return the slate's positions and the yields, as the semantics are written down, without a trick."""
    n, total = len(items), len(items) + len(reserve)
    parts = [(items, i) for i in range(n)] + [(reserve, i) for i in range(len(reserve))]

    def relevance(i):
        part, at = parts[i]
        low, high = min(part.scores.tolist()), max(part.scores.tolist())
        return (float(part.scores[at]) - low) / ((high - low) or 1)

    def group(i, field):
        part, at = parts[i]
        return int(part.groups[field][at])

    def worth(i, chosen):
        value = relevance(i) + sum(
            rule.by for rule in rules if isinstance(rule, Boost) and rule.selected[i + 1]
        )
        for rule in rules:
            if isinstance(rule, MMR):
                vectors = [parts[j][0].vectors[parts[j][1]].astype(float) for j in (i, *chosen)]
                units = [v / (np.linalg.norm(v) or 1) for v in vectors]
                likeness = max((float(units[0] @ other) for other in units[1:]), default=0.0)
                value = rule.relevance_weight * value - (1 - rule.relevance_weight) * likeness
        return value

    allowed = [
        i
        for i in range(total)
        if not any(isinstance(r, InStock) for r in rules) or parts[i][0].stock[parts[i][1]] != 0
    ]
    pins = {
        rule.place - 1: rule.row - 1
        for rule in rules
        if isinstance(rule, Pin) and rule.place <= limit and rule.row - 1 in allowed and rule.row - 1 < n
    }
    soft = [rule for rule in rules if isinstance(rule, (DropSeen, Cap, Sponsored))]

    def objects(rule, i, place, at):
        if isinstance(rule, DropSeen):
            return bool(parts[i][0].seen[parts[i][1]])
        if isinstance(rule, Sponsored):
            paid = rule.selected[i + 1] and i < n and relevance(i) >= rule.min_relevance
            return place + 1 in rule.places and not paid
        mine = group(i, rule.group)
        window = min(rule.window or limit, limit)
        standing = {p: j for p, j in {**at, **pins, place: i}.items() if p < limit}
        return mine != 0 and any(
            sum(group(j, rule.group) == mine for p, j in standing.items() if start <= p < start + window)
            > rule.max_items
            for start in range(limit - window + 1)
            if start <= place < start + window
        )

    at: dict[int, int] = {}
    yields: dict[str, int] = {}
    for place in range(limit):
        if place in pins:
            at[place] = pins[place]
            continue
        left = [i for i in allowed if i not in at.values() and i not in pins.values()]
        if not left:
            break
        chosen = [at[p] for p in sorted(at)]

        def objections(i, place=place):
            return [k for k, rule in enumerate(soft) if objects(rule, i, place, at)]

        def key(i, chosen=chosen, place=place):
            # The strongest objection first: lists compare as the last rule's word, then the one before.
            weights = [int(k in objections(i, place)) for k in reversed(range(len(soft)))]
            return (weights, i >= n, -worth(i, chosen), i)

        pick = min(left, key=key)
        for k in objections(pick):
            yields[soft[k].name] = yields.get(soft[k].name, 0) + 1
        at[place] = pick
    order = [at[p] for p in sorted(at)]
    return order + [pins[p] for p in sorted(pins) if pins[p] not in order], yields


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_the_pass_agrees_with_its_definition(case):
    items, reserve, rules, limit = case
    order, yields = by_definition(items, reserve, rules, limit)
    found = rerank(items, rules, limit, reserve=lambda: reserve)
    assert found.order.tolist() == order
    named = {name: count for name, count in found.yields.items() if not name.startswith("pin")}
    assert named == yields
    explained = rerank(items, rules, limit, reserve=lambda: reserve, explain=True)
    assert explained.order.tolist() == order


# --- what can be wrong


def test_limit_beyond_the_items():
    assert len(rerank(ITEMS, [MMR(relevance_weight=0.5)], limit=100).order) == 6


def test_no_items():
    nothing = ITEMS.take(np.zeros(0, np.int64))
    slate = rerank(nothing, [DropSeen(), MMR(relevance_weight=0.5), ONE_OF_A_BRAND], limit=5, explain=True)
    assert slate.order.tolist() == []
    assert slate.order.dtype == np.int64
    assert slate.relaxed == []


def test_limit_is_checked():
    with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
        rerank(ITEMS, [], limit=0)


def test_too_many_soft_rules_are_refused():
    with pytest.raises(ValueError, match="21 soft rules; expected at most 20"):
        rerank(ITEMS, [DropSeen()] * 21, limit=1)
    assert len(rerank(ITEMS, [DropSeen()] * 20, limit=6).order) == 6


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match="of no family of rules"):
        rerank(ITEMS, ["mmr"], limit=1)  # type: ignore[list-item]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
def test_scores_of_any_size(scale):
    scores = np.array([1, 0.5, 0, -0.5, -1], np.float32) * np.float32(scale)
    items = more([1, 2, 3, 4, 5], scores, brand=[1, 1, 2, 2, 1])
    assert rerank(items, [ONE_OF_A_BRAND], limit=5).order.tolist() == [0, 2, 1, 3, 4]


def test_ranked_items_are_checked():
    with pytest.raises(ValueError, match="seen has 1 entries; expected 2, one an item"):
        more([1, 2], [2, 1], seen=[False])
    with pytest.raises(ValueError, match="brand has 3 entries; expected 2"):
        more([1, 2], [2, 1], brand=[1, 2, 3])
    with pytest.raises(ValueError, match="stock has 1 entries; expected 2"):
        more([1, 2], [2, 1], stock=np.array([1]))
    with pytest.raises(ValueError, match="scores holds NaN or infinity"):
        rerank(more([1, 2], [1, np.nan]), [], limit=1)
    with pytest.raises(ValueError, match="rows holds an item twice"):
        rerank(more([1, 1], [2, 1]), [], limit=1)
    with pytest.raises(ValueError, match="rows holds an item twice"):
        rerank(more([1], [2]), [], limit=2, reserve=lambda: more([2, 2], [2, 1]))
    with pytest.raises(ValueError, match="seed is -1; expected at least 0"):
        Request(seed=-1)


def test_a_list_of_rules_as_bundles_carry_it():
    rules = single_policy(
        [
            {"rule": "mmr", "relevance_weight": 0.8},
            {"rule": "cap", "field": "category", "max_items": 3},
            {"rule": "drop_seen"},
        ]
    )[None].rules
    assert rules == (MMR(relevance_weight=0.8), Cap(field="category", max_items=3), DropSeen())
    assert [rule.name for rule in rules] == ["mmr", "cap:category", "drop_seen"]
