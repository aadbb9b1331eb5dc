from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EarlyStopping

from training.stages import EarlyStoppingAfterWarmUp, default_precision


@pytest.mark.parametrize(("global_step", "expected"), [(0, 0), (200, 0), (201, 2)])
def test_early_stopping_counts_only_after_the_warm_up(
    monkeypatch: pytest.MonkeyPatch, global_step: int, expected: int
) -> None:
    calls = []
    for hook in ("on_validation_end", "on_train_epoch_end"):
        monkeypatch.setattr(EarlyStopping, hook, lambda self, trainer, module: calls.append(module))
    stopping = EarlyStoppingAfterWarmUp(num_warm_up_steps=200, monitor="val", mode="max", patience=1)
    trainer = SimpleNamespace(global_step=global_step)
    stopping.on_validation_end(trainer, None)
    stopping.on_train_epoch_end(trainer, None)
    assert len(calls) == expected


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
