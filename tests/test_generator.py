"""The generator and its building blocks, against the paper's equations written out the slow way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.path_length import path_lengths
from models.generator import Generator, MappingNetwork, channels_by_resolution
from models.layers import EqualConv2d, EqualLinear, SynthesisLayer, blur, upsample_2x, upsampling_filter

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(resolution: int = 32, w_dim: int = 12) -> Generator:
    """A small generator whose noise and biases are not zero, as after training."""
    torch.manual_seed(0)
    widths = [8, 6, 6, 4, 4, 4, 4][: int(math.log2(resolution)) - 1]
    generator = Generator(resolution, widths, z_dim=10, w_dim=w_dim, mapping_layers=2)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith(("noise_strength", "conv0.bias", "conv1.bias", "torgb.bias")):
                parameter.normal_(std=0.3)
        generator.w_avg.normal_()
    return generator


@pytest.fixture(scope="module")
def generator() -> Generator:
    return tiny().requires_grad_(False)


@pytest.fixture
def ws(generator) -> Tensor:
    return torch.randn(3, generator.num_ws, 12, generator=rng(1))


# --- resampling ---


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Applies a 2-D kernel to every channel by summing shifted copies."""
    height, width = x.shape[2] - kernel.shape[0] + 1, x.shape[3] - kernel.shape[1] + 1
    return sum(
        kernel[i, j] * x[:, :, i : i + height, j : j + width]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    )


def insert_zeros(x: Tensor) -> Tensor:
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    y[:, :, ::2, ::2] = x
    return y


def test_upsampling_is_zero_insertion_and_filtering() -> None:
    x = torch.randn(2, 3, 5, 6, generator=rng())
    padded = F.pad(insert_zeros(x), (2, 1, 2, 1))
    torch.testing.assert_close(upsample_2x(x, upsampling_filter()), correlate(padded, 4 * torch.outer(TAPS, TAPS)))


