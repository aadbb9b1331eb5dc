"""What an encoder that cannot be trained with is told, and that those there are can."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ranking.encoders
from ranking.encoders.sasrec import SASRec
from ranking.encoders.sequence_encoder import SequenceEncoder
from retrieval.encoders.lightgcn import LightGCN
from training.encoder_checks import check_graph_encoder, check_sequence_encoder


def sequence_encoders():
    """Return the encoders of all files of ranking/encoders: another file is found and tested by itself."""
    modules = [
        importlib.import_module(f"ranking.encoders.{entry.name}")
        for entry in pkgutil.iter_modules(ranking.encoders.__path__)
        if entry.name != "sequence_encoder"
    ]
    return [
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


@pytest.mark.parametrize("encoder", sequence_encoders())
def test_the_encoders_of_histories_keep_to_it(encoder):
    check_sequence_encoder(encoder)


def test_they_are_found():
    assert {"SASRec", "HSTU"} <= {encoder.__name__ for encoder in sequence_encoders()}


class Gru(nn.Module):
    """A recurrent encoder, right or wrong as it is asked."""

    def __init__(self, max_length, dropout, *, dim=8, both_ways=False, minds_padding=False):
        super().__init__()
        self.dim, self.max_length, self.minds_padding = dim, max_length, minds_padding
        self.layer = nn.GRU(dim, dim // (2 if both_ways else 1), batch_first=True, bidirectional=both_ways)

    def forward(self, items, vectors):
        if self.minds_padding:
            return self.layer(vectors)[0]
        # To the left, so that padding comes after all that counts, and back.
        lengths = (items > 0).sum(1)
        shifts = items.shape[1] - lengths
        there = torch.arange(items.shape[1]) + shifts.unsqueeze(1)
        rows = torch.arange(len(items)).unsqueeze(1)
        states = self.layer(vectors[rows, there % items.shape[1]])[0]
        back = (torch.arange(items.shape[1]) - shifts.unsqueeze(1)) % items.shape[1]
        return states[rows, back]


def test_a_recurrent_encoder_in_a_file_of_its_own_would_do():
    check_sequence_encoder(Gru)


class Gated(Gru):
    """One that looks ahead through a branch that is nothing at first."""

    def __init__(self, max_length, dropout):
        super().__init__(max_length, dropout, both_ways=True)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, items, vectors):
        return vectors + self.gate * super().forward(items, vectors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Gated, "it looks ahead"),
        (lambda length, dropout: Gru(length, dropout, both_ways=True), "it looks ahead"),
        (lambda length, dropout: Gru(length, dropout, minds_padding=True), "it minds padding"),
        (lambda length, dropout: nn.Linear(8, 8), "it has no whole number `dim`"),
        (
            lambda length, dropout: Gru(length + 1, dropout),
            "it has max_length 9; expected its first argument, 8",
        ),
        (lambda length: SASRec(length, 0.5), "fails on a toy, TypeError"),
        (lambda length, dropout: SASRec(length, dropout, num_heads=3), "num_heads is 3; expected a divisor"),
    ],
)
def test_what_is_wrong_with_an_encoder_of_histories(make, message):
    with pytest.raises(ValueError, match=rf"ranking\.model\.encoder: .*{message}"):
        check_sequence_encoder(make)


def test_states_of_another_width_or_that_are_not_finite():
    encoder = Gru(8, 0.5)
    encoder.dim = 9
    with pytest.raises(ValueError, match=r"ranking\.model\.encoder: it gives states .*3, 6, 9|Runtime"):
        check_sequence_encoder(lambda length, dropout: encoder)
    encoder = Gru(8, 0.5)
    nn.init.constant_(encoder.layer.weight_ih_l0, torch.nan)
    with pytest.raises(ValueError, match="states that are not finite"):
        check_sequence_encoder(lambda length, dropout: encoder)


class Graph(LightGCN):
    """An encoder of the graph that is changed in one place."""

    def __init__(self, graph, *, change):
        super().__init__(graph, dim=8)
        self.change = change

    def forward(self, graph):
        return self.change(super().forward(graph))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["item"], r"gives no \{'user': ..., 'item': ...\} by forward\(graph\)"),
        (lambda found: found | {"item": found["item"][1:]}, r"item vectors \[30, 8\] .* each node, 31"),
        (lambda found: found | {"item": found["item"][:, 1:]}, "unlike widths"),
        (lambda found: found | {"item": found["item"] * torch.nan}, "not finite"),
    ],
)
def test_what_is_wrong_with_an_encoder_of_the_graph(change, message):
    with pytest.raises(ValueError, match=rf"retrieval\.model\.encoder: it gives .*{message}|{message}"):
        check_graph_encoder(lambda graph: Graph(graph, change=change))


def test_an_encoder_of_the_graph_says_what_its_vectors_are_made_from():
    encoder = nn.Linear(8, 8)
    encoder.forward = lambda graph: {kind: torch.zeros(graph[kind].num_nodes, 8) for kind in ("user", "item")}
    with pytest.raises(ValueError, match=r"has no initial_vectors\(\)"):
        check_graph_encoder(lambda graph: encoder)


def test_the_random_numbers_of_the_training_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_sequence_encoder(SASRec)
    check_graph_encoder(LightGCN)
    assert torch.equal(torch.rand(3), expected)


def test_the_base_of_encoders_is_none():
    with pytest.raises(ValueError, match="TypeError"):
        check_sequence_encoder(SequenceEncoder)


def test_the_example_of_the_document_would_do():
    document = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(class Mean.*?)```", document, re.DOTALL)
    names = {"nn": nn, "Tensor": torch.Tensor}
    exec(example, names)  # ours
    check_sequence_encoder(names["Mean"])
