from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from training.stages import (
    MONITOR,
    PatientEarlyStopping,
    default_callbacks,
    default_precision,
    fit_stage,
    load_best,
    refit_stage,
)


def test_early_stopping_counts_validations_that_are_enough_steps_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = []
    monkeypatch.setattr(
        EarlyStopping, "on_train_epoch_end", lambda self, trainer, module: counted.append(trainer.global_step)
    )
    stopping = PatientEarlyStopping(min_steps=50, monitor="val", mode="max", patience=1)
    for step in range(20, 201, 20):
        stopping.on_train_epoch_end(SimpleNamespace(global_step=step), None)
        if step == 100:  # as a resumed run would
            state = stopping.state_dict()
            stopping = PatientEarlyStopping(min_steps=50, monitor="val", mode="max", patience=1)
            stopping.load_state_dict(state)
    assert counted == [60, 120, 180]


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({"avx2": True}, "32-true")],
)
def test_precision_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert default_precision() == precision


class _Scheduled(L.LightningModule):
    """A weight that falls by its learning rate at every step; the rate falls over the planned steps."""

    def __init__(self, metrics: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.metrics = metrics
        self.rates: list[float] = []

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_index: int) -> None:
        self.log("val_ndcg@10", self.metrics[self.current_epoch])


class _Batches(L.LightningDataModule):
    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_batches = num_batches

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.zeros(self.num_batches, 1))

    val_dataloader = train_dataloader


OPTIONS = {
    "max_epochs": 5,
    "callbacks": None,
    "logger": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


def test_a_refit_walks_the_chosen_part_of_the_schedule(tmp_path) -> None:
    chosen_by = _Scheduled([0.1, 0.2, 0.5, 0.3, 0.2])
    chosen = fit_stage("ranking", chosen_by, _Batches(2), tmp_path / "fit", OPTIONS, patience=9, resume=False)
    assert (chosen.epochs, chosen.metric) == (3, pytest.approx(0.5))
    assert chosen_by.weight.item() == pytest.approx(-(1 + 0.9 + 0.8 + 0.7 + 0.6 + 0.5))
    limited = OPTIONS | {
        "min_epochs": 4,
        "max_time": "00:00:00:00",
        "callbacks": [EarlyStopping("val_ndcg@10")],
    }

    def refit(num_batches: int, epochs: int, resume: bool = False) -> _Scheduled:
        module = _Scheduled([])
        refit_stage(
            "ranking",
            module,
            _Batches(num_batches),
            tmp_path / "refit",
            limited,
            epochs=epochs,
            resume=resume,
        )
        return module

    # The same data gives the same weights as the chosen epoch had.
    again = refit(2, 3)
    assert again.rates == pytest.approx(chosen_by.rates[:6])
    assert again.weight.item() == pytest.approx(chosen_by.weight.item())
    # Twice the steps an epoch: as much of the schedule, in steps half as wide.
    assert refit(4, 3).rates == pytest.approx([1 - step / 20 for step in range(12)])


def test_a_refit_that_had_ended_trains_no_further_when_resumed(tmp_path) -> None:
    first, second, longer = _Scheduled([]), _Scheduled([]), _Scheduled([])
    for module, epochs in ((first, 2), (second, 2), (longer, 3)):
        refit_stage("ranking", module, _Batches(2), tmp_path, OPTIONS, epochs=epochs, resume=True)
    assert len(first.rates) == 4
    assert second.rates == []
    assert second.weight.item() == first.weight.item() < 0
    assert longer.rates == pytest.approx([0.6, 0.5])


@pytest.mark.parametrize("epochs_before", [1, 2, 4])
def test_a_run_goes_on_where_its_directory_was_moved_to(tmp_path, epochs_before: int) -> None:
    metrics = [0.1, 0.5, 0.2, 0.3]
    first, second = _Scheduled(metrics), _Scheduled(metrics)
    before = OPTIONS | {"max_epochs": epochs_before}
    fit_stage("ranking", first, _Batches(2), tmp_path / "here", before, patience=9, resume=False)
    (tmp_path / "here").rename(tmp_path / "there")
    after = OPTIONS | {"max_epochs": 4}
    chosen = fit_stage("ranking", second, _Batches(2), tmp_path / "there", after, patience=9, resume=True)
    assert len(second.rates) == 2 * (4 - epochs_before)
    assert (chosen.epochs, chosen.metric) == (2, pytest.approx(0.5))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(("later", "best"), [([0.2, 0.3], 2), ([0.2, 0.6], 4)])
def test_a_run_that_goes_on_elsewhere_finds_the_best_weights(tmp_path, later: list[float], best: int) -> None:
    """As `fit --ckpt_path` does, which begins a directory of its own."""
    metrics = [0.1, 0.5, *later]
    first, second = _Scheduled(metrics), _Scheduled(metrics)
    two = OPTIONS | {"max_epochs": 2}
    fit_stage("ranking", first, _Batches(2), tmp_path / "here", two, patience=9, resume=False)
    before = {file: file.read_bytes() for file in (tmp_path / "here").iterdir()}
    callbacks = default_callbacks("ranking", MONITOR["ranking"], 9, tmp_path / "there")
    trainer = L.Trainer(**OPTIONS | {"max_epochs": 4, "callbacks": callbacks})
    trainer.fit(second, _Batches(2), ckpt_path=tmp_path / "here" / "last.ckpt", weights_only=True)
    assert load_best(second, trainer) == best
    assert {file: file.read_bytes() for file in (tmp_path / "here").iterdir()} == before
