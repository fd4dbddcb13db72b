"""Files that appear as a whole, and the owner's rule, for every command and every option that names an output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli.psp_bundle
import cli.sample_faces
import data.align
import data.pack
import data.splits
import editing.__main__
import evaluate
import evaluation.niqe
import export.onnx
import export.page
import models.checkpoints.__main__
import training.gpu_loan
import training.start
from data.figures import save_overview
from data.files import LEDGER, atomic_write, check_replaceable, is_ours, owned_file, owned_folder
from data.listing import find_images
from models.checkpoints import save_generator
from models.generator import Generator

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, text: str = "ours", **options: object) -> Path:
    with owned_file(path, **options) as partial:
        partial.write_text(text)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_of_ours_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "new" / "a.txt")
    assert path.read_text() == "ours" and is_ours(path)
    with pytest.raises(ValueError, match=r"a\.txt exists; --overwrite"):
        write(path, "again")
    assert write(path, "again", overwrite=True).read_text() == "again" and is_ours(path)


@pytest.mark.parametrize("change", ["foreign", "changed", "link", "folder"])
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.txt"
    if change == "changed":
        write(path)
    if change == "link":
        (tmp_path / "precious").write_text("precious")
        path.symlink_to("precious")
    elif change == "folder":
        path.mkdir()
    else:
        path.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"a\.txt exists, and no earlier call wrote it"):
            write(path, "again", overwrite=overwrite)
    assert path.is_dir() or path.read_text() == "precious"
    assert not any(name.startswith(".partial") for name in os.listdir(tmp_path))


def test_the_same_job_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "1", job="x")
    assert write(path, "2", job="x").read_text() == "2"
    with pytest.raises(ValueError, match="--overwrite"):
        write(path, "3", job="y")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    for context in (owned_file(path, True), atomic_write(path), owned_folder(tmp_path / "f")):
        with pytest.raises(RuntimeError), context as partial:
            (partial / "x" if partial.is_dir() else partial).write_text("half")
            raise RuntimeError
    assert path.read_text() == "ours" and names(tmp_path) == [LEDGER, "a.txt"]


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        check_replaceable("")


@pytest.mark.parametrize("ledger", [LEDGER, "report.json"])
def test_a_folder_is_replaced_but_for_what_is_not_ours(tmp_path: Path, ledger: str) -> None:
    def run(*files: str, overwrite: bool = False) -> None:
        with owned_folder(tmp_path / "f", overwrite, ledger) as partial:
            for name in files:
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(f"ours {len(files)}")
            if ledger != LEDGER:
                (partial / ledger).write_text('{"format": "amortized-pulse/report/1", "seed": 3}')

    run("1.png", "2.png", "sub/a.npz")
    folder = tmp_path / "f"
    (folder / "strip.png").write_text("precious")
    with pytest.raises(ValueError, match="--overwrite"):
        run("1.png")
    run("1.png", overwrite=True)
    assert names(folder) == sorted([ledger, "1.png", "strip.png"]) and (folder / "1.png").read_text() == "ours 1"
    with pytest.raises(ValueError, match=r"no earlier call wrote strip\.png"):
        run("1.png", "strip.png", overwrite=True)
    (folder / "1.png").write_text("precious")
    with pytest.raises(ValueError, match=r"no earlier call wrote 1\.png"):
        run("1.png", overwrite=True)
    assert {(folder / name).read_text() for name in ("1.png", "strip.png")} == {"precious"}
    if ledger != LEDGER:
        assert json.loads((folder / ledger).read_text())["seed"] == 3


def test_damaged_ledgers_protect(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    foreign = b'{"format": "other/1", "files": {"a.txt": {"sha256": []}}}'
    for content in (b"", b"[]", foreign, b'{"files": 3}', b"\xff" * 9):
        (tmp_path / LEDGER).write_bytes(content)
        with pytest.raises(ValueError, match="no earlier call"):
            write(path, overwrite=True)


def test_results_are_never_inputs(tmp_path: Path) -> None:
    for name in ("face.png", "overview.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "overview.png").unlink()
    save_overview(Image.new("RGB", (8, 8)), tmp_path / "overview.png")
    assert find_images([tmp_path]).images == [tmp_path / "face.png"]
    with owned_folder(tmp_path / "face", ledger="report.json") as partial:
        for name in ("1.png", "grid.png"):
            Image.new("RGB", (8, 8)).save(partial / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "face" / "own.png")
    assert find_images([tmp_path / "face"]).images == [tmp_path / "face" / "own.png"]
    assert find_images([tmp_path / "face" / "1.png"]).images == [tmp_path / "face" / "1.png"]  # named on purpose


def test_processes_with_one_output_write_one_of_both(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from data.files import owned_file\n"
        "for i in range(40):\n"
        "    with owned_file(sys.argv[2] + f'/{i % 4}.txt', True) as partial: partial.write_text(sys.argv[3] * 1000)\n"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    processes = [subprocess.Popen([*command, letter]) for letter in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    for i in range(4):
        assert (tmp_path / f"{i}.txt").read_text() in ("a" * 1000, "b" * 1000) and is_ours(tmp_path / f"{i}.txt")


def test_a_kill_leaves_the_old_or_the_new_whole_and_ours(tmp_path: Path) -> None:
    script = (
        "import sys, itertools; sys.path.insert(0, sys.argv[1])\n"
        "from data.files import owned_folder\n"
        "for i in itertools.count():\n"
        "    with owned_folder(sys.argv[2], True) as partial:\n"
        "        for name in 'abc': (partial / name).write_text(str(i) * 9999)\n"
        "    print(i, flush=True)\n"
    )
    rng = np.random.default_rng(0)
    for _ in range(8):
        command = [sys.executable, "-c", script, str(ROOT), str(tmp_path / "f")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        try:
            process.wait(float(rng.uniform(0, 0.05)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name in "abc":
            assert len(set((tmp_path / "f" / name).read_text())) and is_ours(tmp_path / "f" / name)


# --- every command ---


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What the commands read: square pictures, landmarks, a generator, a bundle's folder."""
    faces = tmp_path / "faces"
    faces.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(faces / f"{i:05d}.png")
    points = " ".join(map(str, [15, 20, 33, 20, 24, 28, 17, 36, 31, 36]))
    (tmp_path / "points.txt").write_text("".join(f"{i:05d}.png {points}\n" for i in range(3)))
    torch.manual_seed(0)
    generator = Generator(32, channels=(4, 4, 4, 2), z_dim=6, w_dim=6, mapping_layers=2)
    save_generator(generator, tmp_path / "bundle" / "generator.safetensors")
    np.save(tmp_path / "normal.npy", np.eye(6)[0])
    adam = {"state": {}, "param_groups": [{"betas": (0, 0.99)}]}
    checkpoint = {"state_dict": {"w": torch.ones(3)}, "optimizer_states": [adam], "epoch": 0, "global_step": 1}
    checkpoint |= {"loops": {}, "pytorch-lightning_version": "2"}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    training.gpu_loan.write_parts(checkpoint, tmp_path / "state")
    main = editing.__main__.main
    assert main(["import", str(tmp_path / "normal.npy"), "--as", "mine", "--bundle", str(tmp_path / "bundle")]) == 0
    return tmp_path


