"""The benchmarks of searches: their pure parts, on tiny inputs."""

from __future__ import annotations

import sys
import zipfile
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import PixelDistance
from torch import nn

import benchmarks.pulse_speed
import benchmarks.search
import evaluation.metrics
from models.generator import Generator, SynthesisNetwork

D = 16


# --- search.py ---


def test_the_search_is_measured_before_and_after(tiny_bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(evaluation.metrics.NETWORKS, "lpips", PixelDistance)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for i in range(2):
            with BytesIO() as buffer:
                Image.fromarray(np.random.default_rng(i).integers(90, 166, (32, 32, 3), np.uint8)).save(buffer, "png")
                archive.writestr(f"{i}.png", buffer.getvalue())
    command = f"--bundle {tiny_bundle} --data {tmp_path / 'photos.zip'} --faces 2 --k 3 --lr 8 --steps 0 2 --device cpu"
    benchmarks.search.main(command.split())
    title, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("2 faces, 3 samples each")
    names = [name.strip() for name in header.strip("|").split("|")]
    before, after = (dict(zip(names, row.strip("|").split("|"), strict=True)) for row in rows)
    assert float(after["residual"]) < float(before["residual"]) and float(after["nfe"]) > float(before["nfe"])
    assert float(before["draw"]) > 0 and float(before["LR-PSNR"]) > 30


# --- pulse_speed.py ---

ORIGINAL = {
    "bicubic.py": "import torch\nclass Down:\n    def __init__(self, cuda=True):\n        self.cuda = cuda\n",
    "loss.py": "from bicubic import Down\nSIZE = 1024\ndef geocross(d):\n    return (d*512).mean((1, 2))/8.\n",
    "SphericalOptimizer.py": "import torch\n",
    "PULSE.py": """
import torch
from loss import SIZE, Down
from stylegan import G_synthesis, G_mapping
from drive import open_url

class PULSE(torch.nn.Module):
    def __init__(self):
        raise RuntimeError("would download")

    def forward(self, lr, seed, steps, bad_noise_layers, **rest):
        if seed:
            torch.cuda.manual_seed(seed)
        latent = torch.randn((len(lr), 18, 512), device='cuda')
        noise = [torch.zeros(len(lr), 1, 2**(i//2+2), 2**(i//2+2), device='cuda') for i in range(18)]
        ws = self.lrelu(latent*self.gaussian_fit["std"] + self.gaussian_fit["mean"])
        self.seen = self.synthesis(ws, noise), SIZE, Down().cuda, bad_noise_layers
        yield self.seen
""",
}


def test_the_original_runs_with_our_generator(bundle, tmp_path) -> None:
    for name, text in ORIGINAL.items():
        (tmp_path / name).write_text(text)
    modules = set(sys.modules)
    original = benchmarks.pulse_speed.load_original(tmp_path, bundle, bundle.generator.synthesis)
    assert not {"PULSE", "loss", "bicubic", "drive", "stylegan"} & (set(sys.modules) - modules)
    benchmarks.pulse_speed.run_original(original, torch.zeros(2, 3, 8, 8), 3)
    images, size, cuda, last = original.seen
    assert images.shape == (2, 3, 32, 32) and size == 32 and cuda is False and last == "7"


class NvidiaSynthesis(SynthesisNetwork):
    """Ours with the arguments of NVIDIA's."""

    def __init__(self, w_dim: int, size: int, colours: int, channel_base: int, channel_max: int) -> None:
        widths = [min(channel_base // 2**i, channel_max) for i in range(2, size.bit_length())]
        super().__init__(size, widths, w_dim)

    def forward(self, ws, noise_mode, force_fp32, fused_modconv):
        return super().forward(ws, noise=[layer.noise_const for layer in self.layers])


def test_the_original_synthesizes_with_nvidias_code(tmp_path, monkeypatch) -> None:
    networks = SimpleNamespace(SynthesisNetwork=NvidiaSynthesis)
    monkeypatch.setattr(benchmarks.pulse_speed, "nvidia_networks", lambda folder: networks)
    ours = Generator(32, (8, 8, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False).synthesis
    synthesize = benchmarks.pulse_speed.nvidia_synthesis(tmp_path, ours)
    ws, noise = torch.randn(3, ours.num_ws, ours.w_dim), ours.make_noise(3)
    torch.testing.assert_close(synthesize(ws, noise), ours(ws, noise=noise))  # their memory formats differ
    monkeypatch.setattr(NvidiaSynthesis, "load_state_dict", lambda self, state, strict: None)
    with pytest.raises(ValueError, match="other faces"):
        benchmarks.pulse_speed.nvidia_synthesis(tmp_path, ours)


def test_sizes_are_replaced_but_not_the_weight() -> None:
    text = benchmarks.pulse_speed.adapted("x = (18, 512); y = 1024; z = (d*512).mean(); d = 'cuda'", 8, 16, 32, "cpu")
    assert text == "x = (8, 16); y = 32; z = (d*512).mean(); d = 'cpu'"


def test_speeds_are_steps_over_seconds(tiny_bundle, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "PULSE.py").write_text("")
    calls: list[int] = []
    monkeypatch.setattr(benchmarks.pulse_speed, "load_original", lambda *arguments: nn.Identity())
    monkeypatch.setattr(benchmarks.pulse_speed, "run_original", lambda original, lr, steps: calls.append(len(lr)))
    times = iter([9.0, 9.0, 4.0, 1.0, 4.0, 1.0] * 2)

    def fake(call, device) -> float:
        call()
        return next(times)

    monkeypatch.setattr(benchmarks.pulse_speed, "seconds", fake)
    command = f"--pulse {tmp_path} --bundle {tiny_bundle} --lr 8 --batches 1 3 --steps 2 --rounds 2"
    benchmarks.pulse_speed.main(command.split())
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert rows == [
        "| 1 | the original, our synthesis | 0.50 | 4.00 |", "| 1 | ours | 2.00 | 1.00 |",
        "| 3 | the original, our synthesis | 1.50 | 4.00 |", "| 3 | ours | 6.00 | 1.00 |",
    ]  # fmt: skip
    assert calls == [1] * 3 + [3] * 3


def test_a_checkout_is_needed(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmarks.pulse_speed.main(["--pulse", str(tmp_path)])
    assert "PULSE.py" in capsys.readouterr().err
