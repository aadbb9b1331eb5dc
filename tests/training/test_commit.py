"""The commit that a bundle names is the source's own, and nobody else's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training import commit

GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]


@pytest.fixture
def repository(tmp_path):
    """A repository with the module in it, not yet committed."""
    (tmp_path / "training").mkdir()
    shutil.copy(commit.__file__, tmp_path / "training" / "commit.py")
    (tmp_path / "README").write_text("a shop\n")
    subprocess.run([*GIT, "init", "-q"], cwd=tmp_path, check=True)
    _commit(tmp_path, "README")
    return tmp_path


def _commit(folder: Path, *files: str) -> str:
    subprocess.run([*GIT, "add", *files], cwd=folder, check=True)
    subprocess.run([*GIT, "commit", "-qm", "x"], cwd=folder, check=True)
    told = subprocess.run(
        [*GIT, "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, check=True
    )
    return told.stdout.decode().strip()


def _told(folder: Path, **environment: str) -> str:
    code = "import runpy; print(runpy.run_path('training/commit.py')['source_commit']())"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, check=True, env=environment or None
    )
    return ran.stdout.decode().strip()


def test_a_checkout_tells_its_commit_and_whether_files_differ(repository):
    head = _commit(repository, "training/commit.py")
    assert _told(repository) == head
    (repository / "README").write_text("another\n")
    assert _told(repository) == head + "+"


def test_an_installation_inside_of_a_repository_has_none(repository):
    assert _told(repository) == "None"  # committed is the README alone


def test_without_git_there_is_none(repository):
    _commit(repository, "training/commit.py")
    assert _told(repository, PATH="") == "None"
