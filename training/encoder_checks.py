"""What encoders have to keep to, found out on a toy before any time is spent on training.

One that sees what it has to predict trains well, passes every comparison of ONNX with torch, and is worth
nothing: so it is refused here.

Shapes: B histories, T history, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.data import HeteroData

from engine.history import EVENT_CODE
from training.data.graph import build_graph
from training.data.interactions import Interactions

MAX_LENGTH = 8
LENGTHS = (6, 4, 1)  # of the toy's histories
NUM_USERS, NUM_ITEMS = 40, 30
TOLERANCE = 1e-4


def check_sequence_encoder(make: Callable[[int, float], nn.Module]) -> None:
    """Raise ValueError unless an encoder of histories can be trained with: see ranking/ranker.py.

    Args:
        make: of max_length and dropout.
    """
    with _toy("ranking.model.encoder"):
        encoder = make(MAX_LENGTH, 0.5).eval()
        for name in ("dim", "max_length"):
            if not isinstance(getattr(encoder, name, None), int):
                raise ValueError(f"it has no whole number `{name}`; expected attributes dim and max_length")
        if encoder.max_length != MAX_LENGTH:
            raise ValueError(
                f"it has max_length {encoder.max_length}; expected its first argument, {MAX_LENGTH}"
            )
        for parameter in encoder.parameters():  # a branch that begins at nothing shows what it does later
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        dim = int(encoder.dim)  # type: ignore[arg-type]
        longest = max(LENGTHS)
        items = torch.zeros(len(LENGTHS), longest, dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            items[row, longest - length :] = torch.arange(1, length + 1)
        vectors = torch.randn(len(LENGTHS), longest, dim) * (items > 0).unsqueeze(-1)

        states = _states(encoder, items, vectors, (len(LENGTHS), longest, dim))
        later_items, later_vectors = items.clone(), vectors.clone()
        later_items[:, -1], later_vectors[:, -1] = NUM_ITEMS, 1.0
        ahead = encoder(later_items, later_vectors)
        there = items > 0
        if not _close(states[:, :-1][there[:, :-1]], ahead[:, :-1][there[:, :-1]]):
            raise ValueError(
                "it looks ahead: its states change with later events, which are what it is to predict"
            )
        more = MAX_LENGTH - longest
        padded = encoder(functional.pad(items, (more, 0)), functional.pad(vectors, (0, 0, more, 0)))
        if not _close(states[there], padded[:, more:][there]):
            raise ValueError(
                "it minds padding: its states change with the zeros left of a history, of which there are "
                "as many as others in its batch are longer"
            )


def check_graph_encoder(make: Callable[[HeteroData], nn.Module]) -> None:
    """Raise ValueError unless an encoder of the event graph can be trained with: see docs/architecture.md.

    Args:
        make: of the graph.
    """
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(1, NUM_USERS + 1, 300)).astype(np.int32)
    items = rng.integers(1, NUM_ITEMS + 1, 300).astype(np.int32)
    kinds, times = np.full(300, EVENT_CODE["view"], np.uint8), np.arange(300, dtype=np.int64)
    graph = build_graph(Interactions(users, items, kinds, times, NUM_USERS, NUM_ITEMS))
    sizes = {"user": NUM_USERS + 1, "item": NUM_ITEMS + 1}
    with _toy("retrieval.model.encoder"):
        encoder = make(graph).eval()
        found = [("forward(graph)", encoder(graph))]
        if next(encoder.parameters(), None) is not None:  # of one in closed form nothing is trained
            if not hasattr(encoder, "initial_vectors"):
                raise ValueError("it has no initial_vectors(); expected what its vectors are made from")
            found.append(("initial_vectors()", encoder.initial_vectors()))  # type: ignore[operator]
        for name, vectors in found:
            if not isinstance(vectors, dict) or set(vectors) != set(sizes):
                raise ValueError(f"it gives no {{'user': ..., 'item': ...}} by {name}")
            for kind, size in sizes.items():
                shape = list(vectors[kind].shape)
                if len(shape) != 2 or shape[0] != size:
                    raise ValueError(
                        f"it gives {kind} vectors {shape} by {name}; expected a row for each node, {size}"
                    )
            widths = {kind: vectors[kind].shape[1] for kind in sizes}
            if widths["user"] != widths["item"]:
                raise ValueError(f"it gives vectors of unlike widths by {name}: {widths}; expected one")
            if not all(vectors[kind].isfinite().all() for kind in sizes):
                raise ValueError(f"it gives vectors that are not finite by {name}")


@contextmanager
def _toy(option: str) -> Iterator[None]:
    """Leave the random numbers of the training alone, and say of which option an error is."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPU's too, for good
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        except Exception as error:
            raise ValueError(
                f"{option}: it fails on a toy, {type(error).__name__}: {error}; "
                "docs/architecture.md says what is expected"
            ) from error


def _states(encoder: nn.Module, items: Tensor, vectors: Tensor, expected: tuple[int, ...]) -> Tensor:
    states: Tensor = encoder(items, vectors)
    if tuple(states.shape) != expected:
        raise ValueError(f"it gives states {list(states.shape)}; expected {list(expected)}: [B, T, dim]")
    if not states.isfinite().all():
        raise ValueError("it gives states that are not finite; expected finite ones, at padding too")
    return states


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=0.0, atol=TOLERANCE * max(1.0, float(one.abs().max()))))
