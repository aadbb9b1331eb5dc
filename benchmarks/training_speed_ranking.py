"""How long an epoch of SASRec takes: `python -m benchmarks.training_speed ranking --data data/beauty`.

The same model and settings, the same training histories, each contender in a process of its own:

trirank          our ranker without a graph: batches of like length, negatives that a batch shares
trirank-fusion   the same with cross-attention to graph vectors (drawn at random: the work is the same)
rectools         rectools.models.SASRecModel, where a Python has it (benchmarks/peers/rectools_sasrec.py)

An epoch is the whole of it, batches and optimizer included, without validation; of several epochs the fastest
counts, since what else a machine does only ever adds. Only a machine that does nothing else gives figures to
quote: the load average is printed beside them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.bare_trainer import bare_trainer
from benchmarks.peers import rectools_sasrec
from benchmarks.training_speed import measured_apart, peak_memory
from engine.arguments import ArgumentParser
from ranking.encoders.sasrec import SASRec
from training.data.modules import RankingData
from training.data.splits import Split, SplitOptions, final_split, load_split
from training.ranking_module import RankingModule
from training.stages import keep_freed_memory, quiet_lightning

REFERENCE = "rectools"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every contender has to do.

    Attributes:
        epochs: to measure.
        batch_size: histories of a step.
        dim: D.
        num_blocks: attention blocks.
        num_heads: of each.
        dropout: in the model.
        num_negatives: of the sampled softmax; ours shares them in a batch, RecTools draws them per position.
        history_length: newest events that the model sees.
        threads: of torch.
        precision: of lightning.Trainer, the same for all.
    """

    epochs: int = 2
    batch_size: int = 128
    dim: int = 64
    num_blocks: int = 1
    num_heads: int = 1
    dropout: float = 0.2
    num_negatives: int = 256
    history_length: int = 50
    threads: int = os.cpu_count() or 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "dim", "num_negatives", "history_length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


class _EpochClock(Callback):
    def __init__(self) -> None:
        self.epoch_s: list[float] = []
        self.begin = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch_s.append(time.perf_counter() - self.begin)


def _trirank(fusion: bool, directory: Path, split: Split, work: Work) -> list[float]:
    # As many places a step as full batches of the longest histories have: the others get no smaller ones.
    places = work.batch_size * (work.history_length + 1)
    data = RankingData(
        directory,
        batch_size=work.batch_size,
        max_tokens=places,
        history_length=work.history_length,
    )
    data.split = split
    with tempfile.TemporaryDirectory() as folder:
        embeddings = None
        if fusion:
            embeddings = Path(folder, "embeddings.safetensors")
            size = split.train.num_items + 1
            degrees = torch.from_numpy(split.train.item_counts()).float()
            save_file({"item_vectors": torch.randn(size, work.dim), "item_degrees": degrees}, embeddings)
        encoder = partial(
            SASRec,
            dim=work.dim,
            num_blocks=work.num_blocks,
            num_heads=work.num_heads,
        )
        module = RankingModule(
            encoder, embeddings, loss="sampled", num_negatives=work.num_negatives, dropout=work.dropout
        )
        clock = _EpochClock()
        trainer = bare_trainer(
            max_epochs=work.epochs, accelerator="cpu", precision=work.precision, callbacks=[clock]
        )
        trainer.fit(module, datamodule=data)
    return clock.epoch_s


CONTENDERS: dict[str, Callable[[Path, Split, Work], list[float]] | None] = {
    "trirank": partial(_trirank, False),
    "trirank-fusion": partial(_trirank, True),
    "rectools": None,  # in a Python of its own
}


def training_split(directory: Path) -> Split:
    """Return what every contender trains on: all but each user's last item.

    Raises:
        ValueError: the data has no order.
    """
    split = final_split(load_split(directory, SplitOptions()))
    if not split.ordered:
        raise ValueError(f"split {split.name} leaves the events without an order to learn from")
    return split


