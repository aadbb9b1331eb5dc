"""The exported ranker against the one it was made from."""

import numpy as np
import onnx
import polars as pl
import pytest
import torch

from engine.bundle import RANKER_FILES, RANKER_INDEX, RANKER_SCORES, RANKER_STATE, RANKER_WEIGHTS
from ranking.context import ContextKey, ContextTable, Encoded
from ranking.encoders.hstu import HSTU
from ranking.encoders.sasrec import SASRec
from ranking.onnx_scorer import OnnxScorer
from ranking.ranker import HybridRanker
from retrieval.item_index import EXACT_KINDS, KINDS, IndexOptions, ItemIndex
from training.answers import history_queries
from training.compression import compression
from training.content import content_embedding, content_features
from training.data.dataset import ITEM_SCHEMA
from training.data.interactions import Interactions
from training.export import (
    _check_index,
    compress,
    export_ranker,
    index_options,
    recent_popularity,
    write_index,
)
from training.quantization import MAX_SCORE_DIFFERENCE

NUM_ITEMS, LENGTH, DIM = 60, 6, 16


TABLE = ContextTable(
    (
        ContextKey(name="device", kind="categorical", values=("phone", "desktop")),
        ContextKey(name="basket", kind="numeric", mean=10.0, std=4.0),
    )
)


