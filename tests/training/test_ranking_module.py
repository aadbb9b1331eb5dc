"""What the ranker's module decides by the data."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import training.ranking_module
from ranking.dropout import Dropout
from ranking.encoders.sasrec import SASRec
from training.data.dataset import DatasetInfo, write_info
from training.data.modules import RankingData
from training.data.simulator import ShopConfig, write_dataset
from training.losses import sampled_softmax_loss
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


NUM_ITEMS, LENGTH = 60, 8


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in which item n + 1 comes after item n, and the first after the last."""
    folder = tmp_path_factory.mktemp("cycle")
    events = [(user, (7 * user + place) % NUM_ITEMS) for user in range(120) for place in range(LENGTH)]
    pl.DataFrame(
        {
            "user_id": [f"u{user}" for user, _ in events],
            "item_id": [f"i{item}" for _, item in events],
            "timestamp": np.arange(len(events)),
            "event_type": ["view"] * len(events),
        }
    ).write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": [f"i{item}" for item in range(NUM_ITEMS)]}).write_parquet(
        folder / "items.parquet"
    )
    write_info(folder, DatasetInfo(name="cycle", source={}, time="order"))
    return folder


def fitted(
    directory: Path, loss: Literal["auto", "full", "sampled"], num_epochs: int, popularity: float = 0.0
) -> tuple[float, set[int]]:
    """Return NDCG@10 on validation after some epochs, and how many negatives the steps had."""
    L.seed_everything(0)
    nums: set[int] = set()

    def counted(
        states: Tensor, vectors: Tensor, targets: Tensor, negatives: Tensor, expected: Tensor | None
    ) -> Tensor:
        nums.add(len(negatives))
        return sampled_softmax_loss(states, vectors, targets, negatives, expected)

    module = RankingModule(
        lambda *sizes: SASRec(*sizes, dim=16),
        loss=loss,
        num_negatives=16,
        popularity=popularity,
        learning_rate=0.02,
        dropout=0.0,
    )
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=num_epochs, accelerator="cpu", enable_model_summary=False, **silent)
    with mock.patch.object(training.ranking_module, "sampled_softmax_loss", counted):
        trainer.fit(module, datamodule=RankingData(directory, batch_size=16))
    return float(trainer.callback_metrics["val_ndcg@10"]), nums


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_what_comes_next_is_learned_with_either_loss(cycle: Path, loss: Literal["full", "sampled"]) -> None:
    ndcg, nums = fitted(cycle, loss, num_epochs=10)
    assert ndcg > 0.8  # by chance .08
    assert nums == {NUM_ITEMS if loss == "full" else 16}


def test_negatives_by_popularity(cycle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(cycle, "sampled", num_epochs=10, popularity=0.75)[0] > 0.8
    counts = np.array([0, 0, 1, 4, 16, 4])  # of rows 0 to 5
    module = RankingModule(loss="sampled", num_negatives=40_000, popularity=0.5)
    train = SimpleNamespace(item_counts=lambda: counts)
    monkeypatch.setattr(RankingModule, "data", SimpleNamespace(split=SimpleNamespace(train=train)))
    torch.manual_seed(0)
    drawn, expected = module._negatives(torch.tensor([1, 2, 3, 4]))
    found = torch.bincount(drawn, minlength=6) / 40_000
    # Row 1 stands for the items without events, as one of a single event: nothing else keeps these below.
    torch.testing.assert_close(found, torch.tensor([0, 1, 1, 2, 4, 0]) / 8, atol=0.01, rtol=0)
    assert expected is not None
    torch.testing.assert_close(expected.exp(), 40_000 / 8 * torch.tensor([0, 1, 1.0, 2, 4])[drawn])
    with pytest.raises(ValueError, match=r"popularity is 0\.5 with loss auto; expected loss sampled"):
        RankingModule(popularity=0.5)
    uniform, nothing = RankingModule(num_negatives=100)._negatives(torch.tensor([1, 4]))
    assert (set(uniform.tolist()), nothing) == ({1, 4}, None)


def test_each_head_learns_its_own_kind_of_event(tmp_path: Path) -> None:
    """Views go on to the next item, purchases to the one opposite; what comes next may be either."""
    rng = np.random.default_rng(0)
    events: list[tuple[int, int, str]] = []
    for user in range(200):
        for item in range(7 * user, 7 * user + LENGTH):
            events.append((user, item % NUM_ITEMS, "view"))
            if rng.random() < 0.4:
                events.append((user, (item + NUM_ITEMS // 2) % NUM_ITEMS, "purchase"))
    users, items, types = zip(*events, strict=True)
    pl.DataFrame(
        {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item}" for item in items],
            "timestamp": np.arange(len(events)),
            "event_type": types,
        }
    ).write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": [f"i{item}" for item in range(NUM_ITEMS)]}).write_parquet(
        tmp_path / "items.parquet"
    )
    write_info(tmp_path, DatasetInfo(name="two rules", source={}, time="order"))
    L.seed_everything(0)
    module = RankingModule(
        lambda *sizes: SASRec(*sizes, dim=16), heads=["view", "purchase"], learning_rate=0.02, dropout=0.0
    )
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=12, accelerator="cpu", enable_model_summary=False, **silent)
    trainer.fit(module, datamodule=RankingData(tmp_path, batch_size=16))
    ranker = module.ranker.eval()
    assert ranker.heads == ("next", "view", "purchase")
    last = torch.arange(2, NUM_ITEMS + 1)  # rows; row r is item r - 1
    history = torch.stack([last - 1, last], dim=1)

    def first(*weights: float) -> torch.Tensor:
        with torch.no_grad():
            of_all = torch.tensor([weights]).expand(len(history), -1)
            scores = ranker.query(history, head_weights=of_all) @ ranker.item_vectors().T
        scores[:, 0] = -torch.inf
        return scores.argmax(1)

    following, opposite = last % NUM_ITEMS + 1, (last + NUM_ITEMS // 2 - 1) % NUM_ITEMS + 1
    assert (first(0, 1, 0) == following).float().mean() > 0.9
    assert (first(0, 0, 1) == opposite).float().mean() > 0.9
    assert ((first(1, 0, 0) == following) | (first(1, 0, 0) == opposite)).float().mean() > 0.9


def test_catalogs_too_large_for_the_whole_softmax_are_sampled(
    cycle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fitted(cycle, "auto", num_epochs=1)[1] == {NUM_ITEMS}
    monkeypatch.setattr(training.ranking_module, "FULL_SOFTMAX_ITEMS", NUM_ITEMS - 1)
    assert fitted(cycle, "auto", num_epochs=1)[1] == {16}


def test_items_without_events_are_one_negative_together(
    cycle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have one vector, so one of them says all; and a catalog is as large as what is sold of it."""
    for name in ("events.parquet", "dataset.json"):
        shutil.copy(cycle / name, tmp_path)
    names = [f"i{item}" for item in range(NUM_ITEMS)] + [f"unsold {item}" for item in range(1000)]
    pl.DataFrame({"item_id": names}).write_parquet(tmp_path / "items.parquet")
    monkeypatch.setattr(training.ranking_module, "FULL_SOFTMAX_ITEMS", NUM_ITEMS + 1)
    ndcg, nums = fitted(tmp_path, "auto", num_epochs=10)
    assert nums == {NUM_ITEMS + 1}
    assert ndcg > 0.8  # so they do not come first either