# The command, its arguments, and the files that its options name: {in} is where the inputs are, {out} where they go.
COMMANDS = {
    "align --out": (data.align.main, "{in}/faces --out {out} --size 32 --landmarks {in}/points.txt", ["00001.png"]),
    "align --sheet": (
        data.align.main,
        "{in}/faces --out {in}/new --size 32 --landmarks {in}/points.txt --sheet {out}/sheet.png",
        ["sheet.png"],
    ),
    "splits --out": (data.splits.main, "ffhq {in}/faces --out {out}", ["train.txt"]),
    "pack --out": (data.pack.main, "{in}/faces --resolution 8 --workers 0 --out {out}", ["faces.npy"]),
    "editing export": (editing.__main__.main, "export mine {out}/a.npy --bundle {in}/bundle", ["a.npy"]),
    "checkpoints convert": (
        models.checkpoints.__main__.main,
        "convert {in}/bundle/generator.safetensors {out}/g.safetensors",
        ["g.safetensors"],
    ),
    "export.onnx --out": (export.onnx.main, "--bundle {in}/bundle --out {out}/m.onnx", ["m.onnx"]),
    "export.page --out": (export.page.main, "--bundle {in}/bundle --out {out}", ["index.html"]),
    "niqe --out": (evaluation.niqe.main, "--data {in}/faces --size 192 --out {out}/model.npz", ["model.npz"]),
    "sample_faces --out": (cli.sample_faces.main, "--bundle {in}/bundle --out {out}", ["face-1-16px.png"]),
    "psp_bundle --out": (cli.psp_bundle.main, "{in}/last.ckpt --out {out}", ["bundle.json"]),
    "start --out": (training.start.main, "--checkpoint {in}/last.ckpt --out {out}", ["generator.safetensors"]),
    "pack-faces --out": (training.gpu_loan.main, "pack-faces --data {in}/faces --out {out}", ["faces00.zip"]),
    "pack-state --out": (training.gpu_loan.main, "pack-state --checkpoint {in}/last.ckpt --out {out}", ["state.json"]),
    "unpack-state --out": (training.gpu_loan.main, "unpack-state --state {in}/state --out {out}/a.ckpt", ["a.ckpt"]),
}
SLOW = {"niqe --out", "export.onnx --out", "export.page --out"}
ONCE = {"pack --out", "psp_bundle --out", "start --out"}  # never replaced, or made of more than is here