def ranker(length=LENGTH, with_graph=True, content_dim=0, **options):
    torch.manual_seed(0)
    vectors = torch.cat([torch.zeros(1, 5), torch.randn(NUM_ITEMS, 5)])
    if with_graph:
        options |= {"graph_vectors": vectors, "item_degrees": torch.arange(NUM_ITEMS + 1.0)}
    if content_dim:
        options["content_vectors"] = torch.cat(
            [torch.zeros(1, content_dim), torch.randn(NUM_ITEMS, content_dim)]
        )
    model = HybridRanker(
        SASRec(length + 1, dim=DIM, num_blocks=2, num_heads=2), num_items=NUM_ITEMS, **options
    )
    with torch.no_grad():  # as after training: nothing is at its special initial value
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.embedding.weight[0] = 0
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return (the ranker, the directory of its files, its scorer)."""
    directory = tmp_path_factory.mktemp("export")
    model = ranker()
    export_ranker(model, directory)
    return model, directory, scorer_of(directory)


def scorer_of(directory):
    return OnnxScorer(directory / RANKER_STATE, directory / RANKER_SCORES)


def histories(batch_size, length, width=LENGTH):
    rows = np.zeros((batch_size, width), np.int64)
    rows[:, width - length :] = np.random.default_rng(length).integers(1, NUM_ITEMS + 1, (batch_size, length))
    return rows


def by_torch(model, history, candidates):
    with torch.no_grad():
        scores, state = model(torch.from_numpy(history), torch.from_numpy(candidates))
    return scores.numpy(), state.numpy()


@pytest.mark.parametrize("num_candidates", [1, 7, 10_000])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH])
def test_the_same_scores_as_torch(exported, length, batch_size, num_candidates):
    model, _, scorer = exported
    candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (batch_size, num_candidates))
    for width in {max(length, 1), LENGTH}:  # without padding and with it
        history = histories(batch_size, length, width)
        scores, states = by_torch(model, history, candidates)
        found = scorer.score(history, candidates)
        assert found.shape == (batch_size, num_candidates)
        assert np.abs(found - scores).max() <= 1e-4
        assert np.abs(scorer.user_states(history) - states).max() <= 1e-4
        assert np.isfinite(found).all()


@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH])
def test_hstu_scores_as_in_torch(tmp_path, length):
    torch.manual_seed(0)
    model = HybridRanker(HSTU(LENGTH + 1, dim=DIM, num_heads=2), num_items=NUM_ITEMS)
    export_ranker(model, tmp_path)
    candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (2, 9))
    history = histories(2, length)
    scores, _ = by_torch(model, history, candidates)
    assert np.abs(scorer_of(tmp_path).score(history, candidates) - scores).max() <= 1e-4


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_graphs_own_scores_are_exported(tmp_path, precision):
    model = ranker().eval()
    export_ranker(model, tmp_path, precision=precision)
    without = scorer_of(tmp_path).score(histories(2, 4), np.arange(1, NUM_ITEMS + 1)[None])
    model.add_graph_scores(model.graph_vectors[:-1], 0.5, half_life=3)
    whole, _ = by_torch(model, histories(2, 4), np.arange(1, NUM_ITEMS + 1)[None].repeat(2, axis=0))
    compress(model, list(histories(300, 4)))
    export_ranker(model, tmp_path, precision=precision)
    scorer = scorer_of(tmp_path)
    assert scorer.dim == DIM  # a request costs what it costs without
    slack = MAX_SCORE_DIFFERENCE[precision]
    for length in (0, 1, LENGTH - 1, LENGTH):
        for width in {max(length, 1), LENGTH}:
            history = histories(2, length, width)
            candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (2, 9))
            scores, states = by_torch(model, history, candidates)
            allowed = slack * max(1, np.abs(scores).max())
            assert np.abs(scorer.score(history, candidates) - scores).max() <= allowed
            assert np.abs(scorer.user_states(history) - states).max() <= allowed
    found = scorer.score(histories(2, 4), np.arange(1, NUM_ITEMS + 1)[None])
    assert np.abs(found - without).max() > 0.1
    # 16 numbers for 21 that are random: what is lost is the least of it.
    difference = (found - whole) - (found - whole).mean(axis=1, keepdims=True)
    assert difference.std() < 0.2 * (whole - without).std()
    index = ItemIndex.load(tmp_path / RANKER_INDEX)
    products = index.scores(scorer.user_states(histories(2, 4)))[:, 1:]
    np.testing.assert_allclose(products, found, atol=slack * np.abs(found).max() + 1e-4)


def test_histories_of_many_lengths_in_one_batch(exported):
    model, _, scorer = exported
    history = np.concatenate([histories(1, length) for length in range(LENGTH + 1)])
    candidates = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (LENGTH + 1, 9))
    scores, _ = by_torch(model, history, candidates)
    assert np.abs(scorer.score(history, candidates) - scores).max() <= 1e-4
    assert np.ptp(scores) > 1  # and they are no constants


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("num_candidates", [1, 7])
def test_one_row_of_candidates_serves_every_history(exported, batch_size, num_candidates):
    _, _, scorer = exported
    history = histories(batch_size, 4)
    candidates = np.arange(1, num_candidates + 1)[None]
    each = scorer.score(history, np.repeat(candidates, batch_size, axis=0))
    shared = scorer.score(history, candidates)
    assert shared.shape == (batch_size, num_candidates)
    np.testing.assert_allclose(shared, each, atol=1e-6)


def test_candidates_never_see_each_other(exported):
    _, _, scorer = exported
    history, candidates = histories(1, 4), np.random.default_rng(0).permutation(NUM_ITEMS)[None] + 1
    together = scorer.score(history, candidates)
    alone = [scorer.score(history, candidates[:, [c]])[0, 0] for c in range(NUM_ITEMS)]
    np.testing.assert_allclose(together[0], alone, atol=1e-5)
    order = np.random.default_rng(1).permutation(NUM_ITEMS)
    np.testing.assert_allclose(scorer.score(history, candidates[:, order]), together[:, order], atol=1e-5)


def test_of_a_longer_history_the_newest_count(exported):
    model, _, scorer = exported
    history, candidates = histories(2, 3 * LENGTH, 3 * LENGTH), np.arange(1, 9)[None].repeat(2, axis=0)
    scores, _ = by_torch(model, history[:, -LENGTH:], candidates)
    assert np.abs(scorer.score(history, candidates) - scores).max() <= 1e-4


def test_the_file_says_what_it_is_and_stands_alone(exported):
    _, directory, scorer = exported
    assert (scorer.history_length, scorer.num_items, scorer.dim) == (LENGTH, NUM_ITEMS, DIM)
    files = sorted(file.name for file in directory.iterdir())
    assert files == sorted([*RANKER_FILES, RANKER_WEIGHTS])
    shapes = {}
    for name in (RANKER_STATE, RANKER_SCORES):
        model = onnx.load(directory / name, load_external_data=False)
        onnx.checker.check_model(directory / name)
        for node in [*model.graph.input, *model.graph.output]:
            axes = node.type.tensor_type.shape.dim
            shapes[name, node.name] = [axis.dim_param or axis.dim_value for axis in axes]
    assert shapes[RANKER_STATE, "history"] == ["batch", "length"]
    assert shapes[RANKER_STATE, "state"] == shapes[RANKER_SCORES, "state"] == ["batch", DIM]
    assert shapes[RANKER_SCORES, "candidates"] == ["batch_or_1", "num_candidates"]


def test_both_graphs_read_one_table_of_items(exported):
    model, directory, _ = exported
    places = {}
    for name in (RANKER_STATE, RANKER_SCORES):
        graph = onnx.load(directory / name, load_external_data=False).graph
        places[name] = {
            tuple(table.dims): {entry.key: entry.value for entry in table.external_data}
            for table in graph.initializer
            if table.external_data
        }
    with_start_token = places[RANKER_STATE][NUM_ITEMS + 2, DIM]
    assert places[RANKER_SCORES] == {
        (NUM_ITEMS + 1, DIM): with_start_token | {"length": str((NUM_ITEMS + 1) * DIM * 4)}
    }
    assert with_start_token["location"] == RANKER_WEIGHTS
    content = (directory / RANKER_WEIGHTS).read_bytes()[int(with_start_token["offset"]) :]
    vectors = np.frombuffer(content, np.float32, (NUM_ITEMS + 1) * DIM).reshape(-1, DIM)
    np.testing.assert_array_equal(vectors, model.item_vectors().detach().numpy())


def test_the_index_holds_what_the_ranker_scores_with(exported):
    _, directory, scorer = exported
    index = ItemIndex.load(directory / RANKER_INDEX)
    history = histories(3, 4)
    scores = scorer.score(history, np.arange(1, NUM_ITEMS + 1)[None])
    np.testing.assert_allclose(index.scores(scorer.user_states(history))[:, 1:], scores, atol=1e-4)


def clustered(num_items=3000, num_queries=384):
    rng = np.random.default_rng(0)
    means = rng.standard_normal((30, 16))
    vectors = means[rng.integers(0, 30, num_items + 1)] + 0.5 * rng.standard_normal((num_items + 1, 16))
    queries = means[rng.integers(0, 30, num_queries)] + 0.5 * rng.standard_normal((num_queries, 16))
    return vectors.astype(np.float32), queries.astype(np.float32)


def test_options_of_a_recipe():
    quotas = {"sequence": 0.5, "embedding": 0.3, "popular": 0.2}
    recipe = {"num_candidates": 700, "sources": [{"source": n, "quota": q} for n, q in quotas.items()]}

    def k_of(source, has_ranker=True, **index):
        return index_options(recipe | {"index": index}, source, has_ranker=has_ranker).k

    assert index_options(recipe, "sequence", has_ranker=True) == IndexOptions(k=700)
    assert k_of("sequence", kind="ivf", k=None, recall_target=0.9) == 700
    assert k_of("embedding") == 210  # 700 * .3
    assert k_of("embedding", has_ranker=False) == 700  # then it is the first
    assert k_of("embedding", k=4) == k_of("sequence", k=4) == 4
    recipe["num_candidates"] = 250
    assert k_of("embedding") == 100  # not 75
    recipe |= {"num_candidates": 700, "sources": [{"source": "popular", "quota": 1.0}]}
    assert k_of("embedding") == k_of("sequence") == 700  # no source asks them: nothing is known


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_written_and_checked_whatever_its_kind(kind, tmp_path):
    vectors, queries = clustered()
    options = IndexOptions(kind=kind, k=50, recall_target=0.95)
    told = write_index(tmp_path / "index.faiss", vectors, options, queries)
    index = ItemIndex.load(tmp_path / "index.faiss", kind=kind)
    _check_index("index", index, queries[:40], vectors, options)
    assert (told["kind"], told["setting"]) == (index.kind, index.setting) == (kind, told["setting"])
    if kind in EXACT_KINDS:
        assert "recall" not in told
    else:
        assert told["k"] == 50
        assert told["recall"] == round(index.recall(queries[256:], 50), 5) >= 0.95
    with pytest.raises(ValueError, match=f"index: scores of {kind} differ from brute force by "):
        _check_index("index", index, queries[:40], vectors[::-1].copy(), options)


def test_an_index_that_misses_too_much_is_refused(tmp_path):
    vectors, queries = clustered()
    options = IndexOptions(kind="ivf", k=50, num_probes=1)
    told = write_index(tmp_path / "index.faiss", vectors, options, queries)
    assert told["recall"] < 0.96
    index = ItemIndex.load(tmp_path / "index.faiss")
    with pytest.raises(ValueError, match=r"ivf finds 0\.\d+ of the best 50; expected 0\.99 \(pipeline"):
        _check_index("index", index, queries, vectors, options)
    exact = ItemIndex.build(vectors)
    exact.remove([int(exact.search(queries[:1], 1)[0][0, 0])])
    with pytest.raises(ValueError, match=r"flat finds 0\.\d+ of the best 50; expected 1$"):
        _check_index("index", exact, queries[:1], vectors, options)


def test_without_examples_items_stand_in(tmp_path):
    vectors, _ = clustered(500)
    options = IndexOptions(kind="sq8", k=20)
    told = write_index(tmp_path / "index.faiss", vectors, options, np.zeros((0, 16), np.float32))
    assert told["recall"] >= 0.99
    nothing = write_index(tmp_path / "none.faiss", vectors[:1], options, np.zeros((0, 16), np.float32))
    assert nothing["kind"] == "flat"


@pytest.mark.parametrize(("length", "with_graph"), [(1, True), (2, False)])
def test_the_shortest_histories_and_no_graph(tmp_path, length, with_graph):
    # As a training run leaves it: dropout on, and perhaps in half precision.
    model = ranker(length, with_graph).train().to(torch.bfloat16)
    export_ranker(model, tmp_path)
    scorer = scorer_of(tmp_path)
    assert scorer.history_length == length
    candidates = np.arange(1, NUM_ITEMS + 1)[None]
    for events in range(length + 1):
        history = histories(1, events, length)
        scores, _ = by_torch(model.float().eval(), history, candidates)
        assert np.abs(scorer.score(history, candidates) - scores).max() <= 1e-4


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_a_ranker_in_context_scores_as_in_torch(tmp_path, strength):
    model = ranker(context=TABLE, content_dim=4, is_trained=torch.arange(NUM_ITEMS + 1) % 9 > 0)
    model.context_fusion.strength = strength
    export_ranker(model, tmp_path)
    scorer = scorer_of(tmp_path)
    assert scorer.context.keys == TABLE.keys
    history = np.concatenate([histories(1, length) for length in (0, 1, LENGTH - 1, LENGTH)])
    candidates = np.arange(1, NUM_ITEMS + 1)[None]
    moments = [
        TABLE.unknown(4),
        Encoded(
            np.array([[1, 4], [2, 4], [0, 3], [2, 3]]),
            np.array([[1, 2], [1, -1], [1, 1], [1, 1]], np.float32),
        ),
    ]
    for context in moments:
        with torch.no_grad():
            tensors = map(torch.from_numpy, (history, np.repeat(candidates, 4, axis=0), *context))
            scores, states = (found.numpy() for found in model(*tensors))
        assert np.abs(scorer.score(history, candidates, context) - scores).max() <= 1e-4
        assert np.abs(scorer.user_states(history, context) - states).max() <= 1e-4
    assert np.abs(scorer.user_states(history) - scorer.user_states(history, moments[0])).max() == 0
    assert np.abs(scorer.user_states(history) - states).max() > 0.1
    for count in (1, 3):  # the batch axis is free
        alone = Encoded(moments[1].rows[:count], moments[1].weights[:count])
        np.testing.assert_allclose(scorer.user_states(history[:count], alone), states[:count], atol=1e-5)


def test_heads_are_weighed_as_in_torch(tmp_path):
    model = ranker(heads=("cart", "purchase"))
    export_ranker(model, tmp_path)
    scorer = scorer_of(tmp_path)
    assert scorer.heads == ("next", "cart", "purchase")
    history, candidates = histories(2, 3), np.arange(1, NUM_ITEMS + 1)[None].repeat(2, axis=0)
    weights = np.array([[1, 0, 0], [0.5, 0, 2]], np.float32)
    moment = ContextTable().unknown(2)
    with torch.no_grad():
        tensors = map(torch.from_numpy, (history, candidates, *moment, weights))
        scores = model(*tensors)[0].numpy()
    assert np.abs(scorer.score(history, candidates, moment, weights) - scores).max() <= 1e-4
    assert np.abs(scorer.score(history, candidates)[0] - scores[0]).max() <= 1e-4  # the first head alone
    with pytest.raises(ValueError, match=r"head_weights has shape \(1, 3\); expected \(2, 3\)"):
        scorer.user_states(history, None, weights[:1])


def test_compressed_scores_are_right_for_every_head():
    """A head whose queries are unlike those of the next item would lose most of what it says."""
    model = ranker(heads=("purchase",)).eval()
    with torch.no_grad():
        model.head_queries.turn.weight.normal_(std=0.5)
    model.add_graph_scores(model.graph_vectors[:-1], 1.0, half_life=3)
    given, asked = list(histories(300, 4)), list(histories(50, 3))
    items = model.item_parts()[1:].detach().numpy()

    def lost(pair, queries):
        both = queries @ items.T
        found = queries @ pair[0] @ (items @ pair[1]).T
        difference = found - both
        return (difference - difference.mean(axis=1, keepdims=True)).std() / both.std()

    queries = history_queries(model, asked, head=1)
    next_alone = compression(history_queries(model, given), items, DIM)
    compress(model, given)
    of_all = model.compress_queries.numpy(), model.compress_items.numpy()
    assert lost(of_all, queries) < 0.5 * lost(next_alone, queries)


@pytest.mark.parametrize("options", [{}, {"heads": ("cart",)}, {"context": TABLE}])
def test_nobody_asks(tmp_path, options):
    export_ranker(ranker(**options), tmp_path)
    scorer = scorer_of(tmp_path)
    assert scorer.user_states(np.ones((0, 3), np.int64)).shape == (0, DIM)
    assert scorer.score(np.ones((0, 3), np.int64), np.ones((0, 5), np.int64)).shape == (0, 5)


def test_content_costs_serving_nothing(tmp_path):
    """It is in the items' vectors: no file grows with what it was made from."""
    sizes = []
    for content_dim in (0, 400):
        directory = tmp_path / str(content_dim)
        directory.mkdir()
        model = ranker(content_dim=content_dim)
        export_ranker(model, directory)
        sizes.append([(directory / name).stat().st_size for name in (*RANKER_FILES, RANKER_WEIGHTS)])
        scores, _ = by_torch(model, histories(2, 4), np.arange(1, 9)[None].repeat(2, axis=0))
        found = scorer_of(directory).score(histories(2, 4), np.arange(1, 9)[None])
        assert np.abs(found - scores).max() <= 1e-4
    assert np.ptp(sizes, axis=0).max() < 200


ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d", "e"],
        "title": ["Red shoe", "red HAT", None, "Shoe: red!", "shoe"],
        "category": [["wear", "shoes"], None, ["red"], ["wear", "shoes"], []],
        "brand": [None, "red", None, None, None],
        "available_from": [None, 5, 5, 10, 11],
    },
    schema={name: ITEM_SCHEMA[name] for name in ("item_id", "title", "category", "brand", "available_from")},
)


