import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from training.data import simulator
from training.data.dataset import Dataset, fingerprint
from training.data.simulator import DAY_MS, START_MS, ShopConfig, draw, main, simulate, write_dataset

SMALL = ShopConfig(num_users=60, num_items=80, num_events=900, num_categories=12)
SMALL_FLAGS = ["--num_users=60", "--num_items=80", "--num_events=900", "--num_categories=12"]
Tables = tuple[pl.DataFrame, pl.DataFrame]


@pytest.fixture(scope="module")
def tables() -> Tables:
    return simulate(ShopConfig())


# -- what the tables say ---------------------------------------------------------------------------------


def test_draw_follows_the_weights_and_never_draws_a_zero() -> None:
    weights = np.tile([0.0, 1.0, 0.0, 3.0, 0.0], (40_000, 1))
    share = np.bincount(draw(weights, np.random.default_rng(0)), minlength=5) / len(weights)
    assert share[[0, 2, 4]].tolist() == [0, 0, 0]
    assert share[3] == pytest.approx(0.75, abs=0.01)


def test_sizes_and_identities(tables: Tables) -> None:
    events, items = tables
    assert items["item_id"].to_list() == [f"sku-{row:05d}" for row in range(1, 1001)]
    assert set(events["item_id"]) <= set(items["item_id"])
    assert set(events["user_id"]) == {str(number) for number in range(1, 2001)}
    assert len(events) == pytest.approx(60_000, rel=0.1)
    assert events["timestamp"].is_sorted()
    assert events["timestamp"].min() >= START_MS
    assert events["timestamp"].max() < START_MS + 120 * DAY_MS


def test_no_event_before_its_item_is_available(tables: Tables) -> None:
    events, items = tables
    joined = events.join(items, on="item_id")
    assert (joined["timestamp"] >= joined["available_from"]).all()
    new = (items["available_from"] > START_MS).sum()
    assert 150 < new < 250


def test_prices_margins_and_titles(tables: Tables) -> None:
    events, items = tables
    assert items["price"].min() > 0
    assert items["margin"].is_between(0, 1).all()
    for title, brand, category in items.select("title", "brand", "category").iter_rows():
        assert title.startswith(f"{brand} ")
        assert f"{title}s".endswith(category[2])
    paid = events.join(items, on="item_id", suffix="_listed")
    discount = (paid["price"] / paid["price_listed"]).to_numpy()
    on_sale = np.isclose(discount, 0.8, atol=0.01)
    assert (on_sale | (discount == 1)).all()
    assert 0.07 < on_sale.mean() < 0.13


def test_each_visit_is_a_funnel(tables: Tables) -> None:
    events, _ = tables
    visits = events.group_by("user_id", "item_id", maintain_order=True).agg("event_type", "session_id")
    funnel = ["view", "click", "cart", "purchase"]
    assert all(stages == funnel[: len(stages)] for stages in visits["event_type"].to_list())
    assert (visits["session_id"].list.n_unique() == 1).all()
    counts = dict(events["event_type"].value_counts().iter_rows())
    assert counts["view"] > counts["click"] > counts["cart"] > counts["purchase"] > 1000


def test_sessions_of_a_shopper_follow_one_another(tables: Tables) -> None:
    events, _ = tables
    sessions = events.group_by("user_id", "session_id").agg(
        start=pl.col("timestamp").min(), end=pl.col("timestamp").max()
    )
    assert sessions["session_id"].is_unique().all()
    assert (sessions["end"] - sessions["start"]).max() < 3_600_000
    gap = sessions.sort("start").select(gap=pl.col("start") - pl.col("end").shift().over("user_id"))
    assert gap["gap"].drop_nulls().min() > 0
    times = events.select(step=pl.col("timestamp").diff().over("user_id")).drop_nulls()
    assert times["step"].min() > 0  # no two events of a shopper share a time


def test_popularity_is_skewed(tables: Tables) -> None:
    events, _ = tables
    counts = np.sort(events.filter(event_type="view")["item_id"].value_counts()["count"].to_numpy())[::-1]
    assert counts[:100].sum() > 0.25 * counts.sum()
    assert counts[0] > 5 * np.median(counts)


def test_seasons_and_evenings_are_visible(tables: Tables) -> None:
    events, items = tables
    views = events.filter(event_type="view").join(items, on="item_id")
    day = (views["timestamp"] - START_MS) // DAY_MS
    gifts = views["category"].list.get(1) == "Gifts"  # all four leaves sell best in November or December
    grilling = views["category"].list.get(1) == "Grilling"  # in summer
    assert gifts.filter(day >= 90).mean() > 2 * gifts.filter(day < 30).mean()
    assert grilling.filter(day < 30).mean() > 2 * grilling.filter(day >= 90).mean()
    hour = (views["timestamp"] - START_MS) // 3_600_000 % 24
    assert ((hour >= 18) & (hour < 22)).sum() > 5 * ((hour >= 1) & (hour < 5)).sum()


