"""Policies: what a file may say, and what is said of everything that it may not."""

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from reranking.constraints import Cap, DropSeen
from reranking.diversity import MMR
from reranking.families import SELECTABLE, settings_of
from reranking.filters import Deny, InStock
from reranking.items import ItemFacts
from reranking.policy import (
    Bounds,
    PolicyError,
    load_policies,
    parse_policies,
    policies_from_config,
    single_policy,
)
from reranking.rules import RULES, rule_from_config

TEXT = """
default: home
policies:
  shop:
    rules:
      - {rule: in_stock}
      - {rule: drop_seen}
  home:
    extends: shop
    rules:
      - {rule: mmr, relevance_weight: 0.8}
      - {rule: cap, field: category, max_items: 3, window: 10}
    overrides:
      mmr.relevance_weight: {min: 0.5, max: 1}
      cap:category@10.max_items: {min: 1, max: 5}
"""


def facts(**columns) -> ItemFacts:
    """Four items: two shoes of Acme, a hat of Apex, and something of nobody."""

    def rows(*numbers):
        return np.array(numbers, np.int32)

    return ItemFacts(
        num_items=4,
        groups={"category": rows(0, 1, 1, 2, 0), "brand": rows(0, 5, 5, 6, 0)},
        having={
            "category": {"Wear": rows(1, 2, 3), "Shoes": rows(1, 2), "Hats": rows(3)},
            "brand": {"Acme": rows(1, 2), "Apex": rows(3)},
        },
        row_of={"a": 1, "b": 2, "c": 3, "d": 4},
        **columns,
    )


def test_a_file_of_policies(tmp_path):
    policies = parse_policies(TEXT)
    assert set(policies.by_name) == {"shop", "home"}
    home = policies[None]
    assert home is policies["home"] is policies[""]
    assert home.rules == (
        InStock(),
        DropSeen(),
        MMR(relevance_weight=0.8),
        Cap(field="category", max_items=3, window=10),
    )
    assert home.overrides == {
        "mmr.relevance_weight": Bounds(0.5, 1),
        "cap:category@10.max_items": Bounds(1, 5),
    }
    file = tmp_path / "policies.yaml"
    file.write_text(TEXT)
    assert load_policies(file) == policies
    file.write_text(TEXT.replace("home\n", "hame\n", 1))
    with pytest.raises(PolicyError, match=rf"^{re.escape(str(file))}: default is 'hame'"):
        load_policies(file)


def test_the_only_policy_is_the_default():
    assert single_policy([{"rule": "drop_seen"}])[None].rules == (DropSeen(),)
    assert single_policy([])[None].rules == ()


def test_reading_changes_nothing_and_gives_new_objects():
    data = yaml.safe_load(TEXT)
    before = copy.deepcopy(data)
    first, second = policies_from_config(data), policies_from_config(data)
    assert data == before
    assert first == second
    assert first is not second
    bound = first.bound_to(facts())
    assert first == second
    assert bound is not first


# --- every mistake has its own message

ONE = [{"rule": "drop_seen"}]


def one(*rules, **others):
    return {"policies": {"home": {"rules": list(rules), **others}}}


def cap(**settings):
    return {"rule": "cap", "field": "brand", "max_items": 3} | settings


