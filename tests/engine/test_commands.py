from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from engine import commands, explain, operating
from engine.bundle import Bundle


def test_recommend(server_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--address",
        server_address,
        "--user",
        "loyal",
        "--history",
        "emoji 🎉🛒",
        "0042",
        "null",
        "?",
    ]
    assert commands.recommend([*arguments, "--limit", "4", "--context", "hour=9=x"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("embedding", "retrieval", "reranking", "total", "known user"):
        assert text in out
    assert "unknown items in the history: 1" in out
    assert "ignored context: hour" in out


def test_recommend_json(server_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--address", server_address, "--seller", "s1", "--max_price", "20", "--json"]
    assert commands.recommend([*arguments, "--exclude", "null", "emoji 🎉🛒"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["items"]) == 8  # the ten with an odd number, less two
    assert answer["trace"]["visitor_kind"] == "VISITOR_KIND_ANONYMOUS"


def test_similar_and_rank(server_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.similar(["[markup]", "--address", server_address, "--limit", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 2
    candidates = ["[markup]", "emoji 🎉🛒", "nope"]
    assert commands.rank([*candidates, "--address", server_address, "--user", "loyal"]) == 0
    out = capsys.readouterr().out
    assert "[markup]" in out
    assert "Title [b]1[/b]" in out
    assert "unknown candidates: nope" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "error: limit is 0; expected 1 to 500\n"),
        (["--context", "hour"], "error: context is 'hour'; expected key=value\n"),
        (["--min_price", "-1"], "error: filters.min_price is -1.0; expected a finite number of at least 0\n"),
    ],
)
def test_what_is_asked_is_wrong(
    server_address: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.recommend([*arguments, "--address", server_address]) == 2
    assert capsys.readouterr() == ("", message)


def test_unknown_item(server_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.similar(["nope", "--address", server_address]) == 2
    assert capsys.readouterr().err == "error: item_id is 'nope'; expected an item of the catalog\n"


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.recommend(["--address", "127.0.0.1:1"]) == 3
    assert "is `trirank serve` running at 127.0.0.1:1?" in capsys.readouterr().err


def test_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        commands.recommend(["--limits", "3"])
    assert caught.value.code == 2
    assert "did you mean limit?" in capsys.readouterr().err


def test_inspect(bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.inspect([str(bundle_path.parent)]) == 0
    out = capsys.readouterr().out
    assert bundle_path.name in out
    assert "checksum right" in out
    assert commands.inspect([str(bundle_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == Bundle.load(bundle_path).manifest

    damaged = Path(shutil.copytree(bundle_path, tmp_path / bundle_path.name))
    (damaged / "users.parquet").write_bytes(b"")
    for command, more in ((commands.inspect, []), (operating.serve, ["--events", "memory"])):
        assert command([str(damaged), *more]) == 2
        assert "users.parquet is damaged" in capsys.readouterr().err.replace("\n", "")


# Policies

GOOD = """
default: home
policies:
  home:
    rules:
      - {rule: in_stock}
      - {rule: deny, brand: [brand 1, brand 2]}
      - {rule: mmr, relevance_weight: 0.8}
      - {rule: cap, field: seller_id, max_items: 2, window: 4}
      - {rule: exposure, strength: 0.5}
      - {rule: pin, item_id: "0042", place: 2}
    overrides:
      mmr.relevance_weight: {min: 0.5, max: 1}
  plain:
    rules: []
"""


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    file = tmp_path / "policies.yaml"
    file.write_text(GOOD)
    return file


def test_policy_check(policies: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.policy(["check", str(policies)]) == 0
    out, err = capsys.readouterr()
    for text in (
        "home (default)",
        "deny:brand=brand 1,brand 2",
        "relevance_weight 0.5 to 1",
        "cap:seller_id@4",
    ):
        assert text in out
    assert "2 policies are right, checked without a catalog" in err
    assert commands.policy(["check", str(policies), "--bundle", str(bundle_path)]) == 0
    out, err = capsys.readouterr()
    assert f"checked against {bundle_path.name}" in err
    policies.write_text(GOOD.replace("in_stock", "available"))
    assert commands.policy(["check", str(policies), "--bundle", str(bundle_path)]) == 0
    assert (
        "note: policy 'home': available reads available_until, which the catalog lacks"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("in_stock", "instock", "policy 'home': rules[0]: rule is 'instock'; expected one of in_stock,"),
        ("relevance_weight: 0.8", "relevance_weigth: 0.8", "did you mean 'relevance_weight'?"),
        ("place: 2", "place: 0", "pin: place is 0; expected a whole number from 1 to 500"),
        ("brand 2]", "brand 22]", "deny: brand is 'brand 22'; expected one of the catalog's"),
    ],
)
def test_policy_check_of_wrong_ones(
    policies: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    policies.write_text(GOOD.replace(old, new))
    assert commands.policy(["check", str(policies), "--bundle", str(bundle_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err


def test_policy_check_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.policy(["check", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert commands.policy(["check", str(tmp_path)]) == 2
    assert "holds no policies" in capsys.readouterr().err


def test_explain_from_a_bundle(policies: Path, bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--user", "loyal", "--bundle", str(bundle_path), "--policies", str(policies), "--limit", "6"]
    assert explain.main(ask) == 0
    out = capsys.readouterr().out
    for text in (
        "policy home",
        "the request's own filters",
        "deny:brand=brand 1,brand 2",
        "retrieval.embedding",
        "the slate",
        "not on the slate, and there without rules",
        "pin@2",
        "exposure:seller_id",
        "now_ms 30000",
    ):
        assert text in out
    assert explain.main([*ask, "--json", "--override", "mmr.relevance_weight=0.6", "--seed", "9"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["arrangement"]["seed"] == "9"
    assert len(answer["items"]) == 6
    assert answer["items"][1]["item_id"] == "0042"
    assert answer["items"][1]["reasons"]["moves"][-1] == {"rule": "pin@2", "from_place": ANY, "to_place": 2}
    assert explain.main([*ask, "--override", "mmr.relevance_weight=0.4"]) == 2
    assert capsys.readouterr().err == (
        "error: policy 'home': override mmr.relevance_weight is 0.4; expected 0.5 to 1\n"
    )


def test_explain_asks_a_server(
    server_address: str, policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main(["--user", "loyal", "--address", server_address]) == 0
    out = capsys.readouterr().out
    assert "policy toy" in out
    assert "cap:brand" in out
    assert explain.main(["--address", server_address, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 40  # of fifty
    assert explain.main(["--address", server_address, "--policies", str(policies)]) == 2
    assert "policies is given without --bundle" in capsys.readouterr().err
    assert explain.main(["--address", "127.0.0.1:1"]) == 3
    assert explain.main(["--address", server_address, "--policy", "home"]) == 2
    assert "policy is 'home'; expected toy" in capsys.readouterr().err


def test_recommend_with_a_policy(server_address: str, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--address", server_address, "--user", "loyal", "--policy", "toy", "--now_ms", "9000"]
    assert commands.recommend([*ask, "--explain", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "moved by" in out
    assert "policy: toy" in out
    assert "mmr" in out
    assert commands.recommend([*ask, "--override", "mmr.relevance_weight=0.3"]) == 2
    assert "override 'mmr.relevance_weight'; expected none" in capsys.readouterr().err
    assert commands.recommend([*ask, "--override", "mmr.relevance_weight"]) == 2
    assert "expected rule.setting=number" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["num_workers", "num_threads"])
def test_serve_numbers(bundle_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert operating.serve([str(bundle_path), f"--{option}", "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} is 0; expected at least 1\n"


def test_head_weights_of_a_ranker_without_heads(
    server_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--address", server_address, "--user", "loyal", "--head_weights"]
    for command, candidates in ((commands.recommend, []), (commands.rank, ["0042", "null"])):
        assert command([*candidates, *ask, "next=1", "purchase=2"]) == 2
        assert "head_weights" in capsys.readouterr().err
        assert command([*candidates, *ask, "purchase"]) == 2
        assert "head_weight is 'purchase'; expected head=number" in capsys.readouterr().err


@pytest.mark.parametrize("command", [commands.record, commands.recommend, operating.serve, operating.key])
def test_help_names_what_is_allowed(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "<function" not in capsys.readouterr().out
