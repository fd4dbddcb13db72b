"""The measures against closed forms and brute force, on networks of one layer."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.operator import Downscale
from evaluation import metrics
from evaluation.features import EdgeFace
from evaluation.frechet import frechet_distance, kernel_distance
from evaluation.metrics import (
    MetricSuite,
    distance,
    distance_map,
    eight_bit,
    lr_psnr,
    mean_pair_distance,
    ntire_diversity,
    rank1,
    summarize,
)
from losses.perceptual import LPIPS, TRUNK
from models.pretrained import weight_folders

TRUNK_FOLDER = next((folder for folder in weight_folders() if (folder / TRUNK).is_file()), None)


class Colours(nn.Module):
    """Three means of colour."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class Direction(Colours):
    """The same, of unit norm."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(images), dim=1)


class Maps(nn.Module):
    """The picture itself, and half its size."""

    def __init__(self, net: str = "squeeze") -> None:
        super().__init__()

    def features(self, images: Tensor) -> list[Tensor]:
        return [images, nn.functional.avg_pool2d(images, 2)]


@pytest.fixture
def suite(monkeypatch) -> MetricSuite:
    monkeypatch.setattr(metrics, "NETWORKS", {"lpips": Maps, "vgg11": Colours, "identity": Direction})
    monkeypatch.setattr(metrics, "FRECHET_FACES", 3)
    return MetricSuite(names=("lpips", "vgg11", "identity"))


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def inputs(faces: Tensor, size: int = 4) -> Tensor:
    return eight_bit(Downscale(size)(faces))


def test_lr_psnr_is_that_of_the_written_picture() -> None:
    grey = torch.full((2, 3, 16, 16), 1 / 255)  # 128 in 8 bit
    samples = torch.stack([grey, grey + 0.1], dim=1)
    lr = torch.full((2, 3, 4, 4), 128 / 127.5 - 1)
    assert lr_psnr(samples, lr)[0].tolist() == pytest.approx([100.0, -20 * math.log10(13 / 255)], abs=1e-3)


@pytest.mark.parametrize("draws", [2, 5])
def test_mean_pair_distance_is_the_mean_over_pairs(draws) -> None:
    features = [pictures(3, draws, 4, 8, 8), pictures(3, draws, 6, 2, 2, seed=1)]
    pairs = [
        distance([f[:, i] for f in features], [f[:, j] for f in features])
        for i, j in itertools.combinations(range(draws), 2)
    ]
    assert torch.allclose(mean_pair_distance(features), torch.stack(pairs).mean(dim=0), rtol=1e-4)


def test_a_truth_that_is_one_more_draw_has_ratio_1(suite) -> None:
    everything = 0.5 + 0.2 * torch.randn(400, 6, 3, 1, 1, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    everything = everything.expand(-1, -1, -1, 8, 8)
    faces, samples = everything[:, 0].contiguous(), everything[:, 1:]
    found = suite(faces, samples, inputs(faces))
    for name in ("lpips", "vgg11", "identity"):
        assert found[f"ratio_{name}"] == pytest.approx(1, abs=0.07)
    assert found["fd_vgg11"] < 0.01 and abs(found["kid_vgg11"]) < 0.01
    assert found["lpips_best"] < found["lpips_mean"]


def test_measures_do_not_depend_on_the_batch(suite, monkeypatch) -> None:
    faces, samples = pictures(5, 3, 16, 16), pictures(5, 4, 3, 16, 16, seed=1)
    whole = suite.measure(faces, samples, inputs(faces))
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", 1)
    single = suite.measure(faces, samples, inputs(faces))
    assert all(torch.allclose(whole[name], single[name], atol=1e-5) for name in whole)


def test_the_truth_is_its_own_best_sample(suite) -> None:
    faces = eight_bit(pictures(6, 3, 16, 16))
    found = suite(faces, faces[:, None].expand(-1, 3, -1, -1, -1), inputs(faces))
    assert found["lpips_point"] == found["lpips_draws"] == found["ntire_diversity"] == 0
    assert found["identity_draw"] == pytest.approx(1) and found["rank1_draw"] == 1 and found["psnr"] == 100
    assert found["lr_psnr_worst"] > 40


def test_one_sample_has_no_spread(suite) -> None:
    faces = pictures(3, 3, 16, 16)
    found = suite(faces, faces[:, None], inputs(faces))
    assert not any(name.startswith("ratio") or name.endswith(("draw", "draws")) for name in found)
    assert "fd_vgg11" in found


def test_local_best_is_taken_at_each_pixel() -> None:
    truth = [torch.zeros(1, 1, 1, 8, 8)]
    left, right = torch.ones(2, 1, 8, 8)
    left[..., :4], right[..., 4:] = 0, 0  # each is right on one half
    assert ntire_diversity(truth, [torch.stack([left, right])[None]], 8).item() == pytest.approx(100)
    assert ntire_diversity(truth, [torch.stack([left, left])[None]], 8).item() == 0


@pytest.mark.skipif(TRUNK_FOLDER is None, reason=f"{TRUNK} is not on this machine")
def test_distance_map_is_that_of_the_package(monkeypatch) -> None:
    package = pytest.importorskip("lpips")
    if TRUNK_FOLDER.name != "checkpoints":
        pytest.skip("the package lpips finds its weights only in torch.hub's folders")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(TRUNK_FOLDER.parent))
    a, b, ours = pictures(2, 3, 64, 64), pictures(2, 3, 64, 64, seed=1), LPIPS()
    with torch.no_grad():
        expected = package.LPIPS(net="squeeze", spatial=True, verbose=False)(a, b)[:, 0]
    assert torch.allclose(distance_map(ours.features(a), ours.features(b), 64), expected, atol=1e-4)


def test_rank1_asks_for_the_own_truth() -> None:
    truth = torch.eye(3)
    assert rank1(torch.stack([truth, truth[[1, 0, 2]]], dim=1), truth).tolist() == [[1, 0], [1, 0], [1, 1]]


def test_missing_weights_leave_a_measure_out_with_one_line(monkeypatch, caplog) -> None:
    def missing() -> nn.Module:
        raise FileNotFoundError("Expected the weights 'edgeface_xxs.safetensors'.")

    monkeypatch.setattr(metrics, "NETWORKS", {"lpips": Maps, "identity": missing})
    with caplog.at_level(logging.WARNING):
        suite = MetricSuite(names=("lpips", "identity"))
    assert len(caplog.records) == 1 and "edgeface_xxs" in caplog.text
    faces = pictures(3, 3, 16, 16)
    found = suite(faces, faces[:, None], inputs(faces))
    assert "lpips_point" in found and not any("identity" in name for name in found)


@pytest.mark.parametrize("broken", ["samples", "inputs", "nan"])
def test_what_does_not_fit_is_refused(suite, broken) -> None:
    faces = pictures(2, 3, 16, 16)
    samples, lr = faces[:, None].clone(), inputs(faces)
    if broken == "nan":
        samples[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected"):
        suite.measure(
            faces, samples[:, :, :, :8] if broken == "samples" else samples, lr[:1] if broken == "inputs" else lr
        )


def test_distances_of_features_are_their_closed_forms() -> None:
    a = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(16, rel=1e-6)
    b = torch.randn(300, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    kernel = lambda x, y: (x @ y.T / 4 + 1) ** 3  # noqa: E731
    other = ~torch.eye(300, dtype=torch.bool)
    expected = kernel(a, a)[other].mean() + kernel(b, b)[other].mean() - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("name", ["edgeface_xxs.safetensors", "edgeface_xxs.pt"])
def test_edgeface_reads_both_kinds_of_file(tmp_path, name) -> None:
    tensors = timm.create_model("edgenext_xx_small", num_classes=512).half().state_dict()
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save({f"model.{key}": tensor for key, tensor in tensors.items()}, path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    network = EdgeFace(path).train()
    embeddings = network(pictures(2, 3, 32, 32))
    assert embeddings.shape == (2, 512) and torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_another_network_is_refused(tmp_path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "edgeface_xxs.safetensors")
    with pytest.raises(ValueError, match="EdgeFace"):
        EdgeFace(tmp_path / "edgeface_xxs.safetensors")


def test_summary_takes_means_of_decibels(suite) -> None:
    faces = pictures(4, 3, 16, 16)
    values = suite.measure(faces, faces[:, None].expand(-1, 2, -1, -1, -1), inputs(faces))
    found = summarize(values)
    assert found["lr_psnr"] == pytest.approx(values["lr_psnr"].double().mean().item())
    assert found["lr_psnr_worst"] == values["lr_psnr"].min()