def test_the_placement_decides_only_as_far_as_it_is_told_to(tables: Tables) -> None:
    events, _ = tables
    share = {name: (events["placement"] == name).mean() for name in ("home", "search", "mail")}
    assert share == pytest.approx({"home": 0.5, "search": 0.35, "mail": 0.15}, abs=0.02)
    visits = events.group_by("user_id", "item_id").agg(pl.col("placement").n_unique())
    assert (visits["placement"] == 1).all()  # a visit has one

    def spread(events: pl.DataFrame) -> float:
        """How far an item's share of mail lies from the mean, less what chance makes of it."""
        views = events.filter(event_type="view").group_by("item_id").agg(
            n=pl.len(), mail=(pl.col("placement") == "mail").mean()
        ).filter(pl.col("n") >= 20)  # fmt: skip
        chance = 0.15 * 0.85 / views["n"]
        return float(((views["mail"] - 0.15) ** 2 - chance).mean())

    assert abs(spread(events)) < 0.001
    with_effect, _ = simulate(ShopConfig(placement_effect=1.5))
    assert spread(with_effect) > 0.02


# -- what it takes to predict them -----------------------------------------------------------------------

Hits = NDArray[np.float64]


def hits_at_10(seed: int) -> dict[str, Hits]:
    """Each shopper's last new item, ranked among all items he has not seen: 1 where it is in the top 10."""
    events, items = simulate(ShopConfig(seed=seed))
    first = events.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    user = first["user_id"].cast(pl.Int64).to_numpy() - 1
    item = first["item_id"].str.slice(4).cast(pl.Int64).to_numpy() - 1
    order = user.argsort(kind="stable")  # by user, then by time
    user, item = user[order], item[order]
    is_last = np.append(user[1:] != user[:-1], True)
    has_past = np.insert(user[1:] == user[:-1], 0, False)
    who, target, last = (
        user[is_last & has_past],
        item[is_last & has_past],
        np.roll(item, 1)[is_last & has_past],
    )
    user, item = user[~is_last], item[~is_last]
    num_items = len(items)

    def followers(item: NDArray[np.int64]) -> NDArray[np.float64]:
        """How often item b came right after item a, [a, b]."""
        counts = np.zeros((num_items, num_items))
        same = user[1:] == user[:-1]
        np.add.at(counts, (item[:-1][same], item[1:][same]), 1)
        return counts

    # The graph: a low-pass filter over the normalized user-item matrix.
    touched = sp.csr_matrix((np.ones(len(user)), (user, item)), shape=(user.max() + 1, num_items))
    popularity = np.maximum(np.bincount(item, minlength=num_items), 1)
    activity = np.maximum(np.bincount(user), 1)
    normalized = sp.diags(activity**-0.5) @ touched @ sp.diags(popularity**-0.5)
    basis = svds(normalized, k=32, random_state=0)[2]
    graph = (touched[who] @ sp.diags(popularity**-0.5) @ basis.T) @ basis * popularity**0.5

    ordered = followers(item)
    shuffled = followers(item[np.lexsort((np.random.default_rng(0).random(len(user)), user))])
    together = (touched.T @ touched).toarray()
    rare = 1e-3 * popularity / popularity.max()  # where nothing followed, the popular come first
    share = (ordered[last] + rare) / (ordered[last] + rare).sum(axis=1, keepdims=True)
    likes = np.maximum(graph, 0) / np.maximum(graph, 0).sum(axis=1, keepdims=True)
    scores = {
        "popular": np.tile(popularity, (len(who), 1)),
        "order": ordered[last] + rare,
        "order, both directions": ordered[last] + ordered.T[last] + rare,
        "order, shuffled": shuffled[last] + rare,
        "together": together[last] + rare,
        "graph": graph,
        "order and graph": 0.3 * share + 0.7 * likes,
    }
    seen = touched[who].toarray() > 0
    result = {}
    for name, score in scores.items():
        score = np.where(seen, -np.inf, score)
        of_target = score[np.arange(len(who)), target][:, None]
        # Half of the ties stand before the target.
        rank = (score > of_target).sum(axis=1) + ((score == of_target).sum(axis=1) - 1) / 2
        result[name] = (rank < 10).astype(float)
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_order_and_graph_both_matter(seed: int) -> None:
    hits = hits_at_10(seed)
    mean = {name: float(hit.mean()) for name, hit in hits.items()}
    print(mean)

    def margin(better: str, worse: str) -> float:
        """The difference in its own standard errors, shopper by shopper."""
        difference = hits[better] - hits[worse]
        return float(difference.mean() / (difference.std() / np.sqrt(len(difference))))

    assert 0.03 < mean["popular"] < 0.08
    assert 0.3 < mean["order and graph"] < 0.45
    # Order: who forgets the direction, or the order altogether, loses.
    assert margin("order", "order, both directions") > 4
    assert margin("order", "together") > 4
    assert margin("order", "order, shuffled") > 10
    # Graph: who treats all shoppers alike loses.
    assert margin("graph", "popular") > 10
    # Each knows what the other does not.
    assert margin("order and graph", "order") > 4
    assert margin("order and graph", "graph") > 10


