import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from retrieval.item_index import KINDS, IndexOptions, ItemIndex, choose_kind

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
APPROXIMATE = ("ivf", "hnsw", "sq8")

# Row 1 points right, row 2 up, row 3 right and up, row 4 is all zeros.
VECTORS = np.array([[9, 9], [1, 0], [0, 1], [1, 1], [0, 0]], np.float32)


@pytest.fixture
def index() -> ItemIndex:
    return ItemIndex.build(VECTORS)


def build(vectors: np.ndarray, kind: str, **options: object) -> ItemIndex:
    return ItemIndex.build(vectors, IndexOptions(kind=kind, **options))


def clustered(num_items: int, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [I+1, D] in 40 clusters, lengths from 0.5 to 3, and 30 queries near them."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((40, dim))
    vectors = means[rng.integers(0, 40, num_items + 1)] + 0.4 * rng.standard_normal((num_items + 1, dim))
    vectors *= rng.uniform(0.5, 3, (num_items + 1, 1))
    queries = vectors[rng.integers(1, num_items + 1, 30)] + 0.2 * rng.standard_normal((30, dim))
    return vectors.astype(np.float32), queries.astype(np.float32)


@pytest.fixture(scope="module")
def catalog() -> tuple[np.ndarray, np.ndarray]:
    return clustered(4000)


@pytest.fixture(scope="module")
def built(catalog) -> dict[str, ItemIndex]:
    vectors, queries = catalog
    return {
        kind: ItemIndex.build(vectors, IndexOptions(kind=kind, k=100, recall_target=0.95), queries=queries)
        for kind in KINDS
    }


@EVERY_KIND
def test_worked_out_answer(kind):
    index = build(VECTORS, kind)
    rows, scores = index.search(np.array([[2, 1], [-1, 0]], np.float32), k=4)
    # 2x + y: 2, 1, 3, 0.  -x: -1, 0, -1, 0, and equal scores stand by row.
    assert rows.tolist() == [[3, 1, 2, 4], [2, 4, 1, 3]]
    assert scores.tolist() == [[3, 2, 1, 0], [0, 0, -1, -1]]
    assert rows.dtype == np.int32
    assert scores.dtype == np.float32
    assert (index.num_items, index.dim) == (4, 2)


def test_a_small_catalog_is_searched_whole():
    """Tuned on its own items, ivf would look into the wrong half for a query that is like none of them."""
    vectors = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1], [1, 1]], np.float32)
    rows, scores = build(vectors, "ivf").search(np.array([[-1, -1]], np.float32), 1)
    assert (rows.tolist(), scores.tolist()) == ([[1]], [[0]])


def test_row_0_is_never_found(index):
    rows, _ = index.search(np.ones((1, 2), np.float32), k=100)
    assert sorted(rows[0].tolist()) == [1, 2, 3, 4]


def test_allowed(index):
    query = np.array([[2, 1]], np.float32)
    rows, _ = index.search(query, 2, np.array([True, True, True, False, True]))
    assert rows.tolist() == [[1, 2]]
    rows, _ = index.search(query, 4, np.array([True, False, True, False, False]))
    assert rows.tolist() == [[2]]
    rows, scores = index.search(query, 4, np.array([True, False, False, False, False]))
    assert rows.shape == scores.shape == (1, 0)


def test_scores_of_every_item(index):
    scores = index.scores(np.array([[2, 1], [-1, 0]], np.float32))
    assert scores.dtype == np.float32
    assert scores.tolist() == [[-np.inf, 2, 1, 3, 0], [-np.inf, -1, 0, -1, 0]]


def test_scores_in_several_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((12, 3)).astype(np.float32)
    queries = rng.standard_normal((2, 3)).astype(np.float32)
    monkeypatch.setattr("retrieval.item_index.SCORES_BLOCK", 4)
    scores = ItemIndex.build(vectors).scores(queries)
    np.testing.assert_allclose(scores[:, 1:], queries @ vectors[1:].T, rtol=1e-5)


