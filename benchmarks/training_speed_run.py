"""How long a run took to get how far: `python -m benchmarks.training_speed run runs/beauty-... --ndcg 0.07`.

Reads the times that the loggers of `trirank train` left in a run's directory: seconds an epoch of each fit,
validation included, and with --ndcg when the ranker's NDCG@10 on validation first was as high, counted from
the start of the command: content, stage one and the fits of its folds included. Exits with 1 where it never
was. A run that was cut short and resumed has no such time: the pause would count.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.arguments import ArgumentParser
from training.stages import MONITOR


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One fit of a run.

    Attributes:
        name: such as "ranking" or "refit/retrieval".
        start: when it began, seconds since 1970.
        epoch_ends: when each epoch ended, likewise.
        metric: on validation after each epoch; empty for a refit, which has none.
    """

    name: str
    start: float
    epoch_ends: list[float]
    metric: list[float]

    @property
    def epoch_s(self) -> float:
        """Median seconds of an epoch."""
        begins = [self.start, *self.epoch_ends]
        return statistics.median(end - begin for begin, end in zip(begins, self.epoch_ends, strict=False))

    def reached(self, metric: float) -> int | None:
        """Return after how many epochs the metric first was this high; None: never."""
        return next((number for number, value in enumerate(self.metric, 1) if value >= metric), None)


def read_fits(run: Path) -> list[Fit]:
    """Return the fits of a run in the order in which they began.

    Raises:
        ValueError: it is no run of `trirank train`, has none that ended an epoch, or was resumed.
    """
    # Imported here: it takes a second, and the other forms of the benchmark need none of it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (run / "run.json").is_file():
        raise ValueError(f"{run} is no run of `trirank train`: it has no run.json")
    fits = []
    for folder in run.glob("**/tensorboard"):
        name = folder.parent.relative_to(run).as_posix()
        versions = sorted(folder.iterdir())
        if not versions:
            continue
        if len(versions) > 1:
            raise ValueError(f"{run}: the fit {name} was resumed; expected a run in one piece")
        events = EventAccumulator(str(versions[0]))
        events.Reload()
        known = events.Tags()["scalars"]
        if "train_loss" not in known:
            continue  # no epoch has ended
        monitor = MONITOR[folder.parent.name]
        fits.append(
            Fit(
                name=name,
                start=events.FirstEventTimestamp(),
                epoch_ends=[event.wall_time for event in events.Scalars("train_loss")],
                metric=[event.value for event in events.Scalars(monitor)] if monitor in known else [],
            )
        )
    if not fits:
        raise ValueError(f"{run} has no fit that ended an epoch; expected a run with its loggers' files")
    written = (run / "run.json").stat().st_mtime  # by a resumed run anew
    if started(run) + 60 < written < max(fit.epoch_ends[-1] for fit in fits):
        raise ValueError(f"{run} was resumed; expected a run in one piece")
    return sorted(fits, key=lambda fit: fit.start)


def started(run: Path) -> float:
    """Return when a run began, by its name: seconds since 1970."""
    return datetime.strptime(run.name[-len("20261128-140858-000000") :], "%Y%m%d-%H%M%S-%f").timestamp()


def summary(run: Path, ndcg: float | None) -> dict[str, Any]:
    """Return the times of a run's fits, and when the ranker reached an NDCG@10 on validation."""
    run = run.resolve()
    fits = read_fits(run)
    found: dict[str, Any] = {
        "run": run.name,
        "fits": [asdict(fit) | {"epoch_s": fit.epoch_s} for fit in fits],
        "total_s": max(fit.epoch_ends[-1] for fit in fits) - started(run),
    }
    if ndcg is not None:
        ranking = next((fit for fit in fits if fit.name == "ranking"), None)
        epochs = ranking.reached(ndcg) if ranking else None
        found |= {"ndcg": ndcg, "reached_epochs": epochs, "reached_s": None}
        if ranking and epochs:
            found["reached_s"] = ranking.epoch_ends[epochs - 1] - started(run)
    return found


def print_table(found: dict[str, Any], console: Console) -> None:
    """Print a row for each fit."""
    table = Table(title=f"{found['run']}: {found['total_s']:.0f} s from its start to its last epoch")
    for heading in ("fit", "epochs", "s/epoch", "all, s", "best on validation", "after epochs"):
        table.add_column(heading, justify="left" if heading == "fit" else "right")
    for fit in found["fits"]:
        metric = fit["metric"]
        table.add_row(
            fit["name"],
            str(len(fit["epoch_ends"])),
            f"{fit['epoch_s']:.2f}",
            f"{fit['epoch_ends'][-1] - fit['start']:.0f}",
            f"{max(metric):.4f}" if metric else "-",
            str(metric.index(max(metric)) + 1) if metric else "-",
        )
    console.print(table)
    if "ndcg" in found:
        when = "never"
        if found["reached_epochs"]:
            when = f"after {found['reached_s']:.0f} s, {found['reached_epochs']} epochs of the ranker"
        console.print(f"NDCG@10 {found['ndcg']:g} on validation: {when}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, or JSON with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.training_speed run", description=__doc__)
    parser.add_argument("run", type=Path, help="A run's directory, of `trirank train --runs`.")
    parser.add_argument("--ndcg", type=float | None, default=None, help="When was the ranker's as high?")
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        found = summary(options.run, options.ndcg)
    except (ValueError, OSError) as error:
        print(f"benchmarks.training_speed: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found, Console(width=None if sys.stdout.isatty() else 140))
    return int(options.ndcg is not None and not found["reached_epochs"])
