"""HybridRanker: what its scores may depend on, and that it learns signal and not noise."""

import pytest
import torch

from ranking.context import ContextKey, ContextTable
from ranking.encoders.sasrec import SASRec
from ranking.ranker import HybridRanker
from training.losses import full_softmax_loss, sampled_softmax_loss

NUM_ITEMS, LENGTH, DIM, GRAPH_DIM, CONTENT_DIM = 20, 6, 8, 5, 7


def graph():
    rng = torch.Generator().manual_seed(3)
    vectors = torch.randn(NUM_ITEMS + 1, GRAPH_DIM, generator=rng)
    vectors[0] = 0
    return vectors, torch.randint(0, 50, (NUM_ITEMS + 1,), generator=rng).float()


TABLE = ContextTable(
    (
        ContextKey(name="device", kind="categorical", values=("phone", "desktop")),
        ContextKey(name="basket", kind="numeric", mean=10.0, std=4.0),
    )
)


def content():
    rng = torch.Generator().manual_seed(4)
    vectors = torch.randn(NUM_ITEMS + 1, CONTENT_DIM, generator=rng)
    vectors[[0, 7]] = 0  # padding, and an item of which nothing is known
    return vectors


def ranker(with_graph=True, trained=True, with_content=False, **options):
    """Return a HybridRanker; `trained`: no weight is at its special initial value."""
    torch.manual_seed(0)
    vectors, degrees = graph()
    options |= {"graph_vectors": vectors, "item_degrees": degrees} if with_graph else {"num_items": NUM_ITEMS}
    options |= {"content_vectors": content()} if with_content else {}
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
all_kinds = pytest.mark.parametrize(
    ("with_graph", "with_content"), [(True, True), (True, False), (False, True), (False, False)]
)


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
        torch.testing.assert_close(states[:, -1], start)
        assert states.isfinite().all()
    assert start.abs().sum() > 0


@both_kinds
@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, LENGTH - 1, LENGTH])
def test_more_padding_changes_nothing(with_graph, length):
    model = ranker(with_graph)
    states = model.states(histories(length, width=length))
    for width in range(length, LENGTH + 3):
        wider = model.states(histories(length, width=width))
        torch.testing.assert_close(wider[:, -length - 1 :], states)  # the start token's is the first
        assert wider.isfinite().all()


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


def test_graph_vectors_move_where_they_may():
    vectors, degrees = graph()
    model = HybridRanker(
        SASRec(LENGTH + 1, dim=DIM), graph_vectors=vectors, item_degrees=degrees, fine_tune_graph=True
    ).eval()  # without dropout
    assert "graph_vectors" in dict(model.named_parameters())
    states = model.states(histories(LENGTH))
    full_softmax_loss(states[0], model.item_vectors(), torch.ones(LENGTH + 1).long()).backward()
    assert (model.graph_vectors.grad[1:-1] != 0).any(dim=1).all()
    assert (model.graph_vectors.grad[0] == 0).all()  # padding stands for nothing


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
        (
            {"num_items": 3, "content_vectors": torch.zeros(3, 2)},
            "content_vectors has 3 rows; expected 4, one more than items",
        ),
    ],
)
def test_what_is_missing_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        HybridRanker(SASRec(5, dim=4), **options)


# --- content, and items that training never saw


@all_kinds
@torch.no_grad()
def test_an_item_without_events_has_no_random_vector(with_graph, with_content):
    """Its id embedding plays no part, as a candidate and in a history: what stays is what is known of it."""
    is_trained = torch.ones(NUM_ITEMS + 1, dtype=torch.bool)
    is_trained[[3, 7]] = False
    models = [ranker(with_graph, with_content=with_content, is_trained=is_trained) for _ in range(2)]
    models[1].embedding.weight[[3, 7]] += 5.0
    history = torch.tensor([[0, 3], [3, 7], [4, 3]])
    everything = torch.arange(NUM_ITEMS + 1).expand(3, -1)
    first, second = (model(history, everything)[0] for model in models)
    assert torch.equal(first, second)
    # The reference, by hand: the stand-in, and the projections.
    model, expected = models[0], models[0].unknown_id.clone()
    if with_graph:
        expected += model.item_projection.weight @ model.graph_vectors[3]
    if with_content:
        expected += model.content_projection.weight @ model.content_vectors[3]
    torch.testing.assert_close(model.item_vectors()[3], expected)
    changed = ranker(with_graph, with_content=with_content)
    changed.embedding.weight[3] += 5.0
    assert not torch.allclose(changed.item_vectors()[3], expected)


