"""What encoders of a history share: who sees whom, positions, distances, and the frame around their blocks.

Shapes: B batch, T history, D dimension, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ranking.dropout import Dropout


class SequenceEncoder(nn.Module):
    """History -> one hidden state per position, each of which sees only itself and what came before.

    Positions count from the start of the history, so that a prefix gets the same states alone as inside a
    longer one.

    Args:
        make_block: of max_length, D, H and dropout: what takes states [B, T, D] and who sees whom [B, T, T]
            to states [B, T, D].
        max_length: longest T; also the size of the table of positions.
        dropout: on inputs, and the blocks'.
        dim: D.
        num_blocks: how many, one after the other.
        num_heads: H; must divide D.
    """

    def __init__(
        self,
        make_block: Callable[[int, int, int, float], nn.Module],
        max_length: int,
        dropout: float,
        dim: int,
        num_blocks: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("dim", dim, 1),
            ("num_blocks", num_blocks, 0),
            ("num_heads", num_heads, 1),
        ):
            if size < least:
                raise ValueError(f"{name} is {size}; expected {least} or more")
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of dim, which is {dim}")
        self.dim = dim
        self.max_length = max_length
        self.position = nn.Embedding(max_length, dim)
        nn.init.normal_(self.position.weight, std=dim**-0.5)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            make_block(max_length, dim, num_heads, dropout) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, items: Tensor, vectors: Tensor) -> Tensor:
        """Return the hidden states [B, T, D].

        Args:
            items: [B, T] int64 item rows, oldest first, padded on the left with 0. States at padding are
                finite and mean nothing.
            vectors: [B, T, D] the items' input vectors.
        """
        position = (items > 0).long().cumsum(1).sub(1).clamp(0, self.max_length - 1)
        x = self.dropout(vectors + self.position(position))
        visible = causal_mask(items)
        for block in self.blocks:
            x = block(x, visible)
        states: Tensor = self.norm(x)
        return states


class DistanceBias(nn.Module):
    """What is added to an attention logit for how far back it looks; nothing at first.

    Args:
        max_length: distances 0 to max_length - 1 have a bias.
        num_heads: H.
    """

    def __init__(self, max_length: int, num_heads: int) -> None:
        super().__init__()
        self.bias = nn.Embedding(max_length, num_heads)
        nn.init.zeros_(self.bias.weight)

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Return [H, T, T]: of the position (row) that looks at the other (column).

        Padding is on the left, so columns tell distances as positions do. What comes later gets the bias of
        distance 0: it is for a mask to hide.
        """
        place = torch.arange(length, device=device)
        distance = (place[:, None] - place[None, :]).clamp(0, self.bias.num_embeddings - 1)
        bias: Tensor = self.bias(distance).permute(2, 0, 1)
        return bias


def causal_mask(items: Tensor) -> Tensor:
    """Return [B, T, T] bool: True where the position (row) may see the other (column).

    A position sees what came before it, less the padding, and always itself: a row of padding with nothing
    to look at would be NaN in onnxruntime.
    """
    length = items.shape[1]
    place = torch.arange(length, device=items.device)
    before, itself = place[:, None] >= place[None, :], place[:, None] == place[None, :]
    return (before & (items > 0)[:, None, :]) | itself


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, T, D] as [B, H, T, E]."""
    batch, length, dim = x.shape
    return x.view(batch, length, num_heads, dim // num_heads).transpose(1, 2)
