"""The arrays of a safetensors file as a memory map: all processes that open one file share its pages.

safetensors' own reader copies every array into memory of its process. The format is little: the length of the
header (little-endian uint64), the header (JSON: name -> dtype, shape, data_offsets), then the arrays' bytes.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "|u1"}  # all that we write


def map_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file by name, read-only.

    Leave the file as it is while they are in use: what is written into it changes them, and a page that is
    cut off ends the process. It may be removed; its space is free when they are gone.

    Raises:
        ValueError: this is no such file, or it holds another dtype than those above.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    if length > len(mapped) - 8:
        raise ValueError(f"the header has {length} bytes; expected at most {len(mapped) - 8}")
    header = json.loads(mapped[8 : 8 + length])
    arrays = {}
    for name, told in header.items():
        if name == "__metadata__":
            continue
        if told["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {told['dtype']}; expected one of {', '.join(DTYPES)}")
        dtype, shape = np.dtype(DTYPES[told["dtype"]]), tuple(told["shape"])
        begin, end = told["data_offsets"]
        if min((begin, *shape), default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has shape {shape} and the bytes from {begin} to {end}")
        # frombuffer refuses what lies beyond the end of the file.
        array = np.frombuffer(mapped, dtype, math.prod(shape), 8 + length + begin).reshape(shape)
        # safetensors pads its header so that all arrays are aligned.
        arrays[name] = array if array.flags.aligned else array.copy()
    return arrays
