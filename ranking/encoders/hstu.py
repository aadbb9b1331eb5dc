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

from ranking.dropout import Dropout
from ranking.encoders.sequence_encoder import DistanceBias, SequenceEncoder, split_heads


class HSTU(SequenceEncoder):
    """Gated pointwise attention; see SequenceEncoder for what goes in and comes out.

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
        super().__init__(_Block, max_length, dropout, dim, num_blocks, num_heads)


class _Block(nn.Module):
    def __init__(self, max_length: int, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 4 * dim)
        self.distance = DistanceBias(max_length, num_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)
        self.scale = 1.0 / max_length

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        gate, value, query, key = functional.silu(self.project(self.norm(x))).chunk(4, dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        scores = query @ key.transpose(2, 3) + self.distance(x.shape[1], x.device)
        weights = (functional.silu(scores) * visible[:, None]) * self.scale
        attended = (weights @ value).transpose(1, 2).flatten(2)
        fused: Tensor = x + self.dropout(self.out(self.attention_norm(attended) * gate))
        return fused
