"""Stage two of training: HybridRanker fitted to the histories, on the graph vectors of stage one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from engine.history import left_padded
from ranking.encoders.sasrec import SASRec
from ranking.ranker import HybridRanker
from training.data.modules import QuestionBatch, RankingData
from training.data.sequences import SequenceBatch
from training.losses import full_softmax_loss, sampled_softmax_loss
from training.metrics import mean_accuracy

# Above this the softmax over the whole catalog costs more than it brings, and negatives are sampled.
FULL_SOFTMAX_ITEMS = 50_000
RANKING_EPOCHS = 24  # by default: how long the learning rate takes to fall to zero


class RankingModule(L.LightningModule):
    """Fits a HybridRanker to predict every next item of every history, over the whole catalog.

    Args:
        encoder: makes the SequenceEncoder from the longest history, the start token included; in YAML a class
            path and its keywords.
        embeddings: safetensors file with item_vectors [I+1, G] and item_degrees [I+1] (stage one writes it).
            None trains the sequence model alone.
        loss: "full": softmax over the catalog; "sampled": over shared uniform negatives; "auto": full up to
            50,000 items.
        num_negatives: of the sampled loss.
        learning_rate: of Adam.
        schedule: "linear" lets the learning rate fall to zero over the epochs; "constant" does not.
        dropout: on graph vectors and on the fusion's output.
    """

    ranker: HybridRanker

    def __init__(
        self,
        encoder: Callable[[int], nn.Module] = SASRec,
        embeddings: Path | None = None,
        loss: Literal["auto", "full", "sampled"] = "auto",
        num_negatives: int = 4096,
        learning_rate: float = 2e-3,
        schedule: Literal["constant", "linear"] = "linear",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.make_encoder, self.embeddings, self.dropout = encoder, embeddings, dropout
        self.loss, self.num_negatives, self.learning_rate = loss, num_negatives, learning_rate
        self.schedule = schedule

    @property
    def data(self) -> RankingData:
        """The data module of the run."""
        data: RankingData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def configure_model(self) -> None:
        """Make the ranker, now that the catalog and the histories are known."""
        if hasattr(self, "ranker"):
            return
        graph = load_file(self.embeddings) if self.embeddings is not None else {}
        if graph and len(graph["item_vectors"]) != self.data.num_items + 1:
            raise ValueError(
                f"{self.embeddings} has {len(graph['item_vectors']) - 1} items; the data set has "
                f"{self.data.num_items}: train stage one on this data set first"
            )
        self.ranker = HybridRanker(
            self.make_encoder(self.data.history_length + 1),
            graph_vectors=graph.get("item_vectors"),
            item_degrees=graph.get("item_degrees"),
            num_items=self.data.num_items,
            dropout=self.dropout,
        )

    def configure_optimizers(self) -> Any:
        """Return Adam over the ranker's parameters, and its schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        if self.schedule == "constant":
            return optimizer
        num_epochs = self.trainer.max_epochs or 0
        if num_epochs < 1:
            raise ValueError(
                f"max_epochs is {self.trainer.max_epochs}; a schedule other than constant expects 1 or more"
            )
        # A step an epoch: how many batches there are is known when they have been made.
        schedule = LambdaLR(optimizer, lambda epoch: max(0.0, 1.0 - epoch / num_epochs))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def training_step(self, batch: SequenceBatch, batch_index: int) -> Tensor:
        """Return the loss over all places of a batch that have something to predict."""
        known = batch.targets > 0
        states, targets = self.ranker.states(batch.history)[known], batch.targets[known]
        vectors = self.ranker.item_vectors()
        full = self.loss == "full" or (self.loss == "auto" and self.data.num_items <= FULL_SOFTMAX_ITEMS)
        if full:
            loss = full_softmax_loss(states, vectors, targets)
        else:
            negatives = torch.randint(1, len(vectors), (self.num_negatives,), device=targets.device)
            loss = sampled_softmax_loss(states, vectors, targets, negatives)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Make the candidates' vectors once for the whole epoch."""
        self._item_vectors = self.ranker.item_vectors().float()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Log the metrics of a batch of questions, all items ranked."""
        self._log_accuracy(batch, "val")

    def test_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Log the metrics of a batch of questions, all items ranked."""
        self._log_accuracy(batch, "test")

    def _log_accuracy(self, batch: QuestionBatch, part: str) -> None:
        history = torch.from_numpy(left_padded(batch.histories, self.ranker.history_length))
        states = self.ranker.states(history.to(self.device))[:, -1].float()
        scores = (states @ self._item_vectors.T).float().cpu().numpy()
        metrics = mean_accuracy(
            scores, batch.histories, batch.targets, (10,), repeats=self.data.split.repeats
        )
        for name in ("recall@10", "ndcg@10"):
            self.log(f"{part}_{name}", metrics[name], prog_bar=True, batch_size=len(batch), sync_dist=True)
