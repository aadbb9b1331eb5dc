"""Matrix factorization: a graph encoder that leaves the graph alone.

Steffen Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009,
arXiv:1205.2618, section 4.3.1: a score is the inner product of a user's and an item's free vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData


class MF(nn.Module):
    """User and item vectors: the embeddings themselves.

    Args:
        graph: gives the numbers of nodes; node 0 of each type is padding.
        dim: D, the width of the vectors.
        init_std: standard deviation of the initial embeddings.
    """

    def __init__(self, graph: HeteroData, *, dim: int = 64, init_std: float = 0.1):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; expected 1 or more")
        self.num_users = int(graph["user"].num_nodes)
        self.num_items = int(graph["item"].num_nodes)
        self.embedding = nn.Embedding(self.num_users + self.num_items, dim)
        nn.init.normal_(self.embedding.weight, std=init_std)

    def forward(self, graph: HeteroData) -> dict[str, Tensor]:
        """Return {"user": [U+1, D], "item": [I+1, D]}."""
        return self.initial_vectors()

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return the same: {"user": [U+1, D], "item": [I+1, D]}."""
        users, items = torch.split(self.embedding.weight, [self.num_users, self.num_items])
        return {"user": users, "item": items}
