"""The Fréchet distance against its closed form, and the network that `fd_vgg11` is named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from models.pretrained import weight_folders
from training.frechet import VGG11Features, frechet_metric

VGG = "vgg11_bn_features0-13.pth"
needs_vgg = pytest.mark.skipif(
    not any((folder / VGG).is_file() for folder in weight_folders()), reason=f"{VGG} is not on this machine"
)


def pictures(count: int = 24, seed: int = 0) -> Tensor:
    """Smooth random pictures, uint8 (count, 3, 32, 32)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed + 1))
    mixed = 0.7 * nn.functional.interpolate(coarse, size=32, mode="bilinear") + 0.3 * fine
    return (mixed * 255).round().byte()


def distance(metric: FrechetInceptionDistance, real: Tensor, drawn: Tensor) -> float:
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return float(metric.compute())


class ChannelMeans(nn.Module):
    """Three features, so that the closed form can be worked out from the pictures."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def test_metric_is_the_closed_form_between_gaussians() -> None:
    real, drawn = pictures(200), (pictures(150, seed=7) * 0.8).byte()
    (mean1, mean2), (cov1, cov2) = zip(
        *((f.mean(axis=0), np.cov(f.T)) for f in (x.double().mean(dim=(2, 3)).numpy() for x in (real, drawn))),
        strict=True,
    )
    values, vectors = np.linalg.eigh(cov1)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    # tr (Σ₁ Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, of a symmetric matrix
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root)).sum()
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2) - 2 * cross
    metric = FrechetInceptionDistance(feature=ChannelMeans(), reset_real_features=False)
    assert distance(metric, real, drawn) == pytest.approx(expected, rel=1e-4)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, fid or fd_vgg11.*'nonsense'"):
        frechet_metric("nonsense")


@needs_vgg
@pytest.mark.parametrize("name", ["auto", "fd_vgg11"])
def test_fd_vgg11_is_preferred_and_keeps_its_real_faces(name) -> None:
    got, metric = frechet_metric(name)
    assert got == "fd_vgg11"
    metric.update(pictures(4), real=True)
    metric.reset()
    assert metric.real_features_num_samples == 4 and metric.fake_features_num_samples == 0


def test_missing_weights_are_named(monkeypatch, tmp_path) -> None:
    def nowhere(name: str, **_) -> None:
        raise FileNotFoundError(name)

    monkeypatch.setattr("training.frechet.find_weights", nowhere)
    with pytest.raises(FileNotFoundError, match=VGG):
        frechet_metric("fd_vgg11")


@needs_vgg
def test_distance_to_itself_is_nothing_and_grows_with_blur() -> None:
    real = pictures()
    distances = []
    for size in (32, 16, 8):
        smaller = nn.functional.interpolate(real.float(), size=size, mode="area")
        blurred = nn.functional.interpolate(smaller, size=32, mode="bilinear").round().byte()
        distances.append(distance(frechet_metric("fd_vgg11")[1], real, blurred))
    assert distances[0] == pytest.approx(0, abs=1e-4)
    assert 1e-3 < distances[1] < distances[2]


@needs_vgg
def test_features_of_bytes_and_of_floats_are_the_same() -> None:
    features, images = VGG11Features(), pictures(4)
    torch.testing.assert_close(features(images), features(images / 255))
    assert features(images).shape == (4, VGG11Features.num_features)
    assert not any(p.requires_grad for p in features.parameters()) and features.state_dict() == {}
