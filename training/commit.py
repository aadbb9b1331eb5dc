"""Which commit made a bundle or a figure."""

from __future__ import annotations

import subprocess
from pathlib import Path


def source_commit() -> str | None:
    """Return the commit of this source, with a + where files differ from it; None outside of a checkout."""
    here = Path(__file__)
    found = []
    # The first fails where the package lies in somebody else's repository.
    for command in (
        ["ls-files", "--error-unmatch", here.name],
        ["rev-parse", "--short=12", "HEAD"],
        ["status", "--porcelain", "-uno"],
    ):
        try:
            found.append(
                subprocess.run(
                    ["git", "-C", str(here.parent), *command], capture_output=True, text=True, check=True
                ).stdout.strip()
            )
        except (OSError, subprocess.CalledProcessError):
            return None
    _, commit, changed = found
    return f"{commit}+" if changed else commit
