"""The README keeps its word: what it names exists, and its commands and its example run as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line]


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"`([\w/]+(?:\.py|/))`", re.search(r"## What each file.*?\n## ", README, flags=re.S)[0]))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert len(named) > 10 and not missing


def test_every_make_target_exists():
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make")}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in targets if not re.search(rf"^{t}:.*## ", makefile, flags=re.M)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "infer.py" in c], ids=lambda c: c.split("python ")[1])
def test_infer_commands(command, tmp_path):
    sample = sorted((ROOT / "samples").glob("*.png"))[0].read_bytes()
    (tmp_path / "face.png").write_bytes(sample)
    (tmp_path / "photo.jpg").write_bytes(sample)  # a picture is known by its content
    words = shlex.split(command)
    assert words[0] == ".venv/bin/python"
    done = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--help" in command or (tmp_path / "out" / Path(words[2]).stem / "grid.png").exists()


@pytest.mark.parametrize(
    "script",
    [
        "infer.py",
        "evaluate.py",
        "train.py",
        "-m data.samples",
        "-m models.checkpoints",
        "-m export.onnx",
        "-m export.run",
    ]
    + [f"benchmarks/{p.name}" for p in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in p.read_text()],
)
def test_every_script_explains_itself(script):
    command = [sys.executable, *script.split(), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout.lower() and "--help" in done.stdout


def test_python_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    exec(next(text for kind, text in BLOCKS if kind == "python"), scope)
    assert scope["images"].shape == (1, 4, 3, 64, 64) and scope["ws"].shape == (1, 4, 10, 256)
