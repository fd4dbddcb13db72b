"""Smaller files: weights stored as float16 or int8, and float32 again before they meet anything.

fp16: half the size. Bundles hold float16 to begin with, so nothing is lost.
int8: the encoder's large weights become int8 with a scale for each row; the generator's, which make the picture, fp16.

onnxruntime computes the float32 weights once, when it opens the file: speed and memory stay those of float32.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)
_LARGE = 1024  # values; smaller weights save nothing worth a node
_ROWS = 16_384  # values of a weight that is worth a scale for each row


def store(model: ModelProto, precision: str) -> ModelProto:
    """Stores the large weights of a model in a smaller type, one of `PRECISIONS`; changes the model in place."""
    nodes: list[NodeProto] = []
    scales: list[TensorProto] = []
    for weight in model.graph.initializer if precision != FP32 else ():
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < _LARGE:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        if precision == INT8 and values.size >= _ROWS and not name.startswith("synthesis."):
            axes = tuple(range(1, values.ndim))
            scale = np.maximum(np.abs(values).max(axis=axes, keepdims=True), 1e-12).astype(np.float32) / 127
            weight.CopyFrom(numpy_helper.from_array(np.rint(values / scale).astype(np.int8), f"{name}/int8"))
            scales.append(numpy_helper.from_array(scale, f"{name}/scale"))
            nodes.append(_cast(weight.name, f"{name}/steps"))
            nodes.append(helper.make_node("Mul", [f"{name}/steps", f"{name}/scale"], [name], f"{name}/Mul"))
        elif np.abs(values).max() < np.finfo(np.float16).max:
            weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}/float16"))
            nodes.append(_cast(weight.name, name))
    model.graph.initializer.extend(scales)
    for i, node in enumerate(nodes):
        model.graph.node.insert(i, node)
    return model


def _cast(stored: str, name: str) -> NodeProto:
    return helper.make_node("Cast", [stored], [name], f"{stored}/Cast", to=TensorProto.FLOAT)
