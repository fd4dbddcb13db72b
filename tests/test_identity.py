"""The face embedding: its crop against Pillow, its network against the MXNet graph, its use on real faces."""

from __future__ import annotations

import ast
import csv
import gzip
import io
import itertools
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.face_embedder import (
    CROP_LEFT,
    CROP_SIZE,
    CROP_TOP,
    WEIGHTS,
    FaceEmbedder,
    MobileFaceNet,
    crop_face,
    crop_matrix,
    load_mobilefacenet,
    read_mxnet_tensors,
    rename_mxnet_tensors,
)
from models.pretrained import ROOT, weight_folders

SHARED = ROOT.parent / "shared"
GRAPH = SHARED / "weights" / "mobilefacenet_y1_symbol.json"
FACES = SHARED / "data" / "celeba128_val.zip"
LABELS = SHARED / "data" / "celeba128_labels.csv.gz"
PATH = next((f / WEIGHTS for f in weight_folders() if (f / WEIGHTS).is_file()), None)

needs_weights = pytest.mark.skipif(PATH is None, reason=f"{WEIGHTS} is not on this machine")
needs_graph = pytest.mark.skipif(not GRAPH.is_file(), reason=f"{GRAPH.name} is not on this machine")
needs_faces = pytest.mark.skipif(not (FACES.is_file() and LABELS.is_file()), reason="no CelebA on this machine")


@pytest.fixture(scope="module")
def identity() -> FaceEmbedder:
    return load_mobilefacenet()


@pytest.mark.parametrize("size", [32, 64, 112, 256, 1024])
def test_crop_agrees_with_pillow(size: int) -> None:
    channel = np.random.default_rng(0).uniform(-1, 1, (size, size)).astype(np.float32)
    left, top = CROP_LEFT * size, CROP_TOP * size
    box = (left, top, left + CROP_SIZE * size, top + CROP_SIZE * size)
    expected = np.array(Image.fromarray(channel).resize((112, 112), Image.Resampling.BILINEAR, box=box))
    image = torch.from_numpy(channel).expand(1, 3, size, size)
    np.testing.assert_allclose(crop_face(image)[0, 1].numpy(), expected, atol=2e-5)


def test_crop_matrix_of_the_whole_row_is_the_identity() -> None:
    torch.testing.assert_close(crop_matrix(16, 0.0, 1.0, 16), torch.eye(16))


def test_crop_refuses_oblong_images() -> None:
    with pytest.raises(ValueError, match="square"):
        crop_face(torch.zeros(1, 3, 32, 64))


def test_network_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="112"):
        MobileFaceNet()(torch.zeros(1, 3, 64, 64))


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"conv_1_conv2d_weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="MobileFaceNet"):
        load_mobilefacenet(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"no tensors", b"PK\x03\x04 half a zip"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=WEIGHTS):
        load_mobilefacenet(tmp_path / WEIGHTS)


@pytest.mark.parametrize("content", [[torch.zeros(3)], {"a": 3}])
def test_pt_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="dict of MobileFaceNet's tensors"):
        load_mobilefacenet(tmp_path / "other.pt")


def random_mxnet_tensors() -> dict[str, Tensor]:
    """Random tensors by the MXNet names, in the order of the network."""
    kinds = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    tensors = {"fc1_weight": "fc.weight", "pre_fc1_bias": "fc.bias"}
    state = MobileFaceNet().state_dict()
    for name in state:
        *_, kind = name.split(".")
        if name.startswith("norm.") and kind in kinds:
            tensors[f"fc1_{kinds[kind]}"] = name
        elif name.startswith("layers."):
            unit = re.sub(r"\.(sep|dw|proj)\.", r"_conv_\1.", name.removeprefix("layers.")).split(".")[0]
            if ".conv." in name:
                tensors[f"{unit}_conv2d_weight"] = name
            elif ".act." in name:
                tensors[f"{unit}_relu_gamma"] = name
            elif kind in kinds:
                tensors[f"{unit}_batchnorm_{kinds[kind]}"] = name
    return {mxnet: state[name] for mxnet, name in tensors.items()}


def test_other_weights_under_the_published_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / WEIGHTS
    torch.save(random_mxnet_tensors(), path)
    monkeypatch.setattr("models.face_embedder.find_weights", lambda *names, **_: path)
    load_mobilefacenet(path)  # asked for by its path, any is accepted
    with pytest.raises(ValueError, match="to hold MobileFaceNet y1.*Delete or replace"):
        load_mobilefacenet()


