"""The benchmarks of searches, spaces, runtimes and parity: their pure parts, on tiny inputs."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import benchmarks.norms
import numpy as np
import pytest
import scipy.stats
import torch
from search.refine import OPTIMISERS, SPACES
from torch import nn

import benchmarks.parity
import benchmarks.pulse_speed
import benchmarks.runtimes
import benchmarks.search
from models.bundle import Bundle, load_bundle, save_bundle
from models.checkpoints import save_generator, sha256_of
from models.encoder import Encoder
from models.flow import FlowPrior, save_flow
from models.generator import Generator, SynthesisNetwork
from search.loop import Found

D = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    generator = Generator(32, channels=(8, 8, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval()
    encoder = Encoder(32, generator.num_ws, D, backbone="test_resnet", width=8).eval()
    encoder.latents.fit(generator, samples=4000)
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(path, generator, encoder, {"name": "tiny", "licence": "none", "training_data": "none"})
    return path


@pytest.fixture
def bundle(folder) -> Bundle:
    return load_bundle(folder)


# --- search.py ---


def test_a_row_says_what_was_found() -> None:
    ws = torch.zeros(4, 2, 3)
    found = Found(ws + 0.5, None, torch.tensor([1e-3, 2e-3, 5e-4, 4.5e-3]), torch.ones(4), torch.tensor([3, 4, 3, 6]))
    cells = benchmarks.search.row("name", 16, found, ws, sigma=0.25, seconds=2.0).strip("| ").split(" | ")
    assert cells == ["16", "name", "50.0%", "2.00e-03", "1.00e-03", "2.000", "4.0", "0.500"]


def test_all_methods_have_names_of_their_own() -> None:
    methods = benchmarks.search.make_methods(10, [0.1, 0.2])
    assert len(methods) == 3 + len(SPACES) * (len(OPTIMISERS) + 1)
    assert "ours 10, adam 0.2, plain" in methods and "ours 10, lbfgs, plain" in methods


def test_faces_of_the_bundle_are_the_same_every_time(bundle) -> None:
    arguments = argparse.Namespace(data=None, faces=3)
    first, second = (benchmarks.search.read_faces(arguments, bundle) for _ in range(2))
    assert first.shape == (3, 3, 32, 32) and torch.equal(first, second) and first.abs().max() <= 1


def test_search_table(folder, capsys) -> None:
    command = f"--bundle {folder} --faces 2 --k 2 --lr 8 --steps 2 --device cpu --methods encoder"
    benchmarks.search.main([*command.split(), "lbfgs, plain"])
    title, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("2 faces, 2 candidates each")
    table = [dict(zip(header.split("|"), row.split("|"), strict=True)) for row in rows]
    assert [row[" method "].strip() for row in table] == ["encoder", "ours 2, lbfgs, plain"]
    errors = [float(row[" mean error "]) for row in table]
    assert errors[1] < errors[0] and float(table[0][" moved "]) == 0 and float(table[0][" passes "]) == 1


# --- norms.py ---


def test_chi_square_is_scipys() -> None:
    x = np.linspace(1, 600, 50)
    assert np.allclose(benchmarks.norms.chi_square_density(x, 256), scipy.stats.chi2.pdf(x, 256))


def test_coordinates_of_each_space(bundle) -> None:
    z = torch.randn(3000, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = benchmarks.norms.coordinates(bundle, None, z)
    assert list(found) == ["z", "PULSE", "full Gaussian"] and torch.equal(found["z"], z)
    assert torch.allclose(found["PULSE"].std(dim=0), torch.ones(D), atol=0.1)
    assert torch.allclose(torch.cov(found["full Gaussian"].T), torch.eye(D), atol=0.15)
    assert not torch.allclose(torch.cov(found["PULSE"].T), torch.eye(D), atol=0.15)  # it knows nothing of covariances


def test_norms_are_printed_and_drawn(folder, tmp_path, capsys) -> None:
    flow = FlowPrior(D, blocks=1, hidden=8)
    z = torch.randn(2000, D, generator=torch.Generator().manual_seed(1))
    flow.fit_scale(load_bundle(folder).generator.mapping(z)[:, 0].detach())
    save_flow(flow, tmp_path / "flow.safetensors", sha256_of(folder / "generator.safetensors"))
    command = ["--bundle", str(folder), "--samples", "500", "--picture", str(tmp_path / "norms.png")]
    benchmarks.norms.main(command)
    plain = (tmp_path / "norms.png").read_bytes()
    assert "flow" not in capsys.readouterr().out
    benchmarks.norms.main([*command, "--flow", str(tmp_path / "flow.safetensors")])
    table = dict(re.findall(r"^\| (\S.*?) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE))
    assert float(table["z"]) == pytest.approx(1, abs=0.1) and "flow" in table
    assert (tmp_path / "norms.png").read_bytes() != plain
    save_flow(flow, tmp_path / "flow.safetensors", "another")
    with pytest.raises(SystemExit):
        benchmarks.norms.main([*command, "--flow", str(tmp_path / "flow.safetensors")])


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


def test_the_original_draws_with_nvidias_code(bundle, tmp_path, monkeypatch) -> None:
    networks = SimpleNamespace(SynthesisNetwork=NvidiaSynthesis)
    monkeypatch.setattr(benchmarks.pulse_speed, "nvidia_networks", lambda folder: networks)
    ours = bundle.generator.synthesis
    draw = benchmarks.pulse_speed.nvidia_synthesis(tmp_path, ours)
    ws, noise = torch.randn(3, ours.num_ws, ours.w_dim), ours.make_noise(3)
    torch.testing.assert_close(draw(ws, noise), ours(ws, noise=noise))  # their memory formats differ
    monkeypatch.setattr(NvidiaSynthesis, "load_state_dict", lambda self, state, strict: None)
    with pytest.raises(ValueError, match="other faces"):
        benchmarks.pulse_speed.nvidia_synthesis(tmp_path, ours)


def test_sizes_are_replaced_but_not_the_weight() -> None:
    text = benchmarks.pulse_speed.adapted("x = (18, 512); y = 1024; z = (d*512).mean(); d = 'cuda'", 8, 16, 32, "cpu")
    assert text == "x = (8, 16); y = 32; z = (d*512).mean(); d = 'cpu'"


def test_speeds_are_steps_over_seconds(bundle, folder, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "PULSE.py").write_text("")
    calls: list[int] = []
    monkeypatch.setattr(benchmarks.pulse_speed, "load_original", lambda *arguments: nn.Identity())
    monkeypatch.setattr(benchmarks.pulse_speed, "run_original", lambda original, lr, steps: calls.append(len(lr)))
    times = iter([9.0, 9.0, 4.0, 1.0, 4.0, 1.0] * 2)

    def fake(call, device) -> float:
        call()
        return next(times)

    monkeypatch.setattr(benchmarks.pulse_speed, "seconds", fake)
    command = f"--pulse {tmp_path} --bundle {folder} --lr 8 --batches 1 3 --steps 2 --rounds 2"
    benchmarks.pulse_speed.main(command.split())
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert rows == [
        "| 1 | the original, our drawing | 0.50 | 4.00 |", "| 1 | ours | 2.00 | 1.00 |",
        "| 3 | the original, our drawing | 1.50 | 4.00 |", "| 3 | ours | 6.00 | 1.00 |",
    ]  # fmt: skip
    assert calls == [1] * 3 + [3] * 3


def test_a_checkout_is_needed(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmarks.pulse_speed.main(["--pulse", str(tmp_path)])
    assert "PULSE.py" in capsys.readouterr().err


# --- runtimes.py ---


def test_turns_are_taken_and_the_first_round_does_not_count(monkeypatch) -> None:
    order: list[str] = []
    clock = iter([0, 100, 0, 100, 0, 1, 0, 5, 0, 2, 0, 6, 0, 9, 0, 7])  # start and end of each call
    monkeypatch.setattr(benchmarks.runtimes.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(benchmarks.runtimes.time, "sleep", lambda seconds: order.append("rest"))
    medians = benchmarks.runtimes.take_turns([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["rest", "a", "rest", "b"] * 4 and medians == [2, 6]
    order.clear()
    clock = iter(range(4))
    benchmarks.runtimes.take_turns([lambda: order.append("a")], rounds=1, wake=True)
    assert order == ["rest", "a", "a"] * 2


def test_a_command_runs_in_the_repository_with_its_threads() -> None:
    code = "import os; print(os.path.isfile('infer.py'), os.environ['OMP_NUM_THREADS'])"
    assert benchmarks.runtimes.run_once([sys.executable, "-c", code], threads=3) == "True 3\n"
    with pytest.raises(RuntimeError, match="ended with 7: because"):
        benchmarks.runtimes.run_once([sys.executable, "-c", "import sys; sys.stderr.write('because'); sys.exit(7)"], 1)


def test_launcher_tells_the_peak_of_what_it_starts() -> None:
    def peak(megabytes: int) -> float:
        command = [sys.executable, "-c", f"x = b'1' * {megabytes} * 10**6"]
        return float(benchmarks.runtimes.run_once([sys.executable, "-c", benchmarks.runtimes.LAUNCHER, *command], 1))

    assert 60 < peak(100) - peak(10) < 140 or math.isnan(peak(10))


# --- parity.py ---


def test_randomise_leaves_nothing_at_its_start() -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"noise": nn.Linear(1, 1, bias=False)})
    network = nn.ModuleDict({"style": nn.Linear(4, 4), "conv": nn.Linear(4, 4), "layer": layer})
    nn.init.zeros_(layer["noise"].weight)
    for part in ("style", "conv"):
        nn.init.zeros_(network[part].bias)
    benchmarks.parity.randomise(network)
    assert layer["noise"].weight.abs().sum() > 0 and network["conv"].bias.abs().sum() > 0
    assert network["style"].bias.std() > 5 * network["conv"].bias.std()  # its biases count a hundredth


@pytest.fixture
def saved(tmp_path) -> tuple[Generator, Path]:
    torch.manual_seed(0)
    generator = Generator(32, channels=(8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2).eval()
    path = tmp_path / "network.safetensors"
    save_generator(generator, path, dtype=torch.float32)
    return generator, path


def drawing(generator: Generator, shift: float):
    return lambda z: generator(z, truncation_psi=benchmarks.parity.TRUNCATION, noise_mode="const") + shift


def test_difference_is_the_largest(saved) -> None:
    generator, path = saved
    assert benchmarks.parity.difference(drawing(generator, 0.0), path, 0)[0] < 1e-5
    apart, value = benchmarks.parity.difference(drawing(generator, 0.25), path, 0)
    assert apart == pytest.approx(0.25, abs=1e-5) and value > 0.25


@pytest.mark.parametrize(("shift", "status"), [(0.0, None), (0.1, "exceed")])
def test_parity_fails_where_pictures_differ(saved, tmp_path, monkeypatch, capsys, shift, status) -> None:
    generator, path = saved
    (tmp_path / "model.py").write_text("")

    def pair(module: ModuleType, case: tuple, target: Path):
        target = target.with_suffix(".safetensors")
        target.write_bytes(path.read_bytes())
        return drawing(generator, shift), target

    monkeypatch.setattr(benchmarks.parity, "rosinality_module", lambda folder: ModuleType("reference"))
    monkeypatch.setattr(benchmarks.parity, "rosinality_pair", pair)
    command = ["--rosinality", str(tmp_path), "--resolutions", "32"]
    if status is None:
        benchmarks.parity.main(command)
    else:
        with pytest.raises(SystemExit, match=status):
            benchmarks.parity.main(command)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[3:5] for row in rows] == [[f" {m} ", f" {d} "] for m in (1, 2) for d in (2, 8)]


@pytest.mark.parametrize(("command", "message"), [([], "Expected a checkout"), (["--nvidia", "."], "training")])
def test_parity_needs_checkouts(command, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        benchmarks.parity.main(command)
    assert message in capsys.readouterr().err