@EVERY_KIND
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_search_agrees_with_a_full_sort(kind, data):
    """Small whole numbers: products are exact, and duplicates, ties and zero vectors are common."""
    num_items = data.draw(st.integers(0, 30))
    dim = data.draw(st.integers(1, 3))
    vectors = data.draw(arrays(np.float32, (num_items + 1, dim), elements=st.integers(-2, 2)))
    queries = data.draw(arrays(np.float32, (data.draw(st.integers(1, 3)), dim), elements=st.integers(-2, 2)))
    k = data.draw(st.integers(1, 40))
    allowed = data.draw(st.none() | arrays(np.bool_, num_items + 1))
    removed = data.draw(st.lists(st.integers(1, num_items), max_size=5) if num_items else st.just([]))

    index = build(vectors, kind)
    index.remove(np.array(removed, np.int64))
    rows, scores = index.search(queries, k, allowed)
    may_come = [row for row in range(1, num_items + 1) if allowed is None or allowed[row]]
    may_come = [row for row in may_come if row not in removed]
    assert rows.shape == scores.shape == (len(queries), min(k, len(may_come)))
    for query, found, found_scores in zip(queries, rows.tolist(), scores.tolist(), strict=True):
        product = {row: float(query @ vectors[row]) for row in may_come}
        assert found_scores == sorted(product.values(), reverse=True)[:k]
        assert set(found) <= set(may_come)
        assert found == sorted(set(found), key=lambda row: (-product[row], row))
        assert found_scores == [product[row] for row in found]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_exact_search_misses_nothing(data):
    """Numbers of all sizes, which 8 bits hold badly; equals go by the lower row, at the cut too."""
    num_items, dim = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([1, 3, 16, 17, 40, 65, 130]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    sizes = 10.0 ** rng.integers(-data.draw(st.integers(1, 25)), 12, (num_items + 1, dim))
    vectors = (rng.standard_normal((num_items + 1, dim)) * sizes).astype(np.float32)
    vectors[rng.random(num_items + 1) < 0.2] = vectors[-1]  # equals, far apart
    vectors[rng.random(num_items + 1) < 0.1] = 0
    query = (rng.standard_normal((1, dim)) * 10.0 ** rng.integers(-20, 12, dim)).astype(np.float32)
    k = data.draw(st.integers(1, num_items))
    allowed = data.draw(st.none() | st.just(rng.random(num_items + 1) < 0.7))

    rows, scores = build(vectors, "exact").search(query, k, allowed)
    products = np.vecdot(vectors, query[0])  # the same sums in the same order: equal to the last bit
    may_come = [row for row in range(1, num_items + 1) if allowed is None or allowed[row]]
    expected = sorted(may_come, key=lambda row: (-products[row], row))[:k]
    assert rows[0].tolist() == expected
    assert scores[0].tolist() == products[expected].tolist()


@pytest.mark.parametrize("k", [1, 100, 3000])
@pytest.mark.parametrize("order", ["shuffled", "best last", "best on the sample's step"])
def test_exact_search_of_a_large_catalog(k, order):
    """More items than the sample holds, in orders that mislead it."""
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((50_001, 8)).astype(np.float32)
    query = rng.standard_normal((1, 8)).astype(np.float32)
    if order != "shuffled":
        vectors[1:] = vectors[1:][np.argsort(vectors[1:] @ query[0])]
    if order == "best on the sample's step":
        vectors[1::3], vectors[2::3] = vectors[-16_667:], vectors[1:16_668].copy()
    allowed = rng.random(50_001) < 0.6
    index = build(vectors, "exact")
    products = np.vecdot(vectors, query[0])
    for mask in (None, allowed):
        reach = products.copy()
        reach[0] = -np.inf
        if mask is not None:
            reach[~mask] = -np.inf
        rows, scores = index.search(query, k, mask)
        expected = np.lexsort((np.arange(len(reach)), -reach))[:k]
        assert rows[0].tolist() == expected.tolist()
        assert scores[0].tolist() == products[expected].tolist()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rough_search_is_wrong_by_the_rounding_alone(data):
    num_items, dim = data.draw(st.integers(1, 400)), data.draw(st.sampled_from([1, 3, 16, 40, 65, 130]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    vectors = rng.standard_normal((num_items + 1, dim)).astype(np.float32)
    vectors[rng.random(num_items + 1) < 0.1] = 0
    queries = (rng.standard_normal((3, dim)) * [[1e-9], [1], [1e9]]).astype(np.float32)
    k = data.draw(st.integers(1, num_items))
    allowed = data.draw(st.none() | st.just(rng.random(num_items + 1) < 0.7))

    index = build(vectors, "exact")
    rows, scores = index.rough_search(queries, k, allowed)
    best_scores = index.search(queries, k, allowed)[1]
    assert rows.shape == scores.shape == best_scores.shape
    for query, found, found_scores, best in zip(queries, rows, scores, best_scores, strict=True):
        assert len(set(found.tolist())) == len(found)
        assert allowed is None or allowed[found].all()
        assert (np.diff(found_scores) <= 0).all()
        slack = 0.02 * np.linalg.norm(query) * np.linalg.norm(vectors, axis=1).max() + 1e-30
        assert np.abs(found_scores - vectors[found] @ query).max(initial=0) <= slack
        # The n-th best found is as good as the n-th best there is, but for the rounding.
        assert (np.sort(vectors[found] @ query)[::-1] >= best - 2 * slack).all()


def test_rough_search_misses_what_lies_at_the_cut():
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((20_001, 64)).astype(np.float32)
    queries = rng.standard_normal((20, 64)).astype(np.float32)
    index = build(vectors, "exact")
    rough, right = index.rough_search(queries, 1000)[0], index.search(queries, 1000)[0]
    assert (rough != right).any()  # it does not look twice
    assert np.mean([np.isin(r, f).mean() for r, f in zip(right, rough, strict=True)]) > 0.98
    assert all(np.isin(r[:900], f).all() for r, f in zip(right, rough, strict=True))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"exact"}))
