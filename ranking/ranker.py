"""HybridRanker: sequence states fused with graph vectors, then one score per candidate.

Shapes: B batch, T history, C candidates, D dimension, G graph dimension, F content dimension, I items,
K keys of the context. Q: how many numbers scores are inner products of, D; with the graph's own scores D + G,
until these are compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranking.context import ContextTable
from ranking.dropout import Dropout
from ranking.fusion import ContextFusion, GraphCrossAttention, GraphScores, HeadQueries

NO_CONTEXT = ContextTable()
NEXT = "next"  # the head of the next item, whatever the event


class HybridRanker(nn.Module):
    """Scores candidates for a history; candidates never see each other.

    An item's vector is its id embedding plus its projected graph vector plus its projected content vector, on
    the side of the candidates and of the history alike. A history starts with a learned start token, so an
    empty one has a state too. The sequence encoder turns the history into states, the states cross-attend to
    the graph vectors, the context of the moment bends them, and a candidate's score is the inner product of
    the last state with the candidate's vector. Because a score is an inner product, training can afford the
    softmax over the whole catalog, and serving needs one table of vectors, whatever they are made of. Once
    trained, the graph's own scores can be added (`add_graph_scores`).

    An item that training never saw has no id embedding: a learned vector that stands for all such items takes
    its place, and what is left is what graph and content say. Where there is content, training treats some
    items, drawn anew in each step, as if they were new (DropoutNet, Volkovs et al., NIPS 2017): without id
    and graph vector, which most new items lack too. So the stand-in is learned, and content suffices.

    Args:
        encoder: a SequenceEncoder with attributes `dim` and `max_length`:
            forward(items [B, T], vectors [B, T, D]) -> [B, T, D].
        graph_vectors: [I+1, G] float32, row 0 zeros. None leaves the graph out.
        item_degrees: [I+1] training interactions of each item; needed with graph_vectors.
        fine_tune_graph: whether training may move the graph vectors too; they stay as they are otherwise.
        content_vectors: [I+1, F] float32, row 0 and items of which nothing is known zeros; kept frozen. None
            leaves the content out.
        is_trained: [I+1] bool, the items that training has events of. None: all.
        num_items: I; needed without graph_vectors and content_vectors.
        context: the keys of the context; the ranker has no context where there are none.
        heads: kinds of events that have a query of their own, beside the next item whatever the event. None:
            the state is all that candidates are scored with.
        dropout: on graph vectors and on the fusion's output.
        content_dropout: on content vectors.
        id_dropout: share of the items with content that are treated as new in a step of training.
        context_dropout: share of the context's values that count as unknown, in training.
    """

    graph_vectors: Tensor
    fold_weights: Tensor
    content_vectors: Tensor
    has_id: Tensor
    may_be_new: Tensor
    compress_queries: Tensor | None
    compress_items: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        *,
        graph_vectors: Tensor | None = None,
        item_degrees: Tensor | None = None,
        fine_tune_graph: bool = False,
        content_vectors: Tensor | None = None,
        is_trained: Tensor | None = None,
        num_items: int | None = None,
        context: ContextTable = NO_CONTEXT,
        heads: Sequence[str] = (),
        dropout: float = 0.5,
        content_dropout: float = 0.5,
        id_dropout: float = 0.0,
        context_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if graph_vectors is not None and (item_degrees is None or len(item_degrees) != len(graph_vectors)):
            raise ValueError("item_degrees must be given with graph_vectors, one number a row")
        given = {"graph_vectors": graph_vectors, "content_vectors": content_vectors, "is_trained": is_trained}
        for name, rows in given.items():
            if rows is None:
                continue
            if num_items is not None and len(rows) != num_items + 1:
                raise ValueError(
                    f"{name} has {len(rows)} rows; expected {num_items + 1}, one more than items"
                )
            num_items = len(rows) - 1
        if num_items is None:
            raise ValueError("num_items must be given where graph_vectors are not")
        dim = int(encoder.dim)  # type: ignore[arg-type]
        self.num_items = num_items
        self.history_length = int(encoder.max_length) - 1  # type: ignore[arg-type]
        self.encoder = encoder
        self.id_dropout = id_dropout if content_vectors is not None else 0.0
        # Row 0 is padding and row I+1 the start token.
        self.embedding = nn.Embedding(num_items + 2, dim, padding_idx=0)
        nn.init.normal_(self.embedding.weight[1:], std=dim**-0.5)
        self.unknown_id = nn.Parameter(torch.zeros(dim))
        trained = torch.ones(num_items + 1, dtype=torch.bool) if is_trained is None else is_trained.bool()
        has_id = torch.cat([trained, torch.ones(1, dtype=torch.bool)])
        has_id[0] = True
        self.register_buffer("has_id", has_id)
        self.fusion: GraphCrossAttention | None = None
        if graph_vectors is not None and item_degrees is not None:
            scaled = _unit_scale(graph_vectors)
            if fine_tune_graph:
                self.graph_vectors = nn.Parameter(scaled)
            else:
                self.register_buffer("graph_vectors", scaled)
            weights = item_degrees.clamp(min=1).rsqrt()
            weights[0] = 0.0
            self.register_buffer("fold_weights", torch.cat([weights, weights.new_zeros(1)]))
            self.fusion = GraphCrossAttention(self.history_length + 1, dim, graph_vectors.shape[1], dropout)
            self.item_projection = _projection(graph_vectors.shape[1], dim)
            self.graph_dropout = Dropout(dropout)
        self.content_projection: nn.Linear | None = None
        if content_vectors is not None:
            self.register_buffer("content_vectors", _unit_scale(content_vectors))
            self.content_projection = _projection(content_vectors.shape[1], dim)
            self.content_dropout = Dropout(content_dropout)
        may_be_new = torch.zeros(num_items + 2, dtype=torch.bool)
        if content_vectors is not None:
            may_be_new[1:-1] = content_vectors[1:].any(dim=1)
        self.register_buffer("may_be_new", may_be_new, persistent=False)
        self.context = context
        self.context_fusion: ContextFusion | None = None
        if len(context):
            self.context_fusion = ContextFusion(dim, context, context_dropout)
        self.heads: tuple[str, ...] = (NEXT, *heads) if heads else ()
        self.head_queries = HeadQueries(dim, len(heads)) if heads else None
        self.graph_scores: GraphScores | None = None
        self.register_buffer("compress_queries", None, persistent=False)
        self.register_buffer("compress_items", None, persistent=False)

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors of items, [..., D]: what they are scored with, and what a history is read from.

        Args:
            rows: [...] int64 item rows; row 0 is padding and has the zero vector, row I+1 the start token.
        """
        has_id, as_new = self.has_id[rows], None
        if self.training and self.id_dropout:
            as_new = torch.rand(rows.shape, device=rows.device) < self.id_dropout
            as_new &= self.may_be_new[rows]
            has_id = has_id & ~as_new
        vectors: Tensor = torch.where(has_id.unsqueeze(-1), self.embedding(rows), self.unknown_id)
        if self.fusion is not None:
            graph = functional.embedding(rows, self.graph_vectors)
            if as_new is not None:
                graph = graph * ~as_new.unsqueeze(-1)
            vectors = vectors + self.item_projection(self.graph_dropout(graph))
        if self.content_projection is not None:
            vectors = vectors + self.content_projection(self.content_dropout(self.content_vectors[rows]))
        return vectors

    @contextmanager
    def beside(self, graph_vectors: Tensor) -> Iterator[None]:
        """Stand on other vectors of the graph, [I+2, G], for as long as the block lasts."""
        own, self.graph_vectors = self.graph_vectors, graph_vectors
        try:
            yield
        finally:
            self.graph_vectors = own

    @torch.no_grad()
    def start_from(self, vectors: Tensor) -> None:
        """Let the id embeddings start at `vectors` [I+1, D]; where one is zero, the random start is kept."""
        own = self.embedding.weight[:-1]
        own.copy_(torch.where(vectors == 0, own, vectors))

    @torch.no_grad()
    def add_graph_scores(self, vectors: Tensor, weight: float, half_life: float | None) -> None:
        """Let the graph's own scores count beside the ranker's from now on; see GraphScores.

        Args:
            vectors: [I+1, G] of stage one, row 0 zeros; taken at unit mean square.
            weight: 0 takes them out again.
            half_life: of an event, in events; None counts all alike.

        Raises:
            ValueError: the ranker has no graph, or is in training mode: nothing of these scores is trained.
        """
        if self.fusion is None:
            raise ValueError("the ranker has no graph; expected one with graph_vectors")
        self._check_trained()
        self.graph_scores = self.compress_queries = self.compress_items = None
        if weight:
            scaled, fold_weights = _unit_scale(vectors)[:-1], self.fold_weights[:-1]
            self.graph_scores = GraphScores(scaled, fold_weights, weight, half_life)

    @torch.no_grad()
    def set_vectors(self, rows: Tensor, vectors: Tensor) -> None:
        """Let the items' `item_parts` be these from now on, whatever graph and content say of them.

        Args:
            rows: [N] int64 item rows.
            vectors: [N, D or D + G] float32; the first D of them are what a history is read from.

        Raises:
            ValueError: in training, which leaves parts of a vector out at random.
        """
        self._check_trained()
        dim = self.embedding.embedding_dim
        self.has_id[rows] = True
        self.embedding.weight[rows] += vectors[:, :dim] - self.vectors(rows)
        if self.graph_scores is not None:
            self.graph_scores.vectors[rows] = vectors[:, dim:] / self.graph_scores.weight

    def _check_trained(self) -> None:
        if self.training:
            raise ValueError("the ranker is in training mode; expected evaluation mode")

    def all_vectors(self) -> Tensor:
        """Return `vectors` of every row, [I+2, D]: what histories are read from."""
        return self.vectors(torch.arange(self.num_items + 2, device=self.embedding.weight.device))

    def item_parts(self) -> Tensor:
        """Return what candidates are scored by, uncompressed, [I+1, D or D + G]; row 0 is padding."""
        vectors = self.all_vectors()[:-1]
        if self.graph_scores is None:
            return vectors
        return torch.cat([vectors, self.graph_scores.weight * self.graph_scores.vectors], dim=-1)

    def item_vectors(self) -> Tensor:
        """Return what candidates are scored by, [I+1, Q]; row 0 is padding."""
        parts = self.item_parts()
        return parts if self.compress_items is None else parts @ self.compress_items

    def compress(self, queries: Tensor, items: Tensor) -> None:
        """Let queries and what candidates are scored by be multiplied with these, [D + G, D] each.

        See training/compression.py. What a history is read from stays as it is.
        """
        self.compress_queries, self.compress_items = queries, items

    def states(self, history: Tensor, table: Tensor | None = None) -> Tensor:
        """Return the state after the start token and after each event, [B, T+1, D], whatever the context.

        States at padding are finite and mean nothing. The last one is never padding: an empty history has the
        start token's.

        Args:
            history: [B, T] int64 item rows 1..I, oldest first, padded on the left with 0.
            table: all_vectors(), where they are worked out already.
        """
        # The start token stands right before the first event, so that columns tell distances.
        items = functional.pad(history, (1, 0))
        is_start = (items == 0) & (functional.pad(history, (0, 1), value=1) > 0)
        items = torch.where(is_start, self.num_items + 1, items)
        states: Tensor = self.encoder(items, self.vectors(items) if table is None else table[items])
        if self.fusion is not None:
            graph = functional.embedding(items, self.graph_vectors)
            states = self.fusion(states, items, graph, self.fold_weights[items])
        return states

    def in_context(self, states: Tensor, rows: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return states [..., D] as the context bends them: what candidates are scored with in training.

        Args:
            states: [..., D], of `states`.
            rows: [..., K] int64 and
            weights: [..., K] float32, as ContextTable gives them; None where nothing is known of the moment.
        """
        if self.context_fusion is None:
            return states
        bent: Tensor = self.context_fusion(states, rows, weights)
        return bent

    def queries(self, states: Tensor) -> Tensor:
        """Return the query of each of `heads`, [..., K, D], for states [..., D] of `in_context`."""
        if self.head_queries is None:
            return states.unsqueeze(-2)
        queries: Tensor = self.head_queries(states)
        return queries

    def combined(self, states: Tensor, head_weights: Tensor | None = None) -> Tensor:
        """Return the one query [..., D] whose scores are the weighted sums of the heads' scores.

        Args:
            states: [..., D], of `in_context`.
            head_weights: [..., K], in the order of `heads`; None asks for the next item alone.
        """
        if head_weights is None:
            return states
        return (self.queries(states) * head_weights.unsqueeze(-1)).sum(-2)

    def query(
        self,
        history: Tensor,
        context_rows: Tensor | None = None,
        context_weights: Tensor | None = None,
        head_weights: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """Return what candidates are scored with, [B, Q]: the last state, and the graph's own say.

        Args:
            history: [B, T] int64, T >= 1; see `states`.
            context_rows: [B, K] int64; see `in_context`.
            context_weights: [B, K] float32.
            head_weights: [B, heads] float32; see `combined`. The graph's scores count by their sum.
            table: all_vectors(), where they are worked out already.
        """
        state = self.in_context(self.states(history, table)[:, -1], context_rows, context_weights)
        state = self.combined(state, head_weights)
        if self.graph_scores is None:
            return state
        own = self.graph_scores(history)
        if head_weights is not None:
            own = own * head_weights.sum(-1, keepdim=True)
        query = torch.cat([state, own], dim=-1)
        return query if self.compress_queries is None else query @ self.compress_queries

    def forward(
        self,
        history: Tensor,
        candidates: Tensor,
        context_rows: Tensor | None = None,
        context_weights: Tensor | None = None,
        head_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the candidates' scores [B, C] and what they are scored with, [B, Q]: see `query`.

        Args:
            history: [B, T] int64, T >= 1.
            candidates: [B, C] int64 item rows.
            context_rows: [B, K] int64.
            context_weights: [B, K] float32.
            head_weights: [B, heads] float32.
        """
        query = self.query(history, context_rows, context_weights, head_weights)
        scores = (self.item_vectors()[candidates] @ query.unsqueeze(-1)).squeeze(-1)
        return scores, query


def _unit_scale(vectors: Tensor) -> Tensor:
    """Return vectors [I+1, N] at unit mean square, and a row of zeros for the start token: [I+2, N].

    So the layers' initial scale fits whatever made the vectors. Rows of zeros have no say in the scale.
    """
    filled = vectors[1:][vectors[1:].any(dim=1)]
    scale = filled.square().mean().sqrt().clamp(min=1e-12) if len(filled) else 1.0
    return torch.cat([vectors / scale, vectors.new_zeros(1, vectors.shape[1])])


def _projection(width: int, dim: int) -> nn.Linear:
    layer = nn.Linear(width, dim, bias=False)
    nn.init.normal_(layer.weight, std=0.3 * (dim * width) ** -0.5)
    return layer
