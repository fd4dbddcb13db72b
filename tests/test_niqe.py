"""NIQE: the pieces against closed forms and scipy, the whole against what everybody knows of blur and noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image

from data.image_io import from_uint8
from evaluation import niqe
from evaluation.niqe import Pristine, block_features, fit_generalised_gaussian, normalise_locally


def natural(count: int, size: int = 192, seed: int = 0) -> torch.Tensor:
    """Pictures with the 1/f spectrum and the soft edges of natural ones, uint8 (N, 3, size, size)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) + 1 / size
    pictures = []
    for _ in range(count):
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) / frequency).real
        field = np.tanh(field / field.std())
        noisy = 128 + 100 * field + rng.normal(0, 1.5, (3, size, size))
        pictures.append(np.clip(noisy, 0, 255))
    return torch.from_numpy(np.stack(pictures).astype(np.uint8))


@pytest.fixture(scope="module")
def pristine() -> Pristine:
    return Pristine.fit(list(natural(20)), "waves")


@pytest.mark.parametrize("alpha", [0.7, 1.0, 2.0, 4.0])
def test_symmetric_shapes_are_found(alpha: float) -> None:
    x = scipy.stats.gennorm.rvs(alpha, scale=3.0, size=(2, 100_000), random_state=0)
    shape, left, right = fit_generalised_gaussian(torch.from_numpy(x))
    assert shape.tolist() == pytest.approx([alpha] * 2, rel=0.04)
    assert torch.cat([left, right]).tolist() == pytest.approx([3.0] * 4, rel=0.08)  # heavy tails vary


def test_asymmetric_scales_are_found() -> None:
    rng = np.random.default_rng(0)
    magnitude = np.abs(scipy.stats.gennorm.rvs(1.5, size=200_000, random_state=1))
    x = np.where(
        rng.random(200_000) < 1 / 3, -1.0 * magnitude, 2.0 * magnitude
    )  # equal heights at 0: β_l / (β_l + β_r)
    shape, left, right = fit_generalised_gaussian(torch.from_numpy(x)[None])
    assert (float(shape), float(left), float(right)) == pytest.approx((1.5, 1.0, 2.0), rel=0.04)


def test_a_constant_has_no_shape_but_finite_numbers() -> None:
    assert all(value.isfinite().all() for value in fit_generalised_gaussian(torch.zeros(1, 50)))


def test_local_normalisation_is_scipys() -> None:
    x = np.random.default_rng(0).uniform(0, 255, (40, 40))
    blur = lambda a: scipy.ndimage.gaussian_filter(a, 7 / 6, mode="nearest", radius=3)  # noqa: E731
    mean = blur(x)
    deviation = np.sqrt(np.abs(blur(x * x) - mean**2))
    found, spread = normalise_locally(torch.from_numpy(x)[None, None])
    assert np.allclose(found[0, 0], (x - mean) / (deviation + 1), atol=1e-6)
    assert np.allclose(spread[0, 0], deviation, atol=1e-6)


def test_features_count_blocks_and_forget_the_rest() -> None:
    images = from_uint8(natural(2, 210))
    features, sharpness = block_features(images)
    assert features.shape == (2, 4, 36) and sharpness.shape == (2, 4)
    cut, _ = block_features(images[..., :192, :192])
    assert torch.allclose(features, cut)
    with pytest.raises(ValueError, match="96 px"):
        block_features(images[..., :90, :90])


def test_white_noise_has_the_gaussian_shape() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.2, (1, 1, 192, 192))).expand(1, 3, 192, 192)
    features, _ = block_features(noise)
    assert features[0, :, 0].mean() > 1.9  # of x̂; natural pictures have less
    assert abs(float(features[0, :, 3].mean())) < 0.15  # products of neighbours, which have nothing in common
    assert features[0, :, 2].mean() < 1.1  # and products of Gaussians are peaked


def test_worse_pictures_are_further_away(pristine) -> None:
    others = natural(3, seed=9)
    blurred = torch.stack([
        torch.from_numpy(scipy.ndimage.gaussian_filter(p.numpy(), (0, 2, 2))) for p in others
    ])  # fmt: skip
    noise = torch.from_numpy(np.random.default_rng(1).normal(0, 40, others.shape))
    noisy = (others + noise).clamp(0, 255).byte()
    same, blur, grain = (pristine.distance(from_uint8(p)).mean() for p in (others, blurred, noisy))
    assert same < 0.5 * blur and same < 0.5 * grain


def test_distance_of_equal_statistics_is_zero() -> None:
    features, _ = block_features(from_uint8(natural(1)))
    own = Pristine(features[0].mean(dim=0), torch.cov(features[0].T))
    assert float(own.distance(from_uint8(natural(1)))) == pytest.approx(0, abs=1e-9)
    shifted = Pristine(own.mean + 0.1, torch.eye(36, dtype=torch.float64) * 2 - own.covariance)
    assert float(shifted.distance(from_uint8(natural(1)))) == pytest.approx(0.1 * math.sqrt(36), rel=1e-6)  # Σ = I


def test_models_are_kept(pristine, tmp_path) -> None:
    pristine.save(tmp_path / "a.npz")
    read = Pristine.load(tmp_path / "a.npz")
    assert torch.equal(read.mean, pristine.mean) and torch.equal(read.covariance, pristine.covariance)
    assert read.source == "waves"
    (tmp_path / "b.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="b.npz"):
        Pristine.load(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match="evaluation.niqe"):
        Pristine.load(tmp_path / "c.npz")


def test_the_command_fits_a_folder(tmp_path, capsys) -> None:
    for i, picture in enumerate(natural(20)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    assert niqe.main(["--data", str(tmp_path), "--size", "192", "--out", str(tmp_path / "m.npz")]) == 0
    assert "20 pictures" in capsys.readouterr().out
    assert Pristine.load(tmp_path / "m.npz").mean.shape == (36,)
    assert niqe.main(["--data", str(tmp_path), "--size", "192", "--limit", "1", "--out", str(tmp_path / "n.npz")]) == 1
    assert "sharp blocks" in capsys.readouterr().err and not (tmp_path / "n.npz").exists()
