"""LightGCN: a graph encoder that only propagates.

Xiangnan He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
SIGIR 2020, arXiv:2002.02126.

Shapes: N nodes (users, then items), E edges, D dimension, K layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from retrieval.graph_matrix import AdjacencyOf, propagate, start_from_spectrum


class LightGCN(nn.Module):
    """User and item vectors: the mean over layers of the embeddings, propagated over user-item edges.

    e^(k+1) = A e^(k) with A = D^-1/2 (0 R; R^T 0) D^-1/2 (eq. 3 and 8), and e = sum_k e^(k) / (K + 1)
    (eq. 4 with the paper's uniform alpha). No weights but the embeddings, no non-linearity.

    Args:
        graph: gives the numbers of nodes; node 0 of each type is padding and has no edge.
        dim: D.
        num_layers: K; 0 is matrix factorization.
        init: "spectral" starts from the leading singular vectors of the normalized event matrix, which
            training would have to find first; they take seconds. "normal" draws at random, as the paper does.
        init_std: standard deviation of the initial embeddings (the authors' code uses 0.1, with "normal").
    """

    def __init__(
        self,
        graph: HeteroData,
        *,
        dim: int = 64,
        num_layers: int = 3,
        init: Literal["spectral", "normal"] = "spectral",
        init_std: float = 0.3,
    ) -> None:
        super().__init__()
        if dim < 1 or num_layers < 0:
            raise ValueError(
                f"dim is {dim}, num_layers is {num_layers}; expected dim >= 1 and num_layers >= 0"
            )
        self.num_users = int(graph["user"].num_nodes)
        self.num_items = int(graph["item"].num_nodes)
        self.num_layers = num_layers
        self.embedding = nn.Embedding(self.num_users + self.num_items, dim)
        nn.init.normal_(self.embedding.weight, std=init_std)
        if init == "spectral":
            start_from_spectrum(self.embedding.weight, graph, init_std)
        self._adjacency_of = AdjacencyOf()

    def forward(self, graph: HeteroData) -> dict[str, Tensor]:
        """Return {"user": [U+1, D], "item": [I+1, D]}."""
        adjacency = self._adjacency_of(graph, self.embedding.weight.device)
        layer = total = self.embedding.weight
        for _ in range(self.num_layers):
            layer = propagate(adjacency, layer)
            total = total + layer
        users, items = torch.split(total / (self.num_layers + 1), [self.num_users, self.num_items])
        return {"user": users, "item": items}

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return e^(0), the only parameters: {"user": [U+1, D], "item": [I+1, D]}."""
        users, items = torch.split(self.embedding.weight, [self.num_users, self.num_items])
        return {"user": users, "item": items}
