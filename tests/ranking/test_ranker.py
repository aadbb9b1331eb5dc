"""HybridRanker: what its scores may depend on, and that it learns signal and not noise."""

import pytest
import torch

from ranking.encoders.sasrec import SASRec
from ranking.ranker import HybridRanker
from training.losses import full_softmax_loss

NUM_ITEMS, LENGTH, DIM, GRAPH_DIM = 20, 6, 8, 5


def graph():
    rng = torch.Generator().manual_seed(3)
    vectors = torch.randn(NUM_ITEMS + 1, GRAPH_DIM, generator=rng)
    vectors[0] = 0
    return vectors, torch.randint(0, 50, (NUM_ITEMS + 1,), generator=rng).float()


def ranker(with_graph=True, trained=True):
    """Return a HybridRanker; `trained`: no weight is at its special initial value."""
    torch.manual_seed(0)
    vectors, degrees = graph()
    options = {"graph_vectors": vectors, "item_degrees": degrees} if with_graph else {"num_items": NUM_ITEMS}
    model = HybridRanker(SASRec(LENGTH + 1, dim=DIM, num_blocks=2, num_heads=2), **options).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            model.embedding.weight[0] = 0  # padding gets no gradient
    return model


def histories(*lengths, width=LENGTH):
    rng = torch.Generator().manual_seed(1)
    rows = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[width - length :] = torch.randint(1, NUM_ITEMS + 1, (length,), generator=rng)
    return rows


both_kinds = pytest.mark.parametrize("with_graph", [True, False], ids=["graph", "no graph"])


@both_kinds
@torch.no_grad()
def test_candidates_never_see_each_other(with_graph):
    model = ranker(with_graph)
    history = histories(0, 1, LENGTH - 1, LENGTH)
    candidates = torch.stack([torch.randperm(NUM_ITEMS)[:9] + 1 for _ in history])
    together, state = model(history, candidates)
    assert (together.shape, state.shape) == ((4, 9), (4, DIM))
    alone = torch.cat([model(history, candidates[:, c : c + 1])[0] for c in range(9)], dim=1)
    torch.testing.assert_close(alone, together)
    order = torch.randperm(9)
    torch.testing.assert_close(model(history, candidates[:, order])[0], together[:, order])
    doubled = model(history, torch.cat([candidates, candidates], dim=1))[0]
    torch.testing.assert_close(doubled, torch.cat([together, together], dim=1))
    one_by_one = torch.cat([model(history[b : b + 1], candidates[b : b + 1])[0] for b in range(4)])
    torch.testing.assert_close(one_by_one, together)


@both_kinds
@torch.no_grad()
def test_a_score_is_the_inner_product_of_state_and_item_vector(with_graph):
    model = ranker(with_graph)
    history = histories(0, 3)
    scores, state = model(history, torch.arange(NUM_ITEMS + 1).expand(2, -1))
    torch.testing.assert_close(scores, state @ model.item_vectors().T)
    assert model.item_vectors().shape == (NUM_ITEMS + 1, DIM)
    assert (model.item_vectors()[0] == 0).all()
    torch.testing.assert_close(state, model.states(history)[:, -1])


@both_kinds
@torch.no_grad()
def test_an_empty_history_is_the_start_token_whatever_the_padding(with_graph):
    model = ranker(with_graph)
    start = model.states(histories(LENGTH))[:, 0]
    for width in (1, 2, LENGTH):
        states = model.states(histories(0, width=width))
        assert states.shape == (1, width + 1, DIM)
        torch.testing.assert_close(states[0], start.expand(width + 1, -1))
    assert start.abs().sum() > 0


@both_kinds
@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, LENGTH - 1, LENGTH])
def test_more_padding_changes_nothing(with_graph, length):
    model = ranker(with_graph)
    states = model.states(histories(length, width=length))
    for width in range(length, LENGTH + 3):
        wider = model.states(histories(length, width=width))
        torch.testing.assert_close(wider[:, -length:], states[:, 1:])
        torch.testing.assert_close(
            wider[:, : width - length + 1], states[:, :1].expand(1, width - length + 1, -1)
        )


@both_kinds
@torch.no_grad()
def test_a_prefix_has_the_same_state_alone_as_inside_a_longer_history(with_graph):
    model = ranker(with_graph)
    history = histories(LENGTH)
    states = model.states(history)
    for length in range(1, LENGTH + 1):
        alone = model.states(history[:, :length])
        torch.testing.assert_close(alone[:, -1], states[:, length])
        # Nothing behind the prefix counts: no state looks ahead.
        other = history.clone()
        other[:, length:] = other[:, length:] % NUM_ITEMS + 1
        torch.testing.assert_close(model.states(other)[:, : length + 1], states[:, : length + 1])
        if length < LENGTH:
            assert not torch.allclose(model.states(other)[:, length + 1 :], states[:, length + 1 :])


@torch.no_grad()
def test_fusion_starts_without_effect_on_the_states():
    model = ranker(trained=False)
    history = histories(0, 1, LENGTH)
    fused = model.states(history)
    model.fusion.forward = lambda states, *_: states
    assert torch.equal(model.states(history), fused)


