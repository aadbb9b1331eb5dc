from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from training.stages import PatientEarlyStopping, default_precision


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
