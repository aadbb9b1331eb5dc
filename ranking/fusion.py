"""Fusion: hidden states of the sequence cross-attend to graph vectors, and are bent by the context.

Beside what they come to, the graph has a say of its own in the scores.

Shapes: B batch, T history, D dimension, G graph dimension, K keys of the context.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranking.context import ContextTable
from ranking.dropout import Dropout
from ranking.encoders.sequence_encoder import DistanceBias, causal_mask


class GraphCrossAttention(nn.Module):
    """Each state attends to the graph vectors of the items so far and of the user so far.

    The user's vector is folded in from the items up to the position (LightGCN eq. 3 for a new node), not read
    from the trained table: the trained one was fitted to the very items that the ranker has to predict, so
    with it the ranker would learn to look the answer up, and fail on users and clicks it has not seen.

    The output projection starts at zero: training starts from the sequence model alone.

    Args:
        max_length: longest T.
        dim: D.
        graph_dim: G.
        dropout: on the graph vectors and on the output.
    """

    def __init__(self, max_length: int, dim: int, graph_dim: int, dropout: float) -> None:
        super().__init__()
        self.distance = DistanceBias(max_length, 1)
        self.query = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.key_value = nn.Linear(graph_dim, 2 * dim)
        self.user_key_value = nn.Linear(graph_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout = Dropout(dropout)
        self.scale = dim**-0.5

    def forward(self, states: Tensor, items: Tensor, graph_vectors: Tensor, fold_weights: Tensor) -> Tensor:
        """Return the fused states [B, T, D].

        Args:
            states: [B, T, D].
            items: [B, T] int64 item rows, 0 is padding.
            graph_vectors: [B, T, G] of these items; zero where there is none.
            fold_weights: [B, T] weight of each item in the user's vector, 1 / sqrt(degree); 0 at padding and
                at the start token.
        """
        # The start token is no item: like padding it has no weight.
        count = (fold_weights > 0).to(graph_vectors.dtype).cumsum(1).clamp(min=1).unsqueeze(-1)
        user = (graph_vectors * fold_weights.unsqueeze(-1)).cumsum(1) / count.sqrt()

        query = self.query(states)
        key, value = self.key_value(self.dropout(graph_vectors)).chunk(2, dim=-1)
        user_key, user_value = self.user_key_value(self.dropout(user)).chunk(2, dim=-1)
        visible = causal_mask(items)
        # An item counts by how long ago it was, too: on graph vectors alone the attention could not tell.
        bias = self.distance(items.shape[1], items.device)
        to_items = ((query @ key.transpose(1, 2)) * self.scale + bias).masked_fill(~visible, -torch.inf)
        to_user = (query * user_key).sum(-1, keepdim=True) * self.scale
        weights = torch.softmax(torch.cat([to_items, to_user], dim=-1), dim=-1)
        attended = weights[..., :-1] @ value + weights[..., -1:] * user_value
        fused: Tensor = states + self.dropout(self.out(attended))
        return fused


class GraphScores(nn.Module):
    """The graph's own say in a score: <u, weight * g>, beside what attention makes of the graph.

    u is the visitor's vector at unit length, folded in from the history (LightGCN eq. 3 for a new node, the
    n-th last event times 2^(-n / half_life), whatever it repeats), and g the candidate's graph vector.

    Nothing of it is trained: beside a graph that has seen the training events, training would give it more
    weight than it earns on others. The weight is chosen on events that neither network has learned from (late
    fusion by stacking: Wolpert, "Stacked Generalization", Neural Networks 1992).

    Args:
        vectors: [I+1, G], row 0 zeros.
        fold_weights: [I+1] of each item in the visitor's vector, 1 / sqrt(degree); 0 at row 0.
        weight: above 0.
        half_life: of an event, in events; None counts all alike.
    """

    vectors: Tensor
    fold_weights: Tensor

    def __init__(self, vectors: Tensor, fold_weights: Tensor, weight: float, half_life: float | None) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.clone())
        self.register_buffer("fold_weights", fold_weights.clone())
        self.weight, self.half_life = weight, half_life

    def forward(self, history: Tensor) -> Tensor:
        """Return u, [B, G]; zero where the history is empty.

        Args:
            history: [B, T] int64 item rows, oldest first, padded on the left with 0.
        """
        weights = self.fold_weights[history]
        if self.half_life is not None:
            ages = torch.arange(history.shape[1] - 1, -1, -1, device=history.device)
            weights = weights * torch.exp2(-ages / self.half_life)
        user = (self.vectors[history] * weights.unsqueeze(-1)).sum(1)
        return functional.normalize(user, dim=-1)


class ContextFusion(nn.Module):
    """Bends a state to the moment: state * (1 + scale) + shift, each a sum over the context's values.

    FiLM (Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018, eq. 1).
    The shift says what is wanted more at such a moment whoever asks, the scale which of the visitor's wishes
    count.
    All effects start at zero: training starts from the ranker without context. Once trained, `strength` says
    how much of the way from what an unknown moment does to what this one does is gone: 1 is all, as trained,
    and 0 knows no moments.

    Args:
        dim: D.
        table: the keys, and where their effects stand.
        dropout: share of the values that count as unknown in training, so that the defaults are learned.
    """

    default_rows: Tensor

    def __init__(self, dim: int, table: ContextTable, dropout: float) -> None:
        super().__init__()
        self.effects = nn.Embedding(table.num_rows, 2 * dim)
        nn.init.zeros_(self.effects.weight)
        self.register_buffer("default_rows", torch.from_numpy(table.defaults))
        self.dropout = dropout
        self.strength = 1.0

    def forward(self, states: Tensor, rows: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the bent states [..., D].

        Args:
            states: [..., D].
            rows: [..., K] int64 rows of the table; None where nothing is known of the moment.
            weights: [..., K] float32 how often each row counts; needed with rows.
        """
        if rows is None or weights is None:
            rows = self.default_rows.expand(*states.shape[:-1], -1)
            weights = torch.ones_like(rows, dtype=states.dtype)
        if self.training and self.dropout:
            unknown = torch.rand(rows.shape, device=rows.device) < self.dropout
            rows = torch.where(unknown, self.default_rows, rows)
            weights = torch.where(unknown, 1.0, weights)
        effect = (self.effects(rows) * weights.unsqueeze(-1)).sum(-2)
        if self.strength != 1:
            unknown_moment = self.effects(self.default_rows).sum(-2)
            effect = unknown_moment + self.strength * (effect - unknown_moment)
        scale, shift = effect.chunk(2, dim=-1)
        bent: Tensor = states * (1 + scale) + shift
        return bent


class HeadQueries(nn.Module):
    """One query for each kind of event, over the same item vectors: state + W_k state + b_k.

    So a score of any kind is an inner product, and a weighted sum of scores is the inner product with the
    weighted sum of the queries. The heads start where the state is.

    Args:
        dim: D.
        num_heads: K, beside the one that the state itself is.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.turn = nn.Linear(dim, num_heads * dim)
        nn.init.zeros_(self.turn.weight)
        nn.init.zeros_(self.turn.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return the queries [..., 1 + K, D] of states [..., D]: the state itself, then one for each head."""
        own = states.unsqueeze(-2)
        return torch.cat([own, own + self.turn(states).unflatten(-1, (self.num_heads, -1))], dim=-2)
