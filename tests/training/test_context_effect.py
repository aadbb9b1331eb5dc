"""A ranker with context on simulated shops: better where the moment decides, no worse where it does not."""

from functools import partial

import lightning as L
import pytest
from lightning.pytorch import Trainer

from ranking.encoders.sasrec import SASRec
from training.data.modules import RankingData
from training.data.simulator import ShopConfig, write_dataset
from training.ranking_module import RankingModule
from training.stages import quiet_lightning

SIZE = {"num_users": 700, "num_items": 96, "num_events": 14_000, "num_categories": 8, "new_items": 0.0}


def ndcg(directory, context, seed):
    """Return NDCG@10 on the test questions, of a small sequence model without a graph."""
    quiet_lightning()
    L.seed_everything(seed, verbose=False)
    data = RankingData(directory, context=context)
    module = RankingModule(partial(SASRec, dim=32), dropout=0.2, learning_rate=5e-3)
    trainer = Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    (found,) = trainer.test(module, data, verbose=False)
    return found["test_ndcg@10"]


@pytest.mark.parametrize("effect", [3.0, 0.0])
def test_context_helps_where_it_has_an_effect_and_does_no_harm_elsewhere(tmp_path, effect):
    directory = tmp_path / "shop"
    write_dataset(ShopConfig(placement_effect=effect, **SIZE), directory)
    # One seed tells an effect; that there is none takes more, as seeds differ by 4% here.
    seeds = range(1 if effect else 3)
    without, with_context = (sum(ndcg(directory, context, seed) for seed in seeds) for context in ([], None))
    if effect:
        assert with_context > 1.1 * without
    else:
        assert with_context > 0.95 * without