def test_features_are_words_and_names_apart_by_column():
    features = content_features(ITEMS)
    sets = [set(features.row(row)[0].tolist()) for row in range(6)]
    assert [len(found) for found in sets] == [0, 4, 3, 1, 4, 1]
    assert sets[1] == sets[4]  # case and punctuation mean nothing
    assert len(sets[1] & sets[2]) == 1  # the word "red"; the brand and the category red are others
    assert not sets[3] & (sets[1] | sets[2])
    assert sets[5] < sets[1]
    only_ids = content_features(ITEMS.select("item_id"))
    assert (len(only_ids), only_ids.num_columns) == (6, 0)


def test_popularity_of_the_last_days():
    day = 86_400_000
    train = Interactions(
        users=np.array([1, 1, 2, 3], np.int32),
        items=np.array([1, 2, 1, 2], np.int32),
        event_types=np.zeros(4, np.uint8),
        timestamps=np.array([0, 7 * day, 8 * day, 10 * day]),
        num_users=3,
        num_items=2,
    )
    assert recent_popularity(train, None).tolist() == [0, 2, 2]
    assert recent_popularity(train, 3).tolist() == [0, 1, 1]  # 3 days ago is not within 3 days
    assert recent_popularity(train, 4).tolist() == [0, 1, 2]


def test_content_vectors_are_as_alike_as_what_they_describe():
    words = np.random.default_rng(0).integers(0, 30, (40, 5))
    titles = [" ".join(f"word{word}" for word in row) for row in words]
    titles[7] = None
    items = pl.DataFrame({"item_id": [str(n) for n in range(40)], "title": titles})
    features = content_features(items)
    dense = np.stack([features.product(np.eye(features.num_columns, dtype=np.float32))])[0]
    found = content_embedding(features, dim=40)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, dense @ dense.T, atol=1e-4)
    assert not found[[0, 8]].any()
    assert np.array_equal(found, content_embedding(features, dim=40))
    short = content_embedding(features, dim=3)
    assert short.shape == (41, 3)
    # The best vectors of 3 numbers: nothing else of that rank is closer to the products.
    values, vectors = np.linalg.eigh(dense @ dense.T)
    best = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    np.testing.assert_allclose(short @ short.T, best, atol=1e-3)


def test_items_that_say_nothing_have_no_content():
    items = pl.DataFrame({"item_id": ["a", "b"]})
    assert not content_embedding(content_features(items)).any()
