"""SASRec: a causal Transformer over what a user did.

Wang-Cheng Kang and Julian McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv:1808.09781.

Where we differ from the paper: layer norm stands before attention and feed-forward (pre-norm) as in later
Transformers; positions count from the start of the history, so that a prefix gets the same states alone as
inside a longer history, and what was learned at every position of training holds at serving; each head has a
learned bias for how far back it looks (Raffel et al., "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer", JMLR 2020, section 2.1; here each distance has its own).

Shapes: B batch, T history, D dimension, H heads, E = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SASRec(nn.Module):
    """History -> one hidden state per position, each of which sees only itself and what came before.

    Args:
        max_length: longest T; also the size of the table of positions.
        dropout: on inputs, attention weights and block outputs.
        dim: D.
        num_blocks: attention + feed-forward blocks.
        num_heads: H; must divide D.
    """

    def __init__(
        self,
        max_length: int,
        dropout: float = 0.5,
        *,
        dim: int = 128,
        num_blocks: int = 1,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.max_length = max_length
        self.position = nn.Embedding(max_length, dim)
        nn.init.normal_(self.position.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(max_length, dim, num_heads, dropout) for _ in range(num_blocks))
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


class _Block(nn.Module):
    def __init__(self, max_length: int, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of dim, which is {dim}")
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.distance = DistanceBias(max_length, num_heads)
        self.attention_out = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, E]
            for part in self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        )
        bias = self.distance(x.shape[1], x.device).to(query.dtype)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias.masked_fill(~visible[:, None], -torch.inf),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).flatten(2)))
        fed: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return fed
