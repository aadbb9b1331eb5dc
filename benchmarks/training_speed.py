"""How long an epoch of LightGCN takes: `python -m benchmarks.training_speed --data ../shared/data/gowalla`.

Of the ranker: `python -m benchmarks.training_speed ranking --data data/beauty` (training_speed_ranking.py).
Of a run of `trirank train`: `python -m benchmarks.training_speed run runs/...` (training_speed_run.py).

Each contender trains in a process of its own, so that peak memories are apart, on the same graph with the
same batches: as many (user, item) pairs a step and an epoch, the same D and layers, Adam over the embeddings,
a regulariser on the nodes of the batch. They differ in what they draw against the B pairs of a batch:

trirank       our recipe: sampled softmax over negatives that the batch shares
trirank-bpr   our module with PyG's work: BPR, one negative a pair
pyg           torch_geometric.nn.LightGCN and its recommendation_loss, in the loop of PyG's own example: BPR,
              one negative a pair, an edge_index that every layer normalises anew
pyg-csr       the same with the adjacency normalised once, as a CSR tensor: the best we could make of it
implicit-bpr  BPR without any graph, one negative a pair, where `implicit` is installed: a floor, for it does
              not do the same work

A step is everything between the end of one step and the end of the next: batch, negatives, propagation, loss,
gradient, optimizer, trainer. An epoch is the median step times the steps of an epoch. Only a machine that
does nothing else gives figures to quote: the load average is printed beside them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch_geometric.nn
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.bare_trainer import bare_trainer
from engine.arguments import ArgumentParser
from retrieval.encoders.lightgcn import LightGCN
from retrieval.graph_matrix import USER_ITEM, normalized_adjacency
from training.data.formats import lightgcn
from training.data.importing import import_source
from training.data.modules import RetrievalData
from training.data.splits import SplitOptions, final_split, load_split
from training.losses import bpr_loss, embedding_l2
from training.retrieval_losses import SampledSoftmax
from training.retrieval_module import RetrievalModule
from training.stages import default_precision, keep_freed_memory, quiet_lightning

WARM_UP = 3
REFERENCE = "pyg"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every contender has to do.

    Attributes:
        batch_size: (user, item) pairs of a step.
        dim: D of the vectors.
        num_layers: of propagation.
        num_negatives: of our sampled softmax; the others draw one a pair.
        steps: to measure, after a warm-up.
        threads: of torch (and of implicit).
        precision: of ours (lightning.Trainer's), by default that of `trirank train` on this machine; PyG's
            loop has float32 alone.
    """

    batch_size: int = 8192
    dim: int = 64
    num_layers: int = 3
    num_negatives: int = 2048
    steps: int = 20
    threads: int = os.cpu_count() or 1
    precision: str = field(default_factory=default_precision)

    def __post_init__(self) -> None:
        for name in ("batch_size", "dim", "num_negatives", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")


def load_graph_data(directory: Path, work: Work) -> RetrievalData:
    """Return the data module of stage one on all training events, set up."""
    options = SplitOptions()
    data = RetrievalData(directory, options, batch_size=work.batch_size)
    data.split = final_split(load_split(directory, options))
    data.setup("fit")
    return data


class _StepClock(Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class _OneNegative(RetrievalModule):
    """Our module with the work of PyG's loop."""

    def training_step(self, edges: Tensor, batch_index: int) -> Tensor:
        users, items = edges.T
        vectors, initial = self.encoder(self.data.graph), self.encoder.initial_vectors()  # type: ignore[operator]
        negatives = torch.randint(1, len(vectors["item"]), (len(items),), device=edges.device)
        both = torch.cat([items, negatives])
        wants = vectors["user"].index_select(0, users)
        positive, negative = vectors["item"].index_select(0, both).chunk(2)
        loss = bpr_loss((wants * positive).sum(1), (wants * negative).sum(1))
        return loss + self.l2 * embedding_l2(
            initial["user"].index_select(0, users), initial["item"].index_select(0, both)
        )


def _trirank(kind: type[RetrievalModule], data: RetrievalData, work: Work) -> list[float]:
    module = kind(
        partial(LightGCN, dim=work.dim, num_layers=work.num_layers), SampledSoftmax(work.num_negatives)
    )
    clock = _StepClock()
    trainer = bare_trainer(
        max_steps=WARM_UP + work.steps,
        max_epochs=-1,
        accelerator="cpu",
        precision=work.precision,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=data)
    return _step_times(clock.ends)


def _step_times(ends: list[float]) -> list[float]:
    return [float(time_s) for time_s in np.diff(ends)[WARM_UP - 1 :]]


def _pyg(csr: bool, data: RetrievalData, work: Work) -> list[float]:
    """Run the loop of PyG's examples/lightgcn.py."""
    num_users, num_items = int(data.graph["user"].num_nodes), int(data.graph["item"].num_nodes)
    user, item = data.graph[USER_ITEM].edge_index
    pairs = torch.stack([user, item + num_users])
    edges: Tensor = torch.cat([pairs, pairs.flip(0)], dim=1)
    options = {}
    if csr:
        edges = normalized_adjacency(data.graph[USER_ITEM].edge_index, num_users, num_items)
        options["normalize"] = False
    model = torch_geometric.nn.LightGCN(num_users + num_items, work.dim, work.num_layers, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader: DataLoader[int] = DataLoader(
        range(pairs.shape[1]),  # type: ignore[arg-type]
        shuffle=True,
        batch_size=work.batch_size,
    )
    ends: list[float] = []
    while True:
        for index in loader:
            positive = pairs[:, index]
            drawn = torch.randint(num_users, num_users + num_items, (index.numel(),))
            asked = torch.cat([positive, torch.stack([positive[0], drawn])], dim=1)
            optimizer.zero_grad()
            positive_rank, negative_rank = model(edges, asked).chunk(2)
            loss = model.recommendation_loss(positive_rank, negative_rank, node_id=torch.unique(asked))
            loss.backward()
            optimizer.step()
            loss.item()  # the example adds it up
            ends.append(time.perf_counter())
            if len(ends) == WARM_UP + work.steps:
                return _step_times(ends)


def _implicit(data: RetrievalData, work: Work) -> list[float]:
    """Run whole epochs of implicit's BPR, and spread their times over the steps that an epoch stands for."""
    from implicit.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    user, item = data.graph[USER_ITEM].edge_index.numpy()
    matrix = csr_matrix((np.ones(len(user), np.float32), (user, item)))
    times = []
    for _ in range(4):
        model = BayesianPersonalizedRanking(factors=work.dim, iterations=1, num_threads=work.threads)
        begin = time.perf_counter()
        model.fit(matrix, show_progress=False)
        times.append((time.perf_counter() - begin) / steps_of_an_epoch(data, work))
    return times[1:]  # the first one warms up


CONTENDERS: dict[str, Callable[[RetrievalData, Work], list[float]]] = {
    "trirank": partial(_trirank, RetrievalModule),
    "trirank-bpr": partial(_trirank, _OneNegative),
    "pyg": partial(_pyg, False),
    "pyg-csr": partial(_pyg, True),
    "implicit-bpr": _implicit,
}


def steps_of_an_epoch(data: RetrievalData, work: Work) -> int:
    """Return how many batches hold every training edge once."""
    num_edges: int = data.graph[USER_ITEM].edge_index.shape[1]
    return math.ceil(num_edges / work.batch_size)


def measure(name: str, directory: Path, work: Work, profile: bool = False) -> dict[str, Any]:
    """Return one contender's step times in s and peak memory in bytes, measured in this process.

    Args:
        name: of CONTENDERS.
        directory: a data set directory.
        work: what to do.
        profile: whether to list the operators that took the most time; costs some of it.
    """
    torch.set_num_threads(work.threads)
    quiet_lightning()
    keep_freed_memory()  # ours trains with it, and it spares PyG's loop even more page faults
    L.seed_everything(0, verbose=False)
    data = load_graph_data(directory, work)
    before = peak_memory()
    operators: list[tuple[str, float]] = []
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            times = CONTENDERS[name](data, work)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
        num_steps = WARM_UP + work.steps
        operators = [(row.key, row.self_cpu_time_total / 1e6 / num_steps) for row in rows[:12]]
    else:
        times = CONTENDERS[name](data, work)
    return {
        "contender": name,
        "num_edges": data.graph[USER_ITEM].edge_index.shape[1],
        "steps_of_an_epoch": steps_of_an_epoch(data, work),
        "step_s": times,
        "peak_memory_bytes": peak_memory(),
        "memory_before_training_bytes": before,
        "operators_s_per_step": operators,
    }


def measured_apart(name: str, arguments: list[str], work: dict[str, Any]) -> dict[str, Any]:
    """Return what `python -m benchmarks.training_speed` measures of one contender in a process of its own.

    Args:
        name: of the contender.
        arguments: of the command, before --contender and the work.
        work: Work of the benchmark, as its options.

    Raises:
        ValueError: the process failed; it has said why.
    """
    options = [f"--{key}={value}" for key, value in work.items()]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_speed", *arguments, "--contender", name, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(work["threads"])},
    )
    if child.returncode:
        raise ValueError(f"{name} ended with exit status {child.returncode}")
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return measured


def peak_memory() -> int:
    """Return the most memory that this process ever held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would carry over the peak of the process that started this one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource

    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def compare(names: list[str], directory: Path, work: Work, rounds: int, profile: bool) -> dict[str, Any]:
    """Measure the contenders one after the other, `rounds` times over, each time in a fresh process."""
    console = Console(stderr=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for name in names:
            if name == "implicit-bpr" and importlib.util.find_spec("implicit") is None:
                if number == 0:
                    console.print("implicit-bpr: left out, implicit is not installed")
                continue
            console.print(f"{name}: round {number + 1} of {rounds}, {work.steps} steps")
            arguments = ["--data", str(directory), f"--profile={profile}"]
            runs.setdefault(name, []).append(measured_apart(name, arguments, asdict(work)))
    results = {name: _summary(found) for name, found in runs.items()}
    if REFERENCE in results:
        for result in results.values():
            result["times_faster"] = results[REFERENCE]["epoch_s"] / result["epoch_s"]
    first = next(iter(runs.values()), [{"num_edges": 0}])[0]
    return {
        "data": directory.name,
        "num_edges": first["num_edges"],
        "work": asdict(work),
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {work.threads} threads",
        "versions": _versions(),
        "contenders": results,
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    times = np.concatenate([run["step_s"] for run in runs])
    step = float(np.median(times))
    return {
        "step_s": step,
        "step_p10_s": float(np.percentile(times, 10)),
        "step_p90_s": float(np.percentile(times, 90)),
        "measured_steps": len(times),
        "steps_of_an_epoch": runs[0]["steps_of_an_epoch"],
        "epoch_s": step * runs[0]["steps_of_an_epoch"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "memory_before_training_bytes": max(run["memory_before_training_bytes"] for run in runs),
        "operators_s_per_step": runs[0]["operators_s_per_step"],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "torch-geometric", "lightning", "implicit"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def dataset_directory(path: Path) -> Iterator[Path]:
    """Yield a data set directory: `path` itself, or LightGCN's folder imported for the time being."""
    if (path / "dataset.json").is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, path.resolve().name)
        import_source(lightgcn.read(str(path)), out, format_name="lightgcn")
        yield out


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the contenders side by side, and where their time went if that was asked."""
    work = results["work"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    table = Table(
        title=f"LightGCN on {results['data']}: {results['num_edges']:,} pairs an epoch, "
        f"{work['batch_size']:,} a step, D={work['dim']}, {work['num_layers']} layers; "
        f"ours in {work['precision']}",
        caption=f"{results['machine']}, load {results['load_average']:.1f}; {versions}; "
        "an epoch is the median step times its steps",
    )
    for heading in ("", "s/step", "p10", "p90", "measured", "steps/epoch", "s/epoch", "times pyg", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in results["contenders"].items():
        table.add_row(
            name,
            *(f"{row[key]:.4f}" for key in ("step_s", "step_p10_s", "step_p90_s")),
            f"{row['measured_steps']:,}",
            f"{row['steps_of_an_epoch']:,}",
            f"{row['epoch_s']:.2f}",
            f"{row['times_faster']:.1f}" if "times_faster" in row else "-",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
        )
    console.print(table)
    for name, row in results["contenders"].items():
        if row["operators_s_per_step"]:
            console.print(f"{name}: ms of a step by operator (profiled)")
            for operator, seconds in row["operators_s_per_step"]:
                console.print(f"  {1e3 * seconds:8.1f}  {operator}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark: a table on stdout, or JSON with --json."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["ranking"], ["run"]):
        other = importlib.import_module(f"benchmarks.training_speed_{argv[0]}")
        code: int = other.main(argv[1:])
        return code
    parser = ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data/gowalla"),
        help="LightGCN's folder (train.txt, test.txt), or a data set directory.",
    )
    parser.add_argument(
        "--contenders", type=str, nargs="+", default=list(CONTENDERS), help="Those to compare."
    )
    parser.add_class_arguments(Work)
    parser.add_argument("--rounds", type=int, default=1, help="How often to go through all contenders.")
    parser.add_argument("--profile", type=bool, default=False, help="List the operators that take the time.")
    parser.add_argument(
        "--contender", type=str, default=None, help="Measure this one alone, in this process."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, no table.")
    options = parser.parse_args(argv)
    try:
        work = Work(**{field.name: getattr(options, field.name) for field in fields(Work)})
        names = options.contenders if options.contender is None else [options.contender]
        for name in names:
            if name not in CONTENDERS:
                raise ValueError(f"contender is {name!r}; expected one of {', '.join(CONTENDERS)}")
        with dataset_directory(options.data) as directory:
            if options.contender is not None:
                print(json.dumps(measure(options.contender, directory, work, options.profile)))
                return 0
            results = compare(names, directory, work, options.rounds, options.profile)
    except (ValueError, OSError) as error:
        print(f"benchmarks.training_speed: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results, Console(width=None if sys.stdout.isatty() else 140))
    return 0


if __name__ == "__main__":
    sys.exit(main())
