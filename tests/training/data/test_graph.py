"""The event graph of a log small enough to read."""

import numpy as np
import torch

from engine.history import EVENT_CODE
from retrieval.graph_matrix import USER_ITEM
from training.data.graph import build_graph
from training.data.interactions import Interactions

VIEW, CART, REMOVE = EVENT_CODE["view"], EVENT_CODE["cart"], EVENT_CODE["remove_from_cart"]


def test_every_pair_once_with_its_first_touch():
    events = Interactions(
        users=np.array([1, 1, 1, 1, 3, 3, 3], np.int32),
        items=np.array([4, 2, 4, 1, 2, 4, 2], np.int32),
        event_types=np.array([VIEW, CART, CART, REMOVE, REMOVE, VIEW, CART], np.uint8),
        timestamps=np.array([10, 20, 30, 40, 5, 6, 7]),
        num_users=3,
        num_items=5,
    )
    graph = build_graph(events)
    assert (graph["user"].num_nodes, graph["item"].num_nodes) == (4, 6)
    edges = graph[USER_ITEM]
    # User 1 only removed item 1; user 3 removed item 2 and put it in the cart later.
    assert edges.edge_index.tolist() == [[1, 1, 3, 3], [4, 2, 4, 2]]
    assert edges.time.tolist() == [10, 20, 6, 7]
    assert edges.event_type.tolist() == [VIEW, CART, VIEW, CART]
    assert (edges.edge_index.dtype, edges.time.dtype) == (torch.int64, torch.int64)
    assert edges.event_type.dtype == torch.uint8
    graph.validate()


def test_degrees_are_the_item_counts():
    rng = np.random.default_rng(0)
    events = Interactions(
        users=np.sort(rng.integers(1, 8, 100)).astype(np.int32),
        items=rng.integers(1, 13, 100).astype(np.int32),
        event_types=rng.choice([VIEW, REMOVE], 100).astype(np.uint8),
        timestamps=np.arange(100),
        num_users=8,
        num_items=14,
    )
    edge_index = build_graph(events)[USER_ITEM].edge_index
    assert torch.bincount(edge_index[1], minlength=15).tolist() == events.item_counts().tolist()
    assert len(edge_index.T.unique(dim=0)) == edge_index.shape[1]
    assert (edge_index > 0).all()


def test_no_events_no_edges():
    nothing = np.zeros(0)
    events = Interactions(
        nothing.astype(np.int32),
        nothing.astype(np.int32),
        nothing.astype(np.uint8),
        nothing.astype(int),
        2,
        3,
    )
    assert build_graph(events)[USER_ITEM].edge_index.shape == (2, 0)
