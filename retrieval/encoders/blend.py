"""LightGCN and the spectral filter in one vector: their scores, added up.

The inner product of two concatenated vectors is the sum of the parts' inner products, so two models that err
on different items make one model that FAISS can search like any other. The filter is a soft low pass of many
dimensions and learns nothing; LightGCN has few and is fitted to the ranking itself.

Shapes: U users, I items, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from retrieval.encoders.lightgcn import LightGCN
from retrieval.encoders.spectral import SpectralFilter


class SpectralLightGCN(nn.Module):
    """LightGCN, trained alone; once it is in evaluation mode, with the spectral filter beside it.

    Args:
        graph: the user-item graph; node 0 of each type is padding.
        dim: D of LightGCN.
        num_layers: of LightGCN.
        spectral_dim: D of the filter.
        spectral_weight: of the filter's scores, 0 to 1; LightGCN's have the rest. Both are brought to one
            spread first.
    """

    def __init__(
        self,
        graph: HeteroData,
        *,
        dim: int = 64,
        num_layers: int = 3,
        spectral_dim: int = 1024,
        spectral_weight: float = 0.3,
    ) -> None:
        super().__init__()
        if not 0 <= spectral_weight <= 1:
            raise ValueError(f"spectral_weight is {spectral_weight}; expected 0 to 1")
        self.learned = LightGCN(graph, dim=dim, num_layers=num_layers)
        self.filter = SpectralFilter(graph, dim=spectral_dim)
        self.spectral_weight = spectral_weight

    def forward(self, graph: HeteroData) -> dict[str, Tensor]:
        """Return {"user": [U+1, D], "item": [I+1, D]}; D is LightGCN's own while training."""
        learned: dict[str, Tensor] = self.learned(graph)
        if self.training:
            return learned
        filtered: dict[str, Tensor] = self.filter(graph)
        parts = [
            _scaled(filtered, self.spectral_weight / _spread(filtered)),
            _scaled(learned, (1 - self.spectral_weight) / _spread(learned)),
        ]
        return {kind: torch.cat([part[kind] for part in parts], dim=1) for kind in ("user", "item")}

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return LightGCN's parameters, for the regulariser: {"user": [U+1, D], "item": [I+1, D]}."""
        return self.learned.initial_vectors()


def _spread(vectors: dict[str, Tensor]) -> Tensor:
    """The standard deviation of a user's scores over the items, root mean square over users."""
    users, items = vectors["user"][1:], vectors["item"][1:]
    centred = items - items.mean(0)
    covariance = centred.T @ centred / len(items)
    return ((users @ covariance) * users).sum(1).mean().sqrt().clamp(min=1e-12)


def _scaled(vectors: dict[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    # Half to each side, so that a user who is folded in from the items gets the same share.
    return {kind: values * factor.sqrt() for kind, values in vectors.items()}
