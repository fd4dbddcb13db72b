"""infer.py by the thousand: archives in and out, several processes, and runs that are cut, on a tiny bundle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from cli.launch import launch
from cli.progress import Progress
from data.files import PARTIAL
from data.image_io import read_image

ROOT = Path(infer.__file__).parent
FILES = ["1.png", "input.png", "latents.npz", "report.json"]  # of a face in an archive


@pytest.fixture
def command(tiny_bundle: Path) -> list[str]:
    """Options for one sample a face and one face a batch."""
    return ["--bundle", str(tiny_bundle), "--device", "cpu", "-k", "1", "--batch-size", "1"]


@pytest.fixture
def run(command: list[str], tmp_path: Path) -> Callable[..., int]:
    """Runs infer.py, results in tmp_path/out."""

    def call(*arguments: str | Path, out: str = "out") -> int:
        return infer.main([str(argument) for argument in (*command, "--out", tmp_path / out, *arguments)])

    return call


def write_faces(folder: Path, count: int = 5) -> Path:
    """Writes pictures of 8 px by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_zip_gives_what_its_files_give(run: Callable[..., int], tmp_path: Path, capsys) -> None:
    faces = write_faces(tmp_path / "faces")
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in faces.iterdir():
            archive.write(path, f"00000/{path.name}")
        archive.writestr("00000/bad.png", b"no picture")
    assert run(faces, out="a") == 0 and run(tmp_path / "faces.zip", out="b") == 1
    assert f"{tmp_path / 'faces.zip'}/00000/bad.png: not a picture" in capsys.readouterr().err
    (tmp_path / "b" / "failed.jsonl").unlink()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert np.array_equal(read_image(tmp_path / "b" / "00" / "input.png"), read_image(faces / "00.png"))


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {m.name: file.read() for m in archive.getmembers() if (file := archive.extractfile(m)) is not None}


def test_a_tar_holds_what_folders_hold(run: Callable[..., int], tmp_path: Path) -> None:
    """Three inputs a file, of which one is broken, and names in which WebDataset sees one sample."""
    faces = write_faces(tmp_path / "faces")
    (faces / "04.png").rename(faces / "a.b.png")
    (faces / "01.png").write_bytes(b"no picture")
    assert run(faces, out="folders") == 1
    assert run(faces, "--archive", "tar", "--shard-size", "3", out="tar") == 1
    shards = sorted((tmp_path / "tar").glob("*.tar"))
    assert [path.name for path in shards] == ["faces-00000.tar", "faces-00001.tar"]
    members = [read_tar(path) for path in shards]
    assert list(members[0]) == [f"{n}.{f}" for n in ("00", "02") for f in FILES]
    assert list(members[1]) == [f"{n}.{f}" for n in ("03", "a_b") for f in FILES]
    for name, folder in (("02", "02"), ("a_b", "a.b")):
        for file in FILES[:-1]:
            expected = (tmp_path / "folders" / folder / file).read_bytes()
            assert (members[0] | members[1])[f"{name}.{file}"] == expected
    report = json.loads(members[1]["a_b.report.json"])
    assert report["input"] == "a.b.png" and len(report["samples"]) == 1


