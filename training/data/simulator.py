"""A made-up storefront: `trirank simulate` writes a data set directory with a known structure in it.

Two things decide what a shopper looks at next, and neither is enough alone:

    order   leaves of the category tree follow one another in one direction: grinder, then beans, then filters
    taste   which item of the leaf: shoppers, brands and items have taste vectors, and few interests each

On top lie Zipf popularity, seasons, a daily rhythm, sales, items that join the catalog along the way, and the
place where the shopper meets an item (`placement`), which may favour items of its own.
Nothing here was measured on a real shop; dataset.json says `simulated: true`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from engine.arguments import ArgumentParser
from training.data.dataset import (
    CONTEXT_TYPES,
    EVENT_SCHEMA,
    ITEM_SCHEMA,
    ColumnKind,
    DatasetInfo,
    write_info,
)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Leaves in the order in which people come to need them; each leads to the next and the last to the first.
# "Cookie Cutter 8 @12": usual price 8, sells best in month 12. A leaf is named by the plural of its noun.
TREE = {
    ("Kitchen", "Coffee"): "Grinder 60, Bean Blend 14, Paper Filter 6, Travel Mug 22",
    ("Kitchen", "Baking"): "Stand Mixer 180, Baking Tin 16, Flour Blend 7, Cookie Cutter 8 @12",
    ("Kitchen", "Cooking"): "Frying Pan 45, Spatula 9, Spice Jar 5, Apron 18",
    ("Garden", "Planting"): "Seed Tray 9 @3, Potting Mix 12 @4, Flower Pot 15 @5, Watering Can 19 @6",
    ("Garden", "Grilling"): "Grill 160 @6, Charcoal Bag 13 @7, Grill Brush 11 @8, Picnic Blanket 28 @8",
    ("Garden", "Winter"): "Patio Heater 140 @11, Snow Shovel 26 @12, Bird Feeder 21 @1, Fire Basket 75 @12",
    ("Sports", "Running"): "Running Shoe 95, Running Sock 12, Sport Watch 130, Water Bottle 17",
    ("Sports", "Cycling"): "Bike Helmet 70, Bike Light 32 @11, Tire Pump 24, Repair Kit 15",
    ("Sports", "Camping"): "Tent 190 @7, Sleeping Bag 85 @7, Camp Stove 48 @8, Headlamp 30 @10",
    ("Home", "Desk"): "Desk Lamp 50, Notebook 10, Fountain Pen 38, Ink Bottle 13",
    ("Home", "Sleep"): "Mattress 320, Pillow 35, Duvet 90 @11, Bed Sheet 42",
    ("Home", "Gifts"): "Candle 16 @11, Gift Box 9 @12, Wrapping Roll 5 @12, Greeting Card 4 @12",
}
# Two words for each taste dimension: what an item that has little of it, or much of it, is called.
# Dimension 0 is also the price level.
ADJECTIVES = (
    ("Basic", "Premium"), ("Classic", "Modern"), ("Plain", "Colorful"), ("Light", "Sturdy"),
    ("Compact", "Large"), ("Quick", "Handmade"), ("Soft", "Bold"), ("Urban", "Rustic"),
)  # fmt: skip
BRAND_STEMS = (
    "Alder", "Brim", "Corvo", "Dunn", "Elk", "Fenn", "Gale", "Harrow",
    "Isen", "Juno", "Kest", "Lund", "Marl", "Nor", "Oster", "Pell",
)  # fmt: skip
BRAND_ENDINGS = (
    "berg", "craft", "dale", "field", "ford", "haus", "ley", "mark",
    "mont", "stead", "ton", "vale", "wick", "wood", "works", "worth",
)  # fmt: skip

START = datetime(2025, 9, 1, tzinfo=UTC)  # a Monday
START_MS = round(START.timestamp() * 1000)
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# Sessions start in the first half of a two-hour slot and last under an hour, so slots never overlap.
SLOTS = np.array([2, 1, 1, 2, 5, 7, 9, 8, 8, 11, 14, 7]) / 75  # share of the day's sessions, midnight first
WEEKDAYS = np.array([1.0, 0.9, 0.9, 1.0, 1.1, 1.4, 1.5])  # Monday first
MAX_LIKINGS = 4_000_000  # of sessions for items that are worked out at once: 32 MB
MAX_VISITS = 12  # items looked at in one session; 6 on average
EVENTS_PER_SESSION = 8.4  # measured with the default configuration
# How strong each force is. Tuned so that order and taste weigh about the same and neither is enough.
FOLLOW = 0.85  # share of steps whose leaf follows from the last leaf, not from the shopper's interests
NEXT = 0.9  # share of those that go to the next leaf of the category, not elsewhere in the department
TASTE = 0.8  # how much taste decides between the items of a leaf
POPULARITY = 0.6  # Zipf exponent of the items of a leaf
FUNNEL = np.array(["view", "click", "cart", "purchase"])
FUNNEL_MS = np.array([0, 3_000, 9_000, 15_000])  # after the view; shorter than the shortest visit
PLACEMENTS = np.array(["home", "search", "mail"])
PLACEMENT_SHARES = np.array([0.5, 0.35, 0.15])
CONTEXT: dict[str, ColumnKind] = {"placement": "categorical"}


@dataclass(frozen=True, kw_only=True)
class ShopConfig:
    """How large the made-up shop is. The same values give the same data, byte for byte.

    Args:
        num_users: Shoppers, at least 1; each comes at least once.
        num_items: Items in the catalog, at least one for each leaf category.
        num_events: About how many events to write; 10 per shopper or more.
        num_categories: Leaf categories, 4 to 48.
        num_brands: Brands, 4 to 256; each keeps to one department.
        num_sellers: Sellers, at least 1.
        days: Length of the log in days, at least 1; it starts on 2025-09-01.
        new_items: Share of the items that join the catalog while the log runs, 0 to 0.9.
        placement_effect: How much the placement decides between the items of a leaf, 0 to 3: 0 not at
            all, 0.8 as much as taste.
        seed: Seed of all random choices, at least 0.
    """

    num_users: int = 2000
    num_items: int = 1000
    num_events: int = 60_000
    num_categories: int = 48
    num_brands: int = 40
    num_sellers: int = 25
    days: int = 120
    new_items: float = 0.2
    placement_effect: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        # A shopper looks at an item once and comes about once a day at most; more events cannot be placed.
        most = min(self.num_users * self.num_items // 4, 9 * self.num_users * self.days)
        for name, low, high in (
            ("num_users", 1, None),
            ("num_categories", 4, 4 * len(TREE)),
            ("num_items", self.num_categories, None),
            ("num_brands", 4, len(BRAND_STEMS) * len(BRAND_ENDINGS)),
            ("num_sellers", 1, None),
            ("days", 1, None),
            ("num_events", 10 * self.num_users, most),
            ("new_items", 0, 0.9),
            ("placement_effect", 0, 3),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} is {value}; allowed here: {allowed}")


@dataclass(frozen=True)
class Shop:
    """The catalog and what drives it. I items, L leaves, K taste dimensions."""

    paths: list[tuple[str, str, str]]  # [L] department, category, leaf
    nouns: list[str]  # [L]
    leaf: Ints  # [I]
    brand: Ints  # [I]
    seller: Ints  # [I]
    taste: Floats  # [I, K]
    placement_taste: Floats  # [P, I] how much more an item is wanted at each of PLACEMENTS, a logarithm
    appeal: Floats  # [I] Zipf weight inside its leaf
    price: Floats  # [I]
    margin: Floats  # [I]
    available_from: Ints  # [I] ms
    season: Floats  # [days, L] how much a leaf is wanted that day; 1 all year round where it has no season
    next_leaf: Floats  # [L, L] row: the leaf before, column: the leaf after; not symmetric
    leaf_appeal: Floats  # [L]


def draw(weights: Floats, rng: np.random.Generator) -> Ints:
    """Return one column number per row of `weights` [N, M], with chances in proportion to the weights."""
    running = weights.cumsum(axis=1)
    # (0, 1] times the total: a column of weight 0 is never drawn, nor one past the end.
    threshold = (1 - rng.random(len(weights))) * running[:, -1]
    return cast(Ints, (running < threshold[:, None]).sum(axis=1))


def zipf(size: int, exponent: float) -> Floats:
    """Return weights 1, 2**-exponent, 3**-exponent, ... [size]."""
    return np.arange(1.0, size + 1) ** -exponent


def build_shop(config: ShopConfig, rng: np.random.Generator) -> Shop:
    """Lay out the categories, brands, sellers and items."""
    paths, nouns, usual_price, peak = [], [], [], []
    for (department, category), leaves in TREE.items():
        for text in leaves.split(", "):
            words, _, month = text.partition(" @")
            noun, amount = words.rsplit(" ", 1)
            paths.append((department, category, f"{noun}s"))
            nouns.append(noun)
            usual_price.append(float(amount))
            peak.append(float(month or "nan"))
    # Spread over the departments where not all leaves are wanted: whole categories, one from each in turn.
    turn = sorted(range(len(paths)), key=lambda leaf: (leaf // 4 % 3, leaf))[: config.num_categories]
    paths, nouns = [paths[leaf] for leaf in turn], [nouns[leaf] for leaf in turn]
    departments = np.unique([path[0] for path in paths], return_inverse=True)[1]
    categories = np.unique([path[:2] for path in paths], axis=0, return_inverse=True)[1]

    # Each leaf leads to the next one of its category, and less often to one elsewhere in the department.
    num_leaves = len(paths)
    next_leaf = np.zeros((num_leaves, num_leaves))
    for leaf in range(num_leaves):
        siblings = np.flatnonzero(categories == categories[leaf])
        next_leaf[leaf, siblings[(np.searchsorted(siblings, leaf) + 1) % len(siblings)]] += NEXT
        next_leaf[leaf, rng.choice(np.flatnonzero(departments == departments[leaf]))] += 1 - NEXT

    months = START.month - 0.5 + np.arange(config.days) / 30.4  # 9.0: the middle of September
    angle = 2 * np.pi * (months[:, None] - np.array(peak)[turn]) / 12
    season = np.nan_to_num(np.exp(1.5 * (np.cos(angle) - 0.2)), nan=1.0)

    # Deal the items to the leaves in random order, so that an item's row tells nothing about it.
    num_items, num_dims = config.num_items, len(ADJECTIVES)
    rank, leaf_of = np.divmod(rng.permutation(num_items), num_leaves)  # rank 0: the most popular of its leaf

    # Brand b belongs to department b modulo their number; early brands make more of its items.
    num_departments = int(departments.max()) + 1
    at_home = np.arange(config.num_brands) % num_departments == departments[leaf_of][:, None]
    brand = draw(at_home * zipf(config.num_brands, 0.5), rng)
    brand_taste = rng.normal(size=(config.num_brands, num_dims))
    taste = 0.8 * brand_taste[brand] + 0.6 * rng.normal(size=(num_items, num_dims))

    markup = np.exp(0.3 * taste[:, 0] + 0.2 * rng.normal(size=num_items))
    price = np.array(usual_price)[turn][leaf_of] * markup
    seller_share = zipf(config.num_sellers, 0.8)
    # The favourite of a leaf is always old, so that no shelf is ever empty.
    is_new = (rng.random(num_items) < config.new_items) & (rank > 0)
    age = np.where(is_new, -rng.random(num_items) * config.days, 1 + rng.random(num_items) * 700)
    return Shop(
        paths=paths,
        nouns=nouns,
        leaf=leaf_of,
        brand=brand,
        seller=rng.choice(config.num_sellers, num_items, p=seller_share / seller_share.sum()),
        taste=taste,
        placement_taste=config.placement_effect * _apart(config).normal(size=(len(PLACEMENTS), num_items)),
        appeal=(rank + 1.0) ** -POPULARITY,
        price=np.maximum(price.round(2), 0.5),
        margin=rng.beta(4, 8, num_items).round(3),
        available_from=START_MS - (age * DAY_MS).astype(np.int64),
        season=season,
        next_leaf=next_leaf,
        leaf_appeal=rng.permutation(zipf(num_leaves, 0.5)),
    )


@dataclass(frozen=True)
class Shoppers:
    """What drives the U shoppers."""

    interests: Floats  # [U, L] how much each leaf is wanted; rows sum to 1, most of it in three categories
    taste: Floats  # [U, K]


def _apart(config: ShopConfig) -> np.random.Generator:
    """Return random numbers for the placements alone: they move nothing else of a shop."""
    return np.random.default_rng([config.seed, 1])


def draw_shoppers(shop: Shop, num_users: int, rng: np.random.Generator) -> Shoppers:
    """Give every shopper three favourite categories and a taste."""
    category = np.unique([path[:2] for path in shop.paths], axis=0, return_inverse=True)[1]
    liking = rng.gumbel(size=(num_users, int(category.max()) + 1))
    place = (-liking).argsort(axis=1).argsort(axis=1)  # 0 = the favourite category
    weight = np.array([0.6, 0.25, 0.1] + [0.01] * (len(TREE) - 3))[place]
    interests = weight[:, category] * shop.leaf_appeal
    return Shoppers(
        interests=interests / interests.sum(axis=1, keepdims=True),
        taste=rng.normal(size=(num_users, shop.taste.shape[1])),
    )


def simulate(config: ShopConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the events, oldest first (EVENT_SCHEMA and CONTEXT), and the items by row (ITEM_SCHEMA)."""
    rng = np.random.default_rng(config.seed)
    shop = build_shop(config, rng)
    shoppers = draw_shoppers(shop, config.num_users, rng)

    # Sessions, oldest first: who comes, and when. Two sessions of one shopper in one slot are one.
    num_sessions = max(config.num_users, round(config.num_events / EVENTS_PER_SESSION))
    activity = rng.lognormal(sigma=0.6, size=config.num_users)
    more = rng.choice(config.num_users, num_sessions - config.num_users, p=activity / activity.sum())
    weekday = WEEKDAYS[np.arange(config.days) % 7]
    day = rng.choice(config.days, num_sessions, p=weekday / weekday.sum())
    slot = len(SLOTS) * day + rng.choice(len(SLOTS), num_sessions, p=SLOTS)
    slot, user = np.unique([slot, np.concatenate([np.arange(config.num_users), more])], axis=1)
    day = slot // len(SLOTS)
    start = START_MS + slot * 2 * HOUR_MS + rng.integers(HOUR_MS, size=len(slot))
    order = start.argsort(kind="stable")
    user, day, start = user[order], day[order], start[order]

    shares = np.tile(PLACEMENT_SHARES, (len(user) * MAX_VISITS, 1))
    placement = draw(shares, _apart(config).spawn(1)[0]).reshape(len(user), MAX_VISITS)
    item = walk(shop, shoppers, user, day, start, placement, rng)
    clock = start[:, None] + rng.integers(20_000, 180_000, size=item.shape).cumsum(axis=1)

    # A visit is one item in one session. Who knows an item does not come back to it.
    visited = np.flatnonzero(item.ravel() >= 0)
    session, item, clock = visited // MAX_VISITS, item.ravel()[visited], clock.ravel()[visited]
    placement = placement.ravel()[visited]
    first = np.sort(np.unique(user[session] * config.num_items + item, return_index=True)[1])
    session, item, clock, placement = session[first], item[first], clock[first], placement[first]

    # The funnel: who likes the item goes further. Each stage is one more event on the same item.
    fit = (shoppers.taste[user[session]] * shop.taste[item]).sum(axis=1)
    chance = np.stack([1 / (1 + np.exp(1.2 - 0.4 * fit)), np.full(len(fit), 0.35), np.full(len(fit), 0.5)])
    depth = 1 + (rng.random(chance.shape) < chance).cumprod(axis=0).sum(axis=0)
    visit = np.repeat(np.arange(len(item)), depth)
    stage = np.arange(len(visit)) - np.repeat(depth.cumsum() - depth, depth)
    timestamp = clock[visit] + FUNNEL_MS[stage] + rng.integers(2_000, size=len(visit))

    # One item in ten is on sale in any week.
    discount = np.where(rng.random((config.days // 7 + 1, config.num_items)) < 0.1, 0.8, 1.0)
    price = shop.price[item] * discount[day[session] // 7, item]

    items = item_frame(shop)
    events = pl.DataFrame(
        {
            "user_id": pl.Series(user[session] + 1).cast(pl.String).gather(visit),
            "item_id": items["item_id"].gather(item[visit]),
            "timestamp": timestamp,
            "event_type": pl.Series(FUNNEL).gather(stage),
            "session_id": ("s" + (pl.Series(session) + 1).cast(pl.String)).gather(visit),
            "price": price.round(2)[visit],
            "placement": pl.Series(PLACEMENTS[placement]).gather(visit),
        },
        schema={name: EVENT_SCHEMA[name] for name in EVENT_SCHEMA if name not in ("rating", "split")}
        | {name: CONTEXT_TYPES[kind] for name, kind in CONTEXT.items()},
    )
    return events.sort("timestamp", maintain_order=True), items


def walk(
    shop: Shop,
    shoppers: Shoppers,
    user: Ints,
    day: Ints,
    start: Ints,
    placement: Ints,
    rng: np.random.Generator,
) -> Ints:
    """Return the items (0-based) that S sessions look at, [S, MAX_VISITS], -1 after a session's end.

    All sessions take their n-th step together, those at one leaf in blocks of bounded memory; `user`, `day`
    and `start` (ms) are [S], `placement` is [S, MAX_VISITS].
    """
    length = 1 + np.minimum(rng.poisson(5, len(user)), MAX_VISITS - 1)
    items = np.full((len(user), MAX_VISITS), -1)
    leaf = np.zeros(len(user), np.int64)
    shelves = [np.flatnonzero(shop.leaf == code) for code in range(len(shop.paths))]
    pull = np.exp(shop.placement_taste)
    console = Console(stderr=True)
    for step in track(range(MAX_VISITS), "shopping", console=console, transient=True):
        active = np.flatnonzero(length > step)
        wanted = shoppers.interests[user[active]]
        if step:
            wanted = (1 - FOLLOW) * wanted + FOLLOW * shop.next_leaf[leaf[active]]
        leaf[active] = draw(wanted * shop.season[day[active]], rng)
        for code, shelf in enumerate(shelves):
            at_leaf = active[leaf[active] == code]
            block = max(1, MAX_LIKINGS // len(shelf))
            for begin in range(0, len(at_leaf), block):
                here = at_leaf[begin : begin + block]
                liking = shop.appeal[shelf] * np.exp(TASTE * shoppers.taste[user[here]] @ shop.taste[shelf].T)
                liking *= pull[np.ix_(placement[here, step], shelf)]
                liking[start[here, None] < shop.available_from[shelf]] = 0
                items[here, step] = shelf[draw(liking, rng)]
    return items


def item_frame(shop: Shop) -> pl.DataFrame:
    """Return what the shop tells about its items (ITEM_SCHEMA without attributes); tastes stay hidden."""
    strongest = np.abs(shop.taste).argmax(axis=1)
    rows: list[dict[str, Any]] = []
    for row, (leaf, brand, dim) in enumerate(zip(shop.leaf, shop.brand, strongest, strict=True)):
        turn, stem = divmod(brand, len(BRAND_STEMS))
        name = BRAND_STEMS[stem] + BRAND_ENDINGS[(stem + 7 * turn) % len(BRAND_ENDINGS)]  # 256 different ones
        adjective = ADJECTIVES[dim][int(shop.taste[row, dim] > 0)]
        rows.append(
            {
                "item_id": f"sku-{row + 1:05d}",
                "title": f"{name} {adjective} {shop.nouns[leaf]}",
                "category": list(shop.paths[leaf]),
                "brand": name,
                "seller_id": f"seller-{shop.seller[row] + 1:02d}",
                "price": shop.price[row],
                "margin": shop.margin[row],
                "available_from": shop.available_from[row],
            }
        )
    return pl.DataFrame(rows, schema={name: ITEM_SCHEMA[name] for name in rows[0]})


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise ValueError(f"--out is {out}, which exists; name a new directory or add --overwrite")
        if not (out / "dataset.json").is_file():
            raise ValueError(f"--out is {out}; --overwrite replaces only a directory with a dataset.json")


def write_dataset(config: ShopConfig, out: Path, *, overwrite: bool = False) -> DatasetInfo:
    """Simulate a shop and write its data set directory; `out` appears complete or not at all.

    Raises ValueError where `out` is in use: without `overwrite`, or when it is no data set directory.
    """
    out = out.resolve()
    _check_free(out, overwrite)
    events, items = simulate(config)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        events.write_parquet(temporary / "events.parquet")
        items.write_parquet(temporary / "items.parquet")
        info = write_info(
            temporary,
            DatasetInfo(
                name=out.name,
                source={"format": "simulated", "config": dataclasses.asdict(config)},
                time="unix",
                simulated=True,
                context=CONTEXT,
                num_users=events["user_id"].n_unique(),
                num_items=len(items),
                num_events=len(events),
                event_types={stage: int((events["event_type"] == stage).sum()) for stage in FUNNEL.tolist()},
            ),
        )
        _check_free(out, overwrite)  # simulating takes long
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return info


def main(argv: list[str]) -> int:
    """Run `trirank simulate`: the directory (or DatasetInfo as JSON) on stdout, the rest on stderr."""
    parser = ArgumentParser(
        prog="trirank simulate",
        description="Write the data set of a made-up shop whose shoppers follow both order and taste.",
    )
    parser.add_argument("--out", metavar="DIR", type=str, required=True, help="Data set directory to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a data set that stands at DIR.")
    parser.add_argument(
        "--json", action="store_true", help="Print dataset.json on stdout, not the directory."
    )
    parser.add_class_arguments(ShopConfig)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    options = parser.parse_args(argv)
    try:
        config = ShopConfig(**{f.name: options[f.name] for f in dataclasses.fields(ShopConfig)})
        info = write_dataset(config, Path(options.out), overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        console.print(f"trirank simulate: {error}")
        return 2
    console.print("SIMULATED data: made up from a seed; it says nothing about real shoppers.")
    counts = ", ".join(f"{count:,} {name}" for name, count in info.event_types.items())
    console.print(f"{info.num_users:,} users, {info.num_items:,} items, {info.num_events:,} events: {counts}")
    sys.stdout.write((json.dumps(dataclasses.asdict(info)) if options.json else options.out) + "\n")
    return 0
