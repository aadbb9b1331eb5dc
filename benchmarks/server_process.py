"""A server in a process of its own, for benchmarks that ask it as a storefront would."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(bundle: Path, options: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """Run `trirank serve` on a free port; yield its address and its process id."""
    command = ["serve", str(bundle), "--address", "127.0.0.1:0", "--json", "--events", "memory", *options]
    server = subprocess.Popen(
        [sys.executable, "-m", "engine.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        if not ready:
            raise ValueError(f"the server did not start: trirank {' '.join(command)}")
        yield json.loads(ready)["address"], server.pid
    finally:
        server.terminate()
        server.wait(timeout=60)