def test_a_parquet_table_holds_what_folders_hold(run: Callable[..., int], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    faces = write_faces(tmp_path / "faces", 2)
    assert run(faces, out="folders") == run(faces, "--archive", "parquet", out="parquet") == 0
    rows = parquet.read_table(tmp_path / "parquet" / "faces-00000.parquet").to_pylist()
    assert [row["name"] for row in rows] == ["00", "01"]
    folder = tmp_path / "folders" / "01"
    assert rows[1]["input"] == {"bytes": (folder / "input.png").read_bytes(), "path": "input.png"}
    assert rows[1]["images"] == [{"bytes": (folder / "1.png").read_bytes(), "path": "1.png"}]
    ws = np.array(rows[1]["ws"], np.float32).reshape(rows[1]["ws_shape"])
    assert np.array_equal(ws, np.load(folder / "latents.npz")["ws"])
    report = json.loads((folder / "report.json").read_text())
    assert json.loads(rows[1]["report"]) == {key: value for key, value in report.items() if key != "files"}
    assert run(tmp_path / "parquet" / "faces-00000.parquet", out="again") == 0  # its inputs can be read again
    again = {path.read_bytes() for path in (tmp_path / "again").glob("*/1.png")}
    assert again == {path.read_bytes() for path in (tmp_path / "folders").glob("*/1.png")}


def test_parquet_without_pyarrow(run: Callable[..., int], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit) as stop:
        run(write_faces(tmp_path / "faces"), "--archive", "parquet")
    assert stop.value.code == 2 and "pip install pyarrow" in capsys.readouterr().err


KILL = """
import os, signal, sys, cli.faces, infer
write_face, left = cli.faces.write_face, [int(sys.argv[1])]
def kill(*arguments):
    write_face(*arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
cli.faces.write_face = kill
infer.main(sys.argv[2:])
"""


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX has them")
@pytest.mark.parametrize("options", [(), ("--archive", "tar", "--shard-size", "2")])
def test_a_killed_run_goes_on(
    options: tuple[str, ...], run: Callable[..., int], command: list[str], tmp_path: Path, capsys
) -> None:
    """What it wrote is not made again, what it left goes, and in the end all is as if nothing had been."""
    faces = write_faces(tmp_path / "faces", 20)
    assert run(faces, *options, out="whole") == 0
    arguments = ["18", *command, "--out", str(tmp_path / "cut"), str(faces), *options]
    killed = subprocess.run([sys.executable, "-c", KILL, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [path for path in (tmp_path / "cut").iterdir() if path.name.startswith(PARTIAL)]
    capsys.readouterr()
    assert run(faces, *options, out="cut") == 0
    assert int(re.search(r"(\d+) inputs were there", capsys.readouterr().out)[1]) >= (1 if not options else 14)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert run(faces, *options, out="cut") == 0
    assert capsys.readouterr().out.startswith("20 inputs were there already")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_another_run_does_not_go_on(run: Callable[..., int], tmp_path: Path, capsys) -> None:
    """Other options, another picture of the same name, or a result that somebody changed: nothing is replaced."""
    faces = write_faces(tmp_path / "faces", 3)
    assert run(faces) == 0
    before = contents(tmp_path / "out")
    assert run(faces, "--seed", "1") == 1
    assert capsys.readouterr().err.count("--overwrite") == 3
    write_faces(tmp_path / "others", 9)
    (tmp_path / "others" / "08.png").replace(faces / "00.png")
    (tmp_path / "out" / "01" / "1.png").write_bytes(b"mine")
    (tmp_path / "out" / "02" / "1.png").unlink()  # this one is made again
    assert run(faces) == 1
    err = capsys.readouterr().err
    assert "00 exists; --overwrite" in err and "no earlier call wrote 1.png" in err
    after = contents(tmp_path / "out")
    after.pop("failed.jsonl")
    assert after == before | {"01/1.png": b"mine"}


@pytest.mark.parametrize("archive", [(), ("--archive", "tar", "--shard-size", "4")])
def test_what_failed_is_named_in_one_file(archive: tuple[str, ...], run: Callable[..., int], tmp_path: Path) -> None:
    """Until it is made, whatever else was called in the meantime."""
    faces, good = write_faces(tmp_path / "faces", 12), write_faces(tmp_path / "good", 12)
    for i in range(10):
        (faces / f"{i:02}.png").write_bytes(b"no picture")
    (tmp_path / "list.txt").write_text("".join(f"faces/{i:02}.png\n" for i in range(13)))
    assert run(tmp_path / "list.txt", *archive) == 1
    file = tmp_path / "out" / "failed.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["input"] for line in lines] == [str(faces / f"{i:02}.png") for i in (*range(10), 12)]
    assert "not a picture" in lines[0]["reason"] and "no such file" in lines[-1]["reason"]
    for path in good.iterdir():
        path.replace(faces / path.name)
    (tmp_path / "list.txt").write_text("".join(f"faces/{i:02}.png\n" for i in range(12)))
    assert run(tmp_path / "list.txt", *archive, *(["--overwrite"] if archive else [])) == 0
    assert [json.loads(line)["input"] for line in file.read_text().splitlines()] == [str(faces / "12.png")]


@pytest.mark.parametrize("text", ["mine\n", '{"input": "a", "reason": "b"}\nmine\n', ""])
def test_a_file_of_that_name_that_is_not_ours_stays(text: str, run: Callable[..., int], tmp_path: Path, capsys) -> None:
    faces = write_faces(tmp_path / "faces", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "failed.jsonl").write_text(text)
    (faces / "bad.png").write_bytes(b"no picture")
    assert run(faces) == 1
    assert "failed.jsonl exists, and no earlier call wrote it" in capsys.readouterr().err
    assert (tmp_path / "out" / "failed.jsonl").read_text() == text


@pytest.mark.parametrize("options", [(), ("--archive", "tar", "--shard-size", "2")])
def test_processes_share_the_inputs(
    options: tuple[str, ...], run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    faces = write_faces(tmp_path / "faces", 7)
    (faces / "03.png").write_bytes(b"no picture")
    assert run(faces, *options, out="alone") == 1
    shares = []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        assert run(faces, *options, out="shared") == int(rank == (1 if options else 0))
        shares.append(capsys.readouterr().out.count("LR-PSNR"))
    assert shares == ([3, 1, 2] if options else [2, 2, 2])  # of files 0 and 3, 1, 2; of faces 0 3 6, 1 4, 2 5
    alone, shared = contents(tmp_path / "alone"), contents(tmp_path / "shared")
    assert alone.pop("overview.png", None) is None or shared.pop("overview.png")
    ledger = shared.pop(".amortized-pulse.json", b"")
    assert ledger == alone.pop(".amortized-pulse.json", b"") and shared == alone


def test_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Every device of every machine has a process that knows its number; the worst exit status counts."""
    script = "import os, pathlib, sys; n = os.environ; pathlib.Path(sys.argv[1], n['RANK']).write_text("
    script += "n['LOCAL_RANK'] + n['WORLD_SIZE']); sys.exit(int(n['RANK']) % 3)"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for node, worst in (("0", 1), ("1", 2)):
        monkeypatch.setenv("NODE_RANK", node)
        assert launch(2, 3, ["-c", script, str(tmp_path)]) == worst
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "06", "1": "16", "2": "06", "3": "16"}
    monkeypatch.setenv("NODE_RANK", "3")
    with pytest.raises(ValueError, match="NODE_RANK from 0 to 2, got 3"):
        launch(2, 3, [])
    assert launch(1, 1, []) is None
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert launch(2, 3, []) is None
    with pytest.raises(ValueError, match="6 processes in all"):
        launch(2, 1, [])


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX has them")
def test_a_killed_process_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    script = "import os, pathlib, sys, time; rank = os.environ['RANK']; rank == '0' and os.kill(os.getpid(), 9); "
    script += "time.sleep(0.2); pathlib.Path(sys.argv[1], rank).touch()"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("NODE_RANK", "0")
    assert launch(2, 1, ["-c", script, str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert "process 0 was ended by signal 9" in capsys.readouterr().err


def test_a_log_tells_rate_and_rest(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr("cli.progress.time.monotonic", lambda: now[0])
    progress = Progress(10_000)
    for _ in range(60):
        now[0] += 1.0
        progress.advance(20)
    lines = ["600 of 10,000 faces, 20.0 a second, 8 min left", "1,200 of 10,000 faces, 20.0 a second, 7 min left"]
    assert capsys.readouterr().err.splitlines() == lines
