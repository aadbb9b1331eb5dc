"""SASRec of RecTools, trained and asked in a Python of its own.

RecTools 0.19 wants numpy below 2 (below Python 3.13) and an older Lightning, so it cannot stand beside this
project. The two exchange npz files of item and user rows: `run` starts this very file with the other Python,
which then needs RecTools alone.

    python -m venv .venv-rectools
    .venv-rectools/bin/pip install "rectools[torch]"

At test time each user's whole history is asked with, as ours is, and items of the history are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INSTALL = (
    "RecTools is not there; expected a Python that has it: python -m venv .venv-rectools && "
    '.venv-rectools/bin/pip install "rectools[torch]", then --rectools_python .venv-rectools/bin/python'
)
DEFAULT_PYTHON = Path(".venv-rectools/bin/python")

Pairs = tuple[
    NDArray[np.int32], NDArray[np.int32]
]  # users and items of some events, each user's oldest first


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of rectools.models.SASRecModel; the defaults are what eSASRec's text says of its SASRec.

    Attributes:
        epochs: to train, without early stopping.
        num_negatives: of the sampled softmax, drawn for each position.
        threads: of torch.
    """

    epochs: int = 30
    dim: int = 64
    num_blocks: int = 1
    num_heads: int = 1
    dropout: float = 0.2
    history_length: int = 50
    batch_size: int = 128
    num_negatives: int = 256
    learning_rate: float = 1e-3
    precision: str = "32-true"
    seed: int = 0
    threads: int = os.cpu_count() or 1


@dataclass(frozen=True)
class Result:
    """What came back."""

    lists: dict[int, NDArray[np.int32]]  # user row -> item rows, best first
    epoch_s: list[float]  # seconds of each epoch
    peak_memory_bytes: int  # 0 where the system does not tell
    versions: dict[str, str]


def check_python(python: Path) -> None:
    """Raise ValueError, saying what to install, unless this Python has RecTools."""
    command = [str(python), "-c", "import rectools, pytorch_lightning"]
    try:
        found = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        found = False
    if not found:
        raise ValueError(f"{python}: {INSTALL}")


def run(python: Path, settings: Settings, train: Pairs, histories: Pairs | None, k: int = 20) -> Result:
    """Train on `train`, and find the k best items for each user of `histories`.

    Args:
        python: the interpreter that has RecTools.
        settings: of the model.
        train: the training events.
        histories: of those who are asked; None trains only.
        k: length of the lists.

    Raises:
        ValueError: RecTools is not there, or failed.
    """
    check_python(python)
    with tempfile.TemporaryDirectory() as folder:
        asked = histories if histories is not None else (np.zeros(0, np.int32), np.zeros(0, np.int32))
        arrays = {"train_users": train[0], "train_items": train[1], "users": asked[0], "items": asked[1]}
        np.savez(Path(folder, "in.npz"), **arrays)  # type: ignore[arg-type]
        text = json.dumps(dataclasses.asdict(settings))
        command = [str(python), str(Path(__file__).resolve()), folder, text, str(k)]
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "PYTHONPATH": ""}
        child = subprocess.run(command, check=False, stdout=sys.stderr, env=environment)
        if child.returncode:
            raise ValueError(f"RecTools ended with exit status {child.returncode}")
        with np.load(Path(folder, "out.npz")) as out:
            users, items = out["users"], out["items"]
        facts = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
    cuts = np.flatnonzero(np.diff(users)) + 1
    parts = zip(np.split(users, cuts), np.split(items, cuts), strict=True)
    lists = {int(part_users[0]): part_items for part_users, part_items in parts if len(part_users)}
    return Result(lists, facts["epoch_s"], facts["peak_memory_bytes"], facts["versions"])


def main(folder: Path, settings: Settings, k: int) -> None:
    """Do the work, in the Python that has RecTools; see run."""
    warnings.filterwarnings("ignore")
    import importlib.metadata

    import pandas as pd
    import pytorch_lightning as pl
    import torch
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    def dataset(users: NDArray[np.int32], items: NDArray[np.int32]) -> Dataset:
        place = pd.to_datetime(np.arange(len(users)), unit="s")  # RecTools sorts by it
        columns = {Columns.User: users, Columns.Item: items, Columns.Weight: 1.0, Columns.Datetime: place}
        return Dataset.construct(pd.DataFrame(columns))

    class Clock(pl.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.epoch_s: list[float] = []
            self.begin = 0.0

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.epoch_s.append(time.perf_counter() - self.begin)
            print(f"rectools epoch {trainer.current_epoch}  {self.epoch_s[-1]:.1f} s", flush=True)

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_epochs=settings.epochs,
            precision=settings.precision,
            accelerator="cpu",
            callbacks=[Clock()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed)
    with np.load(folder / "in.npz") as given:
        train = dataset(given["train_users"], given["train_items"])
        users, items = given["users"], given["items"]
    model = SASRecModel(
        n_blocks=settings.num_blocks,
        n_heads=settings.num_heads,
        n_factors=settings.dim,
        dropout_rate=settings.dropout,
        session_max_len=settings.history_length,
        loss="sampled_softmax",
        n_negatives=settings.num_negatives,
        lr=settings.learning_rate,
        batch_size=settings.batch_size,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )
    model.fit(train)
    assert model.fit_trainer is not None
    (clock,) = [callback for callback in model.fit_trainer.callbacks if isinstance(callback, Clock)]
    found = pd.DataFrame({Columns.User: [], Columns.Item: []})
    if len(users):
        found = model.recommend(
            np.unique(users), dataset(users, items), k, filter_viewed=True, on_unsupported_targets="ignore"
        )
    found = found.sort_values(Columns.User, kind="stable")
    lists = {"users": found[Columns.User].to_numpy(np.int32), "items": found[Columns.Item].to_numpy(np.int32)}
    np.savez(folder / "out.npz", **lists)
    facts = {
        "epoch_s": clock.epoch_s,
        "peak_memory_bytes": _peak_memory(),
        "versions": {name: importlib.metadata.version(name) for name in ("rectools", "torch", "numpy")},
    }
    (folder / "out.json").write_text(json.dumps(facts), encoding="utf-8")


def _peak_memory() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0  # unknown
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), Settings(**json.loads(sys.argv[2])), int(sys.argv[3]))