@all_kinds
@torch.no_grad()
def test_vectors_can_be_set_whatever_is_known_of_an_item(with_graph, with_content):
    is_trained = torch.arange(NUM_ITEMS + 1) != 3  # and item 5 is trained
    model = ranker(with_graph, with_content=with_content, is_trained=is_trained)
    before = model.all_vectors().clone()
    wanted = torch.randn(2, DIM)
    model.set_vectors(torch.tensor([5, 3]), wanted)
    after = model.all_vectors()
    torch.testing.assert_close(after[[5, 3]], wanted)
    others = [row for row in range(NUM_ITEMS + 2) if row not in (3, 5)]
    assert torch.equal(after[others], before[others])
    with pytest.raises(ValueError, match="training mode; expected evaluation mode"):
        model.train().set_vectors(torch.tensor([1]), wanted[:1])


@torch.no_grad()
def test_vectors_are_the_same_on_both_sides():
    model = ranker(with_content=True, is_trained=torch.arange(NUM_ITEMS + 1) != 5)
    table = model.all_vectors()
    assert table.shape == (NUM_ITEMS + 2, DIM)
    assert (table[0] == 0).all()
    torch.testing.assert_close(table[-1], model.embedding.weight[-1])  # the start token is nothing else
    torch.testing.assert_close(model.item_vectors(), table[:-1])
    rows = torch.tensor([[4, 5], [0, 20]])
    torch.testing.assert_close(model.vectors(rows), table[rows])
    history = histories(0, 2, LENGTH)
    torch.testing.assert_close(model.states(history, table), model.states(history))


@torch.no_grad()
def test_content_matters_and_its_scale_does_not():
    model = ranker(with_content=True)
    before = model(histories(0, 3), torch.arange(1, NUM_ITEMS + 1).expand(2, -1))[0]
    model.content_vectors[1:-1] = model.content_vectors[1:-1][torch.randperm(NUM_ITEMS)]
    after = model(histories(0, 3), torch.arange(1, NUM_ITEMS + 1).expand(2, -1))[0]
    assert ((before - after).abs() > 1e-3).float().mean() > 0.9
    plain = {"num_items": NUM_ITEMS}
    scaled = HybridRanker(SASRec(LENGTH + 1, dim=DIM), content_vectors=100 * content(), **plain)
    torch.testing.assert_close(scaled.content_vectors, ranker(with_content=True).content_vectors)
    filled = scaled.content_vectors.any(dim=1)
    assert filled.tolist() == [row not in (0, 7, NUM_ITEMS + 1) for row in range(NUM_ITEMS + 2)]
    assert scaled.content_vectors[filled].square().mean().item() == pytest.approx(1)
    assert "content_vectors" not in dict(scaled.named_parameters())


@all_kinds
def test_some_items_are_treated_as_new_in_training_alone(with_graph, with_content):
    model = ranker(with_graph, with_content=with_content, id_dropout=0.3, dropout=0.0, content_dropout=0.0)
    plain = ranker(with_graph, with_content=with_content)
    assert torch.equal(model.all_vectors(), plain.all_vectors())
    model.train()
    # By hand: what is left of each item where it is new. Padding, the start token and items of which nothing
    # would be left are never new.
    new, never = model.unknown_id.expand(NUM_ITEMS + 2, -1), list(range(NUM_ITEMS + 2))
    if with_content:
        new = new + model.content_vectors @ model.content_projection.weight.T
        never = [0, 7, NUM_ITEMS + 1]
    count = torch.zeros(NUM_ITEMS + 2)
    for _ in range(200):
        vectors = model.all_vectors()
        as_new = torch.isclose(vectors, new, atol=1e-5).all(1)
        torch.testing.assert_close(vectors[~as_new], plain.all_vectors()[~as_new])
        count += as_new
    assert not count[never].any()
    others = [row for row in range(NUM_ITEMS + 2) if row not in never]
    if others:
        assert (count[others].mean() / 200).item() == pytest.approx(0.3, abs=0.03)