def call(main, arguments: str, **places: Path) -> int:
    try:
        return main([word.format(**places) for word in arguments.split()])
    except SystemExit as ended:
        return int(ended.code)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_replaces_what_it_did_not_write(inputs: Path, command: str) -> None:
    main, arguments, files = COMMANDS[command]
    out = inputs / "out"
    out.mkdir()
    for name in files:
        (out / name).write_bytes(b"precious")
    for options in ("", " --overwrite"):
        assert call(main, arguments + options, **{"in": inputs, "out": out}) in (1, 2)
        assert all((out / name).read_bytes() == b"precious" for name in files)
    assert not any(name.startswith(".partial") for name in os.listdir(out))


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - SLOW - ONCE))
def test_every_command_replaces_its_own_when_asked(inputs: Path, command: str) -> None:
    main, arguments, files = COMMANDS[command]
    places = {"in": inputs, "out": inputs / "out"}
    assert call(main, arguments, **places) in (0, 1)  # 1: a split that is not complete
    content = {name: (inputs / "out" / name).read_bytes() for name in files}
    assert call(main, arguments + " --overwrite", **places) in (0, 1)
    assert {name: (inputs / "out" / name).read_bytes() for name in files} == content
    for name in files:
        (inputs / "out" / name).write_bytes(b"precious")
    assert call(main, arguments + " --overwrite", **places) in (1, 2)
    assert all((inputs / "out" / name).read_bytes() == b"precious" for name in files)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_output_is_refused(inputs: Path, command: str, monkeypatch, capsys) -> None:
    main, arguments, files = COMMANDS[command]
    monkeypatch.chdir(inputs / "bundle")
    before = names(inputs)
    words = [word.format(**{"in": inputs, "out": "{out}"}) for word in arguments.split()]
    with pytest.raises(SystemExit, match="2"):
        main(["" if "{out}" in word else word for word in words])
    error = capsys.readouterr().err
    assert ("empty" in error or "got ''" in error) and names(inputs) == before


MISTAKES = {
    "align, landmarks": (data.align.main, "{in}/faces --out {out} --landmarks {in}/gone.txt", "--landmarks"),
    "align, size": (data.align.main, "{in}/faces --out {out} --size 0", "--size"),
    "align, out": (data.align.main, "{in}/faces --out {in}/points.txt --landmarks {in}/points.txt", "--out"),
    "align, sheet": (data.align.main, "{in}/faces --out {out} --sheet {in}/faces/00000.png", "--sheet"),
    "pack, resolution": (data.pack.main, "{in}/faces --out {out} --resolution 0", "--resolution"),
    "pack, out": (data.pack.main, "{in}/faces --out {in}/bundle --resolution 8", "--out"),
    "niqe, out": (evaluation.niqe.main, "--data {in}/faces --out {in}/points.txt", "--out"),
    "niqe, limit": (evaluation.niqe.main, "--data {in}/faces --out {out} --limit -1", "--limit"),
    "splits, out": (data.splits.main, "ffhq {in}/faces --out {in}/points.txt", "--out"),
    "pack, source": (data.pack.main, "{in}/gone --out {out} --resolution 8", "source, --split"),
    "niqe, data": (evaluation.niqe.main, "--data {in}/gone --out {out}/m.npz", "--data"),
    "onnx, bundle": (export.onnx.main, "--bundle {in}/gone --out {out}/m.onnx", "--bundle"),
    "import, bundle": (editing.__main__.main, "import {in}/normal.npy --as x --bundle {in}/gone", "--bundle"),
    "import, name": (editing.__main__.main, "import {in}/normal.npy --as ../x --bundle {in}/bundle", "--as"),
    "state, checkpoint": (
        training.gpu_loan.main,
        "pack-state --checkpoint {in}/points.txt --out {out}",
        "--checkpoint",
    ),
    "convert, name": (models.checkpoints.__main__.main, "convert a b.safetensors --name=", "--name"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_wrong_option_is_named_with_status_2(inputs: Path, kind: str, capsys) -> None:
    main, arguments, option = MISTAKES[kind]
    assert call(main, arguments, **{"in": inputs, "out": inputs / "new"}) == 2
    assert f"{option}: " in capsys.readouterr().err and not (inputs / "new").exists()


def test_evaluate_replaces_nothing_that_it_did_not_write(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "table.md").write_text("precious")
    monkeypatch.setattr(evaluate, "load_bundle", None)  # refused before anything is loaded
    for options in ([], ["--overwrite"]):
        assert evaluate.main(["--out", str(tmp_path), *options]) == 2
    assert (tmp_path / "table.md").read_text() == "precious"
