"""The storefront example in Node.js against a real server: it has the .proto and nothing else of ours."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from engine.client import RecommenderClient, visitor

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path("docs/examples/node")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def storefront(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Install the example beside a copy of the .proto, and return what runs it."""
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the Node.js example is not tested")
    root = tmp_path_factory.mktemp("a storefront")
    shutil.copytree(ROOT / EXAMPLE, root / EXAMPLE, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(ROOT / "protos", root / "protos", ignore=shutil.ignore_patterns("__pycache__", "*.py*"))
    command = ["npm", "ci", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=root / EXAMPLE, capture_output=True, text=True, check=False)
    if installed.returncode and "network" in installed.stderr.lower():
        pytest.skip(f"no npm registry in reach: the Node.js example is not tested\n{installed.stderr}")
    assert not installed.returncode, installed.stderr

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["node", "storefront.js", *arguments],
            cwd=root / EXAMPLE,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(
    ("user", "history"),
    [("", []), ("nobody-knows", []), ("", ["item-5", "item-7"])],
    ids=["empty", "new", "history"],
)
def test_the_page_is_what_python_gets(
    storefront: Run, server_address: str, user: str, history: list[str]
) -> None:
    found = storefront(server_address, user, *history)
    assert found.returncode == 0, found.stderr
    with RecommenderClient(server_address) as client:
        expected = client.recommend(visitor(user, history), limit=10)
    assert json.loads(found.stdout) == [item.item_id for item in expected.items]
    assert expected.items


def test_a_wrong_request_is_told(storefront: Run, server_address: str) -> None:
    found = storefront(server_address, "", "")
    assert found.returncode == 2
    code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert found.stderr.startswith(f"{code}: ")
    assert "item_id" in found.stderr
    assert not found.stdout


def test_the_fallback_is_shown_without_a_server(storefront: Run) -> None:
    found = storefront("127.0.0.1:1", "u1")
    assert found.returncode == 0
    assert json.loads(found.stdout) == ["bestseller-1", "bestseller-2"]
    assert "UNAVAILABLE" in found.stderr or "DEADLINE_EXCEEDED" in found.stderr
