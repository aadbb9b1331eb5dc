"""The data modules: which batches a fit gets, and in which order."""

from pathlib import Path

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch

from training.data.dataset import DatasetInfo, write_info
from training.data.modules import RankingData, RetrievalData
from training.data.simulator import ShopConfig, write_dataset


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shop") / "data"
    write_dataset(ShopConfig(num_users=120, num_items=48, num_events=1_300, num_categories=8), out)
    return out


class Witness(L.LightningModule):
    """Remembers the batches of each epoch, and draws some numbers at each."""

    def __init__(self, num_draws: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_draws = num_draws
        self.epochs: dict[int, list[torch.Tensor]] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())

    def training_step(self, batch, batch_index: int) -> torch.Tensor:
        torch.rand(self.num_draws)
        seen = batch if isinstance(batch, torch.Tensor) else batch.targets
        self.epochs.setdefault(self.current_epoch, []).append(seen.clone())
        return self.weight.sum()


@pytest.mark.parametrize("kind", [RetrievalData, RankingData])
def test_a_resumed_fit_goes_on_with_the_batches_it_would_have_had(
    directory: Path, tmp_path: Path, kind
) -> None:
    def fit(num_epochs: int, seed: int = 3, num_draws: int = 1, resume: Path | None = None):
        L.seed_everything(seed, verbose=False)
        witness = Witness(num_draws)
        trainer = L.Trainer(
            max_epochs=num_epochs,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(witness, datamodule=kind(directory, batch_size=16), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return witness.epochs

    def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
        return len(first) == len(second) and all(map(torch.equal, first, second))

    whole = fit(3)
    assert list(whole) == [0, 1, 2]
    assert not same(whole[0], whole[1])
    assert not same(fit(1, seed=4)[0], whole[0])
    assert same(fit(1, num_draws=5)[0], whole[0])
    rest = fit(3, resume=tmp_path / "last.ckpt")
    assert list(rest) == [1, 2]
    assert all(same(rest[epoch], whole[epoch]) for epoch in rest)
    # Outside a fit each pass is another.
    data = kind(directory, batch_size=16)
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = ([b if isinstance(b, torch.Tensor) else b.targets for b in loader] for _ in range(2))
    assert not same(first, second)


@pytest.mark.parametrize(
    ("num_users", "length", "batch_size", "max_tokens", "num_steps"),
    [(40, 5, 32, 512, 2), (6_000, 3, 40, 1283, 150), (20_000, 3, 128, 4096, 157), (1_500, 60, 32, 601, 150)],
)
def test_batches_shrink_until_an_epoch_has_steps_enough(
    tmp_path: Path, num_users: int, length: int, batch_size: int, max_tokens: int, num_steps: int
) -> None:
    rows = [(f"u{user}", f"i{(user + place) % 1000}") for user in range(num_users) for place in range(length)]
    pl.DataFrame(
        {
            "user_id": [user for user, _ in rows],
            "item_id": [item for _, item in rows],
            "timestamp": np.arange(len(rows)),
            "event_type": ["view"] * len(rows),
        }
    ).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": [f"i{item}" for item in range(1000)]}).write_parquet(tmp_path / "items.parquet")
    write_info(tmp_path, DatasetInfo(name="shop", source={}, time="order"))
    data = RankingData(tmp_path)
    data.setup("fit")
    assert (data.batch_size, data.max_tokens) == (batch_size, max_tokens)
    assert sum(1 for _ in data.train_dataloader()) == num_steps
