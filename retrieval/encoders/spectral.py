"""Spectral filter: vectors from the leading singular vectors of the event matrix, without training.

A graph filter in closed form. GF-CF (Shen et al., "How Powerful is Graph Convolution for Recommendation?",
CIKM 2021, arXiv:2108.07567) shows that a low-pass filter over the item graph does what LightGCN learns to do;
EigenRec (Nikolakopoulos et al., "EigenRec: Generalizing PureSVD for Effective and Efficient Top-N
Recommendations", KAIS 2019, arXiv:1511.06033) scales items by a power of their popularity. GF-CF has an ideal
low pass of rank 256 and adds the unfiltered item-item product, which no vectors can hold; here the rank is
higher and the pass is soft (`spectrum_power`), so that the whole filter is an inner product and FAISS can
search it.

Shapes: U users, I items, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from retrieval.graph_matrix import USER_ITEM, normalized_interactions, truncated_svd


class SpectralFilter(nn.Module):
    """Item vectors diag(degree)^p V S^(s/2) of the normalized event matrix's truncated SVD U S V^T.

    A user's vector is the fold-in of the items (retrieval/fold_in.py), so that known and new users are asked
    by the same formula: together a score is r_u diag(degree)^(p - 1/2) V S^s V^T diag(degree)^p, a filter of
    the history r_u over the item graph. There is nothing to train.

    Args:
        graph: the user-item graph; node 0 of each type is padding.
        dim: D, at most the smaller number of nodes.
        spectrum_power: s; 0 is GF-CF's ideal low pass, larger values are softer.
        degree_power: p; larger values favour popular items.
    """

    user_vectors: Tensor
    item_vectors: Tensor

    def __init__(
        self, graph: HeteroData, *, dim: int = 1024, spectrum_power: float = 0.5, degree_power: float = 0.4
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; expected 1 or more")
        num_users, num_items = int(graph["user"].num_nodes), int(graph["item"].num_nodes)
        edge_index = graph[USER_ITEM].edge_index
        events = normalized_interactions(edge_index, num_users, num_items)
        rank = min(dim, num_users - 1, num_items - 1)
        _, values, right = truncated_svd(events, rank)
        degree = torch.bincount(edge_index[1], minlength=num_items).clamp(min=1).float()
        items = right * values ** (0.5 * spectrum_power) * degree[:, None] ** degree_power
        items[0] = 0.0
        # events / sqrt(degree of the item) is the fold-in's weight; 1 / sqrt(degree of the user) is in both.
        self.register_buffer("user_vectors", events @ items)
        self.register_buffer("item_vectors", items)

    def forward(self, graph: HeteroData) -> dict[str, Tensor]:
        """Return {"user": [U+1, D], "item": [I+1, D]}."""
        return {"user": self.user_vectors, "item": self.item_vectors}