def test_other_kinds_search_as_ever_where_rough_would_do(kind, catalog, built):
    _, queries = catalog
    rough, right = built[kind].rough_search(queries, 20), built[kind].search(queries, 20)
    np.testing.assert_array_equal(rough[0], right[0])
    np.testing.assert_array_equal(rough[1], right[1])


def test_exact_search_answers_each_query_by_itself():
    rng = np.random.default_rng(3)
    vectors, queries = clustered(3000)
    index = build(vectors, "exact")
    rows, scores = index.search(queries, 200)
    for number in rng.integers(0, len(queries), 5):
        alone_rows, alone_scores = index.search(queries[number : number + 1], 200)
        assert rows[number].tolist() == alone_rows[0].tolist()
        assert scores[number].tolist() == alone_scores[0].tolist()


@EVERY_KIND
def test_recall_on_clustered_vectors(kind, catalog, built):
    _, queries = catalog
    index = built[kind]
    assert index.kind == kind
    assert index.recall(queries, 100) >= (0.95 if kind in APPROXIMATE else 1)
    assert index.recall(queries, 10) >= 0.9


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_falls_where_little_is_looked_at(kind, caplog):
    """So the test above can fail: recall sees what is missed, and what cannot be reached is said."""
    vectors = np.random.default_rng(6).standard_normal((3001, 16)).astype(np.float32)
    index = build(vectors, kind, k=10, num_lists=20, num_probes=1, ef_search=1, num_links=2)
    assert index.recall(vectors[1:31] + vectors[31:61], 10) < 0.9
    assert "of the best 10, less than the 0.9900 asked for" in caplog.text


