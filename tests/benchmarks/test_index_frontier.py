import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import index_frontier
from retrieval.item_index import KINDS


def test_every_kind_has_a_row_for_each_k_and_number_of_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frontier.json"
    small = ["--sizes", "[600]", "--ks", "[10,20,400]", "--threads", "[1,2]", "--queries", "12"]
    assert index_frontier.main([*small, "--build_threads", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    # A k above half of the catalog is left out.
    wanted = {(kind, k, threads) for kind in KINDS for k in (10, 20) for threads in (1, 2)}
    assert {(row["kind"], row["k"], row["threads"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["speedup"] == pytest.approx(row["flat_p50_ms"] / row["p50_ms"])
        assert row["recall"] == 1 if row["kind"] in ("exact", "flat") else row["recall"] > 0.9
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in KINDS)


def test_made_vectors_cluster_and_queries_lie_near_items() -> None:
    items, queries = index_frontier.made_vectors(5_000, 50, np.random.default_rng(0))
    assert items.shape == (5_001, 64)
    assert not items[0].any()
    lengths = np.linalg.norm(items[1:], axis=1)
    assert 1 <= lengths.min() < np.median(lengths) < lengths.max() / 2
    unit = items[1:] / lengths[:, np.newaxis]
    best = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    assert np.median(best.max(axis=1)) > 0.7  # independent directions of 64 numbers: about 0.4
    spectrum = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False) ** 2
    assert spectrum[:16].sum() > 0.6 * spectrum.sum()  # a quarter, were all dimensions alike
