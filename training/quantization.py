"""Fewer bits for an exported ranker: for the tables that items are looked up in, which are nearly all of it.

The layers stay in float32: int8 layers scale their inputs over a whole batch, so that an answer would depend
on who else was asked for. Inputs, outputs and all sums are float32 too.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Precision = Literal["float32", "float16", "int8"]
# How far a score may be from torch's, of the largest score where that is above 1.
MAX_SCORE_DIFFERENCE: dict[Precision, float] = {"float32": 1e-4, "float16": 5e-3, "int8": 3e-2}


def quantize(model: onnx.ModelProto, precision: Precision) -> None:
    """Rewrite an exported graph in a precision, in place.

    In int8 each row has a scale of its own.

    Args:
        model: with the metadata "num_items" (I); a table is what has more than I rows and is gathered from.
        precision: "float32" changes nothing.

    Raises:
        ValueError: another precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}")
    if precision == "float32":
        return
    # What items are looked up in is stored with fewer bits; what was looked up becomes float32 again.
    num_items = int(next(entry.value for entry in model.metadata_props if entry.key == "num_items"))
    tables = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[0] > num_items
    }
    nodes: list[onnx.NodeProto] = []
    stored: set[str] = set()
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type not in ("Gather", "GatherND") or node.input[0] not in tables:
            continue
        table, found = node.input[0], node.output[0]
        if table not in stored:
            stored.add(table)
            _replace(model, tables[table], precision)
        codes, scale, wide = (f"{found}_row_{what}" for what in ("codes", "scale", "wide"))
        node.output[0] = codes
        if precision == "float16":
            nodes.append(helper.make_node("Cast", [codes], [found], to=TensorProto.FLOAT))
            continue
        look_up = helper.make_node(node.op_type, [f"{table}_row_scale", node.input[1]], [scale])
        look_up.attribute.extend(node.attribute)
        nodes.append(look_up)
        nodes.append(helper.make_node("Cast", [codes], [wide], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [wide, scale], [found]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _replace(model: onnx.ModelProto, table: onnx.TensorProto, precision: Precision) -> None:
    values = numpy_helper.to_array(table)
    if precision == "float16":
        arrays: dict[str, NDArray[Any]] = {table.name: values.astype(np.float16)}
    else:
        codes, scale = _int8_rows(values)
        arrays = {table.name: codes, f"{table.name}_row_scale": scale}
    model.graph.initializer.remove(table)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    # What was told of the types of values on the way is not true any more.
    del model.graph.value_info[:]


def _int8_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return codes [N, D] and scales [N, 1] with codes * scales near the values, row by row."""
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    codes = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))
    return codes.astype(np.int8), scale.astype(np.float32)
