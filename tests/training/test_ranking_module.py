"""What the ranker's module decides by the data."""

from pathlib import Path

import lightning as L
import pytest

from ranking.dropout import Dropout
from ranking.encoders.sasrec import SASRec
from training.data.modules import RankingData
from training.data.simulator import ShopConfig, write_dataset
from training.ranking_module import RankingModule, dropout_for


@pytest.mark.parametrize(
    ("targets_per_item", "expected"), [(0.0, 0.5), (1.0, 0.5), (13.0, 0.5), (64.0, 0.3), (289.0, 0.18)]
)
def test_dense_data_want_less_dropout(targets_per_item: float, expected: float) -> None:
    assert dropout_for(targets_per_item) == expected


def test_dropout_never_rises_with_the_density() -> None:
    found = [dropout_for(2.0**power) for power in range(30)]
    assert found == sorted(found, reverse=True)
    assert 0 <= found[-1] < found[0] == 0.5


def dropouts_of(module: RankingModule, data: RankingData) -> set[float]:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, fast_dev_run=1)
    trainer.fit(module, datamodule=data)
    return {part.p for part in module.ranker.modules() if isinstance(part, Dropout)}


def test_one_dropout_for_the_whole_ranker(tmp_path: Path) -> None:
    size = {"num_users": 200, "num_items": 96, "num_events": 4_000, "new_items": 0.0, "num_categories": 8}
    write_dataset(ShopConfig(**size), tmp_path / "data")
    data = RankingData(tmp_path / "data")
    data.setup("fit")
    train = data.split.train
    touched = {(user, item) for user, item in zip(train.users.tolist(), train.items.tolist(), strict=True)}
    assert data.targets_per_item == len(touched) / len(set(train.items.tolist()))
    assert data.targets_per_item < len(train) / len(set(train.items.tolist()))
    by_rule = dropout_for(data.targets_per_item)
    assert by_rule < 0.5
    assert dropouts_of(RankingModule(lambda *sizes: SASRec(*sizes, dim=8)), data) == {by_rule}
    assert dropouts_of(RankingModule(lambda *sizes: SASRec(*sizes, dim=8), dropout=0.35), data) == {0.35}
