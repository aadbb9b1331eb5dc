"""LightGCN: a graph encoder that only propagates.

Xiangnan He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation",
SIGIR 2020, arXiv:2002.02126.

Shapes: N nodes (users, then items), E edges, D dimension, K layers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

USER_ITEM = ("user", "interacts", "item")


class LightGCN(nn.Module):
    """User and item vectors: the mean over layers of the embeddings, propagated over user-item edges.

    e^(k+1) = A e^(k) with A = D^-1/2 (0 R; R^T 0) D^-1/2 (eq. 3 and 8), and e = sum_k e^(k) / (K + 1)
    (eq. 4 with the paper's uniform alpha). No weights but the embeddings, no non-linearity.

    Args:
        graph: gives the numbers of nodes; node 0 of each type is padding and has no edge.
        dim: D.
        num_layers: K; 0 is matrix factorization.
        init_std: standard deviation of the initial embeddings (the authors' code uses 0.1).
    """

    def __init__(self, graph: HeteroData, *, dim: int = 64, num_layers: int = 3, init_std: float = 0.1):
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
        self._adjacency_of: tuple[HeteroData, Tensor] | None = None

    def forward(self, graph: HeteroData) -> dict[str, Tensor]:
        """Return {"user": [U+1, D], "item": [I+1, D]}."""
        adjacency = self._adjacency(graph)
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

    def _adjacency(self, graph: HeteroData) -> Tensor:
        # Building the matrix costs more than a step, and training passes the same graph at every step.
        device = self.embedding.weight.device
        if (
            self._adjacency_of is None
            or self._adjacency_of[0] is not graph
            or self._adjacency_of[1].device != device
        ):
            adjacency = normalized_adjacency(graph[USER_ITEM].edge_index, self.num_users, self.num_items)
            self._adjacency_of = (graph, adjacency.to(device))
        return self._adjacency_of[1]


def normalized_adjacency(edge_index: Tensor, num_users: int, num_items: int) -> Tensor:
    """Return D^-1/2 A D^-1/2 of the bipartite graph, a symmetric sparse CSR [N, N] with N = users + items.

    The indices are int32: on a CPU the product is about twice as fast as with int64.

    Args:
        edge_index: [2, E] int64, user and item nodes, each pair once.
        num_users: nodes 0 to num_users - 1 are users; items follow.
        num_items: number of item nodes.
    """
    user, item = edge_index[0], edge_index[1] + num_users
    row, column = torch.cat([user, item]), torch.cat([item, user])
    num_nodes = num_users + num_items
    order = torch.argsort(row * num_nodes + column)
    row, column = row[order], column[order]
    degree = torch.bincount(row, minlength=num_nodes)
    scale = degree.clamp(min=1).double().rsqrt()
    starts = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    with warnings.catch_warnings():  # "CSR is in beta": the one product used here is tested against PyG
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts.int(), column.int(), (scale[row] * scale[column]).float(), (num_nodes, num_nodes)
        )


class _Propagate(torch.autograd.Function):
    """A @ x for a constant symmetric A, whose gradient is the same product.

    Outside of autocast: a CPU has no sparse product in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, x: Tensor) -> Tensor:
        ctx.adjacency = adjacency
        with torch.autocast(x.device.type, enabled=False):
            return adjacency @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return None, ctx.adjacency @ gradients[0].contiguous()


def propagate(adjacency: Tensor, x: Tensor) -> Tensor:
    """Return adjacency @ x, [N, D], for a constant symmetric sparse matrix [N, N]."""
    result: Tensor = _Propagate.apply(adjacency, x)  # type: ignore[no-untyped-call]
    return result
