"""Stage two of training: HybridRanker fitted to the histories, on the graph vectors of stage one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from engine.history import EVENT_CODE, left_padded
from ranking.encoders.sasrec import SASRec
from ranking.ranker import HybridRanker
from training.content import start_vectors
from training.data.modules import QuestionBatch, RankingData
from training.data.sequences import SequenceBatch
from training.encoder_checks import check_sequence_encoder
from training.losses import negatives_by_popularity, sampled_softmax_loss
from training.metrics import mean_accuracy
from training.stages import check_numbers, check_vectors

# With more items that have events the softmax over all costs more than it brings: negatives are sampled.
FULL_SOFTMAX_ITEMS = 50_000
RANKING_EPOCHS = 24  # by default: how long the learning rate takes to fall to zero


def dropout_for(targets_per_item: float) -> float:
    """Return how much dropout suits data of a density (training.data.sequences.targets_per_item).

    min(0.5, 1.2 / its cube root): 0.5 up to 14 targets an item, 0.3 at 64, 0.18 at 290. Amazon Beauty (13)
    does well with 0.5, MovieLens-1M (289) on validation far better with 0.2 (benchmarks/results/README.md);
    what lies between is a guess.
    """
    return round(min(0.5, 1.2 / float(np.cbrt(max(targets_per_item, 1.0)))), 2)


def check_heads(heads: Sequence[str], event_types: Sequence[str]) -> None:
    """Raise ValueError unless each head is an event type that training has, and is there once."""
    for name in heads:
        if name not in event_types:
            raise ValueError(
                f"heads names {name!r}, of which training has no event; it has {', '.join(event_types)}"
            )
    if len(set(heads)) != len(heads):
        raise ValueError(f"heads is {', '.join(heads)}; expected each once")


class RankingModule(L.LightningModule):
    """Fits a HybridRanker to predict every next item of every history, over the whole catalog.

    Args:
        encoder: makes the SequenceEncoder from the longest history, the start token included, and the
            dropout; in YAML a class path and its keywords.
        embeddings: safetensors file with item_vectors [I+1, G] and item_degrees [I+1] (stage one writes it).
            None trains the sequence model alone.
        folds: safetensors file with fold_vectors [K, I+1, G] (training/cross_fit.py), as many as
            data.num_folds. A batch is learned from beside the vectors of the fit that has not seen its users,
            and questions are answered beside their mean. None: all beside those of `embeddings`.
        fine_tune_graph: whether stage two trains on the vectors of stage one too, or leaves them as they are.
        content: safetensors file with content_vectors [I+1, F] (`python -m training.content`). None leaves
            out what items are.
        content_as: "start": the id embeddings start at what is known of the items (training.content's
            start_vectors), and nothing is added to the ranker. "input": a learned projection of it is part of
            an item's vector, so that new items need nothing else.
        loss: "full": softmax over all items that training has events of; "sampled": over negatives that a
            batch shares; "auto": full up to 50,000 such items.
        num_negatives: of the sampled loss.
        popularity: draw the negatives as often as items occur in training, to this power, and correct the
            logits for it; 0 draws uniformly and corrects nothing (see retrieval_losses.SampledSoftmax). What
            stands for the items without events counts as one of a single event. For the sampled loss alone.
        heads: kinds of events, such as [cart, purchase], that candidates are scored for as well. Beside them
            there is always "next", the next item whatever the event. What counts how much is for
            pipeline.head_weights and for each request to say.
        learning_rate: of Adam.
        schedule: "linear" lets the learning rate fall to zero over the epochs; "constant" does not.
        dropout: in the encoder, on graph vectors and on the fusion's output. None: by the density of the
            data, see dropout_for.
        content_dropout: on content vectors that are input.
        id_dropout: share of the items that are treated as new in a step, so that new ones are scored well;
            where content is input alone.
        context_dropout: share of the context's values that are left out of a step.
    """

    ranker: HybridRanker
    fold_vectors: Tensor | None

    def __init__(
        self,
        encoder: Callable[[int, float], nn.Module] = SASRec,
        embeddings: Path | None = None,
        folds: Path | None = None,
        fine_tune_graph: bool = False,
        content: Path | None = None,
        content_as: Literal["start", "input"] = "start",
        loss: Literal["auto", "full", "sampled"] = "auto",
        num_negatives: int = 4096,
        popularity: float = 0.0,
        heads: list[str] | None = None,
        learning_rate: float = 2e-3,
        schedule: Literal["constant", "linear"] = "linear",
        dropout: float | None = None,
        content_dropout: float = 0.5,
        id_dropout: float = 0.05,
        context_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_numbers("ranking.model.", 1, {"num_negatives": num_negatives})
        check_numbers("ranking.model.", 0, {"learning_rate": learning_rate}, above=True)
        check_numbers("ranking.model.", 0, {"popularity": popularity})
        if popularity and loss != "sampled":
            raise ValueError(
                f"ranking.model.popularity is {popularity} with loss {loss}; expected loss sampled, "
                "which always draws negatives"
            )
        self.make_encoder, self.embeddings, self.content = encoder, embeddings, content
        self.folds = folds
        self.dropout, self.fine_tune_graph, self.content_as = dropout, fine_tune_graph, content_as
        self.dropouts = {
            "content_dropout": content_dropout,
            "id_dropout": id_dropout,
            "context_dropout": context_dropout,
        }
        check_numbers("ranking.model.", 0, self.dropouts | {"dropout": dropout}, below=1)
        self.loss, self.num_negatives, self.learning_rate = loss, num_negatives, learning_rate
        self.schedule, self.popularity = schedule, popularity
        self.heads = tuple(heads or ())
        self._possible: Tensor | None = None  # [N] rows, worked out at the first step,
        self._degrees: Tensor | None = None  # [N] how often each occurs, likewise

    @property
    def data(self) -> RankingData:
        """The data module of the run."""
        data: RankingData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def configure_model(self) -> None:
        """Make the ranker, now that the catalog and the histories are known."""
        if hasattr(self, "ranker"):
            return
        # What it is made from lies on the CPU; Lightning would have it made elsewhere, and moves it later.
        with torch.device("cpu"):
            self._make_ranker()

    def _make_ranker(self) -> None:
        graph = load_file(self.embeddings) if self.embeddings is not None else {}
        content = load_file(self.content) if self.content is not None else {}
        for file, rows, how in (
            (self.embeddings, graph.get("item_vectors"), "train stage one on this data set first"),
            (self.content, content.get("content_vectors"), "make it with `python -m training.content`"),
        ):
            if rows is not None and len(rows) != self.data.num_items + 1:
                raise ValueError(
                    f"{file} has {len(rows) - 1} items; the data set has {self.data.num_items}: {how}"
                )
        check_heads(self.heads, self.data.event_types)
        folds = None if self.folds is None else load_file(self.folds)["fold_vectors"]
        if folds is not None:
            if "item_vectors" not in graph or self.fine_tune_graph:
                raise ValueError(
                    f"folds is {self.folds}; expected embeddings beside it, and no fine_tune_graph: each "
                    "fold has vectors of its own"
                )
            expected = (self.data.num_folds, *graph["item_vectors"].shape)
            if folds.shape != expected:
                raise ValueError(
                    f"{self.folds} has vectors {list(folds.shape)}; expected {list(expected)}: "
                    "data.num_folds, and the items and dimension of embeddings"
                )
            graph["item_vectors"] = folds.mean(0)  # what is asked and served with
        check_sequence_encoder(self.make_encoder)
        dropout = dropout_for(self.data.targets_per_item) if self.dropout is None else self.dropout
        vectors = content.get("content_vectors")
        self.ranker = HybridRanker(
            self.make_encoder(self.data.history_length + 1, dropout),
            graph_vectors=graph.get("item_vectors"),
            item_degrees=graph.get("item_degrees"),
            fine_tune_graph=self.fine_tune_graph,
            content_vectors=vectors if self.content_as == "input" else None,
            is_trained=self.data.is_trained,
            num_items=self.data.num_items,
            context=self.data.context,
            heads=self.heads,
            dropout=dropout,
            **self.dropouts,
        )
        if folds is not None:  # at the scale that the ranker gives their mean
            scale = self.ranker.graph_vectors.norm() / graph["item_vectors"].norm().clamp(min=1e-12)
            folds = functional.pad(folds * scale, (0, 0, 0, 1))
        self.register_buffer("fold_vectors", folds, persistent=False)
        if vectors is not None and self.content_as == "start":
            start = start_vectors(vectors.numpy(), self.ranker.embedding.embedding_dim)
            self.ranker.start_from(torch.from_numpy(start))

    def configure_optimizers(self) -> Any:
        """Return Adam over the ranker's parameters, and its schedule."""
        # Fused: a table of a million items takes .3 s a step, not 4.
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)
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
        if self.fold_vectors is None:
            return self._loss_of(batch)
        with self.ranker.beside(self.fold_vectors[batch.fold]):
            return self._loss_of(batch)

    def _loss_of(self, batch: SequenceBatch) -> Tensor:
        known = batch.targets > 0
        targets = batch.targets[known]
        states = self.ranker.in_context(
            self.ranker.states(batch.history)[known],
            batch.context_rows[known],
            batch.context_weights[known],
        )
        if self.heads:
            states, targets = self._of_every_head(states, targets, batch.target_kinds[known])
        possible = self._possible_rows(targets.device)
        full = self.loss == "full" or (self.loss == "auto" and len(possible) <= FULL_SOFTMAX_ITEMS)
        negatives, expected = (possible, None) if full else self._negatives(possible)
        # Vectors of these items alone are made: a catalog may have millions.
        rows, place = torch.unique(torch.cat([targets, negatives]), return_inverse=True)
        loss = sampled_softmax_loss(
            states, self.ranker.vectors(rows), place[: len(targets)], place[len(targets) :], expected
        )
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))
        return loss

    def _negatives(self, possible: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `num_negatives` rows, and the logarithm of how often each was to be expected."""
        if not self.popularity:
            return possible[torch.randint(len(possible), (self.num_negatives,), device=possible.device)], None
        if self._degrees is None or self._degrees.device != possible.device:
            counts = torch.from_numpy(self.data.split.train.item_counts()).clamp(min=1)
            self._degrees = counts.to(possible.device)[possible].float()
        drawn, expected = negatives_by_popularity(self._degrees, self.popularity, self.num_negatives)
        return possible[drawn], expected

    def _of_every_head(self, states: Tensor, targets: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries of all heads, each where its kind of event came, and their targets.

        An example of one head counts as much as one of another, so a rare kind of event moves the shared
        vectors little.
        """
        queries = self.ranker.queries(states)
        came = torch.ones(queries.shape[:-1], dtype=torch.bool, device=kinds.device)
        for place, name in enumerate(self.heads, start=1):
            came[:, place] = (kinds & (1 << EVENT_CODE[name])) > 0
        return queries[came], targets.unsqueeze(1).expand(-1, queries.shape[1])[came]

    def _possible_rows(self, device: torch.device) -> Tensor:
        """Return the rows that a target is told apart from.

        An item that training never saw is no negative: nothing says that it was not wanted, and what is
        known of it would be learned to be unwanted. Where the ranker takes no content nothing is known, all
        such items have one vector, and the first of them stands for all: they are to stay below the others.
        """
        if self._possible is None or self._possible.device != device:
            possible = self.ranker.has_id[1:-1].clone()
            if self.ranker.content_projection is None and not possible.all():
                possible[(~possible).nonzero()[0]] = True
            self._possible = (possible.nonzero().squeeze(1) + 1).to(device)
        return self._possible

    def on_train_batch_start(self, batch: object, batch_index: int) -> None:
        """Draw what is random in an epoch by its number: a resumed fit draws what it would have drawn."""
        if batch_index == 0:
            torch.manual_seed(self.data.epoch_seed())

    def on_validation_epoch_start(self) -> None:
        """Make the candidates' vectors once for the whole epoch."""
        self._item_vectors = self.ranker.item_vectors().float()
        check_vectors("ranking", self._item_vectors, self.learning_rate)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Log the metrics of a batch of questions, all items ranked."""
        self._log_accuracy(batch, "val")

    def test_step(self, batch: QuestionBatch, batch_index: int) -> None:
        """Log the metrics of a batch of questions, all items ranked."""
        self._log_accuracy(batch, "test")

    def _log_accuracy(self, batch: QuestionBatch, part: str) -> None:
        history = torch.from_numpy(left_padded(batch.wanted, self.ranker.history_length))
        rows, weights = (torch.from_numpy(array).to(self.device) for array in batch.context)
        states = self.ranker.states(history.to(self.device))[:, -1]
        states = self.ranker.in_context(states, rows, weights).float()
        with torch.autocast(self.device.type, enabled=False):  # rounded scores would make ties
            scores = (states @ self._item_vectors.T).cpu().numpy()
        metrics = mean_accuracy(
            scores, batch.histories, batch.targets, (10,), repeats=self.data.split.repeats
        )
        for name in ("recall@10", "ndcg@10"):
            self.log(f"{part}_{name}", metrics[name], prog_bar=True, batch_size=len(batch), sync_dist=True)
