"""Editing from the command line: infer.py, editing.apply and export.run do the same, and say what shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export.onnx
import export.run
import infer
from data.operator import Downscale
from editing import apply
from editing.boundary import STRIP, Boundary, write_boundary
from editing.consistent import keep_lr, visible_change
from models.bundle import save_bundle
from models.checkpoints import sha256_of
from models.encoder import Encoder
from models.generator import Generator

D, SIZE = 32, 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    generator = Generator(SIZE, channels=(16, 16, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval()
    encoder = Encoder(SIZE, generator.num_ws, D, backbone="test_resnet", width=8).eval()
    encoder.latents.fit(generator, samples=500)
    encoder.spread.fill_(1.0)
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(path, generator, encoder, {"name": "tiny", "licence": "none", "training_data": "none"})
    owner = sha256_of(path / "generator.safetensors")
    for i, (name, layers) in enumerate({"smile": (2, 6), "bangs": (0, 8)}.items()):
        normal = np.random.default_rng(i).standard_normal(D)
        normal /= np.linalg.norm(normal)
        write_boundary(Boundary(name, normal, 0.0, 2 * normal, layers, owner), path / "boundaries" / f"{name}.npz")
    other = Boundary("foreign", normal, 0.0, normal, (0, 8), "f" * 64)
    write_boundary(other, path / "boundaries" / "foreign.npz")
    return path


@pytest.fixture
def face(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    return tmp_path / "face.png"


def run_infer(bundle: Path, face: Path, out: str, *arguments: str) -> int:
    options = ["--bundle", str(bundle), "--out", str(face.parent / out), "--device", "cpu", "--k", "2"]
    return infer.main([str(face), *options, *arguments])


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def ws_of(folder: Path) -> np.ndarray:
    return np.load(folder / "latents.npz")["ws"]


def test_edits_move_the_codes_of_every_candidate(bundle, face, tmp_path) -> None:
    assert run_infer(bundle, face, "plain") == 0
    assert run_infer(bundle, face, "edited", "--edit", "smile=+2", "--edit", "bangs=-1") == 0
    plain, edited = ws_of(tmp_path / "plain/face"), ws_of(tmp_path / "edited/face")
    boundary = {name: np.load(bundle / "boundaries" / f"{name}.npz")["direction"] for name in ("smile", "bangs")}
    expected = plain - boundary["bangs"]
    expected[:, 2:6] += 2 * boundary["smile"]
    assert np.allclose(edited, expected, atol=1e-5)
    report = report_of(tmp_path / "edited/face")
    assert [(e["name"], e["strength"], e["layers"]) for e in report["edits"]] == [
        ("smile", 2.0, [2, 6]),
        ("bangs", -1.0, [0, 8]),
    ]
    assert report["edits"][0]["sha256"] == sha256_of(bundle / "boundaries" / "smile.npz")
    assert all(candidate["edit_visible_in_lr"] > 0 for candidate in report["candidates"])
    assert "edits" not in report_of(tmp_path / "plain/face")


def test_refined_candidates_keep_their_noise_when_edited(bundle, face, tmp_path) -> None:
    search = ("--method", "pulse", "--start", "random", "--refine", "2")
    assert run_infer(bundle, face, "out", *search, "--edit", "smile=1") == 0
    with np.load(tmp_path / "out/face/latents.npz") as latents:
        assert "ws" in latents.files and "noise_0" in latents.files
    assert report_of(tmp_path / "out/face")["edits"][0]["name"] == "smile"


def test_the_strip_shows_five_strengths(bundle, face, tmp_path) -> None:
    assert run_infer(bundle, face, "out", "--edit-strip", "smile") == 0
    width, height = Image.open(tmp_path / "out/face/strip.png").size
    assert len(STRIP) == 5 and width == 5 * (160 + 8) + 8 and height == 2 * (160 + 8 + 20) + 8
    assert report_of(tmp_path / "out/face")["edit_strip"]["name"] == "smile"
    assert run_infer(bundle, face, "out", "--overwrite") == 0  # a strip of an earlier call leaves with its report
    assert not (tmp_path / "out/face/strip.png").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--edit", "frown=1"), 1, "there are: bangs, foreign, smile"),
        (("--edit", "foreign=1"), 1, "another generator"),
        (("--edit", "smile"), 2, "NAME=STRENGTH"),
        (("--edit", "smile=999"), 2, "100"),
        (("--edit-consistent",), 2, "expected an --edit"),
    ],
)
def test_what_cannot_be_edited_is_refused(arguments, status, words, bundle, face, capsys) -> None:
    try:
        found = run_infer(bundle, face, "out", *arguments)
    except SystemExit as error:
        found = error.code
    assert found == status and words in capsys.readouterr().err


# ---------------------------------------------------------------- keeping the LR picture


def test_a_consistent_edit_keeps_the_lr_picture(bundle, face, tmp_path) -> None:
    assert run_infer(bundle, face, "free", "--edit", "bangs=2") == 0
    assert run_infer(bundle, face, "kept", "--edit", "bangs=2", "--edit-consistent") == 0
    free, kept = report_of(tmp_path / "free/face")["candidates"], report_of(tmp_path / "kept/face")["candidates"]
    for a, b in zip(free, kept, strict=True):
        assert b["edit_visible_in_lr"] < 0.3 * a["edit_visible_in_lr"] and 0 < b["edit_kept"] < 1
    assert report_of(tmp_path / "kept/face")["edit_consistent"] is True


def test_the_projection_is_that_of_least_squares() -> None:
    """For a linear generator the result is known: what lies in the kernel of D ∘ g stays, the rest goes."""
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(3 * 8 * 8, 20, generator=rng) / 10
    lr_size = 2  # 12 numbers

    def synthesis(ws: torch.Tensor, noise=None) -> torch.Tensor:
        return (ws.flatten(1) @ matrix.T).view(-1, 3, 8, 8)

    ws, offset = torch.randn(2, 4, 5, generator=rng), torch.randn(4, 5, generator=rng)
    down = Downscale(lr_size)(matrix.T.reshape(20, 3, 8, 8)).flatten(1).T  # J (12, 20)
    expected = offset.flatten() - torch.linalg.pinv(down) @ down @ offset.flatten()
    found = keep_lr(synthesis, ws, offset, lr_size, parts=2)
    assert torch.allclose((found.ws - ws).flatten(1), expected.expand(2, -1), atol=0.02)
    share = float((matrix @ expected).norm() / (matrix @ offset.flatten()).norm())
    assert found.kept.tolist() == pytest.approx([share] * 2, abs=0.02)
    small = 0.01 * offset  # within [-1, 1], so that nothing is clamped
    seen = visible_change(synthesis, 0.01 * ws, 0.01 * ws + small, lr_size)
    assert float(seen[0]) == pytest.approx(float((down @ small.flatten() / 2).square().mean().sqrt()), rel=1e-4)


# ---------------------------------------------------------------- saved codes


def test_saved_codes_are_edited_as_infer_does(bundle, face, tmp_path) -> None:
    assert run_infer(bundle, face, "plain") == 0
    assert run_infer(bundle, face, "edited", "--edit", "smile=+2", "--edit-strip", "bangs") == 0
    options = ["--edit", "smile=2", "--edit-strip", "bangs", "--bundle", str(bundle), "--device", "cpu"]
    assert apply.main([str(tmp_path / "plain/face"), "--out", str(tmp_path / "later"), *options]) == 0
    for name in ("1.png", "2.png", "grid.png", "input.png", "strip.png"):
        assert (tmp_path / "later/face" / name).read_bytes() == (tmp_path / "edited/face" / name).read_bytes()
    assert np.allclose(ws_of(tmp_path / "later/face"), ws_of(tmp_path / "edited/face"))
    ours, theirs = report_of(tmp_path / "later/face"), report_of(tmp_path / "edited/face")
    assert ours["edits"] == theirs["edits"] and ours["candidates"] == theirs["candidates"]
    assert apply.main([str(tmp_path / "plain/face"), "--out", str(tmp_path / "later"), *options]) == 1  # it exists
    assert apply.main([str(tmp_path / "plain/face"), "--out", str(tmp_path / "later"), *options, "--overwrite"]) == 0


def test_codes_of_ones_own_and_noise_maps(bundle, face, tmp_path) -> None:
    search = ("--method", "pulse", "--start", "random", "--refine", "2")
    assert run_infer(bundle, face, "out", *search) == 0
    options = ["--bundle", str(bundle), "--device", "cpu", "--out", str(tmp_path / "later")]
    latents = tmp_path / "out/face/latents.npz"
    assert apply.main([str(latents), "--edit", "smile=0", *options]) == 0
    for name in ("1.png", "2.png"):  # an edit of strength 0 draws the same face: the maps went along
        assert (tmp_path / "later/face" / name).read_bytes() == (tmp_path / "out/face" / name).read_bytes()
    np.savez(tmp_path / "mine.npz", ws=np.load(latents)["ws"])
    assert apply.main([str(tmp_path / "mine.npz"), "--edit", "smile=1", "--lr", "4", *options]) == 0
    assert report_of(tmp_path / "later/mine")["lr_size"] == 4


def test_bad_codes_do_not_stop_the_others(bundle, face, tmp_path, capsys) -> None:
    assert run_infer(bundle, face, "plain") == 0
    np.savez(tmp_path / "wide.npz", ws=np.zeros((1, 8, D + 1)))
    np.savez(tmp_path / "code.npz", ws=np.array({"x": 1}, dtype=object))
    np.savez(tmp_path / "nan.npz", ws=np.full((1, 8, D), np.nan))
    bad = [str(tmp_path / name) for name in ("wide.npz", "code.npz", "nan.npz", "none.npz")]
    options = ["--edit", "smile=1", "--bundle", str(bundle), "--device", "cpu", "--out", str(tmp_path / "later")]
    assert apply.main([*bad, str(tmp_path / "plain/face"), *options]) == 1
    said = capsys.readouterr().err
    assert all(name in said for name in bad) and "for this generator" in said and "finite" in said
    assert (tmp_path / "later/face/1.png").is_file()


def test_nothing_to_do_is_an_error(bundle, face) -> None:
    with pytest.raises(SystemExit, match="2"):
        apply.main([str(face), "--bundle", str(bundle)])


# ---------------------------------------------------------------- without torch


def test_the_export_edits_as_infer_does(bundle, face, tmp_path, capsys) -> None:
    (bundle / "boundaries" / "foreign.npz").rename(tmp_path / "foreign.npz")  # export may refuse foreign ones
    try:
        assert export.onnx.main(["--bundle", str(bundle), "--out", str(tmp_path / "exported")]) == 0
    finally:
        (tmp_path / "foreign.npz").rename(bundle / "boundaries" / "foreign.npz")
    edits = ("--edit", "smile=+2", "--edit-strip", "smile")
    assert run_infer(bundle, face, "torch", *edits) == 0
    options = ["--model", str(tmp_path / "exported"), "--out", str(tmp_path / "onnx"), "--k", "2"]
    assert export.run.main([str(face), *options, *edits]) == 0
    ours, theirs = tmp_path / "onnx/face", tmp_path / "torch/face"
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    assert np.allclose(ws_of(ours), ws_of(theirs), atol=1e-3)
    for name in ("1.png", "strip.png"):
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (ours, theirs))
        assert abs(a - b).max() <= 2
    assert report_of(ours)["edits"] == report_of(theirs)["edits"]
    a, b = (report_of(folder)["candidates"][0]["edit_visible_in_lr"] for folder in (ours, theirs))
    assert a == pytest.approx(b, rel=1e-2)
    (tmp_path / "foreign.npz").write_bytes((bundle / "boundaries" / "foreign.npz").read_bytes())
    (tmp_path / "foreign.npz").rename(tmp_path / "exported/boundaries/foreign.npz")
    assert export.run.main([str(face), *options, "--edit", "foreign=1", "--overwrite"]) == 1
    assert "another generator" in capsys.readouterr().err
