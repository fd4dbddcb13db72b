"""The downscaling operator, against Pillow, PULSE's strided convolution, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.operator import Downscale, downscaling_error, resize_matrix, upscale_bicubic

SIZES = [(64, 8), (64, 16), (60, 20), (64, 24), (50, 7), (128, 4), (5, 4), (4, 4), (2, 1), (1, 3), (16, 64), (10, 23)]


def pulse_rows(size_in: int, factor: int) -> Tensor:
    """PULSE's operator on one axis, written from its description: reflect 3f pixels, then a strided 4f-tap filter."""
    offsets = (torch.arange(4 * factor, dtype=torch.float64) - 2 * factor + 0.5) / factor
    x = offsets.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    before = 3 * factor // 2
    unit = torch.eye(size_in, dtype=torch.float64)[:, None]  # (size_in, 1, size_in)
    padded = F.pad(unit, (before, 3 * factor - before), mode="reflect")
    return F.conv1d(padded, (taps / taps.sum())[None, None], stride=factor)[:, 0].T  # (size_out, size_in)


@pytest.mark.parametrize(("size_in", "factor"), [(32, 2), (32, 4), (64, 4), (64, 8), (64, 16), (60, 3), (60, 5)])
def test_whole_factors_are_pulse(size_in: int, factor: int) -> None:
    torch.testing.assert_close(
        resize_matrix(size_in, size_in // factor).double(), pulse_rows(size_in, factor), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize(
    ("factor", "half"),
    [
        (4, [987, 745, 399, 93, -49, -75, -45, -7]),
        (8, [8115, 7553, 6567, 5301, 3899, 2505, 1263, 317, -225, -507, -605, -567, -441, -275, -117, -15]),
    ],
)
def test_taps_in_closed_form(factor: int, half: list[int]) -> None:
    """At (n + 1/2) / f the kernel is a whole number over 16 f³, and the 4f of them sum to f: worked out by hand."""
    row = resize_matrix(16 * factor, 16)[8]
    middle = 8 * factor + factor // 2  # the first pixel right of the centre
    right = torch.tensor(half) / (16 * factor**4)
    torch.testing.assert_close(row[middle : middle + 2 * factor], right, atol=1e-8, rtol=0)
    torch.testing.assert_close(row[middle - 2 * factor : middle].flip(0), right, atol=1e-8, rtol=0)
    assert row.count_nonzero() == 4 * factor


@pytest.mark.parametrize(("size_in", "size_out"), [(64, 8), (64, 16), (64, 32), (64, 24), (50, 7), (100, 30), (97, 90)])
def test_interior_is_pillow(size_in: int, size_out: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (size_in, size_in)).astype(np.float32)
    expected = np.asarray(Image.fromarray(x).resize((size_out, size_out), Image.Resampling.BICUBIC))
    got = Downscale(size_out)(torch.from_numpy(x)[None, None])[0, 0].numpy()
    inside = slice(2, -2)
    np.testing.assert_allclose(got[inside, inside], expected[inside, inside], atol=2e-6)
    assert np.abs(got - expected).max() > 1e-3  # borders are reflected here, renormalised in Pillow


@pytest.mark.parametrize("size_out", [40, 64, 75])
def test_enlarging_interior_is_pillow(size_out: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (20, 20)).astype(np.float32)
    expected = np.asarray(Image.fromarray(x).resize((size_out, size_out), Image.Resampling.BICUBIC))
    got = upscale_bicubic(torch.from_numpy(x)[None, None], size_out)[0, 0].numpy()
    inside = slice(10, -10)
    np.testing.assert_allclose(got[inside, inside], expected[inside, inside], atol=2e-6)


@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_rows_sum_to_one(size_in: int, size_out: int) -> None:
    matrix = resize_matrix(size_in, size_out)
    assert matrix.shape == (size_out, size_in) and matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double().sum(dim=1), torch.ones(size_out).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size_in", "size_out"), [(64, 8), (60, 20), (50, 7), (128, 4), (5, 4)])
def test_constant_images_stay(size_in: int, size_out: int) -> None:
    x = torch.tensor([-1.0, 0.25, 1.0])[None, :, None, None].expand(2, 3, size_in, size_in)
    torch.testing.assert_close(Downscale(size_out)(x), x[..., :size_out, :size_out], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size_in", "size_out", "shift"), [(64, 16, 0), (50, 20, 0), (60, 20, 0.5), (60, 12, 0.5)])
def test_linear_ramps_are_sampled_at_the_centres(size_in: int, size_out: int, shift: float) -> None:
    """A ramp shows where an output pixel lies: half an input pixel further on for odd whole factors, as in PULSE."""
    factor = size_in / size_out
    centres = (torch.arange(size_out) + 0.5) * factor - 0.5 + shift
    got = resize_matrix(size_in, size_out) @ torch.arange(size_in, dtype=torch.float32)
    # Stretched by a fractional factor, the taps reproduce a ramp only nearly.
    torch.testing.assert_close(got[2:-2], centres[2:-2], atol=1e-4 if factor.is_integer() else 0.05, rtol=0)


def test_equal_sizes_are_the_identity() -> None:
    torch.testing.assert_close(resize_matrix(16, 16), torch.eye(16), atol=0, rtol=0)


def test_many_reflections() -> None:
    """From 2 pixels to 1, the taps fold back and forth; by symmetry both pixels count the same."""
    torch.testing.assert_close(resize_matrix(2, 1), torch.tensor([[0.5, 0.5]]))
    wave = torch.tensor([0, 1, 2, 3, 4, 3, 2, 1] * 8)  # the triangle wave itself as an index, for 5 pixels
    spread = resize_matrix(5, 2).new_zeros(2, 5)
    positions = torch.arange(-16, 32)
    x = ((positions - torch.tensor([[0.75], [3.25]])) / 2.5).abs()
    taps = torch.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2)
    spread.index_add_(1, wave[positions % 8], taps / taps.sum(dim=1, keepdim=True))
    torch.testing.assert_close(resize_matrix(5, 2), spread, atol=1e-6, rtol=0)


def test_gradient_is_the_transpose() -> None:
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(Downscale(8)(x), x, g)
    matrix = resize_matrix(20, 8).double()
    torch.testing.assert_close(gradient, torch.einsum("sh,bcst,tw->bchw", matrix, g, matrix))
    assert torch.autograd.gradcheck(Downscale(3), torch.randn(1, 1, 7, 7, dtype=torch.float64, requires_grad=True))


def test_first_use_under_inference_mode_does_not_spoil_training() -> None:
    with torch.inference_mode():
        Downscale(9)(torch.zeros(1, 3, 33, 33))
    x = torch.ones(1, 3, 33, 33, requires_grad=True)
    Downscale(9)(x).sum().backward()
    assert x.grad is not None and x.grad.sum() > 0


def test_returned_matrix_is_the_callers_own() -> None:
    resize_matrix(32, 8).zero_()
    assert resize_matrix(32, 8).abs().sum() > 0


def test_error_is_measured_in_unit_range() -> None:
    images = torch.stack([torch.full((3, 16, 16), v) for v in (0.0, 1.0, -0.5)])
    lr = torch.zeros(1, 3, 4, 4)
    expected = torch.tensor([0.0, 0.25, 0.0625])
    torch.testing.assert_close(downscaling_error(images, lr, Downscale(4)), expected, atol=1e-6, rtol=0)
    lr = lr.expand(3, -1, -1, -1)
    torch.testing.assert_close(downscaling_error(images, lr, Downscale(4)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 12), (1, 3, 4, 4)])
def test_wrong_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Downscale(8)(torch.zeros(shape))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Downscale(0)
    with pytest.raises(ValueError, match="at least 1"):
        resize_matrix(8, 0)
    with pytest.raises(ValueError, match="at least 8"):
        upscale_bicubic(torch.zeros(1, 3, 8, 8), 4)
    with pytest.raises(ValueError, match="Expected lr"):
        downscaling_error(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 4, 4), Downscale(8))
