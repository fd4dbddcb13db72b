"""Mutated pictures and checkpoints, in a process of little memory: each is read or refused by name, at once."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia_files import network, write
from PIL import Image
from safetensors.torch import save

from models.generator import Generator

ROOT = Path(__file__).resolve().parents[1]
QUICK = not os.environ.get("AMORTIZED_PULSE_TEST_ALL")  # make test-all sets it
PICTURES, CHECKPOINTS = (250, 40) if QUICK else (2000, 300)
SECONDS, MEMORY = 5, 600 * 2**20  # of one file; beyond what the libraries take
FORMATS: dict[str, dict[str, object]] = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "WEBP": {},
    "BMP": {},
    "TIFF": {},
    "GIF": {},
    "PPM": {},
    "AVIF": {},
    "JPEG2000": {},
    "progressive JPEG": {"progressive": True},
    "packed TIFF": {"compression": "tiff_lzw"},
    "animated WEBP": {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]},
}

# Reads what its arguments name, one JSON line each: the name, seconds, and "" or the error.
READER = """
import json, resource, sys, time, warnings
sys.path.insert(0, sys.argv[1])
kind, memory = sys.argv[2], int(sys.argv[3])
from data.image_io import UnreadableImage, read_bytes
if kind == "checkpoints":
    from models.checkpoints import load_generator
warnings.simplefilter("ignore")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
if used:
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
for path in sys.stdin.read().splitlines():
    print(path, end=" ", flush=True)
    start, error = time.process_time(), ""
    try:
        read_bytes(path) if kind == "pictures" else load_generator(path)
    except (UnreadableImage if kind == "pictures" else ValueError) as refusal:
        error = str(refusal)
        assert error.startswith(path), error
    print(json.dumps([time.process_time() - start, error]), flush=True)
"""


def mutations(originals: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Flips bits, cuts off, repeats or removes a piece, and puts one file's beginning before another's rest."""
    rng, heads = random.Random(seed), list(originals.values())
    changes: list[Callable[[bytes], bytes]] = [
        lambda c: bytes(b ^ (1 << rng.randrange(8)) if rng.random() < 3 / len(c) else b for b in c),
        lambda c: c[: rng.randrange(len(c))],
        lambda c: c[: (at := rng.randrange(len(c)))] + rng.randbytes(rng.choice([1, 4, 64])) + c[at:],
        lambda c: c[: (at := rng.randrange(len(c)))] + c[at + rng.choice([1, 4, 64]) :],
        lambda c: c[: (at := rng.randrange(min(200, len(c))))] + b"\xff\xff\xff\xff" + c[at + 4 :],
        lambda c: rng.choice(heads)[: rng.choice([4, 16, 64, 300])] + c[rng.choice([4, 16, 64, 300]) :],
    ]
    names = list(originals)
    for i in range(count):
        yield names[i % len(names)], changes[i // len(names) % len(changes)](originals[names[i % len(names)]])


def check(kind: str, originals: dict[str, bytes], count: int, folder: Path) -> tuple[int, int]:
    """Has a process of its own read all mutations; gives how many were read and how many refused."""
    paths = []
    for i, (name, content) in enumerate(mutations(originals, count, 0)):
        path = folder / f"{i}-{name.replace(' ', '-')}"
        path.write_bytes(content)
        paths.append(str(path))
    command = [sys.executable, "-c", READER, str(ROOT), kind, str(MEMORY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input="\n".join(paths), capture_output=True, text=True, env=environment, timeout=600, cwd=folder
    )
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-1500:])
    results = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(results) == count
    slow = [(path, seconds) for path, (seconds, _) in zip(paths, results, strict=True) if seconds > SECONDS]
    assert not slow
    return sum(not error for _, error in results), sum(bool(error) for _, error in results)


def test_mutated_pictures(tmp_path: Path) -> None:
    y, x = np.mgrid[:30, :40]
    picture = Image.fromarray(np.stack([6 * x, 8 * y, 3 * (x + y)], axis=-1).astype(np.uint8))
    originals = {}
    for name, options in FORMATS.items():
        with io.BytesIO() as buffer:
            picture.save(buffer, name.split()[-1], **options)
            originals[name] = buffer.getvalue()
    read, refused = check("pictures", originals, PICTURES, tmp_path)
    assert read > PICTURES // 20 and refused > PICTURES // 4


def test_mutated_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = Generator(32, [4, 4, 4, 4], 4, 4, 2).eval().requires_grad_(False)
    tensors = dict(generator.state_dict())
    originals = {"pickle": write({"G_ema": network(generator)}, tmp_path / "a.pkl").read_bytes()}
    originals["safetensors"] = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    for name, zipped in (("zip", True), ("legacy", False)):
        with io.BytesIO() as buffer:
            torch.save({"G_ema": tensors, "args": {"size": 32}}, buffer, _use_new_zipfile_serialization=zipped)
            originals[name] = buffer.getvalue()
    read, refused = check("checkpoints", originals, CHECKPOINTS, tmp_path)
    assert read >= CHECKPOINTS // 20 and refused > CHECKPOINTS // 4


@pytest.mark.skipif(QUICK, reason="make test-all runs it")
def test_more_seeds_of_pictures(tmp_path: Path) -> None:
    """Pure noise behind every header."""
    rng = random.Random(1)
    heads = [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"RIFF\0\0\0\0WEBP",
        b"BM",
        b"II*\0",
        b"GIF89a",
        b"P6\n9 9 255\n",
    ]
    originals = {f"noise{i}": heads[i % len(heads)] + rng.randbytes(rng.choice([9, 99, 999])) for i in range(100)}
    assert sum(check("pictures", originals, 500, tmp_path)) == 500
