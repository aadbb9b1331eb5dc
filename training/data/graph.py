"""The event graph: users and items as nodes, training events as edges."""

from __future__ import annotations

import numpy as np
import torch
from torch_geometric.data import HeteroData

from retrieval.graph_matrix import USER_ITEM
from training.data.interactions import Interactions


def build_graph(train: Interactions) -> HeteroData:
    """Return the user-item graph of the training events.

    Node n of type "user" or "item" is row n: node 0 is the unknown user, or padding, and has no edge.
    ("user", "interacts", "item") holds each (user, item) pair once, ordered by user:
    edge_index [2, E] int64, time [E] int64 (of the first touch), event_type [E] uint8.
    """
    events = train.edges
    graph = HeteroData()
    graph["user"].num_nodes = train.num_users + 1
    graph["item"].num_nodes = train.num_items + 1
    edges = graph[USER_ITEM]
    edges.edge_index = torch.from_numpy(np.stack([events.users, events.items]).astype(np.int64))
    edges.time = torch.from_numpy(events.timestamps)
    edges.event_type = torch.from_numpy(events.event_types)
    return graph