def test_what_was_not_tuned_on_tells_the_recall(caplog):
    """Tuned on queries that are easy, one list holds all they want; of others it holds little."""
    vectors, _ = clustered(4000)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    easy = vectors[np.random.default_rng(0).integers(1, 4001, 40)]
    hard = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32)
    index = build(vectors, "ivf", k=20, num_lists=40)
    order = np.random.default_rng(0).permutation(80)  # as tune draws: every second one is held out
    mixed = np.empty((80, 16), np.float32)
    mixed[order[::2]], mixed[order[1::2]] = easy, hard
    assert index.tune(easy, k=20, recall_target=0.9) >= 0.9
    probes = int(index.setting.split()[1])
    assert index.recall(hard, 20) < 0.9
    recall = index.tune(mixed, k=20, recall_target=0.9)
    assert recall >= 0.9
    assert recall == pytest.approx(index.recall(hard, 20))
    assert int(index.setting.split()[1]) > probes
    assert index.tune(mixed, k=20, recall_target=0.9, width=1) < 0.9
    assert "nprobe 1 of" in index.setting
    assert "less than the 0.9000 asked for" in caplog.text
    with pytest.raises(ValueError, match="queries is empty"):
        index.tune(hard[:0], k=20, recall_target=0.9)


def test_auto_becomes_exact_where_clusters_do_not_help(monkeypatch, caplog):
    monkeypatch.setattr("retrieval.item_index.choose_kind", lambda *args, **keywords: "ivf")
    vectors, queries = clustered(2000)
    index = build(vectors, "auto", k=20, num_probes=1, recall_target=1.0)
    assert index.kind == "exact"
    assert "the index becomes exact instead" in caplog.text
    assert index.recall(queries, 20) == 1
    assert build(vectors, "ivf", k=20, num_probes=1, recall_target=1.0).kind == "ivf"


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_scores_of_an_approximate_kind_are_the_products(kind, catalog, built):
    vectors, queries = catalog
    rows, scores = built[kind].search(queries, 50)
    np.testing.assert_array_equal(scores, np.vecdot(vectors[rows], queries[:, np.newaxis]))
    assert (np.diff(scores) <= 0).all()


@EVERY_KIND
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("k", [1, 40, 4000])
def test_no_mask_makes_an_answer_short(kind, share, k, catalog, built):
    _, queries = catalog
    rng = np.random.default_rng(4)
    allowed = rng.random(4001) < share
    rows, _ = built[kind].search(queries, k, allowed)
    assert rows.shape == (len(queries), min(k, int(allowed[1:].sum())))
    assert allowed[rows].all()
    assert (rows >= 1).all()
    assert all(len(set(found)) == len(found) for found in rows.tolist())


@EVERY_KIND
def test_a_mask_leaves_recall_as_it_is(kind, catalog, built):
    _, queries = catalog
    index = built[kind]
    allowed = np.random.default_rng(5).random(4001) < 0.5
    every = np.where(allowed, index.scores(queries), -np.inf)
    kth_best = -np.sort(-every, axis=1)[:, 39]
    _, scores = index.search(queries, 40, allowed)
    assert (scores >= kth_best[:, np.newaxis] - 1e-3).mean() >= 0.93


@EVERY_KIND
def test_where_few_lists_hold_what_is_allowed(kind):
    """All allowed items lie in the direction away from the query: an index that stops early finds none."""
    vectors, _ = clustered(3000)
    query = vectors[1:2]
    allowed = vectors @ query[0] < np.quantile(vectors @ query[0], 0.5)
    rows, _ = build(vectors, kind, k=10).search(query, 300, allowed)
    assert rows.shape == (1, 300)
    assert allowed[rows].all()


