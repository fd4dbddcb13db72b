"""Films of searches, alone and through infer.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_infer import bundle, picture, run

import infer
from search.command import FILM
from search.film import CELL, FRAMES, GAP, Film
from search.loop import Step

__all__ = ["bundle", "run"]  # fixtures


def step(number: int, steps: int, rows: list[int], done: list[bool], level: float, size: int = 8) -> Step:
    images = torch.full((len(rows), 3, size, size), level)
    return Step(number, steps, torch.tensor(rows), torch.zeros(len(rows)), torch.tensor(done), images)


def level_of(frame: Image.Image, column: int) -> int:
    return frame.getpixel((column * (CELL + GAP) + CELL // 2, CELL // 2))[0]


def test_rows_that_are_done_stay_as_they_were() -> None:
    film = Film(2)
    film(step(0, 2, [0, 1], [False, True], -1.0))
    film(step(1, 2, [0], [False], 0.0))
    film(step(2, 2, [0], [True], 1.0))
    frames = film.frames(torch.full((3, 4, 4), 1.0))
    assert [level_of(frame, 0) for frame in frames] == [255] * 3  # the input
    assert [level_of(frame, 1) for frame in frames] == [0, 128, 255]
    assert [level_of(frame, 2) for frame in frames] == [0, 0, 0]


def test_rows_in_parts_come_together() -> None:
    film = Film(2)
    for row, level in ((0, 0.0), (1, 1.0)):
        film(step(0, 1, [row], [False], -1.0))
        film(step(1, 1, [row], [True], level))
    frames = film.frames(torch.zeros(3, 4, 4))
    assert [(level_of(frame, 1), level_of(frame, 2)) for frame in frames] == [(0, 0), (128, 255)]


@pytest.mark.parametrize("steps", [1, 10, 59, 60, 500])
def test_long_searches_are_thinned_out(steps: int) -> None:
    film = Film(1)
    for number in range(steps + 1):
        film(step(number, steps, [0], [number == steps], 2 * number / steps - 1))
    frames = film.frames(torch.zeros(3, 4, 4))
    assert len(frames) == min(steps + 1, len(frames)) and min(steps, FRAMES / 2) <= len(frames) <= FRAMES + 1
    assert (level_of(frames[0], 1), level_of(frames[-1], 1)) == (0, 255)


def test_large_faces_are_kept_small() -> None:
    film = Film(1)
    film(step(0, 0, [0], [True], 0.3, size=1024))
    assert film.pictures[0][0].shape == (256, 256, 3)


def test_infer_writes_a_film(run, tmp_path) -> None:
    face = picture(tmp_path / "face.png")
    options = ["--k", "2", "--refine", "3", "--save-steps"]
    assert run(face, *options, out="a") == run(face, *options, out="b") == run(face, *options[:-1], out="plain") == 0
    with Image.open(tmp_path / "a" / "face" / FILM) as film:
        frames = film.n_frames
        assert film.size == (3 * CELL + 2 * GAP, CELL) and frames >= 3
        film.seek(frames - 1)
        last = np.array(film.convert("RGB"))[:, -CELL:]
    drawn = np.array(Image.open(tmp_path / "a" / "face" / "2.png").resize((CELL, CELL), Image.Resampling.NEAREST))
    assert np.abs(last.astype(int) - drawn).mean() < 12  # WebP loses a little; the best step may be the one before
    first, second = ((tmp_path / name / "face" / FILM).read_bytes() for name in "ab")
    assert first == second and not (tmp_path / "plain" / "face" / FILM).exists()
    assert run(face, *options[:-1], "--overwrite", out="a") == 0
    assert not (tmp_path / "a" / "face" / FILM).exists()  # one of an earlier call goes


def test_there_has_to_be_a_search_to_show(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        infer.main([str(picture(tmp_path / "face.png")), "--save-steps"])
    assert "--refine" in capsys.readouterr().err
