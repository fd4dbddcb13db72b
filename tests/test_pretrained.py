"""Finding foreign weights, and the base class of networks that only measure."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from models import pretrained
from models.frozen import Frozen
from models.pretrained import find_weights

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any weights: every folder that is searched lies below its path."""
    monkeypatch.setattr(pretrained, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(pretrained.VARIABLE, str(tmp_path / "own"))
    return tmp_path


def put(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


FOLDERS = ["own", "hub/checkpoints", "repository/weights", "shared/weights", "shared/torch_home/hub/checkpoints"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_searched(machine: Path, folder: str) -> None:
    path = put(machine / folder / "net.pt")
    assert find_weights("net.pt", None, SHA256) == path


def test_earlier_folders_win(machine: Path) -> None:
    paths = [put(machine / folder / "net.pt") for folder in FOLDERS]
    for path in paths:
        assert find_weights("net.pt", None, SHA256) == path
        path.unlink()


def test_wrong_checksum_is_refused(machine: Path) -> None:
    path = put(machine / "own" / "net.pt", b"damaged")
    with pytest.raises(ValueError, match=f"{path}.*{SHA256}"):
        find_weights("net.pt", None, SHA256)
    assert path.exists()


def test_missing_file_says_what_to_put_where(machine: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        find_weights("net.pt", None, SHA256, source="the zoo")
    message = str(error.value)
    for part in ("net.pt", SHA256, str(machine / "own" / "net.pt"), pretrained.VARIABLE, "the zoo"):
        assert part in message


def test_download_to_own_folder(machine: Path) -> None:
    origin = put(machine / "web" / "net.pt")
    path = find_weights("net.pt", origin.as_uri(), SHA256)
    assert path == machine / "own" / "net.pt"
    assert path.read_bytes() == CONTENT


def test_download_to_hub_without_own_folder(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pretrained.VARIABLE)
    origin = put(machine / "web" / "net.pt")
    assert find_weights("net.pt", origin.as_uri(), SHA256) == machine / "hub" / "checkpoints" / "net.pt"


@pytest.mark.parametrize(("name", "sha256"), [("net.pt", SHA256), ("net-0123abcd.pt", None)])
def test_bad_download_leaves_nothing(machine: Path, name: str, sha256: str | None) -> None:
    origin = put(machine / "web" / name, b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        find_weights(name, origin.as_uri(), sha256)
    assert list((machine / "own").iterdir()) == []


def test_failed_download_says_what_to_put_where(machine: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(machine / "own" / "net.pt")):
        find_weights("net.pt", (machine / "web" / "absent.pt").as_uri(), SHA256)
    assert list((machine / "own").iterdir()) == []


class Judge(Frozen):
    """A frozen network with a parameter, a buffer and a child that behaves otherwise in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("offset", torch.zeros(1))
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
        self.freeze()


class Trained(nn.Module):
    """A parent of a frozen network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.judge = Judge()


def test_frozen_stays_in_evaluation_mode() -> None:
    parent = Trained().train()
    assert parent.linear.training
    assert not any(module.training for module in parent.judge.modules())


def test_frozen_takes_no_gradient() -> None:
    parent = Trained()
    assert {name for name, p in parent.named_parameters() if p.requires_grad} == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("duplicate", [False, True], ids=["original", "deepcopy"])
def test_frozen_is_not_saved(duplicate: bool) -> None:
    parent = copy.deepcopy(Trained()) if duplicate else Trained()
    assert set(parent.state_dict()) == {"linear.weight", "linear.bias"}
    assert len(parent.judge.state_dict()) == 0


def test_parent_loads_strictly_and_leaves_frozen_alone() -> None:
    source, target = Trained(), Trained()
    own = target.judge.net[0].weight.clone()
    stale = {"judge.net.0.weight": torch.full((3, 3), 7.0), "judge.bias": torch.ones(1)}
    for extra in ({}, stale):
        target.load_state_dict({**source.state_dict(), **extra}, strict=True)
    assert torch.equal(target.linear.weight, source.linear.weight)
    assert torch.equal(target.judge.net[0].weight, own)
    assert torch.equal(target.judge.bias, torch.zeros(1))


def test_parent_still_reports_its_own_missing_keys() -> None:
    with pytest.raises(RuntimeError, match="linear.weight"):
        Trained().load_state_dict({}, strict=True)
