"""What the tests of encoders share: histories, and the frame around the blocks as explicit loops."""

import math
from collections.abc import Callable

import numpy as np
import torch

DIM, MAX_LENGTH = 8, 6


def disturbed(encoder: torch.nn.Module) -> torch.nn.Module:
    """Return an encoder with noise on its parameters: biases of 0 and norms of 1 would hide a mistake."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


def padded(*lengths: int, width: int = MAX_LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded items [B, T] of these lengths and vectors [B, T, D] that padding shares."""
    rng = torch.Generator().manual_seed(1)
    items = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        items[row, width - length :] = torch.randint(1, 50, (length,), generator=rng)
    vectors = torch.randn(50, DIM, generator=rng, dtype=torch.float64)
    return items, vectors[items]


class Weights:
    """An encoder's weights by name, and its layers on one vector [D]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        self.weight = {name: value.numpy() for name, value in encoder.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.weight[f"{name}.weight"] @ x + self.weight[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - sum(x) / len(x)
        scaled = centred / math.sqrt(sum(centred**2) / len(x) + 1e-5)
        return scaled * self.weight[f"{name}.weight"] + self.weight[f"{name}.bias"]


# A block: the weights, their prefix, the states before it, and who sees whom -> the states after it.
Block = Callable[[Weights, str, list[np.ndarray], list[list[int]]], list[np.ndarray]]


def by_loops(
    encoder: torch.nn.Module, items: torch.Tensor, vectors: torch.Tensor, block: Block
) -> np.ndarray:
    """Return the states [B, T, D] by loops over batch and positions."""
    weights = Weights(encoder)
    result = np.zeros(vectors.shape)
    for b, history in enumerate(items.tolist()):
        visible = [[s for s in range(t + 1) if history[s] > 0 or s == t] for t in range(len(history))]
        states = []
        for t, vector in enumerate(vectors[b].numpy()):
            position = max(0, sum(item > 0 for item in history[: t + 1]) - 1)
            states.append(vector + weights.weight["position.weight"][position])
        for n in range(len(encoder.blocks)):
            states = block(weights, f"blocks.{n}", states, visible)
        result[b] = [weights.norm("norm", state) for state in states]
    return result