# --- context


@torch.no_grad()
def test_context_bends_the_last_state():
    model = ranker(context=TABLE)
    history, candidates = histories(0, LENGTH), torch.arange(1, NUM_ITEMS + 1).expand(2, -1)
    unknown = map(torch.from_numpy, TABLE.unknown(2))
    scores, _ = model(history, candidates, *unknown)
    torch.testing.assert_close(model(history, candidates)[0], scores)  # nothing said is nothing known
    rows, weights = torch.tensor([[1, 4], [2, 3]]), torch.tensor([[1.0, -1.5], [1.0, 1.0]])
    in_context, bent = model(history, candidates, rows, weights)
    assert not torch.allclose(in_context, scores)
    torch.testing.assert_close(in_context, bent @ model.item_vectors()[1:].T)
    # By hand: the sum of the effects, half of it a scale and half a shift.
    effects = model.context_fusion.effects.weight
    for row, of, expected in (
        (0, effects[1] - 1.5 * effects[4], bent[0]),
        (1, effects[2] + effects[3], bent[1]),
    ):
        plain = model.states(history)[row, -1]
        torch.testing.assert_close(plain * (1 + of[:DIM]) + of[DIM:], expected)


@torch.no_grad()
def test_context_counts_as_much_as_it_is_to():
    model = ranker(context=TABLE)
    states = torch.randn(3, DIM)
    rows, weights = torch.tensor([[1, 4], [2, 4], [3, 4]]), torch.tensor([[1, 0.5], [1, -2], [1, 1.0]])
    unknown, full = model.in_context(states), model.in_context(states, rows, weights)
    for strength in (0.0, 0.25, 1.0):
        model.context_fusion.strength = strength
        torch.testing.assert_close(
            model.in_context(states, rows, weights), unknown + strength * (full - unknown)
        )
        torch.testing.assert_close(model.in_context(states), unknown)


def test_context_starts_without_effect_and_none_is_no_context():
    model = ranker(trained=False, context=TABLE)
    states = model.states(histories(0, 3))[:, -1]
    rows, weights = torch.tensor([[1, 4], [2, 3]]), torch.tensor([[1.0, -1.5], [1.0, 1.0]])
    assert torch.equal(model.in_context(states, rows, weights), states)
    assert ranker().context_fusion is None
    assert torch.equal(ranker().in_context(states), states)


def test_the_defaults_are_learned():
    """Where values are left out of a step, their defaults take their place."""
    model = ranker(context=TABLE, context_dropout=0.5).train()
    rows, weights = torch.tensor([[1, 4]]).expand(400, -1), torch.full((400, 2), 2.0)
    torch.manual_seed(0)
    model.in_context(torch.ones(400, DIM), rows, weights).sum().backward()
    counts = model.context_fusion.effects.weight.grad[:, -1]
    assert counts[[0, 3]].tolist() == pytest.approx([200, 200], abs=40)  # each once
    assert counts[[1, 4]].tolist() == pytest.approx([400, 400], abs=80)  # each twice: the weight is 2
    assert counts[2] == 0


# --- heads


@torch.no_grad()
def test_a_weighted_sum_of_scores_is_one_inner_product():
    model = ranker(with_content=True, context=TABLE, heads=("cart", "purchase"))
    assert model.heads == ("next", "cart", "purchase")
    history, candidates = histories(0, 2, LENGTH), torch.arange(1, NUM_ITEMS + 1).expand(3, -1)
    moment = torch.tensor([[1, 4]] * 3), torch.tensor([[1.0, 0.5]] * 3)
    by_head = []
    for place in range(3):
        scores, _ = model(history, candidates, *moment, torch.eye(3)[place].expand(3, -1))
        by_head.append(scores)
    torch.testing.assert_close(by_head[0], model(history, candidates, *moment)[0])  # the next item alone
    assert all(not torch.allclose(by_head[0], other) for other in by_head[1:])
    weights = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    scores, query = model(history, candidates, *moment, weights)
    torch.testing.assert_close(scores, (torch.stack(by_head) * weights.T[:, :, None]).sum(0))
    torch.testing.assert_close(scores, query @ model.item_vectors()[1:].T)


