"""Faults on purpose: kills at any moment, full disks, places that cannot be written, two processes with one output.

Nothing half-written is ever taken for whole, what was there before is still there, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import write_bundle, write_faces

import cli.sample_faces
import data.align
import data.pack
import data.splits
import evaluate
import export.onnx
import infer
import models.checkpoints.__main__
import training.gpu_loan
from data.faces import Faces
from data.files import PARTIAL, _remove_partials_once, is_ours, sha256_of
from data.packed import PackedFaces
from data.report import REPORT
from models.bundle import load_bundle
from models.checkpoints import load_generator
from models.flow import FlowPrior, load_flow, save_flow
from models.flow import main as add_flow
from training.checkpoints import LAST, PREVIOUS, DurableIO, newest_checkpoint, read_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
KILLS = 6 if not os.environ.get("AMORTIZED_PULSE_TEST_ALL") else 40


@pytest.fixture
def place(tmp_path: Path, tiny_bundle: Path) -> Path:
    """What the commands read."""
    write_faces(tmp_path / "faces.zip", 12)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    sha256 = load_bundle(tiny_bundle).info["parts"]["generator.safetensors"]
    save_flow(FlowPrior(16, 1, 8, True), tmp_path / "flow.safetensors", sha256)
    points = " ".join(map(str, [2, 3, 6, 3, 4, 4, 2, 6, 6, 6]))
    (tmp_path / "points.txt").write_text("".join(f"{i}.png {points}\n" for i in range(2)))
    return tmp_path


def words(text: str, place: Path) -> list[str]:
    return [word.format(at=place) for word in text.split()]


# --- kills ---


def save_bundles(place: Path) -> None:
    for seed in (1, 2):
        write_bundle(place / "bundle", seed)


def add_flows(place: Path) -> None:
    assert add_flow(words("--bundle {at}/bundle --flow {at}/flow.safetensors", place)) == 0


def upsample(place: Path) -> None:
    options = "{at}/photos --bundle {at}/bundle -o {at}/out -k 2 --device cpu --overwrite"
    for seed in ("1", "2"):
        assert infer.main([*words(options, place), "--seed", seed]) == 0


def pack_states(place: Path) -> None:
    for step in range(2):
        adam = {
            "state": {0: {"exp_avg_sq": torch.full((9, 9), step), "step": torch.tensor(step)}},
            "param_groups": [{}],
        }
        adam["param_groups"][0]["betas"] = (0, 0.99)
        checkpoint = {"state_dict": {"w": torch.full((99, 99), float(step))}, "optimizer_states": [adam], "epoch": 0}
        checkpoint |= {"global_step": step, "loops": {}, "pytorch-lightning_version": "2"}
        training.gpu_loan.write_parts(checkpoint, place / "state", overwrite=True)


def save_checkpoints(place: Path) -> None:
    for step in range(3):
        content = {"state_dict": {"w": torch.full((300, 300), step)}, "loops": {}, "global_step": step}
        DurableIO().save_checkpoint(content, place / "run" / LAST)


def pack_faces(place: Path) -> None:
    shutil.rmtree(place / "packed", ignore_errors=True)
    assert data.pack.main(words("{at}/faces.zip --resolution 32 --workers 0 --out {at}/packed", place)) == 0


def check_bundle(place: Path) -> None:
    load_bundle(place / "bundle")


def check_flow(place: Path) -> None:
    load_bundle(place / "bundle")
    try:
        load_flow(place / "bundle" / "latents.safetensors")
    except ValueError as error:
        assert "found none" in str(error)


def check_results(place: Path) -> None:
    for folder in (place / "out").glob("[01]"):
        made = {path.name for path in folder.iterdir()}
        assert made == {"1.png", "2.png", "grid.png", "input.png", "latents.npz", REPORT}
        files = json.loads((folder / REPORT).read_text())["files"]
        assert all(
            len(entry["sha256"]) == 1 and sha256_of(folder / name) in entry["sha256"] for name, entry in files.items()
        )


def check_state(place: Path) -> None:
    if (place / "state").exists():
        state = training.gpu_loan.read_parts(place / "state")
        assert (state["state_dict"]["w"] == state["global_step"]).all()


def check_checkpoint(place: Path) -> None:
    found = newest_checkpoint(place / "run")
    if found is not None:
        content = read_checkpoint(found)
        assert (content["state_dict"]["w"] == content["global_step"]).all()
        assert {path.name for path in (place / "run").iterdir()} <= {LAST, PREVIOUS, "partial.ckpt"}


def check_packed(place: Path) -> None:
    if (place / "packed").exists():
        assert len(PackedFaces(place / "packed").names) == 12


JOBS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "bundle": (save_bundles, check_bundle),
    "flow": (add_flows, check_flow),
    "infer.py": (upsample, check_results),
    "state": (pack_states, check_state),
    "checkpoint": (save_checkpoints, check_checkpoint),
    "pack": (pack_faces, check_packed),
}


def in_child(work: Callable[[], object]) -> int:
    """Starts work in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("job", JOBS)
