"""Face recognition networks as losses: their arithmetic is that of their authors, with random weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from psp_files import irse50_units
from torch import nn

from models.face_embedder import INCEPTION_RESNET, IR_SE50, IRSE50, load_face_embedder


def randomised(network: nn.Module) -> nn.Module:
    """Random statistics as well, or an error in normalisation would not be seen."""
    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            spread = torch.rand(tensor.shape) + 0.5 if "var" in name or tensor.ndim == 1 else torch.randn(tensor.shape)
            tensor.copy_(spread if tensor.ndim < 2 else spread / tensor[0].numel() ** 0.5)
    return network.eval()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("AMORTIZED_PULSE_WEIGHTS", str(tmp_path))
    return tmp_path


def irse50_oracle(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The embedding at the end of its units."""

    def norm(x, name):
        return F.batch_norm(
            x, t[f"{name}.running_mean"], t[f"{name}.running_var"], t[f"{name}.weight"], t[f"{name}.bias"]
        )

    x = norm(irse50_units(t, x)[-1], "output_layer.0").flatten(1)
    x = norm(F.linear(x, t["output_layer.3.weight"], t["output_layer.3.bias"]), "output_layer.4")
    return x / x.norm(dim=1, keepdim=True)


def test_ir_se50_is_that_of_psp_s_loss(weights) -> None:
    tensors = randomised(IRSE50()).state_dict()
    torch.save(tensors, weights / IR_SE50)
    images = torch.rand(1, 3, 256, 256, dtype=torch.float64) * 2 - 1  # of 24 random units, float32 loses three digits
    cut = F.adaptive_avg_pool2d(images[:, :, 35:223, 32:220], (112, 112))
    found = load_face_embedder("ir_se50").double()(images)
    expected = irse50_oracle({name: tensor.double() for name, tensor in tensors.items()}, cut)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def test_inception_resnet_is_facenet_pytorch_s(weights) -> None:
    theirs = randomised(InceptionResnetV1())
    torch.save({**theirs.state_dict(), "logits.weight": torch.zeros(3, 512)}, weights / INCEPTION_RESNET)
    ours = load_face_embedder("inception_resnet")
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_(True)
    expected = theirs(ours.crop(images))
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-4)
    assert ours.crop(images).shape == (2, 3, 160, 160)
    (gradient,) = torch.autograd.grad(ours(images)[:, 0].sum(), images)
    assert gradient.abs().sum() > 0 and not ours.state_dict()


@pytest.mark.parametrize(("name", "file"), [("ir_se50", IR_SE50), ("inception_resnet", INCEPTION_RESNET)])
def test_a_file_of_another_network_is_refused(weights, name, file) -> None:
    torch.save({"input_layer.0.weight": torch.zeros(1)}, weights / file)
    with pytest.raises(ValueError, match=f"Expected the tensors of .*{file}: "):
        load_face_embedder(name)


def test_what_is_missing_is_named(weights, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=f"{IR_SE50}.*pixel2style2pixel"):
        load_face_embedder("ir_se50")
    with pytest.raises(ValueError, match="mobilefacenet, ir_se50, inception_resnet, got 'vgg'"):
        load_face_embedder("vgg")
