"""Degradations, against scipy, Pillow and the statistics that their names promise."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import convolve

from data.degradation import (
    DEGRADATIONS,
    Degradation,
    GaussianNoise,
    Jpeg,
    MotionBlur,
    SaltAndPepper,
    face_rngs,
    find_degradation,
    line_kernel,
    random_degradation,
)
from data.image_io import to_uint8
from data.operator import Downscale

SEED = 5


def rng(seed: int = SEED) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth_faces(count: int = 4, size: int = 32) -> torch.Tensor:
    """Pictures with structure at every scale, in [-0.8, 0.8]."""
    noise = torch.from_numpy(rng(1).uniform(-0.8, 0.8, (count, 3, size // 4, size // 4)).astype(np.float32))
    return torch.nn.functional.interpolate(noise, size, mode="bilinear")


@pytest.fixture
def faces() -> torch.Tensor:
    return smooth_faces()


# --- every one of them ---


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_result_is_a_saved_picture_of_the_same_shape(name, faces) -> None:
    lr = DEGRADATIONS[name](faces, Downscale(8), rng())
    assert lr.shape == (4, 3, 8, 8) and lr.dtype == torch.float32
    levels = lr * 127.5 + 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert lr.min() >= -1 and lr.max() <= 1


@pytest.mark.parametrize("name", [name for name in DEGRADATIONS if name != "clean"])
def test_result_differs_from_the_clean_one_and_follows_the_seed(name, faces) -> None:
    degradation, operator = DEGRADATIONS[name], Downscale(16)
    clean = DEGRADATIONS["clean"](faces, operator, rng())
    first = degradation(faces, operator, rng())
    assert not torch.equal(first, clean)
    assert torch.equal(first, degradation(faces, operator, rng()))
    if name != "jpeg":  # which draws nothing
        assert not torch.equal(first, degradation(faces, operator, rng(SEED + 1)))


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_face_meets_the_same_in_any_batch(name, faces) -> None:
    degradation, operator = DEGRADATIONS[name], Downscale(16)
    whole = degradation(faces, operator, face_rngs(SEED, range(4)))
    turned = degradation(faces.flip(0), operator, face_rngs(SEED, [3, 2, 1, 0])).flip(0)
    alone = degradation(faces[2:3], operator, face_rngs(SEED, [2]))
    assert torch.equal(whole, turned) and torch.equal(whole[2:3], alone)
    assert torch.equal(whole, torch.cat([degradation(faces[i : i + 2], operator, face_rngs(SEED, [i, i + 1]))
                                         for i in (0, 2)]))  # fmt: skip


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_name_finds_it(name) -> None:
    assert find_degradation(name) == DEGRADATIONS[name] and DEGRADATIONS[name].name == name


def test_number_of_generators_is_checked(faces) -> None:
    with pytest.raises(ValueError, match="each of 4 images, got 3"):
        GaussianNoise(25).after(faces, face_rngs(SEED, range(3)))


def test_input_is_left_alone(faces) -> None:
    before = faces.clone()
    for degradation in DEGRADATIONS.values():
        degradation.after(degradation.before(faces, rng()), rng())
    assert torch.equal(faces, before)


# --- names ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [("noise10", GaussianNoise(10)), ("jpeg30", Jpeg(30)), ("jpeg75", Jpeg()), ("motion-blur40", MotionBlur(40)),
     ("salt-and-pepper0.1", SaltAndPepper(0.1)), ("noise2.5", GaussianNoise(2.5))],
)  # fmt: skip
def test_strengths_can_be_named(name, expected) -> None:
    assert find_degradation(name) == expected
    assert find_degradation(find_degradation(name).name) == expected


@pytest.mark.parametrize(
    "name", ["", "noise", "noise300", "jpeg0", "jpeg96", "jpeg50.5", "salt-and-pepper2", "clean5", "rain", "noise-5"]
)
def test_other_names_are_refused_with_the_list(name) -> None:
    with pytest.raises(ValueError, match=r"noise25, noise50, salt-and-pepper, jpeg, motion-blur.*got"):
        find_degradation(name)


# --- each ---


@pytest.mark.parametrize("sigma", [25.0, 50.0])
def test_noise_has_its_sigma_in_levels(sigma) -> None:
    grey = torch.zeros(8, 3, 64, 64)
    noise = GaussianNoise(sigma).after(grey, rng()) * 127.5
    # 98,304 draws: the standard deviation is known to 0.25 %; rounding adds 1/12, clamping at 127.5 takes some away.
    reference = np.clip(np.random.default_rng(0).normal(127.5, sigma, 10**6), 0, 255).std()
    assert abs(float(noise.std()) - reference) < 0.02 * sigma
    assert abs(float(noise.mean())) < 0.02 * sigma
    channels = noise.transpose(0, 1).flatten(1)
    assert torch.corrcoef(channels)[0, 1].abs() < 0.03


def test_salt_and_pepper_replaces_whole_pixels_and_nothing_else() -> None:
    lr = smooth_faces(8, 64)
    result, clean = SaltAndPepper(0.05).after(lr, rng()), Degradation().after(lr, rng())
    white, black = (result == 1).all(dim=1), (result == -1).all(dim=1)  # (B, s, s)
    kept = ~(white | black)[:, None].expand_as(lr)
    assert torch.equal(result[kept], clean[kept])
    for share in (white.float().mean(), black.float().mean()):  # 32,768 pixels: sigma of a share is 0.0009
        assert abs(float(share) - 0.025) < 0.004


@pytest.mark.parametrize("quality", [30, 75])
def test_jpeg_is_pillow_s(quality) -> None:
    lr = smooth_faces(2, 16)
    result = to_uint8(Jpeg(quality).after(lr, rng())).permute(0, 2, 3, 1).numpy()
    for face, got in zip(to_uint8(lr).permute(0, 2, 3, 1).numpy(), result, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(face).save(buffer, "JPEG", quality=quality, subsampling=2)
        assert np.array_equal(np.asarray(Image.open(buffer)), got)


def test_lower_quality_is_further_off() -> None:
    lr = smooth_faces(2, 32)
    errors = [(Jpeg(q).after(lr, rng()) - lr).square().mean().item() for q in (90, 75, 30, 5)]
    assert errors == sorted(errors) and errors[0] > 0


# --- motion blur ---


@pytest.mark.parametrize("length", [0.0, 0.4, 6.25, 25.0, 100.0])
@pytest.mark.parametrize("angle", [0.0, 30.0, 45.0, 90.0, 137.0])
def test_kernel_is_a_centred_line_of_its_length_and_angle(length, angle) -> None:
    kernel = line_kernel(length, angle).astype(np.float64)
    size = len(kernel)
    assert kernel.shape == (size, size) and size % 2 == 1 and kernel.min() >= 0
    assert abs(kernel.sum() - 1) < 1e-5
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    # Second moments: of a line, length²/12 along it and nothing across; bilinear sharing adds at most 1/4 per axis.
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    along, across = x * cos - y * sin, x * sin + y * cos
    assert -1e-4 <= (kernel * along**2).sum() - length**2 / 12 <= 0.26
    assert 0 <= (kernel * across**2).sum() <= 0.26


def test_horizontal_kernel_in_closed_form() -> None:
    """A line of 3 px over pixels -2 … 2 with triangular shares: 1/24, 7/24, 8/24, 7/24, 1/24 of it."""
    expected = np.zeros((5, 5))
    expected[2] = np.array([1, 7, 8, 7, 1]) / 24
    np.testing.assert_allclose(line_kernel(3.0, 0.0), expected, atol=1e-3)


def test_blur_is_the_convolution_with_that_kernel() -> None:
    faces = smooth_faces(3, 64)
    blurred = MotionBlur(100).before(faces, face_rngs(SEED, range(3)))
    for face, got, source in zip(faces, blurred, face_rngs(SEED, range(3)), strict=True):
        kernel = line_kernel(6.25, source.uniform(0, 180))
        for channel, result in zip(face.numpy(), got.numpy(), strict=True):
            np.testing.assert_allclose(result, convolve(channel, kernel, mode="mirror"), atol=2e-6)


def test_blur_of_nothing_is_nothing() -> None:
    faces = smooth_faces(2, 32)
    torch.testing.assert_close(MotionBlur(0).before(faces, rng()), faces, atol=2e-6, rtol=0)
    torch.testing.assert_close(MotionBlur(100).before(torch.full((1, 3, 32, 32), 0.3), rng()).std(), torch.zeros([]),
                               atol=1e-6, rtol=0)  # fmt: skip


def test_blur_scales_with_the_face() -> None:
    """The same scene at 64 and 256 px is blurred alike, which a blur of as many pixels would not be."""
    large = torch.nn.functional.interpolate(smooth_faces(1, 64), 256, mode="bicubic")
    small = Downscale(64)(large)
    expected = Downscale(64)(MotionBlur(200).before(large, rng()))
    inside = (..., slice(8, -8), slice(8, -8))
    off = [(MotionBlur(n).before(small, rng()) - expected)[inside].square().mean().sqrt() for n in (200, 800, 0)]
    assert off[0] < 0.1 * min(off[1:])


# --- training ---


def test_random_degradations_cover_all_kinds_and_follow_the_seed() -> None:
    source = rng()
    drawn = [random_degradation(source) for _ in range(2000)]
    source = rng()
    assert drawn == [random_degradation(source) for _ in range(2000)]
    shares = {kind: sum(type(d) is kind for d in drawn) / 2000
              for kind in (Degradation, GaussianNoise, SaltAndPepper, Jpeg, MotionBlur)}  # fmt: skip
    assert abs(shares.pop(Degradation) - 0.5) < 0.05
    assert all(abs(share - 0.125) < 0.03 for share in shares.values())
    qualities = [d.quality for d in drawn if isinstance(d, Jpeg)]
    assert min(qualities) >= 30 and max(qualities) <= 95 and len(set(qualities)) > 40


def test_random_degradations_can_be_switched_off() -> None:
    source = rng()
    assert {type(random_degradation(source, clean=1.0)) for _ in range(100)} == {Degradation}
