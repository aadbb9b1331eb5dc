from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine import commands
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
    for command in (commands.inspect, commands.serve):
        assert command([str(damaged)]) == 2
        assert "users.parquet is damaged" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("option", ["num_workers", "num_threads"])
def test_serve_numbers(bundle_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.serve([str(bundle_path), f"--{option}", "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} is 0; expected at least 1\n"
