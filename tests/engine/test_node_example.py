"""The storefront example in Node.js against a real server: it has the .proto and nothing else of ours."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.auth import ApiKeys, create_key
from engine.bundle import Bundle
from engine.client import RecommenderClient, visitor
from engine.pipeline import RecommendationPipeline
from engine.tls import server_tls

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


def asked(
    storefront: Run,
    served: Any,
    bundle_path: Path,
    environments: list[dict[str, str]],
    **options: Any,
) -> list["subprocess.CompletedProcess[str]"]:
    """Run the storefront in each environment against one server with these options."""

    async def scene() -> list["subprocess.CompletedProcess[str]"]:
        pipeline = RecommendationPipeline(Bundle.load(bundle_path))
        async with served(pipeline, **options) as shop:
            return [
                await asyncio.to_thread(lambda given=given: storefront(shop.address, "loyal", **given))
                for given in environments
            ]

    return asyncio.run(scene())


def assert_answered(found: "subprocess.CompletedProcess[str]") -> None:
    assert found.returncode == 0, found.stderr
    assert len(json.loads(found.stdout)) == 10
    assert "fallback" not in found.stderr  # Node itself warns of a server that is asked for by its address


def assert_fallback(found: "subprocess.CompletedProcess[str]") -> None:
    """No connection: what is not trusted looks to the page like a server that is away."""
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == ["bestseller-1", "bestseller-2"]
    assert "UNAVAILABLE" in found.stderr or "DEADLINE_EXCEEDED" in found.stderr


def test_tls(storefront: Run, certificates: Any, served: Any, bundle_path: Path) -> None:
    tls = server_tls(certificates.cert, certificates.key, None)
    assert tls
    environments = [
        {"TRIRANK_CA": str(certificates.ca)},
        {"TRIRANK_CA": str(certificates.other_ca)},
        {},  # in the clear
    ]
    trusted, other, clear = asked(
        storefront, served, bundle_path, environments, credentials=tls.credentials()
    )
    assert_answered(trusted)
    assert_fallback(other)
    assert_fallback(clear)


def test_mtls(storefront: Run, certificates: Any, served: Any, bundle_path: Path) -> None:
    tls = server_tls(certificates.cert, certificates.key, certificates.ca)
    assert tls
    authority = {"TRIRANK_CA": str(certificates.ca)}
    own = {"TRIRANK_CERT": str(certificates.client_cert), "TRIRANK_KEY": str(certificates.client_key)}
    environments = [authority | own, authority]
    shown, unknown = asked(storefront, served, bundle_path, environments, credentials=tls.credentials())
    assert_answered(shown)
    assert_fallback(unknown)


def test_an_api_key(
    storefront: Run, certificates: Any, served: Any, bundle_path: Path, tmp_path: Path
) -> None:
    """As it should be used: under TLS."""
    tls = server_tls(certificates.cert, certificates.key, None)
    assert tls
    key = create_key(tmp_path / "keys.json", "storefront", role="reader")
    stranger = create_key(tmp_path / "others.json", "storefront")
    authority = {"TRIRANK_CA": str(certificates.ca)}
    environments = [
        authority | {"TRIRANK_API_KEY": key},
        authority | {"TRIRANK_API_KEY": stranger},
        authority,
    ]
    keys = ApiKeys.load(tmp_path / "keys.json")
    known, unknown, none = asked(
        storefront, served, bundle_path, environments, credentials=tls.credentials(), keys=keys
    )
    assert_answered(known)
    code = grpc.StatusCode.UNAUTHENTICATED.value[0]
    for found, message in ((unknown, "the API key is not one of this server's"), (none, "no API key")):
        assert found.returncode == 2
        assert found.stderr.splitlines()[-1].startswith(f"{code}: {message}")
        assert not found.stdout  # a mistake of the shop's, which a fallback would hide


def test_wrong_files_are_told(storefront: Run, certificates: Any) -> None:
    for environment, message in (
        ({"TRIRANK_CA": "no.pem"}, "ENOENT: "),
        ({"TRIRANK_CERT": str(certificates.client_cert)}, "Error: "),
        ({"TRIRANK_KEY": str(certificates.client_key)}, "Error: "),
    ):
        found = storefront("127.0.0.1:1", "u1", **environment)
        assert found.returncode == 2, found.stderr
        assert found.stderr.startswith(message)
        assert len(found.stderr.splitlines()) == 1
        assert not found.stdout


def test_it_is_said_how_to_install_it() -> None:
    """The command that the fixture above uses, where a reader begins."""
    text = (ROOT / EXAMPLE / "storefront.js").read_text(encoding="utf-8")
    assert re.search(r"^//   npm ci\b", text, re.MULTILINE)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (paragraph,) = [part for part in readme.split("\n\n") if f"]({EXAMPLE})" in part]
    assert "npm ci" in paragraph
