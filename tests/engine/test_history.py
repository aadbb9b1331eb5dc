from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from engine.history import EMPTY_HISTORY, USERS_SCHEMA, BundleHistoryStore, left_padded, without_repeats


def users(**columns: list[object]) -> pl.DataFrame:
    return pl.DataFrame(
        {"user_id": ["a", "b c", "🎉"], "items": [[3, 1], [], [2]], "event_types": [[1, 6], [], [0]]}
        | {"timestamps": [[10, 20], [], [0]]}
        | columns,
        schema=USERS_SCHEMA,
    )


def test_rows_and_histories() -> None:
    store = BundleHistoryStore.from_table(users(), num_items=3)
    assert len(store) == 3
    assert [store.row(user) for user in ("a", "b c", "🎉", "nobody", "")] == [1, 2, 3, 0, 0]
    history = store.get("a")
    assert history.items.tolist() == [3, 1]
    assert history.event_types.tolist() == [1, 6]
    assert history.timestamps.tolist() == [10, 20]
    assert len(store.get("b c")) == 0
    assert store.get("🎉").items.tolist() == [2]
    assert store.get("nobody") is EMPTY_HISTORY


def test_no_users() -> None:
    store = BundleHistoryStore.from_table(pl.DataFrame(schema=USERS_SCHEMA), num_items=0)
    assert (len(store), store.row("a"), len(store.get("a"))) == (0, 0, 0)


def test_bad_tables() -> None:
    with pytest.raises(ValueError, match="item rows run from 1 to 3; expected 1 to 2"):
        BundleHistoryStore.from_table(users(), num_items=2)
    with pytest.raises(ValueError, match="differ in length"):
        BundleHistoryStore.from_table(users(timestamps=[[10], [], [0]]), num_items=3)
    with pytest.raises(ValueError, match="user_id is repeated"):
        BundleHistoryStore.from_table(users(user_id=["a", "a", "b"]), num_items=3)
    with pytest.raises(ValueError, match="empty cell"):
        BundleHistoryStore.from_table(users(items=[[3, None], [], [2]]), num_items=3)
    with pytest.raises(ValueError, match="columns are"):
        BundleHistoryStore.from_table(users().drop("items"), num_items=3)


def test_without_repeats() -> None:
    assert without_repeats(np.array([3, 3, 1, 3, 3, 3], np.int32)).tolist() == [3, 1, 3]
    assert without_repeats(np.zeros(0, np.int32)).tolist() == []


def test_left_padded() -> None:
    histories = [np.array(items, np.int32) for items in ([], [7], [1, 2, 2, 3, 4, 4], [5, 5])]
    expected = [[0, 0, 0], [0, 0, 7], [2, 3, 4], [0, 0, 5]]
    assert left_padded(histories, 3).tolist() == expected
    assert left_padded(histories[:1], 3).tolist() == [[0]]
    assert left_padded([], 3).shape == (0, 1)
