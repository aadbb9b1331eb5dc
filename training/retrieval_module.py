"""Stage one of training: a graph encoder fitted to the event graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.optim.lr_scheduler import LambdaLR
from torch_geometric.data import HeteroData

from retrieval.encoders.lightgcn import LightGCN
from retrieval.fold_in import fold_in
from training.data.modules import QuestionBatch, RetrievalData
from training.encoder_checks import check_graph_encoder
from training.losses import embedding_l2
from training.metrics import mean_accuracy
from training.retrieval_losses import EdgeBatch, RetrievalLoss, SampledSoftmax
from training.stages import check_numbers, check_vectors

RETRIEVAL_EPOCHS = 20  # by default: how long the learning rate takes to fall to zero


class RetrievalModule(L.LightningModule):
    """Fits a GraphEncoder to the training edges.

    Validation asks as serving does, for the nearest items to the vector folded in from a history, but there
    every event counts alike: what types and ages count is the bundle's setting, not the model's.

    Args:
        encoder: makes the GraphEncoder from the graph; in YAML a class path and its keywords.
        loss: of training/retrieval_losses.py; in YAML a class path and its keywords. None: SampledSoftmax,
            each edge against negatives drawn uniformly from the items that have edges.
        learning_rate: of Adam.
        l2: weight of the regulariser on the initial embeddings of a batch's users and items.
        schedule: "linear" lets the learning rate fall to zero over the epochs; "constant" does not. The last
            epochs at a small rate settle what the negatives' noise keeps in motion.
    """

    encoder: nn.Module
    user_degrees: Tensor
    item_degrees: Tensor

    def __init__(
        self,
        encoder: Callable[[HeteroData], nn.Module] = LightGCN,
        loss: RetrievalLoss | None = None,
        learning_rate: float = 2e-2,
        l2: float = 3e-2,
        schedule: Literal["constant", "linear"] = "linear",
    ) -> None:
        super().__init__()
        check_numbers("retrieval.model.", 0, {"learning_rate": learning_rate}, above=True)
        check_numbers("retrieval.model.", 0, {"l2": l2})
        self.make_encoder, self.loss = encoder, loss or SampledSoftmax()
        self.learning_rate, self.l2, self.schedule = learning_rate, l2, schedule

    @property
    def data(self) -> RetrievalData:
        """The data module of the run."""
        data: RetrievalData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def configure_model(self) -> None:
        """Make the encoder, now that the graph is known."""
        if not hasattr(self, "encoder"):
            check_graph_encoder(self.make_encoder)
            with torch.device("cpu"):  # where the graph lies; Lightning moves the encoder later
                self.encoder = self.make_encoder(self.data.graph)
            # On the device from the start; not part of the weights.
            self.register_buffer("user_degrees", self.data.user_degrees, persistent=False)
            self.register_buffer("item_degrees", self.data.item_degrees, persistent=False)

    def configure_optimizers(self) -> Any:
        """Return Adam and its schedule; None for an encoder without parameters."""
        parameters = list(self.parameters())
        if not parameters:
            return None
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)
        if self.schedule == "constant":
            return optimizer
        num_steps = self.trainer.estimated_stepping_batches
        if math.isinf(num_steps):
            raise ValueError(
                f"max_epochs is {self.trainer.max_epochs}; a schedule other than constant expects 1 or more"
            )
        num_steps = max(1, int(num_steps))
        schedule = LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, edges: Tensor, batch_index: int) -> Tensor | None:
        """Return the loss of a batch of edges [B, 2] int64 (user row, item row)."""
        if next(self.parameters(), None) is None:  # an encoder in closed form: validate it, and that is all
            self.trainer.should_stop = True
            return None
        users, items = edges.T
        vectors = self.encoder(self.data.graph)
        batch = EdgeBatch(
            users=users,
            items=items,
            user_vectors=vectors["user"],
            item_vectors=vectors["item"],
            user_degrees=self.user_degrees,
            item_degrees=self.item_degrees,
        )
        initial = self.encoder.initial_vectors()  # type: ignore[operator]
        loss = self.loss(batch) + self.l2 * embedding_l2(
            embedding(users, initial["user"]), embedding(items, initial["item"])
        )
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(edges))
        return loss

    @torch.no_grad()
    def item_vectors(self) -> NDArray[np.float32]:
        """Return the item vectors [I+1, D]; zero for padding and for items without an edge."""
        vectors: NDArray[np.float32] = self.encoder(self.data.graph)["item"].float().cpu().numpy().copy()
        vectors[self.data.item_degrees.numpy() == 0] = 0.0
        return vectors

    @torch.no_grad()
    def vectors(self) -> dict[str, NDArray[np.float32]]:
        """Return what later stages need: item_vectors [I+1, D], user_vectors [U+1, D], item_degrees [I+1]."""
        users: NDArray[np.float32] = self.encoder(self.data.graph)["user"].float().cpu().numpy().copy()
        users[0] = 0.0
        return {
            "item_vectors": self.item_vectors(),
            "user_vectors": users,
            "item_degrees": self.data.item_degrees.numpy(),
        }

    def on_train_batch_start(self, batch: object, batch_index: int) -> None:
        """Draw what is random in an epoch by its number: a resumed fit draws what it would have drawn."""
        if batch_index == 0:
            torch.manual_seed(self.data.epoch_seed())

    def on_validation_epoch_start(self) -> None:
        """Propagate once for the whole epoch."""
        self._item_vectors = self.item_vectors()
        check_vectors("retrieval", torch.from_numpy(self._item_vectors), self.learning_rate)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Log the metrics of a batch of questions, all items ranked."""
        self._log_accuracy(batch, "val")

    def test_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Log the metrics of a batch of questions, all items ranked."""
        self._log_accuracy(batch, "test")

    def _log_accuracy(self, batch: QuestionBatch, part: str) -> None:
        items, degrees = self._item_vectors, self.data.item_degrees.numpy()
        queries = np.stack([fold_in(items, degrees, history) for history in batch.wanted])
        metrics = mean_accuracy(
            queries @ items.T, batch.histories, batch.targets, (20,), repeats=self.data.split.repeats
        )
        for name in ("recall@20", "ndcg@20"):
            self.log(f"{part}_{name}", metrics[name], prog_bar=True, batch_size=len(batch), sync_dist=True)
