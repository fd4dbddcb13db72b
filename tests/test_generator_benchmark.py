"""The generator's benchmark compares like with like, and its numbers follow from what it measured."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.generator as benchmark
from models.generator import Generator

ROOT = Path(__file__).resolve().parents[1]

MODEL = '''
import torch
from op import scale

class Generator(torch.nn.Module):
    """Has the reference's interface."""
    def __init__(self, size, style_dim, n_mlp):
        super().__init__()
        self.size, self.weight = size, torch.nn.Parameter(torch.ones(1))

    def forward(self, styles, input_is_latent, randomize_noise):
        assert input_is_latent and not randomize_noise
        ws = styles[0] * self.weight
        return scale(ws.mean(dim=(1, 2)))[:, None, None, None].expand(-1, 3, self.size, self.size), None
'''
OPERATIONS = """
from torch.utils.cpp_extension import load
library = load("needs a CUDA compiler", sources=[])

def scale(x):
    return 2 * x
"""


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "Generator", lambda resolution: Generator(resolution, (8,) * 4, mapping_layers=1))


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "__init__.py").write_text(OPERATIONS)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def test_the_reference_is_imported_without_compiling(checkout) -> None:
    draw = benchmark.make_synthesis(benchmark.REFERENCE, 32, str(checkout))
    ws = benchmark.codes(2, 32)
    assert torch.equal(draw(ws)[:, 0, 0, 0], 2 * ws.mean(dim=(1, 2)))


def test_our_variants_synthesize_the_same_face() -> None:
    ws = benchmark.codes(2, 32)
    with torch.no_grad():
        exact, half = (benchmark.make_synthesis(name, 32, None)(ws) for name in (benchmark.EXACT, benchmark.HALF))
    assert exact.shape == (2, 3, 32, 32) and exact.dtype == half.dtype == torch.float32
    assert 0 < (exact - half).abs().mean() < 0.05 * exact.std()
    assert 0 < benchmark.grey_levels(32) < 0.05 * 0.5 * 127.5


@pytest.mark.parametrize("gradient", [False, True])
def test_a_gradient_is_computed_only_where_asked(gradient) -> None:
    seen = []

    def draw(ws: torch.Tensor) -> torch.Tensor:
        seen.append((ws.requires_grad, torch.is_grad_enabled()))
        return ws * 2

    assert benchmark.once(draw, torch.ones(2, 8, 4), gradient) > 0
    assert seen == [(gradient, gradient)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="the system does not tell the peak memory")
def test_peak_memory_is_that_of_one_image() -> None:
    """In a process of its own, as the benchmark does it: here, a call may find room that earlier tests have left."""
    script = (
        "import torch, benchmarks.generator as benchmark\n"
        "benchmark.make_synthesis = lambda *a: lambda ws: torch.ones(2**24).mean()\n"
        "print(benchmark.peak_megabytes('any', 32, None, 1, False))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(64, abs=16)


def test_report_gives_ratios_of_rounds() -> None:
    results = {
        benchmark.REFERENCE: benchmark.Result([4.0, 8.0, 6.0], 300.0, None),
        benchmark.EXACT: benchmark.Result([1.0, 2.0, 2.0], 100.0, None),
        benchmark.HALF: benchmark.Result([1.0, 1.0, 1.0], None, 0.25),
    }
    text = benchmark.report(results, argparse.Namespace(gradient=False, resolution=32, batch=1))
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", text, re.MULTILINE))
    assert rows[benchmark.REFERENCE] == "6000 | 1.00 | 300 | –"
    assert rows[benchmark.EXACT] == "2000 | 4.00 | 100 | –"
    assert rows[benchmark.HALF] == "1000 | 6.00 | – | 0.25"


def test_command_takes_turns(checkout, monkeypatch, capsys) -> None:
    order = []
    monkeypatch.setattr(benchmark, "once", lambda synthesize, ws, gradient: order.append(id(synthesize)) or 1.0)

    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def apply(self, task: object) -> float:
            return 7.0

    monkeypatch.setattr(
        benchmark.multiprocessing, "get_context", lambda kind: argparse.Namespace(Pool=lambda n: Pool())
    )
    benchmark.main(f"--rosinality {checkout} --resolution 32 --rounds 2".split())
    out = capsys.readouterr().out
    assert out.count("| 7 |") == 3 and "32 px, batch 1, forward" in out
    assert len(order) == 9 and order[:3] == order[3:6] == order[6:]


@pytest.mark.parametrize(("command", "reason"), [("--rosinality nowhere", "model.py"), ("--rounds 0", "at least 1")])
def test_bad_arguments_are_refused(command, reason, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(command.split())
    assert reason in capsys.readouterr().err
