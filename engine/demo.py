"""`trirank demo`: the whole story on a simulated shop, by the commands that anyone would type."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl

from engine.arguments import ArgumentParser

DESCRIPTION = """\
Simulate a small shop, train on it, publish a bundle, measure it, serve it and ask it for recommendations.

Every step is a trirank command of its own, printed before it runs.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `trirank demo`."""
    parser = ArgumentParser(prog="trirank demo", description=DESCRIPTION)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="Directory for all that the demo makes."
    )
    parser.add_argument("--num_users", type=int, default=2000, help="Shoppers to simulate.")
    parser.add_argument("--num_items", type=int, default=1000, help="Items to simulate.")
    options = parser.parse_args(argv)
    data, bundles, runs = (str(options.out / name) for name in ("data", "bundles", "runs"))
    started = time.perf_counter()
    try:
        _heading("A simulated shop: shoppers with tastes, sessions, seasons, new items")
        size = ["--num_users", str(options.num_users), "--num_items", str(options.num_items)]
        _run(["simulate", "--out", data, "--overwrite", *size])
        _heading("Train: LightGCN on the event graph, then the Transformer ranker; publish a bundle")
        _run(["train", data, "--out", bundles, "--runs", runs])
        _heading("Measure: what the served artefacts find on the test split, against popularity")
        _run(["evaluate", bundles, "--data", data])
        _heading("Serve it, and ask over gRPC as a storefront would")
        _serve_and_ask(bundles, data)
    except subprocess.CalledProcessError as error:
        print(f"trirank demo: step failed with exit code {error.returncode}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Everything is in {options.out}; ", end="")
    print(f"serve it again with: trirank serve {shlex.quote(bundles)}")
    return 0


def _serve_and_ask(bundles: str, data: str) -> None:
    command = ["serve", bundles, "--events", "memory", "--address", "127.0.0.1:0", "--json"]
    _echo(command)
    server = subprocess.Popen(_argv(command), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        if not ready:
            raise subprocess.CalledProcessError(server.wait(), command)
        ask = ["recommend", "--address", json.loads(ready)["address"], "--limit", "10"]
        _heading("A known user")
        known, clicked = _known_user_and_clicks(data)
        _run([*ask, "--user", known])
        _heading("Why these, and why in this order")
        _run(["explain", *ask[1:], "--user", known])
        _heading("A brand-new visitor with three clicks")
        _run([*ask, "--history", *clicked])
        _heading("A visitor with nothing")
        _run(ask)
        _heading("A newcomer, a moment after three clicks were recorded")
        _run(["record", *clicked, "--user", "newcomer", "--type", "click", *ask[1:3]])
        _run([*ask, "--user", "newcomer"])
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    if code != 0:
        raise subprocess.CalledProcessError(code, command)


def _known_user_and_clicks(data: str) -> tuple[str, list[str]]:
    """Return the newest shopper's id, and the last three items of another: what a new visitor might click."""
    events = pl.read_parquet(Path(data) / "events.parquet", columns=["user_id", "item_id"])
    known, other = events["user_id"].reverse().unique(maintain_order=True)[:2]
    items = events.filter(pl.col("user_id") == other)["item_id"].unique(maintain_order=True).tail(3)
    return known, items.to_list()


def _heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _echo(command: list[str]) -> None:
    print(f"$ trirank {shlex.join(command)}", flush=True)


def _argv(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "engine.cli", *command]


def _run(command: list[str]) -> None:
    _echo(command)
    subprocess.run(_argv(command), check=True)
