"""Ids made in parts are the ids made at once."""

import gc

import polars as pl
import pytest

from engine.ids import AT_ONCE, rows_by_id, strings


@pytest.mark.parametrize("length", [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE])
def test_parts_make_the_whole(length):
    ids = [f"item-{n}" for n in range(length)]
    found = strings(pl.Series(ids, dtype=pl.String))
    assert found.tolist() == ids
    assert not gc.is_tracked(found)
    assert rows_by_id(ids) == {name: row for row, name in enumerate(ids, start=1)}


def test_what_is_missing_and_what_is_repeated():
    assert strings(pl.Series(["a", None, ""])).tolist() == ["a", None, ""]
    assert rows_by_id(["a", "b", "a"]) == {"a": 3, "b": 2}
