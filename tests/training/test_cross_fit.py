"""Vectors of stage one for a history come from fits without its user."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ranking.encoders.sasrec import SASRec
from training.cross_fit import fold_vectors, turned, without_fold
from training.data.interactions import Interactions
from training.data.modules import RankingData
from training.data.sequences import SequenceBatch
from training.data.simulator import ShopConfig, write_dataset
from training.ranking_module import RankingModule

NUM_USERS, NUM_ITEMS, DIM = 9, 20, 6


def events() -> Interactions:
    users = np.repeat(np.arange(1, NUM_USERS + 1), 3).astype(np.int32)
    items = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, len(users)).astype(np.int32)
    kinds, times = np.zeros(len(users), np.uint8), np.arange(len(users))
    return Interactions(users, items, kinds, times, NUM_USERS, NUM_ITEMS)


def test_every_event_is_left_out_of_one_fit() -> None:
    log, num_folds = events(), 4
    left_out = []
    for fold in range(num_folds):
        others = without_fold(log, fold, num_folds)
        assert not set(others.users % num_folds) & {fold}
        left_out += sorted(set(log.timestamps) - set(others.timestamps))
    assert sorted(left_out) == log.timestamps.tolist()


def test_a_fold_of_all_users() -> None:
    log = events().take(events().users == 4)
    assert len(without_fold(log, 1, 4)) == 3
    with pytest.raises(ValueError, match="num_folds is 2; expected fewer: fold 0 has all users with events"):
        without_fold(log, 0, 2)


def test_a_fit_in_another_basis_is_turned_back() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(NUM_ITEMS + 1, DIM)).astype(np.float32)
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    degrees = np.ones(NUM_ITEMS + 1, np.float32)
    degrees[[0, 7]] = 0  # row 0 is padding, and item 7 had no event in this fit: its vector means nothing
    other = (reference @ basis).astype(np.float32)
    other[7] = 100.0
    expected = np.where(degrees[:, None] > 0, reference, 0)
    np.testing.assert_allclose(turned(other, degrees, reference), expected, atol=1e-5)
    tables = fold_vectors([(other, degrees), (reference, degrees)], reference)
    np.testing.assert_allclose(tables, np.stack([expected, expected]), atol=1e-5)


def loss_of_fold(module: RankingModule, batches: list[SequenceBatch], fold: int) -> float:
    """Return the loss on the batches of a fold, added up; no dropout."""
    losses = [module.training_step(batch, 0) for batch in batches if batch.fold == fold]
    assert losses
    return float(sum(losses))


@pytest.fixture
def data(tmp_path: Path) -> RankingData:
    size = {"num_users": 60, "num_items": 40, "num_events": 600, "new_items": 0.0, "num_categories": 4}
    write_dataset(ShopConfig(**size), tmp_path / "data")
    return RankingData(tmp_path / "data", num_folds=2)


def module_of(data: RankingData, folder: Path, tables: np.ndarray) -> RankingModule:
    folder.mkdir(exist_ok=True)
    degrees = np.ones(tables.shape[1], np.float32)
    save_file({"item_vectors": tables.mean(0), "item_degrees": degrees}, folder / "embeddings.safetensors")
    save_file({"fold_vectors": tables}, folder / "folds.safetensors")
    files = {"embeddings": folder / "embeddings.safetensors", "folds": folder / "folds.safetensors"}
    L.seed_everything(0, verbose=False)
    module = RankingModule(lambda *sizes: SASRec(*sizes, dim=8), dropout=0.0, context_dropout=0.0, **files)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, fast_dev_run=1)
    trainer.fit(module, datamodule=data)
    return module


def test_a_batch_is_learned_from_beside_the_vectors_of_its_fold(data: RankingData, tmp_path: Path) -> None:
    data.setup("fit")
    tables = np.random.default_rng(2).normal(size=(2, data.num_items + 1, DIM)).astype(np.float32)
    tables[:, 0] = 0
    module = module_of(data, tmp_path / "run", tables)
    assert module.fold_vectors is not None
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    # Asked, and served, with their mean, at the scale that a ranker gives its vectors.
    mean = module.fold_vectors.mean(0)
    torch.testing.assert_close(module.ranker.graph_vectors, mean)
    batches = list(data.train_dataloader())
    with torch.no_grad():
        before = [loss_of_fold(module, batches, fold) for fold in (0, 1)]
        module.fold_vectors[1] += 1.0
        after = [loss_of_fold(module, batches, fold) for fold in (0, 1)]
    assert after[0] == before[0]
    assert after[1] != before[1]
    torch.testing.assert_close(module.ranker.graph_vectors, mean)  # and not those of the last batch


def test_vectors_that_do_not_fit(data: RankingData, tmp_path: Path) -> None:
    data.setup("fit")
    with pytest.raises(ValueError, match=r"has vectors \[3, 41, 6\]; expected \[2, 41, 6\]: data.num_folds"):
        module_of(data, tmp_path / "run", np.ones((3, data.num_items + 1, DIM), np.float32))
    module = RankingModule(folds=tmp_path / "run" / "folds.safetensors")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, fast_dev_run=1)
    with pytest.raises(ValueError, match="expected embeddings beside it, and no fine_tune_graph"):
        trainer.fit(module, datamodule=data)
    with pytest.raises(ValueError, match="num_folds is 0; expected 1 or more"):
        RankingData(tmp_path / "data", num_folds=0)


def test_a_ranker_is_made_where_its_parts_lie(data: RankingData, tmp_path: Path, monkeypatch) -> None:
    """Lightning makes it on the device that it trains on, which the files and tables know nothing of."""
    data.setup("fit")
    tables = np.ones((2, data.num_items + 1, DIM), np.float32)
    made = module_of(data, tmp_path / "run", tables)
    content = {"content_vectors": np.eye(data.num_items + 1, 5, dtype=np.float32)}
    save_file(content, tmp_path / "content.safetensors")
    module = RankingModule(
        embeddings=made.embeddings, folds=made.folds, content=tmp_path / "content.safetensors"
    )
    monkeypatch.setattr(RankingModule, "data", data)
    with torch.device("meta"):
        module.configure_model()
    assert {part.device.type for part in [*module.parameters(), *module.buffers()]} == {"cpu"}