def pin(place, item="a"):
    return {"rule": "pin", "item_id": item, "place": place}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "the file is None; expected a mapping with the keys policies, default"),
        (
            {"policy": {}},
            "the file has the key 'policy'; expected one of policies, default (did you mean 'policies'?)",
        ),
        ({}, "the file needs the key 'policies'"),
        ({"policies": {}}, "policies is {}; expected a mapping of names to policies, at least one"),
        ({"policies": ["home"]}, "policies is ['home']; expected a mapping of names to policies"),
        (
            {"policies": {"a": {"rules": []}, "b": {"rules": []}}},
            "default is missing; expected it beside several",
        ),
        (one() | {"default": "hom"}, "default is 'hom'; expected home (did you mean 'home'?)"),
        (
            {"policies": {"home": ONE}},
            "policy 'home' is [{'rule': 'drop_seen'}]; expected a mapping with the keys",
        ),
        (
            one(rule=[]),
            "policy 'home' has the key 'rule'; expected one of rules, extends, overrides (did",
        ),
        ({"policies": {"home": {}}}, "policy 'home' needs the key 'rules'"),
        (
            {"policies": {"home": {"rules": {"rule": "cap"}}}},
            "policy 'home': rules is {'rule': 'cap'}; expected a list",
        ),
        # one rule
        (one({"rule": "cpa"}), "policy 'home': rules[0]: rule is 'cpa'; expected one of in_stock,"),
        (one({"rule": "cpa"}), "(did you mean 'cap'?)"),
        (one(*ONE, {"rule": ["cap"]}), "policy 'home': rules[1]: rule is ['cap']; expected one of"),
        (one({"field": "brand"}), "rules[0] is {'field': 'brand'}; expected a mapping with the key 'rule'"),
        (one("cap"), "policy 'home': rules[0] is 'cap'; expected a mapping"),
        (one({"rule": "drop_seen", "hard": True}), "drop_seen has no setting 'hard'; expected no settings"),
        (one({"rule": "mmr"}), "mmr needs the setting 'relevance_weight'"),
        (
            one(cap(max_item=3)),
            "cap has no setting 'max_item'; expected one of field, max_items, window, level (did",
        ),
        (
            one(cap(field="brands")),
            "cap: field is 'brands'; expected one of category, brand, seller_id (did you mean 'brand'?)",
        ),
        (one(cap(max_items=0)), "cap: max_items is 0; expected a whole number of at least 1"),
        (one(cap(max_items=1.5)), "cap: max_items is 1.5; expected a whole number of at least 1"),
        (one(cap(max_items=True)), "cap: max_items is True; expected a whole number of at least 1"),
        (
            one(cap(max_items=5, window=5)),
            "cap:brand@5: max_items is 5 in a window of 5, which forbids nothing; expected 1 to 4",
        ),
        (one(cap(level=0)), "cap:brand/0: level is 0; only a category has levels"),
        (
            one({"rule": "mmr", "relevance_weight": 1.1}),
            "mmr: relevance_weight is 1.1; expected a number from 0 to 1",
        ),
        (
            one({"rule": "mmr", "relevance_weight": float("nan")}),
            "relevance_weight is nan; expected a number from 0 to 1",
        ),
        (
            one({"rule": "mmr", "relevance_weight": "0.5"}),
            "relevance_weight is '0.5'; expected a number from 0 to 1",
        ),
        (
            one({"rule": "freshness", "weight": -1, "half_life_days": 7}),
            "freshness: weight is -1; expected a number above 0 and at most 1000",
        ),
        (one({"rule": "boost", "brand": "Acme", "by": -0.1}), "boost: by is -0.1; expected a number above 0"),
        (
            one({"rule": "boost", "by": 0.1}),
            "boost: no items are named; expected one of category, brand, seller_id,",
        ),
        (one({"rule": "deny", "brand": [7]}), "deny: brand is 7; expected a text"),
        (one({"rule": "deny", "brand": [""]}), "deny: brand is ''; expected a text"),
        (
            one({"rule": "price_range"}),
            "price_range: neither min_price nor max_price is given; expected at least one",
        ),
        (
            one({"rule": "price_range", "min_price": 5, "max_price": 4}),
            "price_range: min_price is 5.0; expected at most max_price, 4.0",
        ),
        (one({"rule": "bought_within", "days": 0}), "bought_within: days is 0; expected a number above 0"),
        (one(pin(0)), "pin: place is 0; expected a whole number from 1 to 500"),
        (
            one({"rule": "sponsored", "places": [], "brand": "A"}),
            "sponsored: places is empty; expected at least one place",
        ),
        (
            one({"rule": "sponsored", "places": [3, 3], "brand": "A"}),
            "sponsored: places are [3, 3]; expected every place once",
        ),
        (
            one({"rule": "sponsored", "places": [501], "brand": "A"}),
            "sponsored: places is 501; expected a whole number from 1 to 500",
        ),
        (
            one({"rule": "explore", "places": 3}),
            "explore: nothing says which items are new; expected one of newer_than_days, fewer",
        ),
        (
            one({"rule": "explore", "places": 3, "fewer_events_than": 3, "method": "epsilon"}),
            "explore: epsilon is None and method is 'epsilon'; expected epsilon with method: epsilon",
        ),
        (
            one({"rule": "exposure", "shares": {"A": 0.7, "B": 0.7}, "merit": "shares"}),
            "exposure: shares sum to 1.4; expected at most 1",
        ),
        (
            one({"rule": "exposure", "shares": {"A": 2}, "merit": "shares"}),
            "exposure: shares.A is 2; expected a number above 0 and at most 1",
        ),
        (
            one({"rule": "exposure", "shares": {"A": 0.5}}),
            "exposure: shares is {'A': 0.5} and merit is 'relevance'",
        ),
        # rules together
        (one(pin(2, "a"), pin(2, "b")), "policy 'home': pin: two items are pinned to place 2; expected one"),
        (one(pin(2), pin(3)), "policy 'home': pin: 'a' is pinned to the places 2 and 3; expected one"),
        (
            one(pin(2), {"rule": "sponsored", "places": [1, 2], "brand": "A"}),
            "sponsored:brand=A and pin@2 both want place 2; expected one of them",
        ),
        (
            one({"rule": "mmr", "relevance_weight": 1}, {"rule": "dpp", "relevance_weight": 1}),
            "mmr and dpp both choose the next item",
        ),
        (one(cap(), cap(max_items=5)), "policy 'home': cap:brand stands there twice; expected once"),
        (
            one({"rule": "allow", "brand": "A"}, {"rule": "deny", "brand": "A"}),
            "allow:brand=A and deny:brand=A contradict each other; expected one of them",
        ),
        (
            one({"rule": "allow", "brand": "A", "category": "C"}, {"rule": "deny", "brand": ["A", "B"]}),
            "deny:brand=A,B forbids all that allow:category=C;brand=A allows; nothing could be shown",
        ),
        (
            one({"rule": "allow", "brand": "A"}, {"rule": "allow", "brand": ["B", "C"]}),
            "allow:brand=A and allow:brand=B,C have no brand in common; nothing could be shown",
        ),
        (
            one({"rule": "boost", "brand": "A", "by": 1}, {"rule": "bury", "brand": "A", "by": 1}),
            "boost:brand=A and bury:brand=A contradict each other",
        ),
        (
            one({"rule": "price_range", "max_price": 4}, {"rule": "price_range", "min_price": 5}),
            "price_range stands there twice; expected once",
        ),
        (
            one(*[cap(window=window) for window in range(4, 25)]),
            "policy 'home': 21 soft rules; expected at most 20",
        ),
        # policies together
        (one(extends="hame"), "policy 'home': extends is 'hame'; expected another policy"),
        (
            {"policies": {"a": {"rules": [], "extends": "bb"}, "b": {"rules": []}}, "default": "a"},
            "policy 'a': extends is 'bb'; expected b (did you mean 'b'?)",
        ),
        (one(extends="home"), "policy 'home': extends runs in a circle: home -> home"),
        (one(extends=["home"]), "policy 'home': extends is ['home']; expected another policy"),
        (one(extends={}), "policy 'home': extends is {}; expected another policy"),
        ({"policies": {"a": {"rules": []}}, "default": ["a"]}, "default is ['a']; expected a"),
        (
            {
                "policies": {
                    "a": {"rules": [], "extends": "b"},
                    "b": {"rules": [], "extends": "c"},
                    "c": {"rules": [], "extends": "a"},
                },
                "default": "a",
            },
            "policy 'a': extends runs in a circle: a -> b -> c -> a",
        ),
        # overrides
        (one(cap(), overrides=[1]), "policy 'home': overrides is [1]; expected a mapping"),
        (
            one(cap(), overrides={"cap:brand.max_item": {"min": 1, "max": 2}}),
            "'cap:brand.max_item' is no number of this policy's rules; expected one of cap:brand.max_items,",
        ),
        (one(*ONE, overrides={"x": {"min": 1, "max": 2}}), "expected nothing, as no rule has a number"),
        (
            one(cap(), overrides={"cap:brand.max_items": {"min": 1}}),
            "overrides: cap:brand.max_items needs the key 'max'",
        ),
        (
            one(cap(), overrides={"cap:brand.max_items": {"min": 1, "max": "9"}}),
            "max is '9'; expected a number",
        ),
        (
            one(cap(), overrides={"cap:brand.max_items": {"min": 4, "max": 3}}),
            "min is 4; expected at most max, 3",
        ),
        (
            one(cap(), overrides={"cap:brand.max_items": {"min": 0, "max": 3}}),
            "max_items is 0; expected a whole number of at least 1",
        ),
        (
            one(cap(), overrides={"cap:brand.max_items": {"min": 4, "max": 9}}),
            "4 to 9 leaves out the policy's own 3; expected it in",
        ),
        (
            one(cap(window=9), overrides={"cap:brand@9.max_items": {"min": 1, "max": 9}}),
            "override cap:brand@9.max_items: cap:brand@9: max_items is 9 in a window of 9",
        ),
        (
            one(pin(1), pin(2, "b"), overrides={"pin@1.place": {"min": 1, "max": 2}}),
            "policy 'home': pin: two items are pinned to place 2; expected one",
        ),
    ],
)
def test_a_wrong_file_says_what_is_wrong(data, message):
    with pytest.raises(PolicyError) as error:
        policies_from_config(data)
    assert message in str(error.value)


