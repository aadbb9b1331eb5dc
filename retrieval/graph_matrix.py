"""The event graph as sparse matrices, and the two things that encoders do with them: propagate, decompose.

Shapes: N nodes (users, then items), E edges, D dimension.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch_geometric.data import HeteroData

USER_ITEM = ("user", "interacts", "item")


def normalized_interactions(edge_index: Tensor, num_users: int, num_items: int) -> Tensor:
    """Return D_u^-1/2 R D_i^-1/2 of the bipartite graph, a sparse CSR [users, items].

    Args:
        edge_index: [2, E] int64, user and item nodes, each pair once.
        num_users: number of user nodes.
        num_items: number of item nodes.
    """
    return _normalized(edge_index[0], edge_index[1], (num_users, num_items))


def normalized_adjacency(edge_index: Tensor, num_users: int, num_items: int) -> Tensor:
    """Return D^-1/2 A D^-1/2 of the bipartite graph, a symmetric sparse CSR [N, N] with N = users + items.

    The indices are int32: on a CPU the product is about twice as fast as with int64.

    Args:
        edge_index: [2, E] int64, user and item nodes, each pair once.
        num_users: nodes 0 to num_users - 1 are users; items follow.
        num_items: number of item nodes.
    """
    user, item = edge_index[0], edge_index[1] + num_users
    num_nodes = num_users + num_items
    return _normalized(torch.cat([user, item]), torch.cat([item, user]), (num_nodes, num_nodes))


class AdjacencyOf:
    """The normalized adjacency of a graph, kept for the next time that the same graph is asked for.

    Building it costs more than a step, and training passes the same graph at every step.
    """

    def __init__(self) -> None:
        self._last: tuple[HeteroData, Tensor] | None = None

    def __call__(self, graph: HeteroData, device: torch.device) -> Tensor:
        """Return `normalized_adjacency` of the user-item edges, on a device."""
        if self._last is None or self._last[0] is not graph or self._last[1].device != device:
            num_users, num_items = int(graph["user"].num_nodes), int(graph["item"].num_nodes)
            adjacency = normalized_adjacency(graph[USER_ITEM].edge_index, num_users, num_items)
            self._last = (graph, adjacency.to(device))
        return self._last[1]


def _normalized(row: Tensor, column: Tensor, shape: tuple[int, int]) -> Tensor:
    order = torch.argsort(row * shape[1] + column)
    row, column = row[order], column[order]
    row_degree = torch.bincount(row, minlength=shape[0])
    column_degree = torch.bincount(column, minlength=shape[1])
    values = row_degree[row].double().rsqrt() * column_degree[column].double().rsqrt()
    starts = torch.cat([row_degree.new_zeros(1), row_degree.cumsum(0)])
    with warnings.catch_warnings():  # "CSR is in beta": the one product used here is tested against PyG
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts.int(), column.int(), values.float(), shape)


class _Propagate(torch.autograd.Function):
    """A @ x for a constant symmetric A, whose gradient is the same product in the same precision."""

    @staticmethod
    def forward(ctx: Any, adjacency: Tensor, x: Tensor) -> Tensor:
        kind = x.device.type
        ctx.adjacency = adjacency
        ctx.half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        return _product(adjacency, x, ctx.half)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _product(ctx.adjacency, gradients[0].contiguous(), ctx.half)


def _product(adjacency: Tensor, x: Tensor, half: bool) -> Tensor:
    # Outside of autocast: a CPU has no sparse product in bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or x.dtype != torch.float32 or not len(adjacency.values()):
            return adjacency @ x
        # The kernel for bags of embeddings is a CSR product too, and faster than CSR itself: on Gowalla 11 ms
        # against 29 on one thread. It spends its time on reading rows: 7 ms in bfloat16, where the caller
        # allows it. Its sums are in float32 all the same.
        dtype = torch.bfloat16 if half else torch.float32
        return torch.nn.functional.embedding_bag(
            adjacency.col_indices(),
            x.to(dtype),
            adjacency.crow_indices(),
            mode="sum",
            per_sample_weights=adjacency.values().to(dtype),
            include_last_offset=True,
        ).float()


def propagate(adjacency: Tensor, x: Tensor) -> Tensor:
    """Return adjacency @ x, [N, D], for a constant symmetric sparse matrix [N, N].

    Under bfloat16 autocast on a CPU, x and the matrix are read in bfloat16 and the result is float32.
    """
    result: Tensor = _Propagate.apply(adjacency, x)  # type: ignore[no-untyped-call]
    return result


def truncated_svd(matrix: Tensor, rank: int, num_iterations: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a sparse matrix: left [M, D], values [D], right [N, D].

    Randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4). Memory is a few dense
    [M, D] and [N, D].

    Args:
        matrix: sparse CSR [M, N].
        rank: D, at most min(M, N).
        num_iterations: passes over the matrix and back; more separate close singular values better.
    """
    transposed = matrix.t().to_sparse_csr()
    width = min(rank + 32, *matrix.shape)
    basis = torch.randn(matrix.shape[1], width)
    for _ in range(num_iterations):
        basis = torch.linalg.qr(transposed @ (matrix @ basis)).Q
    left, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank], values[:rank], (basis @ right.T)[:, :rank]


@torch.no_grad()
def start_from_spectrum(embeddings: Tensor, graph: HeteroData, std: float) -> None:
    """Put the leading singular vectors of the normalized event matrix into embeddings, times their values.

    Training would have to find them first, and they take seconds. Columns beyond the rank stay as they are.
    So do nodes of small connected components: each component has a singular value of 1, the largest there is,
    and a vector that is zero outside. Some hundred users with an item each that nobody else has would take
    all columns, and have vectors many times as long as all others.

    Args:
        embeddings: [N, D], users first; changed in place.
        graph: a bipartite graph of N nodes.
        std: root mean square that the columns get.
    """
    num_users, num_items = int(graph["user"].num_nodes), int(graph["item"].num_nodes)
    edges = _without_small_components(graph[USER_ITEM].edge_index, num_users, num_items)
    user, item = torch.unique(edges[0]), torch.unique(edges[1])
    rank = min(embeddings.shape[1], len(user) - 1, len(item) - 1)
    if rank < 1:
        return
    users, values, items = truncated_svd(normalized_interactions(edges, num_users, num_items), rank)
    inside = torch.cat([user, item + num_users])
    vectors = (torch.cat([users, items]) * values)[inside]
    embeddings[inside, :rank] = vectors * (std / vectors.square().mean().sqrt().clamp(min=1e-12))


def _without_small_components(edge_index: Tensor, num_users: int, num_items: int) -> Tensor:
    """Return the edges, [2, E], of the connected components that have a hundredth of them or more.

    All edges, where the others have most of them.
    """
    user, item = edge_index.cpu().numpy()
    num_nodes = num_users + num_items
    graph = coo_matrix((np.ones(len(user), np.bool_), (user, item + num_users)), (num_nodes, num_nodes))
    component = connected_components(graph, directed=False)[1][user]
    is_large = np.bincount(component, minlength=1)[component] >= len(user) / 100
    if is_large.mean() < 0.5:  # many of like size: none of them stands out
        return edge_index
    return edge_index[:, torch.from_numpy(is_large).to(edge_index.device)]
