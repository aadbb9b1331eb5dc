"""LightGCN's and NGCF's adjacency lists (https://github.com/kuandeng/LightGCN): train.txt and test.txt."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from training.data.formats.s3rec import scan_adjacency
from training.data.formats.source import Source, required


def read(src: str) -> Source:
    """Import LightGCN's folders: train.txt and test.txt with `user item item ...` lines, no order, no times.

    A user without items in one of the files is rejected there: it is no event.

    Args:
        src: The folder, such as gowalla; the files may be gzipped.
    """
    files = {split: required(Path(src) / f"{split}.txt") for split in ("train", "test")}
    parts = [scan_adjacency(file).with_columns(split=pl.lit(split)) for split, file in files.items()]
    return Source(
        name=Path(src).resolve().name,
        files=list(files.values()),
        events=pl.concat(parts),
        time="none",
        split="given",
    )