def test_yaml_that_is_none_and_keys_that_stand_twice():
    with pytest.raises(PolicyError, match=r"not YAML: .*line 1"):
        parse_policies("policies: {home: [")
    twice = "policies:\n  home:\n    rules: []\n  home:\n    rules: []\n"
    with pytest.raises(PolicyError, match="line 4: the key 'home' stands there twice"):
        parse_policies(twice)
    with pytest.raises(PolicyError, match="not YAML: could not determine a constructor"):
        parse_policies("policies: !!python/object/apply:os.system ['true']")
    for text in ("? [a]\n: b\n", "policies: &a [*a]"):
        with pytest.raises(PolicyError, match="a key is a list or a mapping, or something holds itself"):
            parse_policies(text)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_is_a_frozen_dataclass_that_says_what_missing_values_mean(rule):
    assert dataclasses.is_dataclass(rule)
    assert rule.__dataclass_params__.frozen
    assert rule.__doc__
    if rule.columns or rule.rule.startswith(
        ("mmr", "dpp", "max_sum", "cap", "exposure", "region", "min_age")
    ):
        assert rule.absent
    assert RULES[rule.rule] is rule
    assert all(one.hint is not None for one in settings_of(rule))


# --- on a catalog


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"rule": "deny", "category": "Shoos"}],
            "deny: category is 'Shoos'; expected one of the catalog's 3 (did you mean 'Shoes'?)",
        ),
        (
            [{"rule": "boost", "brand": "acme", "by": 1}],
            "boost: brand is 'acme'; expected one of the catalog's 2 (did you mean 'Acme'?)",
        ),
        (
            [{"rule": "allow", "seller_id": "x"}],
            "allow: seller_id is 'x'; the catalog has no seller_id at all",
        ),
        ([pin(1, "z")], "pin@1: item_id is 'z'; expected one of the catalog's 4"),
        (
            [cap(field="seller_id")],
            "cap:seller_id: the catalog has no group 'seller_id'; expected one of category, brand",
        ),
        (
            [{"rule": "allow", "brand": "Apex", "category": "Shoes"}],
            "allow:category=Shoes;brand=Apex is about no item of the catalog",
        ),
        (
            [{"rule": "allow", "category": "Wear"}, {"rule": "deny", "category": ["Shoes", "Hats"]}],
            "allow and deny together forbid every item of the catalog",
        ),
        (
            [pin(1), {"rule": "deny", "brand": "Acme"}],
            "pin@1: deny:brand=Acme never lets 'a' be shown; expected another item",
        ),
        ([pin(1), {"rule": "price_range", "min_price": 5}], "pin@1: price_range never lets 'a' be shown"),
        (
            [pin(1, "a"), pin(3, "b"), cap(max_items=1, window=3)],
            "cap:brand@3 allows 1, and 2 pins from place 1 on are of one group",
        ),
        (
            [pin(1, "a"), pin(9, "b"), cap(max_items=1)],
            "cap:brand allows 1, and 2 pins from place 1 on are of one group",
        ),
    ],
)
def test_what_does_not_fit_the_catalog(rules, message):
    policies = single_policy(rules, "home")
    with pytest.raises(PolicyError) as error:
        policies.bound_to(facts(prices=np.array([np.nan, 1, 2, 3, 4])))
    assert str(error.value).startswith("policy 'home': ")
    assert message in str(error.value)