@torch.no_grad()
def test_heads_start_where_the_state_is():
    model = ranker(trained=False, heads=("purchase",))
    states = model.states(histories(0, 3))[:, -1]
    assert torch.equal(model.queries(states), states[:, None].expand(-1, 2, -1))
    assert ranker().heads == ()
    assert torch.equal(ranker().queries(states), states[:, None])


# --- the graph's own scores


@torch.no_grad()
def test_graph_scores_add_by_hand():
    model, (vectors, degrees) = ranker(heads=("purchase",)), graph()
    history, everything = histories(0, 1, 3, LENGTH), torch.arange(1, NUM_ITEMS + 1).expand(4, -1)
    weights = torch.tensor([[1.0, 0.5]]).expand(4, -1)
    before, with_heads = model(history, everything)[0], model(history, everything, None, None, weights)[0]
    model.add_graph_scores(vectors, 0.7, half_life=2)
    unit = vectors / vectors[1:].square().mean().sqrt()
    expected = torch.zeros(4, NUM_ITEMS)
    for row, items in enumerate(history):
        user = torch.zeros(GRAPH_DIM)
        for age, item in enumerate(items.flip(0).tolist()):
            if item:
                user += 2 ** (-age / 2) * unit[item] / degrees[item].clamp(min=1).sqrt()
        if user.any():
            expected[row] = 0.7 * unit[1:] @ user / user.norm()
    scores, query = model(history, everything)
    assert query.shape == (4, DIM + GRAPH_DIM)
    torch.testing.assert_close(scores, before + expected)
    torch.testing.assert_close(scores, query @ model.item_vectors()[1:].T)
    torch.testing.assert_close(scores[0], before[0])  # nobody's history says nothing
    torch.testing.assert_close(
        model(history, everything, None, None, weights)[0], with_heads + 1.5 * expected
    )
    wider = model(torch.nn.functional.pad(history, (3, 0))[:, -LENGTH:], everything)[0]
    torch.testing.assert_close(wider, scores)
    model.add_graph_scores(vectors, 0, half_life=2)
    torch.testing.assert_close(model(history, everything)[0], before)


@torch.no_grad()
def test_without_a_half_life_the_order_does_not_count():
    model = ranker()
    model.add_graph_scores(graph()[0], 1.0, half_life=None)
    history = histories(LENGTH)
    own = model.query(history)[:, DIM:]
    torch.testing.assert_close(model.query(history.flip(1))[:, DIM:], own)
    model.add_graph_scores(graph()[0], 1.0, half_life=1)
    assert not torch.allclose(model.query(history.flip(1))[:, DIM:], model.query(history)[:, DIM:])


def test_graph_scores_need_a_graph_and_a_trained_ranker():
    with pytest.raises(ValueError, match="the ranker has no graph; expected one with graph_vectors"):
        ranker(with_graph=False).add_graph_scores(graph()[0], 0.1, 3)
    with pytest.raises(ValueError, match="training mode; expected evaluation mode"):
        ranker().train().add_graph_scores(graph()[0], 0.1, 3)


@torch.no_grad()
def test_vectors_can_be_set_with_the_part_of_the_graph():
    model = ranker(is_trained=torch.arange(NUM_ITEMS + 1) != 3)
    model.add_graph_scores(graph()[0], 0.5, half_life=3)
    before, wanted = model.item_vectors().clone(), torch.randn(2, DIM + GRAPH_DIM)
    model.set_vectors(torch.tensor([5, 3]), wanted)
    after = model.item_vectors()
    torch.testing.assert_close(after[[5, 3]], wanted)
    others = [row for row in range(NUM_ITEMS + 1) if row not in (3, 5)]
    assert torch.equal(after[others], before[others])
    history = torch.tensor([[0, 3]])
    expected = wanted[1, DIM:] / wanted[1, DIM:].norm()
    torch.testing.assert_close(model.query(history)[0, DIM:], expected)


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