def test_upsampling_keeps_a_constant_inside() -> None:
    y = upsample_2x(torch.full((1, 2, 8, 8), 0.7), upsampling_filter())
    torch.testing.assert_close(y[:, :, 1:-1, 1:-1], torch.full_like(y[:, :, 1:-1, 1:-1], 0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_filter_is_exact_in_half_precision(dtype) -> None:
    assert torch.equal(upsampling_filter().to(dtype).float(), upsampling_filter())


# --- equalized layers ---


def test_equal_linear_scales_weight_and_bias_at_run_time() -> None:
    layer = EqualLinear(9, 4, bias_init=1.0, lr_multiplier=0.01)
    x = torch.randn(5, 9, generator=rng())
    torch.testing.assert_close(layer(x), x @ (layer.weight * 0.01 / 3).T + 1.0)
    assert layer.weight.std() > 30  # stored large, so that Adam moves it slowly


def test_equal_conv_folds_its_gain_in() -> None:
    layer = EqualConv2d(4, 5, 3, activate=True, gain=0.5)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 6, 6, generator=rng())
    plain = F.conv2d(x, layer.weight / math.sqrt(4 * 9), layer.bias, padding=1)
    torch.testing.assert_close(layer(x), F.leaky_relu(plain, 0.2) * math.sqrt(2) * 0.5)


# --- modulated convolution ---


def modulated_convolution(layer: SynthesisLayer, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
    """Karras et al. 2020, equations 1 and 3, with one kernel per sample."""
    styles = w @ (layer.affine.weight / math.sqrt(w.shape[1])).T + layer.affine.bias
    results = []
    for b in range(x.shape[0]):
        kernel = layer.weight * styles[b][None, :, None, None]
        kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if layer.up:
            spread = F.pad(insert_zeros(x[b : b + 1])[:, :, :-1, :-1], (2, 2, 2, 2))
            y = F.conv2d(spread, kernel.flip(2, 3))  # the transposed convolution
            y = correlate(F.pad(y, (1, 1, 1, 1)), 4 * torch.outer(TAPS, TAPS))
        else:
            y = F.conv2d(x[b : b + 1], kernel, padding=1)
        if noise is not None:
            y = y + layer.noise_strength * noise[b % len(noise)][None]
        results.append(F.leaky_relu(y + layer.bias[:, None, None], 0.2) * math.sqrt(2))
    return torch.cat(results)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("noise_maps", [0, 1, 3])
def test_synthesis_layer_equals_the_equations(up, noise_maps) -> None:
    torch.manual_seed(0)
    layer = SynthesisLayer(5, 4, w_dim=7, resolution=12 if up else 6, up=up)
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.constant_(layer.noise_strength, 0.6)
    x, w = torch.randn(3, 5, 6, 6), torch.randn(3, 7)
    noise = torch.randn(noise_maps, 1, layer.resolution, layer.resolution) if noise_maps else None
    expected = modulated_convolution(layer, x, w, noise)
    assert expected.shape == (3, 4, layer.resolution, layer.resolution)
    torch.testing.assert_close(layer(x, w, noise), expected, rtol=1e-5, atol=1e-5)


def test_blur_after_a_transposed_convolution_gives_an_even_size() -> None:
    assert blur(torch.zeros(1, 2, 9, 9), upsampling_filter()).shape == (1, 2, 8, 8)


def test_filters_move_with_the_network_and_are_not_saved() -> None:
    generator = tiny()
    assert not any("filter" in name for name in generator.state_dict())
    filters = [b for name, b in generator.to("meta").named_buffers() if name.endswith("upsampling_filter")]
    assert len(filters) == 6 and all(b.is_meta for b in filters)  # 8, 16, 32 px: one for the features, one for colour


# --- shapes ---


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
def test_shapes(resolution) -> None:
    generator = tiny(resolution)
    assert generator.num_ws == 2 * math.log2(resolution) - 2
    ws = generator.mapping(torch.randn(2, 10))
    assert ws.shape == (2, generator.num_ws, 12)
    assert torch.equal(ws[:, 0], ws[:, -1])
    images = generator.synthesis(ws)
    assert images.shape == (2, 3, resolution, resolution) and images.dtype == torch.float32
    sizes = [m.shape for m in generator.synthesis.make_noise(2)]
    assert sizes == [(2, 1, r, r) for r in [layer.resolution for layer in generator.synthesis.layers]]
    assert len(sizes) == generator.num_ws - 1


def test_official_widths() -> None:
    assert channels_by_resolution(1024) == (512, 512, 512, 512, 512, 256, 128, 64, 32)
    assert channels_by_resolution(256, base=16384) == (512, 512, 512, 512, 256, 128, 64)


@pytest.mark.parametrize(("resolution", "channels"), [(48, None), (16, (4, 4, 4)), (32, (4, 4, 4)), (32, (4,) * 5)])
def test_wrong_sizes_are_refused(resolution, channels) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Generator(resolution, channels, 8, 8, 2)


# --- mapping ---


def test_mapping_ignores_the_length_of_z() -> None:
    mapping = MappingNetwork(10, 12, 2, num_ws=8)
    z = torch.randn(4, 10, generator=rng())
    torch.testing.assert_close(mapping(z), mapping(3 * z), rtol=1e-4, atol=1e-5)


def test_truncation_goes_to_the_mean(generator) -> None:
    z = torch.randn(2, 10, generator=rng())
    full, none = generator.mapping(z), generator.mapping(z, truncation_psi=0.0)
    torch.testing.assert_close(none, generator.w_avg.expand_as(none))
    assert torch.equal(full, generator.mapping(z, truncation_psi=1.0))
    torch.testing.assert_close(generator.mapping(z, 0.3), 0.7 * none + 0.3 * full)
    assert not torch.equal(full[0], full[1])
    torch.testing.assert_close(generator(z, 0.3), generator.synthesis(generator.mapping(z, 0.3)))


# --- synthesis ---


def test_noise_modes(generator, ws) -> None:
    const = generator.synthesis(ws)
    assert torch.equal(const, generator.synthesis(ws, noise_mode="const"))
    random, again = (generator.synthesis(ws, noise_mode="random") for _ in range(2))
    none = generator.synthesis(ws, noise_mode="none")
    for a, b in [(const, random), (random, again), (const, none), (random, none)]:
        assert (a - b).abs().max() > 1e-3


def test_given_noise_replaces_the_modes(generator, ws) -> None:
    maps = generator.synthesis.make_noise(3, rng(2))
    drawn = generator.synthesis(ws, noise=maps)
    assert torch.equal(drawn, generator.synthesis(ws, noise_mode="none", noise=maps))
    assert not torch.equal(drawn, generator.synthesis(ws))
    stored = [layer.noise_const[None, None] for layer in generator.synthesis.layers]
    assert torch.equal(generator.synthesis(ws, "none", stored), generator.synthesis(ws, "const"))
    mixed = [maps[0], *[None] * (len(maps) - 1)]
    assert torch.equal(generator.synthesis(ws, noise=mixed), generator.synthesis(ws, noise=[maps[0], *stored[1:]]))


def test_wrong_input_is_refused(generator, ws) -> None:
    with pytest.raises(ValueError, match="const, random, none.*'fixed'"):
        generator.synthesis(ws, noise_mode="fixed")
    with pytest.raises(ValueError, match="7 noise maps.*got 6"):
        generator.synthesis(ws, noise=[None] * 6)
    for wrong in (ws[:, 0], ws[:, :-1], ws[:, :, :-1]):
        with pytest.raises(ValueError, match=r"style codes \(B, 8, 12\)"):
            generator.synthesis(wrong)
    for z in (torch.zeros(2, 9), torch.zeros(10), torch.zeros(2, 1, 10)):
        with pytest.raises(ValueError, match=r"latents z \(B, 10\)"):
            generator.mapping(z)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 1, 16, 8), (3, 3, 16, 16), (16, 16)])