def test_pins_that_keep_their_distance_fit_a_cap():
    rules = [pin(1, "a"), pin(4, "b"), pin(2, "c"), cap(max_items=1, window=3)]
    assert len(single_policy(rules).bound_to(facts())[None].rules) == 4


def test_binding_looks_names_up():
    (deny,) = single_policy([{"rule": "deny", "brand": ["Acme", "Apex"]}]).bound_to(facts())[None].rules
    assert isinstance(deny, Deny)
    assert deny.selected.tolist() == [False, True, True, True, False]
    (bound,) = single_policy([pin(1, "c")]).bound_to(facts())[None].rules
    assert bound.row == 3


def test_warnings_say_what_the_catalog_lacks():
    policies = single_policy([{"rule": "in_stock"}, {"rule": "margin", "relevance_per_unit": 1}], "home")
    assert policies.warnings(facts(prices=np.zeros(5))) == [
        "policy 'home': in_stock reads stock, which the catalog lacks: "
        "an item whose stock is unknown counts as in stock",
        "policy 'home': margin reads margins, which the catalog lacks: "
        "an item without a margin (or, for profit, a price) earns nothing",
    ]
    assert policies.warnings(facts(prices=np.zeros(5), margins=np.zeros(5), stock=np.zeros(5))) == []


