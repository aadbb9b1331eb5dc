"""The README tells the truth: its commands exist with their options, its files and folders are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from engine.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
BLOCKS = "\n".join(text for language, text in FENCED if language in ("", "bash", "sh")).replace("\\\n", " ")
COMMAND_LINES = [line.strip("$ ") for line in BLOCKS.split("\n") if line.strip("$ ").startswith("trirank ")]


def test_the_five_commands_are_there() -> None:
    names = [shlex.split(line)[1] for line in COMMAND_LINES]
    assert {"import", "train", "evaluate", "serve", "recommend"} <= set(names)
    # None is left out, wherever in a block it stands.
    assert len(COMMAND_LINES) == len(re.findall(r"^(?:    |\$ )?trirank ", README, re.MULTILINE))


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_take_the_options_that_the_readme_gives_them(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line, comments=True)
    module, function = COMMANDS[words[1]][0].split(":")
    command = getattr(importlib.import_module(module), function)
    asked = [*words[2:3], "--help"] if words[1] == "import" else ["--help"]
    with pytest.raises(SystemExit) as stop:
        command(asked)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for word in words[2:]:
        if word.startswith("--"):
            assert re.search(rf"{word.split('=')[0]}\b", shown)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make (\w+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_top_level_folder_has_its_line() -> None:
    for folder in (
        "engine",
        "protos",
        "retrieval",
        "ranking",
        "reranking",
        "training",
        "benchmarks",
        "tests",
    ):
        assert re.search(rf"^{folder}/ +\S", README, re.MULTILINE), folder


def test_the_python_example_compiles_and_imports_what_exists() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(code, "README.md", "exec")
    names = re.findall(r"from (\S+) import (.+)", code)
    for module, imported in names:
        for name in imported.split(", "):
            assert hasattr(importlib.import_module(module), name)


def test_no_document_has_a_gap() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]:
        assert "@@" not in path.read_text(encoding="utf-8"), path
