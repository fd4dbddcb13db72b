"""The Fréchet distance against its closed form, and the network that `fd_vgg11` is named after."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.features import INCEPTION, VGG11_SHORT, VGG11_WHOLE, VGG11Features, load_vgg11_tensors
from evaluation.frechet import FrechetDistance, frechet_metric
from models.pretrained import weight_folders
from training.run import RunRefused

FILES = (VGG11_SHORT, VGG11_WHOLE)
PATH = next((f / name for name in FILES for f in weight_folders() if (f / name).is_file()), None)
needs_vgg = pytest.mark.skipif(PATH is None, reason=f"neither {' nor '.join(FILES)} is on this machine")


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


@needs_vgg
def test_whole_file_gives_the_same_layers(monkeypatch, tmp_path) -> None:
    tensors = load_vgg11_tensors()
    # As torchvision's file: old, without step counters, and with more layers than needed.
    whole = {f"features.{name}": t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    whole |= {
        "features.15.weight": torch.zeros(3),
        "features.22.bias": torch.zeros(3),
        "classifier.0.bias": torch.ones(2),
    }
    torch.save(whole, tmp_path / VGG11_WHOLE, _use_new_zipfile_serialization=False)
    expected = VGG11Features()(pictures(2))
    monkeypatch.setattr("evaluation.features.find_weights", lambda *names, **_: tmp_path / VGG11_WHOLE)
    assert torch.equal(VGG11Features()(pictures(2)), expected)


@pytest.mark.parametrize("name", FILES)
def test_other_weights_are_refused(monkeypatch, tmp_path, name) -> None:
    prefix = "features." if name == VGG11_WHOLE else ""
    torch.save({f"{prefix}0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / name)
    monkeypatch.setattr("evaluation.features.find_weights", lambda *names, **_: tmp_path / name)
    with pytest.raises(ValueError, match="VGG11-BN.*Delete or replace"):
        frechet_metric("auto")  # a damaged file is told of, not passed by


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without weights and without a network."""
    monkeypatch.setattr("models.pretrained.ROOT", tmp_path / "repository")
    monkeypatch.setattr("evaluation.features.VGG11_URL", (tmp_path / "absent.pth").as_uri())
    monkeypatch.setattr("evaluation.features.INCEPTION_URL", (tmp_path / "absent.pth").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("AMORTIZED_PULSE_WEIGHTS", raising=False)


@pytest.mark.parametrize(("name", "files"), [("fd_vgg11", FILES), ("fid", (INCEPTION,)), ("auto", (*FILES, INCEPTION))])
def test_missing_weights_are_named(nothing, name, files) -> None:
    with pytest.raises(FileNotFoundError) as error:
        frechet_metric(name)
    assert all(file in str(error.value) for file in files)
    assert (INCEPTION in str(error.value)) == (INCEPTION in files)


def test_fid_is_torch_fidelitys_with_a_file_of_its_weights(nothing, monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: untrained)
        untrained = {}
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / INCEPTION)
    monkeypatch.setenv("AMORTIZED_PULSE_WEIGHTS", str(tmp_path))
    (name, metric), images = frechet_metric("fid"), pictures(6)
    assert name == "fid"
    torch.testing.assert_close(metric.inception(images), network.eval()(images)[0], rtol=1e-4, atol=1e-6)
    assert distance(metric, images[:3], images[3:]) > distance(frechet_metric("fid")[1], images, images) - 1e-3


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
    assert not any(t.is_meta for t in (*features.parameters(), *features.buffers()))


@pytest.mark.parametrize("options", [{"metric": "fdi"}, {"samples": 1}])
def test_what_cannot_be_measured_is_refused_before_the_first_step(options) -> None:
    with pytest.raises(ValueError, match="Expected"):
        FrechetDistance(**options)


def test_one_face_to_compare_with_is_refused_before_the_first_step() -> None:
    trainer = SimpleNamespace(datamodule=SimpleNamespace(val_faces=[0]), fast_dev_run=False)
    with pytest.raises(RunRefused, match="2 faces or more"):
        FrechetDistance().on_fit_start(trainer, None)
