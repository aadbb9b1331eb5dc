"""What our models find, beside what others published: `python -m benchmarks.quality TABLE [options]`.

One line per table; each is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import sys

from engine.arguments import nearest

TABLES = {
    "retrieval": (
        "benchmarks.quality_retrieval:main",
        "graph encoders and item-item models, all items ranked",
    ),
    "ranking": (
        "benchmarks.quality_ranking:main",
        "bundles, fusion rows, session baselines and peers, all items ranked",
    ),
    "fusion": (
        "benchmarks.quality_fusion:main",
        "the ranker with, without and with shuffled graph vectors, over seeds",
    ),
    "reranking": (
        "benchmarks.quality_reranking:main",
        "NDCG against variety and against margin, by rule: the curve, and a picture of it",
    ),
}


def usage() -> str:
    """Return the text of --help."""
    lines = [f"  {name:<12}{text}" for name, (_, text) in TABLES.items()]
    return "\n".join(["usage: python -m benchmarks.quality TABLE [options]", "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Print a table; return the exit code: 0 done, 2 wrong input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in TABLES:
        hint = nearest([argv[0]], TABLES)
        print(f"benchmarks.quality: {argv[0]!r} is not a table{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    module, function = TABLES[argv[0]][0].split(":")
    code: int = getattr(importlib.import_module(module), function)(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
