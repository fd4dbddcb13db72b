"""The README keeps its word: what it names exists, and its commands and its examples run as written."""

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
LINES = [line.split(" #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
COMMANDS = [re.sub(r"^(\.venv/bin/)?python ", "", line) for line in LINES]
EXAMPLES = [text for kind, text in BLOCKS if kind == "python" and "path/to" not in text]
SCRIPTS = [
    path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]) if "__main__" in path.read_text()
]
MODULES = ("cli.sample_faces", "models.checkpoints", "export.onnx")


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README)) | set(re.findall(r"`([\w/]+(?:\.py|/))`", README))
    made = {"datasets/", "out/", "out/face/", "demo/", "runs/", "exported/", "results/", "build/web/"}  # by commands
    missing = sorted(name for name in named - made if not (ROOT / name).exists())
    assert len(named) > 5 and not missing


def test_every_make_target_exists():
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in targets if not re.search(rf"^{t}:.*## ", makefile, flags=re.M)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("infer.py")])
def test_infer_commands(command, tmp_path):
    sample = sorted((ROOT / "samples").glob("*.png"))[0].read_bytes()
    (tmp_path / "photos").mkdir()
    for name in ("face.png", "photo.jpg", "holiday.jpg", "photos/face.png"):
        (tmp_path / name).write_bytes(sample)  # a picture is known by its content
    script, *words = shlex.split(command)
    words = [str(ROOT / word) if word == "samples" or word.startswith("bundles/") else word for word in words]
    done = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--help" in words or list(tmp_path.glob("*/*/report.json"))


@pytest.mark.parametrize(
    "script", [str(path.relative_to(ROOT)) for path in SCRIPTS] + [f"-m {name}" for name in MODULES]
)
def test_every_script_explains_itself(script):
    command = [sys.executable, *script.split(), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout.lower() and "--help" in done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_python_examples(example, monkeypatch, tmp_path):
    """They run, and what comes out has the shapes that their comments promise, such as "samples.images (1, 4)"."""
    for name in ("bundles", "samples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(example, scope)
    promised = re.findall(r"([\w.]+) (\((?:\d+, )+\d+\))", example)
    assert promised and all(str(tuple(eval(name, scope).shape)) == shape for name, shape in promised)
