"""How fast `trirank import table` reads a shop's event log, and how much memory it takes.

    python -m benchmarks.import_speed --rows 20_000_000

The log is simulated: REES46's columns, popular items and busy users, missing categories and brands. The
import runs in a process of its own, through the public command; peak memory is that process's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

CHUNK_ROWS = 1_000_000
START_S = 1_569_888_000  # 2019-10-01
COLUMNS = {
    "timestamp": "event_time",
    "item_id": "product_id",
    "session_id": "user_session",
    "category": "category_code",
}


def write_log(path: Path, rows: int, users: int, items: int, seed: int = 0) -> None:
    """Write a simulated event log of `rows` rows as CSV, a chunk at a time."""
    rng = np.random.default_rng(seed)
    levels = np.array([f"level{i % 12}.kind{i % 120}.sort{i}" for i in range(1000)])
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, rows - start)
            # u^3 makes a few items and users much busier than the others.
            item = (items * rng.random(count) ** 3).astype(np.int64)
            user = (users * rng.random(count) ** 2).astype(np.int64)
            chunk = pl.DataFrame(
                {
                    "event_time": START_S + np.arange(start, start + count) // 10,
                    "event_type": rng.choice(["view", "cart", "purchase"], count, p=[0.94, 0.04, 0.02]),
                    "product_id": item + 1_000_000,
                    "category_code": levels[item % 1000],
                    "brand": item % 3000,
                    "price": (item % 100_000) / 100 + 0.5,
                    "user_id": user + 500_000_000,
                    "user_session": user * 7 + start // 5_000_000,
                }
            ).with_columns(
                pl.from_epoch("event_time").dt.strftime("%Y-%m-%d %H:%M:%S UTC"),
                category_code=pl.when(pl.col("product_id") % 3 != 0).then("category_code"),
                brand=pl.when(pl.col("product_id") % 7 != 0).then(pl.format("brand-{}", "brand")),
                user_session=pl.format("72d76fde-8bb3-4e00-8c23-{}", pl.col("user_session")),
            )
            chunk.write_csv(file, include_header=start == 0)


def measure(rows: int, users: int, items: int, folder: Path | None = None) -> dict[str, object]:
    """Write a log, import it once, and return what it took."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        log, out = Path(temporary, "log.csv"), Path(temporary, "dataset")
        write_log(log, rows, users, items)
        log_bytes = log.stat().st_size
        command = [sys.executable, "-m", "training.data.importing", "table", str(log), "--out", str(out)]
        command += [f"--columns.{ours}={theirs}" for ours, theirs in COLUMNS.items()]
        started = time.perf_counter()
        with subprocess.Popen(
            [*command, "--repeats", "--json"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            info = json.loads(process.stdout.read() or "{}")
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"the import failed with exit code {process.returncode}")
        return {
            "rows": rows,
            "users": info["num_users"],
            "items": info["num_items"],
            "log_gb": round(log_bytes / 1e9, 2),
            "seconds": round(seconds, 1),
            "rows_per_s": round(rows / seconds),
            "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),  # Linux counts in KiB
            "events_parquet_gb": round((out / "events.parquet").stat().st_size / 1e9, 2),
            "cpus": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            "polars": pl.__version__,
        }


def main() -> None:
    """Parse the command line, measure once and print the result."""
    parser = argparse.ArgumentParser(description="Speed and peak memory of `trirank import table`.")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--users", type=int, default=1_500_000)
    parser.add_argument("--items", type=int, default=150_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    result = measure(options.rows, options.users, options.items, options.folder)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
