"""The contenders of the training benchmark do the same work; their times are nobody's test."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch_geometric.nn
from rich.console import Console

from benchmarks import training_speed
from benchmarks.training_speed import CONTENDERS, Work, _OneNegative, dataset_directory, load_graph_data
from retrieval.encoders.lightgcn import LightGCN
from retrieval.graph_matrix import USER_ITEM

WORK = Work(batch_size=16, dim=4, num_layers=2, num_negatives=8, steps=3, threads=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for name, count in (("train", 5), ("test", 2)):
        lines = [f"{u} {' '.join(map(str, rng.permutation(20)[:count]))}\n" for u in range(12)]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def data(source):
    with dataset_directory(source) as directory:
        yield load_graph_data(directory, WORK)


def test_the_graph_holds_every_training_pair(data):
    assert data.graph[USER_ITEM].edge_index.shape == (2, 12 * 5)
    assert training_speed.steps_of_an_epoch(data, WORK) == 4
    assert sum(len(batch) for batch in data.train_dataloader()) == 12 * 5


@pytest.mark.parametrize("name", ["trirank", "trirank-bpr", "pyg", "pyg-csr"])
def test_every_contender_gives_a_time_for_each_step(name, data):
    times = CONTENDERS[name](data, WORK)
    assert len(times) == WORK.steps
    assert all(time_s > 0 for time_s in times)


def test_our_bpr_is_pyg_s(data, monkeypatch):
    """The same embeddings, pairs, negatives and regulariser give the same loss and the same gradient."""
    graph = data.graph
    num_users = graph["user"].num_nodes
    module = _OneNegative(lambda graph: LightGCN(graph, dim=4, num_layers=2), l2=0.02)
    module.encoder = module.make_encoder(graph)
    monkeypatch.setattr(_OneNegative, "data", data)
    reference = torch_geometric.nn.LightGCN(num_users + graph["item"].num_nodes, 4, 2)
    reference.embedding.load_state_dict(module.encoder.embedding.state_dict())

    pairs = graph[USER_ITEM].edge_index
    users, items = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    negatives = torch.tensor([7, 8, 9])  # each node once: PyG's regulariser counts a node once
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: negatives)
    ours = module.training_step(torch.stack([users, items], 1), 0)

    both_ways = torch.stack(
        [torch.cat([pairs[0], pairs[1] + num_users]), torch.cat([pairs[1] + num_users, pairs[0]])]
    )
    asked = torch.stack([users.repeat(2), torch.cat([items, negatives]) + num_users])
    positive, negative = reference(both_ways, asked).chunk(2)
    theirs = reference.recommendation_loss(positive, negative, node_id=asked.unique(), lambda_reg=0.01)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(module.encoder.embedding.weight.grad, reference.embedding.weight.grad)


def test_ratios_and_missing_contenders(monkeypatch, tmp_path):
    """Each contender is measured in a process of its own; here the processes are made up."""

    def run(command, **options):
        name = command[command.index("--contender") + 1]
        record = {
            "num_edges": 80,
            "steps_of_an_epoch": 5,
            "step_s": {"trirank": [1, 2, 30], "pyg": [20, 10, 40]}[name],
            "peak_memory_bytes": 5,
            "memory_before_training_bytes": 2,
            "operators_s_per_step": [["mm", 0.5]],
        }
        return type("Done", (), {"returncode": 0, "stdout": "noise\n" + json.dumps(record)})

    monkeypatch.setattr(training_speed.subprocess, "run", run)
    monkeypatch.setattr(training_speed.importlib.util, "find_spec", lambda name: None)
    results = training_speed.compare(["trirank", "pyg", "implicit-bpr"], tmp_path, WORK, 2, False)
    found = results["contenders"]
    assert list(found) == ["trirank", "pyg"]
    assert (found["trirank"]["step_s"], found["trirank"]["epoch_s"]) == (2, 10)
    assert (found["trirank"]["times_faster"], found["pyg"]["times_faster"]) == (10, 1)
    assert found["trirank"]["measured_steps"] == 6
    assert results["work"] == dataclasses.asdict(WORK)
    console = Console(record=True, width=140)
    training_speed.print_table(results, console)
    assert "10.0" in console.export_text()


def test_peak_memory_is_of_this_process():
    before = training_speed.peak_memory()
    held = np.ones(3_000_000)  # 24 MB
    assert training_speed.peak_memory() >= max(before, held.nbytes)


def test_wrong_input(source, capsys):
    assert training_speed.main(["--data", str(source), "--contenders", "dgl"]) == 2
    assert "contender is 'dgl'; expected one of trirank, trirank-bpr," in capsys.readouterr().err
    assert training_speed.main(["--data", str(source), "--steps", "0"]) == 2
    assert "steps is 0; expected 1 or more" in capsys.readouterr().err
