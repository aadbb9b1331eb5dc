"""The `trirank` command: one line per subcommand; each is imported only when it is asked for.

So `trirank serve` never loads torch, and `trirank --help` loads nothing.
"""

from __future__ import annotations

import importlib
import os
import sys

from engine.arguments import nearest

COMMANDS = {
    "demo": ("engine.demo:main", "see it all work on a simulated shop, in a few minutes"),
    "simulate": ("training.data.simulator:main", "make a data set of a simulated shop"),
    "import": ("training.data.importing:main", "make a data set directory from files of your own"),
    "train": ("training.train:main", "train both stages on a data set and publish a bundle"),
    "evaluate": ("training.evaluate:main", "measure a bundle on the test split, stage by stage"),
    "inspect": ("engine.commands:inspect", "print what is inside a bundle, and verify it"),
    "serve": ("engine.operating:serve", "serve a bundle over gRPC"),
    "recommend": ("engine.commands:recommend", "ask a server for recommendations"),
    "similar": ("engine.commands:similar", "ask a server for items like an item"),
    "rank": ("engine.commands:rank", "ask a server to rank your own candidates"),
    "record": ("engine.commands:record", "tell a server what a user did"),
    "explain": ("engine.explain:main", "show why a slate is what it is: the funnel of one request"),
    "policy": ("engine.commands:policy", "check a file of re-ranking policies"),
    "key": ("engine.operating:key", "make and remove API keys of a server"),
    "rollback": ("engine.operating:rollback", "serve an older bundle"),
}


def usage() -> str:
    """Return the text of `trirank --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trirank COMMAND [options]",
            "",
            "A hybrid GNN-Transformer ranking engine: event log -> bundle -> recommendations over gRPC.",
            "",
            *lines,
            "",
            "`trirank COMMAND --help` explains a command.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 failed on the way, 2 wrong input, 3 server not reached,
    130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"trirank {version('trirank')}")
        return 0
    if argv[0] not in COMMANDS:
        hint = nearest([argv[0]], COMMANDS)
        print(f"trirank: {argv[0]!r} is not a command{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    if argv[0] == "serve":
        # Requests run side by side; with a pool of BLAS and OpenMP threads each they would fight for cores.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    module, function = COMMANDS[argv[0]][0].split(":")
    try:
        code: int = getattr(importlib.import_module(module), function)(argv[1:])
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