@EVERY_KIND
def test_removed_items_never_come_back(kind, catalog, tmp_path: Path):
    vectors, queries = catalog
    index = build(vectors, kind, k=100)
    before, _ = index.search(queries, 100)
    gone = np.unique(before[:, :50])
    index.remove(gone[::2])
    index.remove(gone.tolist())
    assert index.removed.tolist() == gone.tolist()
    assert index.num_items == 4000
    index.save(tmp_path / "item_index.faiss")
    for each in (index, ItemIndex.load(tmp_path / "item_index.faiss", kind=exact_or_flat(kind))):
        assert each.kind == kind
        assert each.removed.tolist() == gone.tolist()
        rows, scores = each.search(queries, 100)
        assert not np.isin(rows, gone).any()
        np.testing.assert_allclose(scores, np.vecdot(vectors[rows], queries[:, np.newaxis]), rtol=1e-4)
        assert each.search(queries, 5000)[0].shape == (len(queries), 4000 - len(gone))
        every = each.scores(queries)
        assert np.isneginf(every[:, gone]).all()
        assert np.isfinite(np.delete(every, [0, *gone], axis=1)).all()
        assert each.search(queries, 5, np.isin(np.arange(4001), gone))[0].shape == (len(queries), 0)


def exact_or_flat(kind: str) -> str | None:
    return kind if kind in ("exact", "flat") else None


def test_remove_names_a_wrong_row(index):
    with pytest.raises(ValueError, match="rows holds 5; expected 1 to 4"):
        index.remove([1, 5])
    with pytest.raises(ValueError, match="rows holds 0; expected 1 to 4"):
        index.remove([0])
    with pytest.raises(ValueError, match=r"rows is float64 \(1,\); expected whole numbers"):
        index.remove([1.0])
    assert index.removed.tolist() == []
    index.remove([])


def test_large_k_and_many_queries_agree_with_scores():
    """FAISS takes other code paths for k >= 100 and for 20 queries and more."""
    rng = np.random.default_rng(1)
    index = ItemIndex.build(rng.standard_normal((2001, 8)).astype(np.float32))
    queries = rng.standard_normal((25, 8)).astype(np.float32)
    allowed = rng.random(2001) < 0.5
    every = np.where(allowed, index.scores(queries), -np.inf)
    for k in (1, 150, 1900):
        rows, scores = index.search(queries, k, allowed)
        expected = -np.sort(-every, axis=1)[:, : min(k, int(allowed[1:].sum()))]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
        assert allowed[rows].all()


def test_empty_catalog():
    index = ItemIndex.build(np.zeros((1, 4), np.float32))
    queries = np.ones((3, 4), np.float32)
    rows, scores = index.search(queries, 10)
    assert rows.shape == scores.shape == (3, 0)
    assert index.search(queries, 10, np.array([True]))[0].shape == (3, 0)
    assert index.scores(queries).tolist() == [[-np.inf]] * 3


def test_one_item_and_no_query():
    index = ItemIndex.build(np.ones((2, 4), np.float32))
    assert index.search(np.ones((1, 4), np.float32), 5)[0].tolist() == [[1]]
    assert index.search(np.ones((0, 4), np.float32), 5)[0].shape == (0, 1)
    assert index.scores(np.ones((0, 4), np.float32)).shape == (0, 2)


def test_build_leaves_the_padding_row_out():
    vectors = VECTORS.copy()
    vectors[0] = np.nan
    assert ItemIndex.build(vectors).num_items == 4