def test_wrong_noise_is_refused(generator, ws, shape) -> None:
    noise = [None] * generator.synthesis.num_layers
    noise[3] = torch.zeros(shape)  # a layer of 16 px
    with pytest.raises(ValueError, match=r"noise map 3 to be \(B or 1, 1, 16, 16\) with B = 3"):
        generator.synthesis(ws, noise=noise)


def test_export_with_a_dynamic_batch(generator, ws) -> None:
    synthesis, batch = generator.synthesis, torch.export.Dim("batch", min=2)
    maps = synthesis.make_noise(3, rng(2))
    shapes = ({0: batch}, None, [{0: batch} for _ in maps])
    program = torch.export.export(synthesis, (ws, "const", maps), dynamic_shapes=shapes)
    more = torch.cat([ws, ws[:2]])
    noise = synthesis.make_noise(5, rng(4))
    torch.testing.assert_close(program.module()(more, "const", noise), synthesis(more, noise=noise))


def test_faces_of_a_batch_do_not_see_each_other(generator, ws) -> None:
    singles = torch.cat([generator.synthesis(w[None]) for w in ws])
    torch.testing.assert_close(generator.synthesis(ws), singles, rtol=1e-4, atol=1e-5)


def test_every_style_reaches_the_image(generator, ws) -> None:
    ws = ws.requires_grad_(True)
    (gradient,) = torch.autograd.grad(generator.synthesis(ws).square().sum(), ws)
    assert (gradient.abs().amax(dim=2) > 0).all()


# --- derivatives ---


def test_gradient_matches_finite_differences(monkeypatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the colours leave the network in float32 otherwise
    generator = tiny().double().requires_grad_(False)
    ws = torch.randn(1, generator.num_ws, 12, generator=rng(1), dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 3, 32, 32, generator=rng(2), dtype=torch.float64)

    def value(codes: Tensor) -> Tensor:
        return (generator.synthesis(codes) * target).mean()

    (gradient,) = torch.autograd.grad(value(ws), ws)
    for seed in range(3):
        step = torch.randn(ws.shape, generator=rng(10 + seed), dtype=torch.float64) * 1e-6
        with torch.no_grad():
            difference = (value(ws + step) - value(ws - step)) / 2
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=0)


def test_path_lengths_can_be_trained() -> None:
    generator = tiny()
    ws = generator.mapping(torch.randn(2, 10, generator=rng()))
    images = generator.synthesis(ws, noise_mode="none")
    lengths = path_lengths(images, ws, torch.randn(images.shape, generator=rng(3)))
    (lengths - 1).square().mean().backward()
    for name in ("synthesis.b8.conv0.weight", "synthesis.b4.conv1.affine.weight", "mapping.fc0.weight"):
        gradient = generator.get_parameter(name).grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_in_bfloat16_the_weights_are_the_same_ones() -> None:
    torch.manual_seed(0)
    generator = Generator(32, channels=(16, 16, 8, 8), z_dim=16, w_dim=16, mapping_layers=2).eval()
    exact, fast = generator.synthesis, generator.synthesis.in_bfloat16()
    ws = torch.randn(2, generator.num_ws, 16)
    before = exact(ws)
    images = fast(ws)
    assert images.dtype == torch.float32 and not torch.equal(images, before)
    assert (images - before).abs().max() < 0.02 * before.abs().max()
    assert torch.equal(exact(ws), before)  # the network itself stays in float32
    assert all(a is b for a, b in zip(exact.parameters(), fast.parameters(), strict=True))
