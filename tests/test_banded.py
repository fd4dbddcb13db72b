"""Bands draw what the blocks draw, and are used only where that is safe."""

from __future__ import annotations

import pytest
import torch

from models import banded
from models.generator import Generator


@pytest.fixture(autouse=True)
def small_blocks_too(monkeypatch) -> None:
    monkeypatch.setattr(banded, "SMALLEST", 16)


def make(resolution: int = 64, conv_clamp: float | None = None) -> Generator:
    torch.manual_seed(0)
    channels = (8, 12, 8, 6, 4, 6)[: resolution.bit_length() - 2]
    generator = Generator(resolution, channels, 8, 10, 2, conv_clamp=conv_clamp)
    for name, parameter in generator.named_parameters():
        if name.endswith(("noise_strength", "bias")):
            torch.nn.init.normal_(parameter)
    return generator.eval()


def whole(generator: Generator, ws: torch.Tensor, **options: object) -> torch.Tensor:
    """The blocks' own forward, which gradients need."""
    return generator.synthesis(ws.clone().requires_grad_(True), **options).detach()


@pytest.mark.parametrize("rows", [2, 8, 10, 24, 1000])
@pytest.mark.parametrize("noise_mode", ["const", "none"])
@pytest.mark.parametrize("conv_clamp", [None, 0.5])
def test_bands_draw_the_same_pictures(monkeypatch, rows, noise_mode, conv_clamp) -> None:
    generator = make(64, conv_clamp)
    monkeypatch.setattr(banded, "band_rows", lambda channels, size, itemsize: rows)
    ws = torch.randn(3, generator.num_ws, 10)
    with torch.no_grad():
        drawn = generator.synthesis(ws, noise_mode)
    torch.testing.assert_close(drawn, whole(generator, ws, noise_mode=noise_mode), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_noise_maps_belong_to_their_pictures(batch) -> None:
    generator, ws = make(), torch.randn(2, 10, 10)
    noise = [None if i == 7 else n for i, n in enumerate(generator.synthesis.make_noise(batch))]
    with torch.no_grad():
        drawn = generator.synthesis(ws, noise=noise)
    torch.testing.assert_close(drawn, whole(generator, ws, noise=noise), rtol=1e-4, atol=1e-4)


def test_a_batch_draws_what_single_pictures_draw() -> None:
    generator, ws = make(), torch.randn(3, 10, 10)
    with torch.no_grad():
        together = generator.synthesis(ws)
        alone = torch.cat([generator.synthesis(w[None]) for w in ws])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codes", [torch.float32, torch.bfloat16])  # autocast also rounds what the mapping gives
def test_bfloat16_stays_close(codes) -> None:
    generator, ws = make(), torch.randn(2, 10, 10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        drawn = generator.synthesis(ws.to(codes))
    exact = whole(generator, ws)
    assert drawn.dtype == torch.float32
    assert 0 < (drawn - exact).abs().mean() < 0.02 * exact.std()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bands_are_used_for_inference(monkeypatch, mode) -> None:
    calls = []
    synthesize = banded.synthesize_blocks
    monkeypatch.setattr(banded, "synthesize_blocks", lambda *a: calls.append(len(a[0])) or synthesize(*a))
    generator = make()
    with mode():
        generator.synthesis(torch.randn(1, 10, 10))
    assert calls == [3]  # 16, 32, 64


def test_weights_and_codes_stay_as_they_were() -> None:
    generator, ws = make(), torch.randn(2, 10, 10)
    before = {name: t.clone() for name, t in generator.state_dict().items()}
    noise = generator.synthesis.make_noise(2)
    copies = [n.clone() for n in noise]
    with torch.no_grad():
        first = generator.synthesis(ws, noise=noise)
        second = generator.synthesis(ws, noise=noise)
    assert torch.equal(first, second)
    assert all(torch.equal(t, before[name]) for name, t in generator.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(noise, copies, strict=True))


@pytest.mark.parametrize("kind", ["training", "trace", "export", "compile"])
def test_graphs_and_gradients_never_see_bands(monkeypatch, kind) -> None:
    generator, ws = make(), torch.randn(2, 10, 10)
    monkeypatch.setattr(banded, "synthesize_blocks", lambda *a: pytest.fail("bands were used"))
    if kind == "training":
        generator.synthesis(ws)  # parameters ask for gradients
    with torch.no_grad():
        if kind == "trace":
            torch.jit.trace(generator.synthesis, ws, check_trace=False)
        elif kind == "export":
            torch.export.export(generator.synthesis, (ws,))
        elif kind == "compile":
            torch.compile(generator.synthesis, backend="eager")(ws)


def test_bands_fit_the_cache_and_begin_at_even_rows() -> None:
    for size, channels in ((1024, 32), (512, 64), (256, 512), (128, 3)):
        rows = banded.band_rows(channels, size, 4)
        assert rows % 2 == 0 and rows >= 8
        assert rows * size * channels * 4 <= banded.BAND_BYTES or rows == 8
