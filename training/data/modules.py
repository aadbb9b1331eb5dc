"""Lightning data modules: one per training stage, both over the same split of the same directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ranking.context import ContextTable, Encoded
from retrieval.graph_matrix import USER_ITEM
from training.data.context import context_table, encoded_context
from training.data.graph import build_graph
from training.data.interactions import MAX_EVENTS
from training.data.sequences import (
    SequenceBatch,
    equal_share,
    make_sequences,
    num_batches,
    sequence_batches,
    targets_per_item,
)
from training.data.splits import Holdout, Split, SplitOptions, load_split, questions_at_once
from training.stages import check_numbers

# Of the ranker, at least, where batches need not be smaller than RankingData lets them be for it.
STEPS_AN_EPOCH = 150


class _StageData(L.LightningDataModule):
    """What the stages share: the split, and questions for validation and test."""

    def __init__(self, directory: Path, split: SplitOptions, max_validation_users: int) -> None:
        super().__init__()
        self.directory, self.options, self.max_validation_users = directory, split, max_validation_users
        self.context = ContextTable()  # of the ranker; stage one asks without
        self.seed = torch.initial_seed()

    @cached_property
    def split(self) -> Split:
        """The split data set; read at first use, unless it was set before."""
        return load_split(self.directory, self.options).split

    def epoch_seed(self) -> int:
        """Return what the shuffles of an epoch follow: the seed of the run and the number of the epoch.

        Nothing drawn since plays a part, so a resumed fit goes on with the order that it would have had, and
        the processes of a distributed fit share one order among them. Outside a fit each call is another.
        """
        if self.trainer is None:
            return int(torch.randint(2**31, ()))
        # Not trainer.current_epoch, which a resumed fit brings up to date behind its first batch.
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        both = (self.seed, progress.processed)
        return int(np.random.default_rng(both).integers(2**31))

    def val_dataloader(self) -> DataLoader[Any]:
        """Yield QuestionBatch of the validation targets (a fixed random part of them where they are many)."""
        return question_loader(self.split.validation.sample(self.max_validation_users), self.context)

    def test_dataloader(self) -> DataLoader[Any]:
        """Yield QuestionBatch of the test targets."""
        return question_loader(self.split.test, self.context)


class RetrievalData(_StageData):
    """The event graph, its edges in random batches, and questions.

    Args:
        directory: a data set directory (`trirank import`, `trirank simulate`).
        split: how to cut it.
        batch_size: edges of a step. None: a sixteenth of them, at least 256 and at most 8192, so that an
            epoch of small data has steps enough.
        max_validation_users: most users asked at each validation.
    """

    def __init__(
        self,
        directory: Path,
        split: SplitOptions = SplitOptions(),  # noqa: B008 (frozen)
        batch_size: int | None = None,
        max_validation_users: int = 5000,
    ) -> None:
        super().__init__(directory, split, max_validation_users)
        numbers = {"batch_size": batch_size, "max_validation_users": max_validation_users}
        check_numbers("retrieval.data.", 1, numbers)
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Build the graph of the training events."""
        self.graph = build_graph(self.split.train)
        self.item_degrees = torch.from_numpy(self.split.train.item_counts()).float()
        self.user_degrees = torch.from_numpy(self.split.train.user_counts()).float()

    def train_dataloader(self) -> DataLoader[Any]:
        """Yield [B, 2] int64 edges (user row, item row)."""
        edges = self.graph[USER_ITEM].edge_index.T.contiguous()
        batch_size = self.batch_size or int(np.clip(len(edges) // 16, 256, 8192))
        return _ShuffledBatches(edges, batch_size, self.epoch_seed)


class _ShuffledBatches(DataLoader[Any]):
    """Rows of one tensor in random batches; gathers a batch at once, where a DataLoader would row by row."""

    def __init__(self, rows: Tensor, batch_size: int, seed: Callable[[], int]) -> None:
        super().__init__(_Batched(rows, batch_size, seed), batch_size=None)


def _share() -> tuple[int, int]:
    """This process's number and how many there are, in distributed training; (0, 1) otherwise."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class _Batched(IterableDataset[Tensor]):
    def __init__(self, rows: Tensor, batch_size: int, seed: Callable[[], int]) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def __len__(self) -> int:
        return max(1, -(-len(self.rows) // self.batch_size) // _share()[1])

    def __iter__(self) -> Iterator[Tensor]:
        rank, world_size = _share()
        generator = torch.Generator().manual_seed(self.seed())
        batches = torch.split(torch.randperm(len(self.rows), generator=generator), self.batch_size)
        for batch in equal_share(batches, rank, world_size):
            yield self.rows[batch]


class RankingData(_StageData):
    """Histories in batches of like length, and questions.

    Args:
        directory: a data set directory (`trirank import`, `trirank simulate`).
        split: how to cut it.
        batch_size: most histories of a step. None: 128, or where an epoch would have fewer steps than
            STEPS_AN_EPOCH as many fewer, but 32 at least.
        max_tokens: most events of a step, padding included; long histories get smaller batches. None: 4096,
            or fewer likewise, but 512 at least.
        history_length: newest events that the ranker sees. None: as many as 95% of the users have,
            at least 50 and at most 200.
        context: keys of the context that the ranker takes (DatasetInfo.context, and hour and weekday where
            the data has unix times). None: all.
        max_validation_users: most users asked at each validation.
        num_folds: that users are dealt into; each batch is of one. As many as model.folds has vectors of.
    """

    def __init__(
        self,
        directory: Path,
        split: SplitOptions = SplitOptions(),  # noqa: B008 (frozen)
        batch_size: int | None = None,
        max_tokens: int | None = None,
        history_length: int | None = None,
        context: list[str] | None = None,
        max_validation_users: int = 10_000,
        num_folds: int = 1,
    ) -> None:
        super().__init__(directory, split, max_validation_users)
        numbers = {
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "history_length": history_length,
            "max_validation_users": max_validation_users,
        }
        check_numbers("ranking.data.", 1, numbers)
        check_numbers("ranking.", 1, {"num_folds": num_folds})
        self.num_folds = num_folds
        self._batch_size, self._max_tokens, self._history_length = batch_size, max_tokens, history_length
        self._context_names = context

    @property
    def history_length(self) -> int:
        """The newest events that the ranker sees."""
        if self._history_length is not None:
            return self._history_length
        lengths = np.diff(self.split.train.offsets)
        return int(np.clip(np.percentile(lengths[lengths > 0], 95), 50, 200))

    def setup(self, stage: str) -> None:
        """Cut the training histories into windows."""
        split = self.split
        if not split.ordered:
            raise ValueError(
                f"split {split.name} leaves the events without an order that a ranker could learn"
            )
        self.context = context_table(split.train, self._context_names)
        self.sequences = make_sequences(
            split.train, self.history_length, repeats=split.repeats, context=self.context
        )
        if left_out := self.sequences.num_left_out:
            print(
                f"the ranker does not learn from {left_out:,} events of users who have more than "
                f"{MAX_EVENTS:,}: of these it takes the newest",
                file=sys.stderr,
            )
        self.num_items = split.train.num_items
        self.event_types = split.train.wanted_types
        # An event that says "not this" is one too: the item was there to be chosen, or not.
        self.is_trained = torch.from_numpy(
            np.bincount(split.train.items, minlength=split.train.num_items + 1) > 0
        )
        self.targets_per_item = targets_per_item(split.train, split.repeats)
        wanted = STEPS_AN_EPOCH * _share()[1]  # each process has its share of the batches
        share = min(1.0, num_batches(self.sequences, 128, 4096) / wanted)
        self.batch_size = self._batch_size or max(32, round(128 * share))
        self.max_tokens = self._max_tokens or max(512, round(4096 * share))

    def train_dataloader(self) -> DataLoader[Any]:
        """Yield SequenceBatch."""
        return DataLoader(_SequenceDataset(self), batch_size=None)


class _SequenceDataset(IterableDataset[SequenceBatch]):
    def __init__(self, data: RankingData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[SequenceBatch]:
        rng = np.random.default_rng(self.data.epoch_seed())
        yield from sequence_batches(
            self.data.sequences,
            self.data.batch_size,
            self.data.max_tokens,
            rng,
            *_share(),
            num_folds=self.data.num_folds,
        )


@dataclass  # not frozen: Lightning moves a batch's tensors in place
class QuestionBatch:
    """Some questions of a holdout; lists hold one array per question."""

    users: NDArray[np.int32]  # [B]
    histories: list[NDArray[np.int32]]  # item rows, oldest first, each whole
    wanted: list[NDArray[np.int32]]  # the histories without events that say "not this"
    targets: list[NDArray[np.int32]]
    context: Encoded  # [B, K]

    def __len__(self) -> int:
        return len(self.users)


def question_loader(holdout: Holdout, context: ContextTable) -> DataLoader[Any]:
    """Yield all questions of a holdout, shortest history first, as QuestionBatch.

    As many at once as leave room for their scores of all items.
    """
    batch_size = questions_at_once(holdout.events.num_items)
    asked_in = encoded_context(context, holdout.events, holdout.ends)
    length = holdout.ends - holdout.events.offsets[holdout.users]
    order = torch.from_numpy(np.argsort(length, kind="stable"))

    def collate(rows: list[tuple[Tensor]]) -> QuestionBatch:
        questions = [int(row[0]) for row in rows]
        return QuestionBatch(
            holdout.users[questions],
            [holdout.history(q).items for q in questions],
            [holdout.history(q).wanted for q in questions],
            [holdout.target(q) for q in questions],
            Encoded(asked_in.rows[questions], asked_in.weights[questions]),
        )

    return DataLoader(TensorDataset(order), batch_size=batch_size, collate_fn=collate)
