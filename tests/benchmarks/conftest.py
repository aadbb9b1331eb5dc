"""What several benchmarks' tests need."""

import numpy as np
import pytest

from engine.cli import main as trirank


@pytest.fixture(scope="session")
def pairs_directory(tmp_path_factory):
    """A data set of 20 users with 6 of 15 items each."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = [f"{user} {item}" for user in range(20) for item in rng.permutation(15)[:6]]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    assert trirank(["import", "pairs", str(root / "pairs.txt"), "--out", str(root / "data")]) == 0
    return root / "data"