# --- overrides


def test_overrides():
    home = parse_policies(TEXT)["home"]
    assert home.with_overrides({}) is home
    changed = home.with_overrides({"mmr.relevance_weight": 0.5, "cap:category@10.max_items": 2.0})
    assert changed.rules[2:] == (
        MMR(relevance_weight=0.5),
        Cap(field="category", max_items=2, window=10),
    )
    assert home.rules[2] == MMR(relevance_weight=0.8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"mmr.relevance_wait": 0.5},
            "override 'mmr.relevance_wait'; expected one of mmr.relevance_weight, cap:category@10.max_items "
            "(did you mean 'mmr.relevance_weight'?)",
        ),
        ({"mmr.relevance_weight": 0.4}, "override mmr.relevance_weight is 0.4; expected 0.5 to 1"),
        ({"mmr.relevance_weight": float("nan")}, "override mmr.relevance_weight is nan; expected 0.5 to 1"),
        ({"cap:category@10.max_items": 2.5}, "cap: max_items is 2.5; expected a whole number of at least 1"),
    ],
)
def test_overrides_that_are_not_allowed(asked, message):
    policies = parse_policies(TEXT)
    with pytest.raises(PolicyError, match=r"^policy 'home': override") as error:
        policies["home"].with_overrides(asked)
    assert message in str(error.value)
    with pytest.raises(
        PolicyError, match=r"policy 'shop': override 'x'; expected none, as the policy has none"
    ):
        policies["shop"].with_overrides({"x": 1})
    with pytest.raises(
        PolicyError, match=r"policy is 'hoem'; expected one of shop, home \(did you mean 'home'\?\)"
    ):
        policies["hoem"]


def test_an_override_keeps_what_was_looked_up():
    rules = [{"rule": "boost", "brand": "Acme", "by": 0.5}]
    overrides = {"boost:brand=Acme.by": {"min": 0.1, "max": 1}}
    policies = policies_from_config({"policies": {"home": {"rules": rules, "overrides": overrides}}})
    changed = policies.bound_to(facts())[None].with_overrides({"boost:brand=Acme.by": 0.25})
    assert changed.rules[0].by == 0.25
    assert changed.rules[0].selected.tolist() == [False, True, True, False, False]


def test_overrides_that_change_a_name_and_that_contradict_each_other():
    rules = [cap(window=9), pin(1, "a"), pin(5, "b")]
    overrides = {
        "cap:brand@9.window": {"min": 5, "max": 20},
        "cap:brand@9.max_items": {"min": 1, "max": 4},
        "pin@1.place": {"min": 1, "max": 9},
    }
    home = policies_from_config({"policies": {"home": {"rules": rules, "overrides": overrides}}})[None]
    changed = home.with_overrides({"cap:brand@9.window": 12, "cap:brand@9.max_items": 2})
    assert changed.rules[0] == Cap(field="brand", max_items=2, window=12)
    with pytest.raises(
        PolicyError, match="policy 'home': pin: two items are pinned to place 5; expected one"
    ):
        home.with_overrides({"pin@1.place": 5})


def test_a_message_names_the_place():
    with pytest.raises(ValueError, match=r"^rules\[1\]: rule is 'x'"):
        rule_from_config("rules[1]", {"rule": "x"})


# --- the document

DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def test_the_example_of_the_document_is_right():
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert set(parse_policies(example).by_name) == {"shop", "home", "basket"}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_document_has_every_rule_with_its_settings(rule):
    (line,) = re.findall(rf"^\| `{rule.rule}` \|.*$", DOCUMENT, re.MULTILINE)
    settings = line.split("|")[3]
    for one in settings_of(rule):
        assert f"`{one.name}`" in settings or ("SELECTION" in settings and one.name in SELECTABLE)
