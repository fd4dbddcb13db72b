"""A loan of a GPU, rehearsed: faces and state go there in small files, and the state comes back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import write_faces

import training.gpu_loan
from data.faces import Faces
from training.gpu_loan import main, read_parts, write_parts

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "resolution": 32, "channels": [8, 8, 8, 6], "z_dim": 16, "w_dim": 16, "mapping_layers": 2, "init_generator": None,
    "freeze_below": None, "freeze_steps": 0, "feature_weight": 0.0, "reconstruction_weight": 0.0,
    "reconstruction_steps": 0, "micro_batches": 2, "compile": False,
}  # fmt: skip


def run(folder: Path, state: str, out: str, steps: int) -> None:
    main([
        "train", "--faces", str(folder / "packed"), "--state", str(folder / state), "--out", str(folder / out),
        "--steps", str(steps), "--batch", "4", "--model", yaml.safe_dump(MODEL),
        "--recipe", str(folder / "recipe.yaml"),
    ])  # fmt: skip


def weights(folder: Path) -> torch.Tensor:
    """The generator's parameters, at the end of their way."""
    state = read_parts(folder)["state_dict"]
    return torch.cat([t.flatten() for name, t in state.items() if name.startswith("generator.")])


def test_loan(tmp_path, monkeypatch, capsys) -> None:
    write_faces(tmp_path / "faces.zip")
    recipe = (ROOT / "configs" / "stylegan2_128.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("bf16-mixed", "32-true"))
    monkeypatch.setattr(training.gpu_loan, "PART_BYTES", 20_000)
    main(["pack-faces", "--data", str(tmp_path / "faces.zip"), "--out", str(tmp_path / "packed")])
    monkeypatch.setattr(training.gpu_loan, "PART_BYTES", 220_000)
    packed = sorted((tmp_path / "packed").glob("*.zip"))
    assert len(packed) > 1 and all(path.stat().st_size <= 20_000 for path in packed)

    run(tmp_path, "nothing", "three", 3)
    output = capsys.readouterr().out
    assert re.search(r"12 images in \d+ s, [\d.]+ images/s", output)
    files = sorted((tmp_path / "three").glob("*"))
    assert len(files) > 2 and all(path.stat().st_size <= 220_000 for path in files)
    all_faces, unpacked = Faces(tmp_path / "faces.zip", 32), Faces(tmp_path / "packed" / "all", 32)
    assert all(torch.equal(a, b) for a, b in zip(all_faces, unpacked, strict=True))

    run(tmp_path, "three", "five", 5)
    run(tmp_path, "nothing", "straight", 5)
    assert read_parts(tmp_path / "five")["global_step"] == read_parts(tmp_path / "straight")["global_step"] == 5
    first, resumed, straight = (weights(tmp_path / name) for name in ("three", "five", "straight"))
    assert (resumed - straight).norm() < 0.05 * (straight - first).norm()  # the state is short by some bits

    main(["unpack-state", "--state", str(tmp_path / "five"), "--out", str(tmp_path / "home" / "last.ckpt")])
    checkpoint = torch.load(tmp_path / "home" / "last.ckpt", weights_only=True)
    main(["pack-state", "--checkpoint", str(tmp_path / "home" / "last.ckpt"), "--out", str(tmp_path / "again")])
    for name, tensor in read_parts(tmp_path / "again")["state_dict"].items():
        assert torch.equal(tensor, checkpoint["state_dict"][name])


def test_other_optimizers_are_refused(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = torch.optim.Adam([weight], betas=(0.9, 0.99)).state_dict()
    with pytest.raises(ValueError, match="β₁ = 0"):
        write_parts({"state_dict": {}, "optimizer_states": [state]}, tmp_path)


def test_loan_needs_no_package_that_the_machine_lacks() -> None:
    missing = ("lpips", "facenet_pytorch", "zuko", "jsonargparse", "albumentations")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import training.gpu_loan"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
