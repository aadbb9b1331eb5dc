from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from engine.mapped_arrays import map_arrays


def test_what_safetensors_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "odd": rng.integers(0, 255, 7).astype(np.uint8),
        "vectors": rng.normal(size=(5, 3)).astype(np.float32),
        "none": np.zeros((0, 4), np.float32),
        "number": np.array(3, np.int64),
        "large": np.array([2**62, -1]),
        "doubles": rng.normal(size=2),
        "rows": np.arange(9, dtype=np.int32).reshape(3, 3),
    }
    file = tmp_path / "a.safetensors"
    save_file(arrays, file, metadata={"made": "by a test"})
    expected, found = load_file(file), map_arrays(file)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert array.dtype == expected[name].dtype
        assert array.flags.aligned


def test_an_unpadded_header_is_read_all_the_same(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 4 + 4)
    data = np.array([1.5, -2], np.float32)
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())
    found = map_arrays(tmp_path / "a")["x"]
    assert found.flags.aligned
    assert found.tolist() == [1.5, -2]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_file_is_read_beyond_its_end(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands in it: arrays within the file, or an error."""
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    file.write_bytes(content)
    try:
        arrays = map_arrays(file)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return  # Bundle.load names the file in all of them
    assert sum(array.nbytes for array in arrays.values()) <= 3 * len(content)
    for array in arrays.values():
        array.sum()
