"""Finding foreign weights, and the base class of networks that only measure."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import pretrained
from models.layers import Frozen
from models.pretrained import check_tensors, find_weights, tensors_sha256

CONTENT = b"weights"
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]


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
    assert find_weights("net.pt") == path


def test_earlier_folders_win(machine: Path) -> None:
    paths = [put(machine / folder / "net.pt") for folder in FOLDERS]
    for path in paths:
        assert find_weights("net.pt") == path
        path.unlink()


def test_own_folder_may_lie_in_the_home(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(machine))
    monkeypatch.setenv(pretrained.VARIABLE, "~/w")
    assert find_weights("net.pt", url=put(machine / "web" / "net.pt").as_uri()) == machine / "w" / "net.pt"


def test_names_are_tried_in_order(machine: Path) -> None:
    second = put(machine / "own" / "second.pt")
    assert find_weights("first.pt", "second.pt") == second
    first = put(machine / "shared" / "weights" / "first.pt")  # in the last of the folders, yet more welcome
    assert find_weights("first.pt", "second.pt") == first


def test_last_name_is_downloaded(machine: Path) -> None:
    origin = put(machine / "web" / "second.pt")
    assert find_weights("first.pt", "second.pt", url=origin.as_uri()) == machine / "own" / "second.pt"


def test_missing_file_says_what_to_put_where(machine: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        find_weights("net.pt", "other.pt", source="the zoo")
    message = str(error.value)
    for part in (str(machine / "own" / "net.pt"), str(machine / "own" / "other.pt"), pretrained.VARIABLE, "the zoo"):
        assert part in message


def test_download_to_own_folder(machine: Path) -> None:
    name = f"net-{DIGITS}.pt"
    path = find_weights(name, url=put(machine / "web" / name).as_uri())
    assert path == machine / "own" / name
    assert path.read_bytes() == CONTENT


def test_download_to_hub_without_own_folder(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pretrained.VARIABLE)
    origin = put(machine / "web" / "net.pt")
    assert find_weights("net.pt", url=origin.as_uri()) == machine / "hub" / "checkpoints" / "net.pt"


def test_bad_download_leaves_nothing(machine: Path) -> None:
    origin = put(machine / "web" / f"net-{DIGITS}.pt", b"something else")
    with pytest.raises(ValueError, match=f"SHA-256 {DIGITS}"):
        find_weights(origin.name, url=origin.as_uri())
    assert list((machine / "own").iterdir()) == []


def test_failed_download_says_what_to_put_where(machine: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(machine / "own" / "net.pt")):
        find_weights("net.pt", url=(machine / "web" / "absent.pt").as_uri())
    assert list((machine / "own").iterdir()) == []


# --- checksums of tensors ---


def tensors() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1.5, dtype=torch.float16)}


def test_tensor_checksum_ignores_order_format_and_counters() -> None:
    expected = tensors_sha256(tensors())
    assert tensors_sha256(dict(reversed(tensors().items()))) == expected
    assert tensors_sha256({**tensors(), "n.num_batches_tracked": torch.tensor(7)}) == expected
    assert tensors_sha256({**tensors(), "b": torch.arange(6.0).view(2, 3).T.contiguous().T}) == expected
    by_hand = b"a torch.float16 []\n\x00\x3e" + b"b torch.float32 [2, 3]\n" + np.arange(6, dtype="<f4").tobytes()
    assert expected == hashlib.sha256(by_hand).hexdigest()


@pytest.mark.parametrize("change", [{"b": torch.arange(6.0)}, {"a": torch.tensor(1.5)}, {"c": torch.zeros(0)}])
def test_other_tensors_are_refused(change: dict[str, torch.Tensor]) -> None:
    expected = tensors_sha256(tensors())
    check_tensors(tensors(), expected, "net.pt", "the net")
    with pytest.raises(ValueError, match=f"net.pt to hold the net .*{expected}.*Delete or replace"):
        check_tensors({**tensors(), **change}, expected, "net.pt", "the net")


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