def test_missing_weights_name_the_file_and_the_way_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.pretrained.ROOT", tmp_path / "repository")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("AMORTIZED_PULSE_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load_mobilefacenet()
    for part in (str(tmp_path / "checkpoints" / WEIGHTS), "model-y1-test2", "--model.weight_identity 0"):
        assert part in str(error.value)


def read_attribute(value: str) -> object:
    """Reads "(3, 3)", "2e-05" or "True"; other words stay as they are."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return value


def run_node(node: dict, inputs: list[Tensor]) -> Tensor:
    """Evaluates one MXNet node."""
    attributes = {key: read_attribute(value) for key, value in node.get("attrs", {}).items()}
    x = inputs[0]
    match node["op"]:
        case "_minus_scalar":
            return x - attributes["scalar"]
        case "_mul_scalar":
            return x * attributes["scalar"]
        case "Convolution":
            assert attributes["no_bias"]
            return F.conv2d(x, inputs[1], None, attributes["stride"], attributes["pad"], 1, attributes["num_group"])
        case "BatchNorm":
            _, gamma, beta, mean, variance = inputs
            gamma = torch.ones_like(gamma) if attributes["fix_gamma"] else gamma
            shape = (1, -1, *[1] * (x.ndim - 2))
            scale = gamma / (variance + attributes.get("eps", 1e-3)).sqrt()
            return (x - mean.view(shape)) * scale.view(shape) + beta.view(shape)
        case "LeakyReLU":
            assert attributes["act_type"] == "prelu"
            return torch.where(x > 0, x, x * inputs[1].view(1, -1, 1, 1))
        case "elemwise_add":
            return x + inputs[1]
        case "FullyConnected":
            return x.flatten(1) @ inputs[1].T + inputs[2]
    raise NotImplementedError(node["op"])


def run_graph(faces255: Tensor) -> Tensor:
    """Evaluates the MXNet graph on faces (B, 3, 112, 112) in [0, 255]."""
    tensors = read_mxnet_tensors(PATH)
    graph = json.loads(GRAPH.read_text())
    values: list[Tensor] = []
    for node in graph["nodes"]:
        if node["op"] == "null":
            values.append(faces255 if node["name"] == "data" else tensors[node["name"]].double())
        else:
            values.append(run_node(node, [values[source] for source, *_ in node["inputs"]]))
    return values[graph["heads"][0][0]]


@needs_weights
@needs_graph
def test_network_equals_its_mxnet_graph(identity: FaceEmbedder) -> None:
    faces255 = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 255.0
    expected = F.normalize(run_graph(faces255.double()), dim=1).float()
    torch.testing.assert_close(identity.network(faces255 / 127.5 - 1.0), expected, atol=1e-5, rtol=1e-4)


@needs_weights
def test_every_tensor_of_the_file_is_used() -> None:
    tensors = read_mxnet_tensors(PATH)
    with torch.device("meta"):
        names = set(MobileFaceNet().state_dict())
    assert set(rename_mxnet_tensors(tensors)) == names


@needs_weights
def test_gradients_reach_the_image_only(identity: FaceEmbedder) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    identity(images)[0, 0].backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in identity.parameters())
    assert len(identity.state_dict()) == 0


def read_people(people: int) -> tuple[Tensor, np.ndarray]:
    """Reads two faces (2N, 3, 128, 128) of each of N people, and their identities (2N,)."""
    files: dict[str, list[str]] = {}
    with gzip.open(LABELS, "rt") as stream:
        for row in csv.DictReader(stream):
            if row["split"] == "val":
                files.setdefault(row["identity"], []).append(row["file"])
    chosen = [(name, file) for name, own in files.items() if len(own) > 1 for file in own[:2]][: 2 * people]
    with zipfile.ZipFile(FACES) as archive:
        pictures = [np.array(Image.open(io.BytesIO(archive.read(file))).convert("RGB")) for _, file in chosen]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images, np.array([name for name, _ in chosen])


@needs_weights
@needs_faces
def test_same_people_score_above_different_people(identity: FaceEmbedder) -> None:
    images, names = read_people(40)
    with torch.inference_mode():
        embeddings = identity(images)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(names)))
    scores = (embeddings @ embeddings.T).numpy()
    pairs = list(itertools.combinations(range(len(names)), 2))
    same = np.array([scores[i, j] for i, j in pairs if names[i] == names[j]])
    different = np.array([scores[i, j] for i, j in pairs if names[i] != names[j]])
    assert len(same) == 40
    assert (same[:, None] > different[None, :]).mean() > 0.9  # area under the ROC curve
