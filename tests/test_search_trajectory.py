"""Trajectories of searches as moving pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cli.search_options import TRAJECTORY
from cli.trajectory import CELL, FRAMES, GAP, TrajectoryRecorder
from models.bundle import load_bundle
from search.loop import SearchState
from search.plan import SearchPlan
from search.samples import find_samples


def step(number: int, steps: int, indices: list[int], done: list[bool], level: float, size: int = 8) -> SearchState:
    images = torch.full((len(indices), 3, size, size), level)
    return SearchState(number, steps, torch.tensor(indices), torch.zeros(len(indices)), torch.tensor(done), images)


def level_of(frame: Image.Image, column: int) -> int:
    return frame.getpixel((column * (CELL + GAP) + CELL // 2, CELL // 2))[0]


def test_samples_that_have_converged_stay_as_they_were() -> None:
    recorder = TrajectoryRecorder(3)
    recorder(step(0, 2, [0, 1], [False, True], -1.0))
    recorder(step(1, 2, [0], [False], 0.0))
    recorder(step(0, 2, [2], [True], 0.0))  # of another batch, and of the next input
    recorder(step(2, 2, [0], [True], 1.0))
    frames = recorder.frames(torch.full((3, 4, 4), 1.0), slice(0, 2))
    assert [level_of(frame, 0) for frame in frames] == [255] * 3  # the input
    assert [level_of(frame, 1) for frame in frames] == [0, 128, 255]
    assert [level_of(frame, 2) for frame in frames] == [0, 0, 0]
    assert [level_of(frame, 1) for frame in recorder.frames(torch.zeros(3, 4, 4), slice(2, 3))] == [128]


@pytest.mark.parametrize("steps", [1, 10, 59, 60, 500])
def test_long_searches_are_thinned_out(steps: int) -> None:
    recorder = TrajectoryRecorder(1)
    for number in range(steps + 1):
        recorder(step(number, steps, [0], [number == steps], 2 * number / steps - 1))
    frames = recorder.frames(torch.zeros(3, 4, 4))
    assert len(frames) == min(steps + 1, len(frames)) and min(steps, FRAMES / 2) <= len(frames) <= FRAMES + 1
    assert (level_of(frames[0], 1), level_of(frames[-1], 1)) == (0, 255)


def test_large_faces_are_kept_small() -> None:
    recorder = TrajectoryRecorder(1)
    recorder(step(0, 0, [0], [True], 0.3, size=1024))
    assert recorder.pictures[0][0].shape == (256, 256, 3)


def test_a_search_is_recorded(tiny_bundle, tmp_path) -> None:
    bundle, lr = load_bundle(tiny_bundle), torch.zeros(1, 3, 8, 8)
    contents = []
    for name in ("a", "b"):
        recorder = TrajectoryRecorder(2)
        find_samples(bundle, lr, 2, SearchPlan(steps=3, epsilon=1e-9), recorder)
        (tmp_path / name).mkdir()
        recorder.save(tmp_path / name / TRAJECTORY, lr[0])
        contents.append((tmp_path / name / TRAJECTORY).read_bytes())
    assert contents[0] == contents[1]
    with Image.open(tmp_path / "a" / TRAJECTORY) as picture:
        assert picture.size == (3 * CELL + 2 * GAP, CELL) and picture.n_frames == 4
        picture.seek(3)
        last = np.array(picture.convert("RGB"))[:, -CELL:]
    wanted = np.repeat(np.repeat(recorder.pictures[1][3], CELL // 32, 0), CELL // 32, 1)
    assert np.abs(last.astype(int) - wanted).mean() < 12  # WebP loses a little