@EVERY_KIND
@pytest.mark.parametrize("num_items", [0, 4, 4000])
def test_save_and_load(kind, num_items: int, catalog, tmp_path: Path):
    vectors, queries = catalog
    index = build(vectors[: num_items + 1], kind, k=50)
    index.save(tmp_path / "item_index.faiss")
    loaded = ItemIndex.load(tmp_path / "item_index.faiss", kind=exact_or_flat(index.kind), num_threads=2)
    assert (loaded.num_items, loaded.dim, loaded.num_threads) == (num_items, 16, 2)
    assert (loaded.kind, loaded.setting) == (index.kind, index.setting)
    for before, after in zip(index.search(queries, 50), loaded.search(queries, 50), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(index.scores(queries), loaded.scores(queries))


@EVERY_KIND
def test_a_loaded_index_is_a_memory_map(kind, tmp_path: Path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    path = tmp_path / "item_index.faiss"
    vectors, queries = clustered(500)
    build(vectors, kind, k=5).save(path)
    loaded = ItemIndex.load(path, kind=exact_or_flat(kind))
    loaded.search(queries, 5)
    assert str(path) in Path("/proc/self/maps").read_text()


def test_load_takes_a_file_of_plain_vectors_as_either(tmp_path: Path, catalog):
    vectors, queries = catalog
    path = tmp_path / "item_index.faiss"
    build(vectors, "exact").save(path)
    assert ItemIndex.load(path).kind == choose_kind(4000, k=1, recall_target=1)
    exact, flat = ItemIndex.load(path, kind="exact"), ItemIndex.load(path, kind="flat")
    np.testing.assert_allclose(exact.search(queries, 70)[1], flat.search(queries, 70)[1], rtol=1e-5)
    build(vectors, "ivf").save(path)
    with pytest.raises(ValueError, match="of kind ivf; expected hnsw"):
        ItemIndex.load(path, kind="hnsw")


def test_load_refuses_an_index_of_another_make(tmp_path: Path):
    faiss.write_index(faiss.IndexHNSWFlat(2, 4, faiss.METRIC_INNER_PRODUCT), str(tmp_path / "hnsw.faiss"))
    with pytest.raises(
        ValueError, match=r"holds a FAISS IndexHNSWFlat; expected what ItemIndex\.save writes"
    ):
        ItemIndex.load(tmp_path / "hnsw.faiss")


@EVERY_KIND
def test_searches_run_on_the_threads_they_were_given(kind, catalog, built, monkeypatch):
    """FAISS reads its setting in the thread that calls it; a server calls from many."""
    vectors, queries = catalog
    seen: list[int] = []
    for name in ("IndexFlatIP", "IndexIVFPQFastScan", "IndexHNSWSQ", "IndexScalarQuantizer"):
        search = getattr(faiss, name).search

        def spy(self, *args, _search=search, **keywords):
            seen.append(faiss.omp_get_max_threads())
            return _search(self, *args, **keywords)

        monkeypatch.setattr(getattr(faiss, name), "search", spy)
    index = ItemIndex.build(vectors, IndexOptions(kind=kind, k=100), num_threads=3)
    seen.clear()
    faiss.omp_set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda query: index.search(query[np.newaxis].repeat(4, 0), 20), queries[:6]))
        after = list(pool.map(lambda _: faiss.omp_get_max_threads(), range(6)))
    assert set(seen) == (set() if kind == "exact" else {3})  # exact has threads of its own
    seen.clear()
    index.search(queries[:1], 20)
    assert set(seen) <= {1}
    assert 3 not in after
    assert faiss.omp_get_max_threads() == 1
    for query, (rows, _) in zip(queries, answers, strict=False):
        assert rows[0].tolist() == index.search(query[np.newaxis], 20)[0][0].tolist()


def test_auto_is_the_rule_that_choose_kind_states(catalog):
    vectors, _ = catalog
    assert choose_kind(10_000, 100, 0.99) == "flat"
    assert choose_kind(100_000, 100, 1.0) == "exact"
    assert choose_kind(1_000_000, 10_000, 1.0) == "exact"
    assert choose_kind(1_000_000, 10_000, 0.99) == "ivf"
    assert choose_kind(1_000_000, 50_001, 0.99) == "exact"
    assert choose_kind(1_000_000, 2_048, 1.0, gpu=True) == "flat"
    assert choose_kind(1_000_000, 2_049, 1.0, gpu=True) == "exact"
    assert ItemIndex.build(vectors).kind == "flat"


