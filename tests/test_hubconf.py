"""The entry points of torch.hub work from elsewhere, and go on working once torch.hub has let go of the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import hubconf
from models import load_generator, pretrained
from models.checkpoints import save_generator
from models.generator import Generator
from models.pretrained import read_cards

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "bundles" / "celeba64" / "generator.safetensors"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any weights but the repository's; its working directory is elsewhere."""
    monkeypatch.setattr(pretrained, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(pretrained.VARIABLE, str(tmp_path / "own"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def tiny(path: Path, width: int = 4) -> Generator:
    torch.manual_seed(width)
    generator = Generator(32, channels=(width, 4, 4, 2), z_dim=6, w_dim=6, mapping_layers=2)
    save_generator(generator, path, dtype=torch.float32)
    return generator


def test_a_name_and_a_path_give_the_generator(machine: Path) -> None:
    expected = load_generator(OWN).state_dict()
    for name in ("celeba64", str(OWN), str(OWN.parent)):
        found = hubconf.generator(name).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_card_whose_file_is_here(machine: Path, capsys) -> None:
    card = read_cards()["ffhq256"]
    generator = tiny(machine / "weights.safetensors")
    (machine / "own").mkdir()
    (machine / "weights.safetensors").rename(machine / "own" / card.file)
    with pytest.raises(FileNotFoundError):  # the name of its file is no path here
        hubconf.generator(card.file)
    loaded = hubconf.generator("ffhq256")
    assert torch.equal(loaded.synthesis.b32.conv1.weight, generator.synthesis.b32.conv1.weight)
    assert card.licence in capsys.readouterr().err


def test_a_name_goes_before_a_file(machine: Path) -> None:
    tiny(Path("x.safetensors"))
    Path("x.safetensors").rename("celeba64")
    assert hubconf.generator("celeba64").resolution == 64
    assert hubconf.generator("./celeba64").resolution == 32


@pytest.mark.parametrize("entry", [hubconf.generator, hubconf.upsampler])
def test_an_unknown_name_is_told_the_known_ones(machine: Path, entry) -> None:
    with pytest.raises(FileNotFoundError, match=r"celeba64.*'celeba65'"):
        entry("celeba65")


def test_only_the_entry_points_are_public() -> None:
    public = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert public == {"generator", "upsampler"}
    assert all(getattr(hubconf, name).__doc__.count(">>>") for name in public)


def run(script: str, folder: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(ROOT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_through_torch_hub_from_another_folder(tmp_path: Path, tiny_bundle: Path) -> None:
    script = """
import sys
import torch
generator = torch.hub.load(sys.argv[1], "generator", source="local")
assert sys.argv[1] not in sys.path  # what follows has no repository to import from
assert generator(torch.randn(2, generator.z_dim)).shape == (2, 3, 64, 64)
import models
assert models.load_bundle and models.make_encoder
upsampler = torch.hub.load(sys.argv[1], "upsampler", sys.argv[2], source="local")
samples = upsampler(torch.zeros(1, 3, 16, 16), k=2)
print(tuple(samples.images.shape), tuple(samples.ws.shape))
"""
    done = run(script, tmp_path, tiny_bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 2, 3, 32, 32) (1, 2, 8, 16)"


@pytest.mark.parametrize("name", ["models", "data", "search", "pipeline"])
def test_another_package_of_the_same_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hubconf._check_packages()
    other = types.ModuleType(name)
    other.__path__ = [str(tmp_path / name)]
    monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(ImportError, match=re.escape(str(tmp_path / name))):
        hubconf._check_packages()