@torch.no_grad()
def test_graph_vectors_matter():
    model, shuffled = ranker(), ranker()
    history, candidates = histories(0, 1, LENGTH), torch.arange(1, NUM_ITEMS + 1).expand(3, -1)
    before, state_before = model(history, candidates)
    shuffled.graph_vectors[1:-1] = shuffled.graph_vectors[1:-1][torch.randperm(NUM_ITEMS)]
    after, state_after = shuffled(history, candidates)
    assert ((before - after).abs() > 1e-3).float().mean() > 0.9
    # The states of those with a history move, that of an empty one has nothing of the graph.
    assert ((state_before - state_after).abs().amax(1) > 1e-3).tolist() == [False, True, True]


@torch.no_grad()
def test_fused_states_depend_on_the_degrees():
    model, other = ranker(), ranker()
    other.fold_weights[1:-1] *= torch.linspace(0.1, 3, NUM_ITEMS)
    history = histories(0, 1, LENGTH)
    moved = (model.states(history)[:, -1] - other.states(history)[:, -1]).abs().amax(1) > 1e-4
    assert moved.tolist() == [False, True, True]


@torch.no_grad()
def test_the_scale_of_the_graph_vectors_means_nothing():
    vectors, degrees = graph()
    scores = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        model = HybridRanker(
            SASRec(LENGTH + 1, dim=DIM, num_heads=1), graph_vectors=scale * vectors, item_degrees=degrees
        ).eval()
        scores.append(model(histories(3), torch.arange(1, NUM_ITEMS + 1)[None])[0])
    torch.testing.assert_close(*scores)
    assert model.graph_vectors[1:-1].square().mean().item() == pytest.approx(1)


def test_graph_vectors_are_frozen_and_padding_is_not_learned():
    model = ranker().train()
    trainable = {name for name, _ in model.named_parameters()}
    assert not any(name in ("graph_vectors", "fold_weights") for name in trainable)
    assert {"graph_vectors", "fold_weights"} <= set(model.state_dict())
    _, degrees = graph()
    expected = [0, *degrees[1:].clamp(min=1).rsqrt().tolist(), 0]  # padding, items, start token
    assert model.fold_weights.tolist() == pytest.approx(expected)
    states = model.states(histories(0, 2, LENGTH))
    full_softmax_loss(
        states.flatten(0, 1), model.item_vectors(), torch.ones(states[..., 0].numel()).long()
    ).backward()
    assert (model.embedding.weight.grad[0] == 0).all()
    assert (model.embedding.weight.grad[-1] != 0).any()  # the start token is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_close_and_trains(dtype):
    model, history = ranker(), histories(0, 1, LENGTH)
    expected = model.states(history)
    with torch.autocast("cpu", dtype):
        states = model.states(history)
        loss = full_softmax_loss(states[:, -1], model.item_vectors(), torch.tensor([1, 2, 3]))
    assert (states.float() - expected).norm() < 0.05 * expected.norm()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_the_ranker_says_of_itself():
    assert (ranker().num_items, ranker().history_length) == (NUM_ITEMS, LENGTH)
    assert (ranker(with_graph=False).num_items, ranker(with_graph=False).fusion) == (NUM_ITEMS, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_items must be given where graph_vectors are not"),
        ({"graph_vectors": torch.zeros(4, 2)}, "item_degrees must be given with graph_vectors"),
        ({"graph_vectors": torch.zeros(4, 2), "item_degrees": torch.zeros(3)}, "one number a row"),
    ],
)
def test_what_is_missing_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        HybridRanker(SASRec(5, dim=4), **options)


# --- it learns


def hit_at_1(make_histories, num_items=12, length=8, num_steps=80):
    """Return the share of next items that rank first, after some steps on other histories of one kind."""
    torch.manual_seed(0)
    vectors = torch.cat([torch.zeros(1, 4), torch.randn(num_items, 4)])
    encoder = SASRec(length + 1, dim=16, num_heads=2, dropout=0.0)
    model = HybridRanker(encoder, graph_vectors=vectors, item_degrees=torch.ones(num_items + 1), dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        rows = make_histories(32, length, num_items)
        states, targets = model.states(rows[:, :-1]), rows
        loss = full_softmax_loss(states[:, 1:].flatten(0, 1), model.item_vectors(), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        rows = make_histories(400, length, num_items)
        scores = model(rows[:, :-1], torch.arange(1, num_items + 1).expand(400, -1))[0]
    return (scores.argmax(1) + 1 == rows[:, -1]).float().mean().item()


def test_cycles_are_learned_and_noise_is_not():
    def cycles(count, length, num_items):
        first = torch.randint(num_items, (count, 1))
        return (first + torch.arange(length)) % num_items + 1

    def noise(count, length, num_items):
        return torch.randint(1, num_items + 1, (count, length))

    assert hit_at_1(cycles) > 0.9
    assert 0.02 < hit_at_1(noise) < 0.15  # chance is 1/12


def test_what_came_before_the_last_item_counts():
    """The next item follows from the one before the last: the last item alone says nothing."""

    def second_order(count, length, num_items):
        rows = torch.randint(num_items, (count, 2))
        for _ in range(length - 2):
            rows = torch.cat([rows, (rows[:, -2:-1] + 1) % num_items], dim=1)
        return rows + 1

    assert hit_at_1(second_order, num_steps=200) > 0.9
