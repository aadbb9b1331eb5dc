"""The shape of the code: who may import whom, and what serving never loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "protos": set(),
    "retrieval": set(),
    "ranking": set(),
    "reranking": set(),
    "engine": {"protos", "retrieval", "ranking", "reranking"},
    "training": {"engine", "retrieval", "ranking"},
    "benchmarks": {"engine", "protos", "retrieval", "ranking", "reranking", "training"},
}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.append(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    assert not imported_packages(path) & forbidden


def test_every_product_module_stands_in_a_known_folder() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    folders = {Path(name).parts[0] for name in listed if name}
    assert folders <= {*MAY_IMPORT, "tests", "docs", "deploy"}


@pytest.mark.parametrize(
    "module",
    [
        "engine.cli",
        "engine.commands",
        "engine.server",
        "engine.operating",
        "engine.client",
        "engine.pipeline",
        "training.evaluate",
        "training.data.importing",
        "training.data.simulator",
    ],
)
def test_serving_and_importing_never_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_that_serving_opens_is_pickled() -> None:
    for package in ("engine", "retrieval", "ranking", "reranking"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "pickle" not in text.replace("No pickle", ""), path
            assert "torch.load" not in text, path