def test_what_is_known_of_an_item_places_it_without_an_event():
    """Items of one colour follow one another. One that training never saw is found by its colour."""
    torch.manual_seed(0)
    num_items, colours = 40, torch.arange(41) % 4
    vectors = torch.nn.functional.one_hot(colours, 4).float()
    vectors[0] = 0
    is_trained = torch.arange(num_items + 1) % 10 != 5
    trained = [row for row in range(1, num_items + 1) if is_trained[row]]
    model = HybridRanker(
        SASRec(5, dim=16, dropout=0.0), content_vectors=vectors, is_trained=is_trained, id_dropout=0.2,
        content_dropout=0.0,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    possible = torch.tensor(trained)
    for _ in range(60):
        of_colour = [[row for row in trained if row % 4 == colour] for colour in range(4)]
        rows = torch.tensor(
            [
                [of_colour[c][n % len(of_colour[c])] for n in torch.randint(0, 99, (5,)).tolist()]
                for c in torch.randint(0, 4, (32,)).tolist()
            ]
        )
        states = model.states(rows[:, :-1])[:, 1:].flatten(0, 1)
        targets = rows[:, 1:].flatten()
        loss = sampled_softmax_loss(states, model.item_vectors(), targets, possible)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    new = [row for row in range(1, num_items + 1) if not is_trained[row]]
    history = torch.tensor([[row for row in trained if row % 4 == colour][:4] for colour in range(4)])
    with torch.no_grad():
        scores = model(history, torch.tensor([new]).expand(4, -1))[0]
    for colour in range(4):
        if any(row % 4 == colour for row in new):
            assert new[int(scores[colour].argmax())] % 4 == colour


def test_a_moment_without_which_nothing_can_be_said():
    """What comes next depends on the device alone: without it there is nothing but chance."""

    def hit_at_1(context):
        torch.manual_seed(0)
        model = HybridRanker(
            SASRec(4, dim=16, dropout=0.0), num_items=8, context=context, context_dropout=0.0
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for step in range(150):
            rows = torch.randint(1, 9, (64, 3))
            device = torch.randint(0, 2, (64,))
            targets = device * 4 + 1  # item 1 on a phone, item 5 on a desktop
            moment = (1 + device[:, None], torch.ones(64, 1)) if len(context) else ()
            scores, _ = model(rows, torch.arange(1, 9).expand(64, -1), *moment)
            if step == 149:
                return (scores.argmax(1) + 1 == targets).float().mean().item()
            loss = torch.nn.functional.cross_entropy(scores, targets - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert hit_at_1(ContextTable(TABLE.keys[:1])) > 0.99
    assert hit_at_1(ContextTable()) < 0.75


@torch.no_grad()
def test_ids_start_where_content_says_and_at_random_elsewhere():
    model, before = ranker(trained=False), ranker(trained=False)
    start = torch.zeros(NUM_ITEMS + 1, DIM)
    start[2] = torch.arange(1.0, DIM + 1)
    start[4, 1:] = 7.0
    model.start_from(start)
    expected = before.embedding.weight.clone()
    expected[2] = start[2]
    expected[4, 1:] = 7.0
    torch.testing.assert_close(model.embedding.weight, expected)


@torch.no_grad()
def test_beside_other_graph_vectors_for_a_while():
    model = ranker()
    own, rows = model.graph_vectors.clone(), torch.arange(1, NUM_ITEMS + 1)
    before = model.vectors(rows)
    with model.beside(torch.flip(own, (0,))):
        assert not torch.equal(model.vectors(rows), before)
    torch.testing.assert_close(model.graph_vectors, own)
    torch.testing.assert_close(model.vectors(rows), before)
