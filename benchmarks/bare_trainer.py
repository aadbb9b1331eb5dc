"""A lightning.Trainer that takes the steps and does nothing else."""

from __future__ import annotations

from typing import Any

import lightning as L


def bare_trainer(**options: Any) -> L.Trainer:
    """Return a trainer without validation, log, checkpoints, progress bar and summary, with these options."""
    return L.Trainer(
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
