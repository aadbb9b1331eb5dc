"""HSTU: pointwise attention over what a user did, without a softmax and without a feed-forward.

Jiaqi Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations", ICML 2024, arXiv:2402.17152, eq. 1 to 3. There is no time here, so the bias of a pair is
that of its distance in the history alone.

Where we differ from the paper: attention is divided by the longest history and not by the padded length of a
batch, so that a prefix gets the same states alone as inside a longer history.

Shapes: B batch, T history, D dimension, H heads, E = D / H.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ranking.encoders.sasrec import DistanceBias, causal_mask


class HSTU(nn.Module):
    """History -> one hidden state per position, each of which sees only itself and what came before.

    Args:
        max_length: longest T; also the size of the tables of positions and distances.
        dropout: on inputs and block outputs.
        dim: D.
        num_blocks: of pointwise attention.
        num_heads: H; must divide D.
    """

    def __init__(
        self,
        max_length: int,
        dropout: float = 0.2,
        *,
        dim: int = 128,
        num_blocks: int = 2,
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
        visible = causal_mask(items).unsqueeze(1)
        for block in self.blocks:
            x = block(x, visible)
        states: Tensor = self.norm(x)
        return states


class _Block(nn.Module):
    def __init__(self, max_length: int, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of dim, which is {dim}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 4 * dim)
        self.distance = DistanceBias(max_length, num_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.scale = 1.0 / max_length

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        gate, value, query, key = functional.silu(self.project(self.norm(x))).chunk(4, dim=-1)
        batch, length, dim = x.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, dim // self.num_heads).transpose(1, 2)  # [B, H, T, E]
            for part in (query, key, value)
        )
        scores = query @ key.transpose(2, 3) + self.distance(length, x.device)
        weights = (functional.silu(scores) * visible) * self.scale
        attended = (weights @ value).transpose(1, 2).flatten(2)
        fused: Tensor = x + self.dropout(self.out(self.attention_norm(attended) * gate))
        return fused
