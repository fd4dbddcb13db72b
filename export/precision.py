"""Smaller models: weights stored as float16, or convolutions and matrix products in int8.

fp16: large weights lie in the file as float16, each behind a Cast that onnxruntime folds when it opens the file: half
    the size, computed in float32, on every provider. What was trained in float16 loses nothing.
int8: the large convolutions and matrix products of the encoder become int8 (QDQ format, weights per channel), after a
    calibration on low-resolution faces; everything else is stored as with fp16. So do those of the feedback, if that
    does no harm. The generator, whose products make the picture, is stored as with fp16.

Source: Wu et al. 2020 "Integer quantization for deep learning inference", sections 3 and 4.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)

_LARGE = 1024  # values; smaller weights save nothing worth a node
_PRODUCT = 16_384  # values; smaller convolutions and products take no time worth their loss
_INT8_OPERATORS = ("Conv", "Gemm", "MatMul")
_EXACT = "latents.directions"  # these products take out of a move what would show most: rounding would put it back


def store_half(model: ModelProto) -> ModelProto:
    """Stores the large weights of a model as float16; they are float32 again before they meet anything.

    Inputs keep their defaults, since a default has the type of its input; so do weights beyond float16's range.

    Args:
        model: Any model; changed in place.

    Returns:
        The same model.
    """
    graph = model.graph
    inputs = {value.name for value in graph.input}
    casts: list[NodeProto] = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or weight.name in inputs or np.prod(weight.dims) < _LARGE:
            continue
        values = numpy_helper.to_array(weight)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [weight.name], [name], f"{name}_cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def quantize(model: ModelProto, faces: Iterable[dict[str, np.ndarray]]) -> ModelProto:
    """Turns the large convolutions and matrix products of a model into int8, by the ranges that faces give.

    Args:
        model: A float32 model.
        faces: Its inputs by name, one batch after the other; some hundred faces are enough.

    Returns:
        Another model with the same inputs, outputs and metadata.

    Raises:
        ValueError: If the model has nothing to quantise, or no face was given.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as holder, _quiet():
        given, prepared, made = (Path(holder) / f"{name}.onnx" for name in ("given", "prepared", "made"))
        onnx.save(model, given)
        # The symbolic shape inference does not know every operator that torch writes, and nothing here needs it.
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        chosen = _large_products(onnx.load(prepared))
        if not chosen:
            raise ValueError("Expected a model with large convolutions or products, found none; leave it as it is.")
        reader = _Reader(faces)
        quantize_static(
            prepared,
            made,
            reader,  # type: ignore[arg-type]  # its base class would import onnxruntime.quantization with this file
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_INT8_OPERATORS),
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True},
        )
        if not reader.count:
            raise ValueError("Expected faces to calibrate on, got none.")
        result = onnx.load(made)
    helper.set_model_props(result, {prop.key: prop.value for prop in model.metadata_props})
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    return result


class _Reader:
    """What onnxruntime's calibration asks for inputs; see its CalibrationDataReader."""

    def __init__(self, faces: Iterable[dict[str, np.ndarray]]) -> None:
        self.faces: Iterator[dict[str, np.ndarray]] = iter(faces)
        self.count = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Gives the inputs of one call, None at the end."""
        inputs = next(self.faces, None)
        self.count += inputs is not None
        return inputs

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Gives the inputs of one call."""
        inputs = self.get_next()
        if inputs is None:
            raise StopIteration
        return inputs


def _large_products(model: ModelProto) -> list[str]:
    """Names the nodes that multiply by large constant weights, but for the directions of `models.preconditioner`."""
    sizes = {weight.name: int(np.prod(weight.dims)) for weight in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _INT8_OPERATORS
        and any(sizes.get(name, 0) >= _PRODUCT for name in node.input)
        and not any(_EXACT in name for name in node.input)
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what onnxruntime's quantisation prints and logs from the user: advice for its own command line."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
