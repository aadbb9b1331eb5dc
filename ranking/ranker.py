"""HybridRanker: sequence states fused with graph vectors, then one score per candidate.

Shapes: B batch, T history, C candidates, D dimension, G graph dimension, I items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ranking.fusion import GraphCrossAttention


class HybridRanker(nn.Module):
    """Scores candidates for a history; candidates never see each other.

    A history starts with a learned start token, so an empty one has a state too. The sequence encoder turns
    the history into states, the states cross-attend to the graph vectors, and a candidate's score is the
    inner product of the last state with the candidate's vector: its id embedding plus its projected graph
    vector. Because a score is an inner product, training can afford the softmax over the whole catalog.

    Args:
        encoder: a SequenceEncoder with attributes `dim` and `max_length`:
            forward(items [B, T], vectors [B, T, D]) -> [B, T, D].
        graph_vectors: [I+1, G] float32, row 0 zeros; kept frozen. None leaves the graph out.
        item_degrees: [I+1] training interactions of each item; needed with graph_vectors.
        num_items: I; needed without graph_vectors.
        dropout: on graph vectors and on the fusion's output.
    """

    graph_vectors: Tensor
    fold_weights: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        graph_vectors: Tensor | None = None,
        item_degrees: Tensor | None = None,
        num_items: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if graph_vectors is not None:
            if item_degrees is None or len(item_degrees) != len(graph_vectors):
                raise ValueError("item_degrees must be given with graph_vectors, one number a row")
            num_items = len(graph_vectors) - 1
        if num_items is None:
            raise ValueError("num_items must be given where graph_vectors are not")
        dim = int(encoder.dim)  # type: ignore[arg-type]
        self.num_items = num_items
        self.history_length = int(encoder.max_length) - 1  # type: ignore[arg-type]
        self.encoder = encoder
        # Row 0 is padding and row I+1 the start token.
        self.embedding = nn.Embedding(num_items + 2, dim, padding_idx=0)
        nn.init.normal_(self.embedding.weight[1:], std=dim**-0.5)
        self.fusion: GraphCrossAttention | None = None
        if graph_vectors is not None and item_degrees is not None:
            # Brought to unit mean square, so that the layers' initial scale fits any graph encoder.
            scale = graph_vectors[1:].square().mean().sqrt().clamp(min=1e-12)
            start = graph_vectors.new_zeros(1, graph_vectors.shape[1])
            self.register_buffer("graph_vectors", torch.cat([graph_vectors / scale, start]))
            weights = item_degrees.clamp(min=1).rsqrt()
            weights[0] = 0.0
            self.register_buffer("fold_weights", torch.cat([weights, weights.new_zeros(1)]))
            self.fusion = GraphCrossAttention(dim, graph_vectors.shape[1], dropout)
            self.item_projection = nn.Linear(graph_vectors.shape[1], dim, bias=False)
            nn.init.normal_(self.item_projection.weight, std=0.3 * (dim * graph_vectors.shape[1]) ** -0.5)
            self.graph_dropout = nn.Dropout(dropout)

    def item_vectors(self) -> Tensor:
        """Return what candidates are scored with, [I+1, D]; row 0 is padding."""
        vectors = self.embedding.weight[:-1]
        if self.fusion is not None:
            vectors = vectors + self.item_projection(self.graph_dropout(self.graph_vectors[:-1]))
        return vectors

    def states(self, history: Tensor) -> Tensor:
        """Return the state after the start token and after each event, [B, T+1, D].

        Args:
            history: [B, T] int64 item rows 1..I, oldest first, padded on the left with 0.
        """
        start = self.num_items + 1
        items = torch.cat([torch.full_like(history[:, :1], start), history], dim=1)
        # Padding looks like the start token and sees nothing else, so its state is the start token's: the
        # last state of a history of nothing but padding is that of an empty history.
        tokens = torch.where(items > 0, items, start)
        vectors = self.embedding(tokens)
        if self.fusion is None:
            states: Tensor = self.encoder(items, vectors)
            return states
        graph = self.graph_vectors[tokens]
        states = self.encoder(items, vectors + self.item_projection(self.graph_dropout(graph)))
        fused: Tensor = self.fusion(states, items, graph, self.fold_weights[tokens])
        return fused

    def forward(self, history: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the candidates' scores [B, C] and the users' states [B, D].

        Args:
            history: [B, T] int64, T >= 1; see `states`.
            candidates: [B, C] int64 item rows.
        """
        state = self.states(history)[:, -1]
        scores = (self.item_vectors()[candidates] @ state.unsqueeze(-1)).squeeze(-1)
        return scores, state
