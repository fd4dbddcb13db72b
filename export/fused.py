"""One file for both: upsample.onnx, from a low-resolution face to its candidates, for programs that edit nothing.

    canvas (B, 3, C, C), lr_size (B,), noise (B, n, E) -> images (B, n + 1, 3, R, R), ws (B, n + 1, L, D)

The passes of learned feedback are not in it: each draws the faces once more, and whether it is taken depends on what it
drew. Its candidates are those of `passes=0`, and its metadata says so: `passes` and `feedback_canvas` are 0.
It is joined from encoder.onnx and generator.onnx as they were written, so it has their precision and their weights.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnx.compose import merge_models

from export.metadata import Metadata, from_props, to_props

PIXELS = "pixels"  # of all candidates in one batch


def fuse(encoder: ModelProto, generator: ModelProto) -> ModelProto:
    """Joins an encoder and its generator; the noise maps become constants.

    Args:
        encoder: From encoder.onnx.
        generator: From generator.onnx.

    Returns:
        The joined model, with metadata of the role "upsample".

    Raises:
        ValueError: If one of the two is not ours.
    """
    about = from_props({prop.key: prop.value for prop in encoder.metadata_props}, "encoder.onnx")
    drawing = ModelProto()
    drawing.CopyFrom(generator)
    stored = {weight.name for weight in drawing.graph.initializer}
    for value in [value for value in drawing.graph.input if value.name in stored]:
        drawing.graph.input.remove(value)
    _take_candidates(drawing, about)
    coding = onnx.compose.add_prefix(encoder, "encoder/", rename_inputs=False, rename_outputs=False)
    drawing = onnx.compose.add_prefix(drawing, "generator/", rename_inputs=False, rename_outputs=False)
    del coding.metadata_props[:], drawing.metadata_props[:]
    drawing.ir_version = coding.ir_version = max(coding.ir_version, drawing.ir_version)
    model = merge_models(coding, drawing, [("ws", "candidates")], outputs=["images", "ws"])
    helper.set_model_props(model, to_props(_describe(about, generator)))
    model.producer_name, model.producer_version = encoder.producer_name, encoder.producer_version
    onnx.checker.check_model(model)
    return model


def _take_candidates(drawing: ModelProto, about: Metadata) -> None:
    """Lets a generator take codes (B, k, L, D), and give images (B, k, 3, R, R)."""
    graph, size = drawing.graph, about.resolution
    for node in graph.node:
        node.output[:] = [PIXELS if name == "images" else name for name in node.output]
    shapes = {
        "codes_shape": [-1, about.num_ws, about.w_dim],
        "images_tail": [3, size, size],
        "zero": [0],
        "two": [2],
    }
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), name) for name, v in shapes.items())
    before = helper.make_node("Reshape", ["candidates", "codes_shape"], ["ws"], "flatten_candidates")
    after = [
        helper.make_node("Shape", ["candidates"], ["candidates_shape"], "shape_of_candidates"),
        helper.make_node("Slice", ["candidates_shape", "zero", "two"], ["faces_and_k"], "faces_and_k"),
        helper.make_node("Concat", ["faces_and_k", "images_tail"], ["images_shape"], "shape_of_images", axis=0),
        helper.make_node("Reshape", [PIXELS, "images_shape"], ["images"], "unflatten_candidates"),
    ]
    nodes = [before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    kind = onnx.TensorProto.FLOAT
    codes: list[str | int | None] = ["batch", "candidates", about.num_ws, about.w_dim]
    graph.input.append(helper.make_tensor_value_info("candidates", kind, codes))
    graph.output.append(helper.make_tensor_value_info("images", kind, ["batch", "candidates", 3, size, size]))


def _describe(about: Metadata, generator: ModelProto) -> Metadata:
    props = {prop.key: prop.value for prop in generator.metadata_props}
    images = json.loads(props["values"])["images"].replace("(batch,", "(batch, 1 + samples,")
    values = {name: text for name, text in about.values.items() if name != "best"} | {"images": images}
    return replace(about, role="upsample", values=values, passes=0, feedback_canvas=0)