def test_kills(job: str, place: Path) -> None:
    work, check = JOBS[job]
    start = time.monotonic()
    work(place)
    lasts, rng = time.monotonic() - start, np.random.default_rng(0)

    def again_and_again() -> None:
        while True:
            work(place)

    for _ in range(KILLS):
        child = in_child(again_and_again)
        time.sleep(lasts * rng.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        check(place)
    _remove_partials_once.cache_clear()
    work(place)
    check(place)
    assert not list(place.rglob(f"{PARTIAL}*"))


# --- places where nothing can be written ---

WRITERS = {
    "infer.py": (infer.main, "{at}/photos --bundle {at}/bundle -k 1 --device cpu -o {out}"),
    "evaluate.py": (
        evaluate.main,
        "--bundle {at}/bundle --data {at}/faces.zip --faces 2 --lr 8 --k 1 --methods bicubic --out {out}",
    ),
    "align": (data.align.main, "{at}/photos --landmarks {at}/points.txt --size 32 --smallest 1 --out {out}"),
    "splits": (data.splits.main, "ffhq {at}/photos --out {out}"),
    "pack": (data.pack.main, "{at}/faces.zip --resolution 32 --workers 0 --out {out}"),
    "convert": (
        models.checkpoints.__main__.main,
        "convert {at}/bundle/generator.safetensors {out}/g.safetensors --dtype float32",
    ),
    "onnx": (export.onnx.main, "--bundle {at}/bundle --out {out}/m.onnx"),
    "samples": (cli.sample_faces.main, "--bundle {at}/bundle --out {out}"),
    "pack-faces": (training.gpu_loan.main, "pack-faces --data {at}/faces.zip --out {out}"),
}


def call(main: Callable, text: str, place: Path, out: Path) -> int:
    try:
        return main([word.format(at=place, out=out) for word in text.split()])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("command", WRITERS)
def test_a_place_below_a_file_is_refused_in_words(command: str, place: Path, capsys) -> None:
    """As a folder that may not be written is: the tests may run as root, who may write everywhere."""
    (place / "file").write_bytes(b"precious")
    main, text = WRITERS[command]
    assert call(main, text, place, place / "file" / "sub") in (1, 2)
    error = capsys.readouterr().err
    assert ("Not a directory" in error or "File exists" in error) and (place / "file").read_bytes() == b"precious"


def limited(work: Callable[[], int], size: int) -> int:
    """Runs work in a process that cannot write files beyond a size, as where a disk is full; its exit status."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os._exit(work())

    return os.waitstatus_to_exitcode(os.waitpid(in_child(run), 0)[1])


@pytest.mark.parametrize("size", [0, 200])
@pytest.mark.parametrize("command", sorted(WRITERS.keys() - {"onnx", "evaluate.py"}))
def test_a_full_disk_leaves_what_was_there(command: str, size: int, place: Path) -> None:
    if command == "splits" and size:
        pytest.skip("its files are smaller")
    main, text = WRITERS[command]
    out = place / "out"
    assert limited(lambda: call(main, text, place, out), size) in (1, 2)
    assert not [path for path in out.rglob("*") if path.is_file()] if out.exists() else True
    assert call(main, text, place, out) in ((0, 1) if command == "splits" else (0,))  # 1: the data set is not complete
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    overwrite = "" if command == "pack" else " --overwrite"
    limited(lambda: call(main, text + overwrite, place, out), size)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


# --- two processes, and workers that die ---


@pytest.mark.parametrize("command", ["infer.py", "convert", "samples", "align"])
def test_two_processes_with_one_output(command: str, place: Path) -> None:
    main, text = WRITERS[command]
    out = place / "out"
    assert call(main, text, place, out) == 0
    children = [in_child(lambda: os._exit(call(main, f"{text} --overwrite", place, out))) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert not list(place.rglob(f"{PARTIAL}*"))
    if command == "infer.py":
        for name in "01":
            assert len({path.name for path in (out / name).iterdir()}) == 5
    if command == "samples":
        assert all(is_ours(path) for path in out.glob("*.png"))
    if command == "convert":
        load_generator(out / "g.safetensors")


def test_evaluate_is_alone_in_its_folder(place: Path, monkeypatch, capsys) -> None:
    with evaluate._alone(place), pytest.raises(evaluate.WrongOption, match="another call measures"):
        with evaluate._alone(place):
            pass


def test_a_worker_of_a_pack_that_dies_is_told(place: Path, monkeypatch, capsys) -> None:
    def dies(faces: Faces, index: int) -> torch.Tensor:
        assert torch.utils.data.get_worker_info() is not None  # not this process
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.empty(0)

    monkeypatch.setattr(Faces, "_decode", dies)
    command = words("{at}/faces.zip --resolution 32 --workers 1 --out {at}/packed", place)
    assert data.pack.main(command) == 1 and not (place / "packed").exists()
    assert "DataLoader worker" in capsys.readouterr().err
