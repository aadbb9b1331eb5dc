"""NGCF: a graph encoder whose messages are transformed, and know their receiver.

Xiang Wang et al., "Neural Graph Collaborative Filtering", SIGIR 2019, arXiv:1905.08108.

Shapes: N nodes (users, then items), D dimension, K layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.data import HeteroData

from retrieval.graph_matrix import AdjacencyOf, propagate, start_from_spectrum


class NGCF(nn.Module):
    """User and item vectors: the embeddings and every layer's output, side by side.

    E^(k) = LeakyReLU((A + I) E^(k-1) W1 + (A E^(k-1) * E^(k-1)) W2) with A = D^-1/2 (0 R; R^T 0) D^-1/2
    (eq. 7 and 8), and e = e^(0) || ... || e^(K) (eq. 9), so a vector has (K + 1) D numbers.

    Three things are as in the authors' code: the layers' outputs enter eq. 9 with length 1, LeakyReLU's slope
    is 0.2, and message dropout falls on a layer's output. Where that code leaves the paper we follow the
    paper: the code averages over neighbours and the node itself in place of A, adds biases, and applies
    LeakyReLU to the two terms apart.

    Args:
        graph: gives the numbers of nodes; node 0 of each type is padding and has no edge.
        dim: D, of the embeddings and of each layer.
        num_layers: K; 0 is matrix factorization.
        message_dropout: share of a layer's output that a training step drops.
        init: "normal" draws the embeddings at random, as the paper does; "spectral" starts from the leading
            singular vectors of the normalized event matrix, and needs a fraction of the epochs.
        init_std: standard deviation of the initial embeddings.
    """

    def __init__(
        self,
        graph: HeteroData,
        *,
        dim: int = 64,
        num_layers: int = 3,
        message_dropout: float = 0.1,
        init: Literal["spectral", "normal"] = "normal",
        init_std: float = 0.1,
    ):
        super().__init__()
        if dim < 1 or num_layers < 0 or not 0 <= message_dropout < 1:
            raise ValueError(
                f"dim is {dim}, num_layers is {num_layers}, message_dropout is {message_dropout}; "
                "expected dim >= 1, num_layers >= 0 and 0 <= message_dropout < 1"
            )
        self.num_users = int(graph["user"].num_nodes)
        self.num_items = int(graph["item"].num_nodes)
        self.message_dropout = message_dropout
        self.embedding = nn.Embedding(self.num_users + self.num_items, dim)
        nn.init.normal_(self.embedding.weight, std=init_std)
        if init == "spectral":
            start_from_spectrum(self.embedding.weight, graph, init_std)
        self.sums = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_layers))  # W1
        self.products = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_layers))  # W2
        for linear in [*self.sums, *self.products]:
            nn.init.xavier_uniform_(linear.weight)
        self._adjacency_of = AdjacencyOf()

    def forward(self, graph: HeteroData) -> dict[str, Tensor]:
        """Return {"user": [U+1, (K+1) D], "item": [I+1, (K+1) D]}."""
        adjacency = self._adjacency_of(graph, self.embedding.weight.device)
        layer = self.embedding.weight
        outputs = [layer]
        for of_sum, of_product in zip(self.sums, self.products, strict=True):
            neighbours = propagate(adjacency, layer)
            layer = functional.leaky_relu(of_sum(neighbours + layer) + of_product(neighbours * layer), 0.2)
            layer = functional.dropout(layer.float(), self.message_dropout, self.training)
            outputs.append(functional.normalize(layer))
        users, items = torch.split(torch.cat(outputs, 1), [self.num_users, self.num_items])
        return {"user": users, "item": items}

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return the embeddings e^(0): {"user": [U+1, D], "item": [I+1, D]}."""
        users, items = torch.split(self.embedding.weight, [self.num_users, self.num_items])
        return {"user": users, "item": items}