# -- the command -----------------------------------------------------------------------------------------


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    info = write_dataset(SMALL, tmp_path / "a")
    assert write_dataset(SMALL, tmp_path / "b").fingerprint == info.fingerprint == fingerprint(tmp_path / "a")
    other = ShopConfig(num_users=60, num_items=80, num_events=900, num_categories=12, seed=1)
    assert write_dataset(other, tmp_path / "c").fingerprint != info.fingerprint


def test_command_writes_a_data_set_that_says_it_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "shop"
    assert main(["--out", str(out), *SMALL_FLAGS]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "SIMULATED" in captured.err
    assert [path.name for path in out.parent.iterdir()] == ["shop"]  # nothing temporary stays behind

    dataset = Dataset.open(out)
    info = dataset.info
    assert (info.simulated, info.time, info.repeats, info.split) == (True, "unix", False, None)
    assert info.source["format"] == "simulated"
    assert ShopConfig(**info.source["config"]) == SMALL
    assert (info.num_users, info.num_items) == (60, 80)
    assert info.num_events == len(dataset.events.collect()) == sum(info.event_types.values())


def test_json_prints_the_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "shop"), "--json", *SMALL_FLAGS]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "shop/dataset.json").read_text())


def test_an_existing_directory_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shop"
    out.mkdir()  # an empty directory is free
    assert main(["--out", str(out), *SMALL_FLAGS]) == 0
    before = fingerprint(out)
    assert main(["--out", str(out), "--seed=1", *SMALL_FLAGS]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert fingerprint(out) == before
    assert main(["--out", str(out), "--seed=1", "--overwrite", *SMALL_FLAGS]) == 0
    assert fingerprint(out) != before


def test_what_somebody_else_writes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "shop"

    def simulated(config: ShopConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
        found = simulate(config)
        out.mkdir()
        (out / "dataset.json").write_text("theirs")
        return found

    monkeypatch.setattr(simulator, "simulate", simulated)
    with pytest.raises(ValueError, match="which exists; name a new directory"):
        write_dataset(SMALL, out)
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]
    assert (out / "dataset.json").read_text() == "theirs"


def test_overwrite_spares_what_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["--out", str(tmp_path), "--overwrite", *SMALL_FLAGS]) == 2
    assert "dataset.json" in capsys.readouterr().err
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_users=0", "num_users is 0; allowed here: at least 1"),
        ("--num_items=10", "num_items is 10; allowed here: at least 48"),
        ("--num_categories=49", "num_categories is 49; allowed here: 4 to 48"),
        ("--num_brands=3", "num_brands is 3; allowed here: 4 to 256"),
        ("--num_sellers=0", "num_sellers is 0; allowed here: at least 1"),
        ("--num_events=100", "num_events is 100; allowed here: 20000 to 500000"),
        ("--days=0", "days is 0; allowed here: at least 1"),
        ("--new_items=1", "new_items is 1.0; allowed here: 0 to 0.9"),
        ("--seed=-1", "seed is -1; allowed here: at least 0"),
    ],
)
def test_bad_values_are_named(
    flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "shop"), flag]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--num_user=5"], ["--seed=x"], ["--new_items=nan"], ["shop"]])
def test_unknown_flags_and_wrong_types_are_errors(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "shop"), *flags])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "config",
    [
        ShopConfig(num_users=1, num_items=48, num_events=10),
        ShopConfig(
            num_users=40, num_items=500, num_events=400, num_categories=5, num_brands=4, num_sellers=1
        ),
        ShopConfig(num_users=200, num_items=100, num_events=2000, days=2, new_items=0.9),
    ],
)
def test_extreme_shops_keep_the_promises(config: ShopConfig) -> None:
    events, items = simulate(config)
    assert events["user_id"].n_unique() == config.num_users
    assert len(items) == config.num_items
    joined = events.join(items, on="item_id")
    assert len(joined) == len(events)
    assert (joined["timestamp"] >= joined["available_from"]).all()


def test_simulating_does_not_load_torch() -> None:
    code = "import sys, training.data.simulator; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