def test_options_name_what_is_wrong():
    for keywords, message in [
        ({"kind": "annoy"}, "kind is 'annoy'; expected auto or one of exact, flat, ivf, hnsw, sq8"),
        ({"recall_target": 0.0}, "recall_target is 0.0; expected more than 0, up to 1"),
        ({"recall_target": 1.1}, "recall_target is 1.1"),
        ({"k": 0}, "k is 0; expected at least 1"),
        ({"num_probes": 0}, "num_probes is 0; expected at least 1"),
        ({"num_links": 1}, "num_links is 1; expected at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            IndexOptions(**keywords)
    with pytest.raises(ValueError, match="num_threads is 0; expected at least 1"):
        ItemIndex.build(VECTORS, num_threads=0)


class FakeGpu:
    """Stands in for faiss-gpu: counts its searches and lets the CPU answer."""

    def __init__(self, index):
        self.index, self.searches = index, 0

    def search(self, queries, k):
        self.searches += 1
        return self.index.search(queries, k)


def test_flat_runs_on_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    gpus = []

    def to_gpu(resources, device, index):
        gpus.append(FakeGpu(index))
        return gpus[-1]

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    vectors, queries = clustered(3000)
    index = build(vectors, "flat")
    expected = build(vectors, "exact").search(queries, 2048)[1]
    np.testing.assert_allclose(index.search(queries, 2048)[1], expected, rtol=1e-4, atol=1e-4)
    assert gpus[0].searches == 1
    index.search(queries, 2049)  # more than a GPU takes
    index.search(queries, 10, np.arange(3001) % 2 == 0)  # filtered
    assert gpus[0].searches == 1
    assert build(vectors, "auto", k=100).kind == "flat"


def test_load_refuses_another_metric(tmp_path: Path):
    faiss.write_index(faiss.IndexFlatL2(2), str(tmp_path / "l2.faiss"))
    with pytest.raises(ValueError, match="expected inner product"):
        ItemIndex.load(tmp_path / "l2.faiss")


@pytest.mark.parametrize("shape", [(3,), (0, 2), (3, 0), (1, 2, 3)])
def test_build_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"vectors has shape .*; expected \[I\+1, D\]"):
        ItemIndex.build(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(index, value):
    with pytest.raises(ValueError, match="vectors holds NaN or infinity"):
        ItemIndex.build(np.array([[0, 0], [1, value]], np.float32))
    with pytest.raises(ValueError, match="queries holds NaN or infinity"):
        index.search(np.array([[0, value]], np.float32), 1)
    with pytest.raises(ValueError, match="queries holds NaN or infinity"):
        index.scores(np.array([[0, value]], np.float32))


@pytest.mark.parametrize("kind", ["exact", "flat"])
def test_overflow_is_an_error_and_not_row_0(kind):
    index = build(np.full((3, 2), 1e29, np.float32), kind)
    with pytest.raises(ValueError, match="too large for float32"):
        index.search(np.full((1, 2), -1e30, np.float32), 2)


def test_search_names_what_is_wrong(index):
    query = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"queries has shape \(1, 3\); expected \[B, 2\]"):
        index.search(np.zeros((1, 3), np.float32), 1)
    with pytest.raises(ValueError, match=r"queries has shape \(2,\)"):
        index.search(np.zeros(2, np.float32), 1)
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        index.search(query, 0)
    with pytest.raises(ValueError, match=r"allowed is bool \(4,\); expected bool \(5,\)"):
        index.search(query, 1, np.ones(4, bool))
    with pytest.raises(ValueError, match="allowed is int64"):
        index.search(query, 1, np.ones(5, np.int64))


def test_serving_modules_do_not_load_torch():
    code = (
        "import sys, retrieval.item_index, retrieval.sources, reranking.rerank, ranking.onnx_scorer;"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