def measure(name: str, directory: Path, work: Work) -> dict[str, Any]:
    """Return the epochs' seconds and the peak memory of one of ours, measured in this process."""
    torch.set_num_threads(work.threads)
    quiet_lightning()
    keep_freed_memory()
    L.seed_everything(0, verbose=False)
    train = CONTENDERS[name]
    assert train is not None
    epoch_s = train(directory, training_split(directory), work)
    return {"epoch_s": epoch_s, "peak_memory_bytes": peak_memory()}


def measure_rectools(python: Path, split: Split, work: Work) -> dict[str, Any]:
    """Return the same of RecTools."""
    same = {field.name: getattr(work, field.name) for field in fields(work)}
    train = split.train
    result = rectools_sasrec.run(
        python, rectools_sasrec.Settings(**same), (train.users, train.items), histories=None
    )
    return {
        "epoch_s": result.epoch_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "versions": result.versions,
    }


def compare(names: list[str], directory: Path, work: Work, python: Path) -> dict[str, Any]:
    """Measure the contenders one after the other; one that is not installed is left out, and says so."""
    console = Console(stderr=True)
    split = training_split(directory)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        console.print(f"{name}: {work.epochs} epochs")
        if name == "rectools":
            try:
                rectools_sasrec.check_python(python)
            except ValueError as missing:
                console.print(f"rectools: left out. {missing}", markup=False)
                continue
            found[name] = measure_rectools(python, split, work)
            continue
        found[name] = measured_apart(name, ["ranking", "--data", str(directory)], asdict(work))
    for result in found.values():
        result["fastest_epoch_s"] = min(result["epoch_s"])
    if REFERENCE in found:
        for result in found.values():
            result["times_faster"] = found[REFERENCE]["fastest_epoch_s"] / result["fastest_epoch_s"]
    return {
        "data": directory.name,
        "num_events": len(split.train),
        "work": asdict(work),
        "load_average": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {work.threads} threads",
        "torch": torch.__version__,
        "contenders": found,
    }


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the contenders side by side."""
    work = results["work"]
    table = Table(
        title=f"SASRec on {results['data']}: {results['num_events']:,} events an epoch, batches of "
        f"{work['batch_size']}, D={work['dim']}, {work['num_blocks']} block(s), {work['num_negatives']} "
        f"negatives, history {work['history_length']}, {work['precision']}",
        caption=f"{results['machine']}, load {results['load_average']:.1f}; torch {results['torch']}; "
        "the fastest epoch of each",
    )
    for heading in ("", "s/epoch", "all epochs", "times rectools", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in results["contenders"].items():
        table.add_row(
            name,
            f"{row['fastest_epoch_s']:.2f}",
            " ".join(f"{epoch_s:.2f}" for epoch_s in row["epoch_s"]),
            f"{row['times_faster']:.1f}" if "times_faster" in row else "-",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, or JSON with --json."""
    parser = ArgumentParser(prog="python -m benchmarks.training_speed ranking", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="A data set directory.")
    parser.add_argument(
        "--contenders", type=str, nargs="+", default=list(CONTENDERS), help="Those to compare."
    )
    parser.add_class_arguments(Work)
    parser.add_argument(
        "--rectools_python",
        type=Path,
        default=rectools_sasrec.DEFAULT_PYTHON,
        help="The Python that has RecTools; without it that contender is left out.",
    )
    parser.add_argument(
        "--contender", type=str, default=None, help="Measure this one of ours alone, in this process."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        work = Work(**{field.name: getattr(options, field.name) for field in fields(Work)})
        for name in options.contenders if options.contender is None else [options.contender]:
            if name not in CONTENDERS:
                raise ValueError(f"contender is {name!r}; expected one of {', '.join(CONTENDERS)}")
        if options.contender is not None:
            print(json.dumps(measure(options.contender, options.data, work)))
            return 0
        results = compare(options.contenders, options.data, work, options.rectools_python)
    except (ValueError, OSError) as error:
        print(f"benchmarks.training_speed: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results, Console(width=None if sys.stdout.isatty() else 140))
    return 0
