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

from ranking.dropout import Dropout
from ranking.encoders.sequence_encoder import DistanceBias, SequenceEncoder, split_heads


class SASRec(SequenceEncoder):
    """A causal Transformer; see SequenceEncoder for what goes in and comes out.

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
        super().__init__(_Block, max_length, dropout, dim, num_blocks, num_heads)


class _Block(nn.Module):
    def __init__(self, max_length: int, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.distance = DistanceBias(max_length, num_heads)
        self.attention_out = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        query, key, value = (
            split_heads(part, self.num_heads)
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
