"""The referee, on stub bundles and small pictures; closed forms where there are any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import evaluate
from data.faces import Faces
from data.operator import Downscale, upscale_bicubic
from data.reading import from_uint8, to_uint8
from losses.perceptual import LPIPS
from models.identity import Identity
from referee import cells, contest, figure, judge, measures, methods, options
from referee.methods import Drawn

R, NUM_FACES = 32, 20  # more than one batch


@pytest.fixture
def networks() -> None:
    """Skips a test where the weights of LPIPS or of the identity network are not on the machine."""
    try:
        LPIPS(), Identity()
    except FileNotFoundError as error:
        pytest.skip(str(error))


class PixelDistance(nn.Module):
    """In place of LPIPS: the mean squared difference of pixels."""

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images,)

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        return (a[0] - b[0]).square().flatten(1).mean(dim=1)


class PixelDirection(nn.Module):
    """In place of the face embedding: the picture itself, at unit length."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.flatten(1), dim=1)


class StubBundle:
    """Bicubic faces with noise from the random numbers that are passed in; codes are pictures."""

    name, hash, resolution, lr_sizes = "stub", "0123456789abcdef", R, (4, R)
    generator = SimpleNamespace(w_avg=torch.full((R * R,), 0.15), num_ws=3, state_dict=dict)
    encoder = SimpleNamespace(config={}, passes=lambda wanted: wanted or 0)

    def generate(self, ws: Tensor) -> Tensor:
        return ws.unflatten(-1, (R, R))  # a style is a colour

    def upsample(self, lr: Tensor, k: int, *, rng: np.random.Generator, passes: int | None) -> tuple[Tensor, Tensor]:
        ws = self.encode(lr, k, rng)
        return self.generate(ws), ws

    def encode(self, lr: Tensor, k: int, rng: np.random.Generator) -> Tensor:
        base = upscale_bicubic(lr, R)[:, None]  # (B, 1, 3, R, R)
        noise = torch.from_numpy(rng.standard_normal((len(lr), k, 3, R, R), dtype=np.float32))
        return (base + 0.05 * noise).flatten(-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Faces: waves of random direction and colour with a grain that no LR picture shows, all within 0.1 to 0.9."""
    path, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    y, x = np.mgrid[:R, :R] / R
    for i in range(NUM_FACES):
        a, b, c = rng.uniform(-9, 9, (3, 3, 1, 1))
        wave = 0.5 + 0.3 * np.sin(a * x + b * y + c) + rng.uniform(-0.1, 0.1, (3, R, R))  # (3, R, R)
        Image.fromarray((255 * wave).astype(np.uint8).transpose(1, 2, 0)).save(path / f"{i:02}.png")
    return path


@pytest.fixture
def stub(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "load_bundle", lambda path, device: StubBundle())
    monkeypatch.setattr(options, "DEFAULT_METHODS", ("bicubic", "mean", "ours"))


@pytest.fixture
def enter(monkeypatch) -> Callable[[str, Callable], None]:
    """Lets a method take part that maps LR pictures, k and seeds to candidates."""

    def add(name: str, draw: Callable[[Tensor, int, Sequence[int]], Tensor]) -> None:
        def method(lr: Tensor, k: int, seeds: Sequence[int]) -> Drawn:
            images = draw(lr, k, seeds)
            return Drawn(images, torch.ones(images.shape[:2]))

        monkeypatch.setitem(methods.PICTURES, name, lambda bundle: method)
        monkeypatch.setattr(options, "METHODS", (*options.METHODS, name))

    return add


@pytest.fixture
def plain(stub, monkeypatch) -> None:
    """Lets the referee run without the weights of its networks."""
    monkeypatch.setattr(judge, "LPIPS", PixelDistance)
    monkeypatch.setattr(judge, "Identity", PixelDirection)


def truths(folder: Path) -> Tensor:
    faces = Faces(folder, R)
    return torch.stack([faces[i] for i in range(len(faces))])


def oracle(folder: Path, change=lambda truth: truth[:, None]):
    """A method that knows the truth of every LR picture, and returns what `change` makes of it."""
    known = {}
    for truth in truths(folder):
        for size in (8, 16):
            lr = from_uint8(to_uint8(Downscale(size)(from_uint8(truth[None]))))
            known[to_uint8(lr).numpy().tobytes()] = from_uint8(truth)
    return lambda lr, k, seeds: change(torch.stack([known[to_uint8(one[None]).numpy().tobytes()] for one in lr]))


def run(folder: Path, out: Path, *more: str) -> dict:
    assert evaluate.main(["--data", str(folder), "--out", str(out), "--device", "cpu", *more]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


# --- closed forms ---


def test_psnr_of_a_constant_difference() -> None:
    truth = torch.zeros(2, 3, 8, 8)
    images = truth + torch.tensor([0.2, 0.0])[:, None, None, None]
    assert measures.psnr(images, truth).tolist() == pytest.approx([20.0, math.inf])


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([1.0, 2.0, 2.01, 0.5], [True, True, False, True]),
        ([0.0, 0.0, 1e-9, 1.0], [True, True, False, False]),
    ],
)
def test_candidates_up_to_twice_the_best_error_count(errors, expected) -> None:
    assert measures.candidates_that_count(torch.tensor([errors])).tolist() == [expected]


def test_candidates_within_twice_epsilon_count_whatever_the_best_is() -> None:
    errors = torch.tensor([[5e-3, 1e-3, 2e-3, 2.1e-3]])
    assert measures.candidates_within(errors).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([True, True, True], (1 + 9 + 4) / 3),
        ([True, True, False], 1),
        ([True, False, True], 9),
        ([True, False, False], 0),
    ],
)
def test_diversity_of_three_values(counts, expected) -> None:
    values = torch.tensor([0.0, 1.0, 3.0]).reshape(1, 3, 1, 1, 1)
    assert measures.diversity(PixelDistance(), [values], torch.tensor([counts])).item() == pytest.approx(expected)


# --- what is measured ---


def test_a_perfect_method(networks, folder, tmp_path, stub, enter) -> None:
    enter("perfect", oracle(folder))
    means = run(folder, tmp_path, "--methods", "bicubic", "perfect", "--lr", "16")["results"]["16"]
    perfect = means["perfect"]
    assert perfect["psnr"] == "inf" and perfect["lpips"] == 0 and perfect["lpips_over_bicubic"] == 0
    assert perfect["identity"] == pytest.approx(1, abs=1e-5) and perfect["ssim"] == pytest.approx(1, abs=1e-5)
    assert perfect["error"] <= (0.5 / 255) ** 2 and perfect["within"] == 1  # the rounding of the LR picture
    assert means["bicubic"]["lpips"] > 0.01 and means["bicubic"]["identity"] < 0.999
    assert "| inf |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_identical_candidates_have_no_diversity(networks, folder, tmp_path, stub, enter) -> None:
    same = oracle(folder, lambda truth: truth[:, None].expand(-1, 4, -1, -1, -1))
    enter("same", same)
    means = run(folder, tmp_path, "--methods", "same", "ours", "--lr", "16")["results"]["16"]
    assert means["same"]["diversity"] == 0 and means["same"]["count"] == 1
    assert means["ours"]["diversity"] > 0


def test_candidates_with_too_large_an_error_do_not_count(folder, tmp_path, plain, enter) -> None:
    # A checkerboard vanishes when it is downscaled by 2, a shift stays. The best guess has an error of its own.
    checker = 2.0 * (torch.arange(R)[:, None] + torch.arange(R)).remainder(2) - 1  # (R, R)
    level = 1 / 127.5
    changes = torch.stack([10 * level + 0 * checker, 10 * level + 5 * level * checker, 40 * level + 0 * checker])
    method = oracle(folder, lambda truth: truth[:, None] + changes[:, None])  # (B, 3, 3, R, R)
    enter("changed", method)
    means = run(folder, tmp_path, "--methods", "changed", "--lr", "16")["results"]["16"]["changed"]
    assert means["error"] == pytest.approx((10 / 255) ** 2, rel=0.05)
    assert means["within"] == 0
    assert means["count"] == pytest.approx(2 / 3)
    assert means["diversity"] == pytest.approx((5 * level) ** 2, rel=1e-3)


def test_the_mean_face_is_the_same_for_everybody(folder, tmp_path, plain) -> None:
    means = run(folder, tmp_path, "--methods", "mean", "--lr", "8")["results"]["8"]["mean"]
    face = from_uint8(to_uint8(torch.full((1, 3, R, R), 0.15)))  # the mean of the stub's w_avg
    assert means["lpips"] == pytest.approx((face - from_uint8(truths(folder))).square().mean().item(), rel=1e-5)
    assert "diversity" not in means


def test_pictures_are_measured_as_written(folder, tmp_path, plain, enter) -> None:
    enter("almost", oracle(folder, lambda truth: truth[:, None] + 0.4 / 127.5))
    enter("level", oracle(folder, lambda truth: truth[:, None] + 1 / 127.5))
    enter("white", lambda lr, k, seeds: torch.full((len(lr), 1, 3, R, R), 9.0))
    means = run(folder, tmp_path, "--methods", "almost", "level", "white", "--lr", "8")["results"]["8"]
    assert means["almost"]["psnr"] == "inf"
    assert means["level"]["psnr"] == pytest.approx(20 * math.log10(255), abs=1e-3)
    assert means["white"]["lpips"] == pytest.approx((1 - from_uint8(truths(folder))).square().mean().item())


def test_methods_see_the_rounded_lr_picture(folder, tmp_path, plain, enter) -> None:
    seen = []

    def spy(lr: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
        seen.append((lr, k))
        return torch.zeros(len(lr), k, 3, R, R)

    enter("spy", spy)
    run(folder, tmp_path, "--methods", "spy", "--lr", "8", "--k", "3")
    judged = torch.cat([lr for lr, k in seen if k == 3])
    expected = to_uint8(Downscale(8)(from_uint8(truths(folder))))
    assert torch.equal(judged, from_uint8(expected))
    timed = [lr for lr, k in seen if k == 1]
    assert len(timed) == contest.WARM_UP + min(NUM_FACES, contest.TIMED_FACES)
    assert {tuple(lr.shape) for lr in timed} == {(1, 3, 8, 8)}


def test_batches_do_not_change_the_means(folder, tmp_path, plain, monkeypatch) -> None:
    whole = run(folder, tmp_path)["results"]
    monkeypatch.setattr(cells, "BATCH", 3)
    parts = run(folder, tmp_path)["results"]
    assert parts["8"]["bicubic"] == pytest.approx(whole["8"]["bicubic"], rel=1e-5)
    assert parts["16"]["ours"] == pytest.approx(whole["16"]["ours"], rel=1e-5)


def tiny_metric() -> tuple[str, FrechetInceptionDistance]:
    class MeanColour(nn.Module):
        num_features = 3

        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(2, 3)) / 255

    return "fd_tiny", FrechetInceptionDistance(feature=MeanColour(), reset_real_features=False)


def test_frechet_distance_needs_enough_faces(folder, tmp_path, plain, monkeypatch, enter) -> None:
    monkeypatch.setattr(judge, "frechet_metric", tiny_metric)
    for module in (evaluate, contest):
        monkeypatch.setattr(module, "FRECHET_FACES", NUM_FACES)
    shifted = oracle(
        folder, lambda truth: truth[:, None] + 0.2
    )  # 0.1 in [0, 1], for each of three colours; no clipping
    enter("perfect", oracle(folder))
    enter("shifted", shifted)
    results = run(folder, tmp_path, "--methods", "shifted", "perfect", "--lr", "16")
    assert results["networks"]["frechet"] == "fd_tiny" and "fd_tiny" in (tmp_path / "table.md").read_text()
    assert results["results"]["16"]["perfect"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert results["results"]["16"]["shifted"]["frechet"] == pytest.approx(3 * 0.1**2, rel=0.05)
    few = run(folder, tmp_path, "--faces", str(NUM_FACES - 1), "--lr", "16")
    assert few["networks"]["frechet"] is None and "frechet" not in few["results"]["16"]["bicubic"]


# --- what is written ---


def test_the_table_has_a_row_per_size_and_method(folder, tmp_path, plain, capsys) -> None:
    results = run(folder, tmp_path, "--lr", "8", "16", "--faces", "5")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    for words in ("5 faces", "from 8 px; 16 px", "seed 0", "bundle stub (0123456789ab)"):
        assert words in text.splitlines()[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    expected = [[f"{size} px", method] for size in (8, 16) for method in ("bicubic", "mean face", "ours")]
    assert [row[:2] for row in rows[2:]] == expected
    column = rows[0].index("LPIPS / bicubic")
    ours, bicubic = results["results"]["8"]["ours"], results["results"]["8"]["bicubic"]
    assert rows[2][column] == "1.000" and float(rows[4][column]) == pytest.approx(
        ours["lpips"] / bicubic["lpips"], abs=6e-4
    )
    assert rows[2][rows[0].index("diversity")] == "–" and float(rows[4][rows[0].index("diversity")]) > 0


def test_results_say_how_they_came_about(folder, tmp_path, plain) -> None:
    results = run(folder, tmp_path, "--faces", "99", "--seed", "3")
    assert results["faces"] == NUM_FACES and results["seed"] == 3 and results["data"] == folder.name
    assert results["bundle"] == {"name": "stub", "hash": StubBundle.hash}
    assert results["versions"] == {"torch": torch.__version__, "numpy": np.__version__}
    assert "--faces 99 --seed 3" in results["command"]
    assert "a = -0.5" in results["operator"] and set(results["networks"]) == {"lpips", "identity", "frechet"}
    assert results["timing"]["seconds_per_face"]["8"]["ours"] > 0


def test_the_same_seed_gives_the_same_figures(folder, tmp_path, plain) -> None:
    runs, pictures = [], []
    for _ in range(2):
        runs.append(run(folder, tmp_path, "--seed", "0"))
        pictures.append((tmp_path / "faces_16.png").read_bytes())
    for results in runs:
        results.pop("timing")
    assert runs[0] == runs[1] and pictures[0] == pictures[1]
    other = run(folder, tmp_path, "--seed", "1")["results"]["16"]
    first = runs[0]["results"]["16"]
    assert other["bicubic"] == first["bicubic"] and other["ours"]["psnr"] != first["ours"]["psnr"]
    alone = run(folder, tmp_path, "--methods", "ours", "--lr", "16")["results"]["16"]["ours"]
    assert alone["psnr"] == first["ours"]["psnr"] and alone["lpips_over_bicubic"] is None


def test_the_figure_shows_the_truth_last(folder, tmp_path, plain) -> None:
    run(folder, tmp_path, "--lr", "16", "8")
    truth = truths(folder)[: contest.SHOWN_FACES]
    cell, step = figure.CELL, figure.CELL + 4
    for size in (16, 8):
        pixels = np.array(Image.open(tmp_path / f"faces_{size}.png"))
        # input, bicubic, mean, ours twice, truth
        assert pixels.shape[:2] == (18 + contest.SHOWN_FACES * step, 6 * step)
        lr = to_uint8(Downscale(size)(from_uint8(truth)))
        for column, shown in ((0, lr), (5, truth)):
            for row, picture in enumerate(shown):
                top, left, block = 18 + row * step, column * step, cell // picture.shape[-1]
                part = pixels[top : top + cell : block, left : left + cell : block]
                assert np.array_equal(part, picture.permute(1, 2, 0).numpy())


# --- what goes wrong ---


def no_weights(*args, **kwargs):
    raise FileNotFoundError("Expected the weights 'x.pt', found none.")


def test_a_measure_without_weights_is_left_out(folder, tmp_path, plain, monkeypatch) -> None:
    monkeypatch.setattr(judge, "Identity", no_weights)
    with pytest.warns(UserWarning, match=r"identity.*x\.pt") as caught:
        results = run(folder, tmp_path)
    assert len([w for w in caught if "n/a" in str(w.message)]) == 1
    assert results["networks"]["identity"] is None and "identity" not in results["results"]["16"]["ours"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("| n/a |") == 6


def test_frechet_without_weights_is_left_out(folder, tmp_path, plain, monkeypatch) -> None:
    for module in (evaluate, contest):
        monkeypatch.setattr(module, "FRECHET_FACES", 2)
    monkeypatch.setattr(judge, "frechet_metric", no_weights)
    with pytest.warns(UserWarning, match=r"Fréchet.*x\.pt"):
        assert run(folder, tmp_path)["networks"]["frechet"] is None
    assert (tmp_path / "table.md").read_text(encoding="utf-8").count("| n/a |") == 6


@pytest.mark.parametrize(
    ("more", "network", "message"),
    [
        ((), no_weights, "x.pt"),
        (("--lr", "64"), PixelDistance, "from 4 to 32 px"),
        (("--data", "no_such_faces.zip"), PixelDistance, "no_such_faces.zip"),
    ],
)
def test_what_is_missing_is_named(more, network, message, folder, tmp_path, plain, monkeypatch, capsys) -> None:
    monkeypatch.setattr(judge, "LPIPS", network)
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path / "out"), *more]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_failure_is_a_message_and_leaves_the_sizes_before_it(folder, tmp_path, plain, capsys, enter) -> None:
    def breaks(lr: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
        if lr.shape[-1] == 16:
            raise RuntimeError("out of memory")
        return torch.zeros(len(lr), 1, 3, R, R)

    enter("breaks", breaks)
    options = ["--data", str(folder), "--out", str(tmp_path), "--methods", "breaks", "--lr", "8", "16"]
    assert evaluate.main(options) == 1
    assert "evaluate.py: out of memory" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "faces_8.png", "partial"}
    assert list(json.loads((tmp_path / "results.json").read_text())["results"]) == ["8"]


def test_a_place_that_cannot_be_written_is_refused_first(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate, "load_bundle", lambda *arguments: pytest.fail("the bundle came first"))
    (tmp_path / "out").write_text("mine")
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "--out" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_interrupted(folder, tmp_path, monkeypatch, capsys) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_bundle", interrupt)
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ("--k", "0"),
        ("--faces", "0"),
        ("--seed", "-1"),
        ("--lr", "3"),
        ("--methods", "magic"),
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--out", ""),
        ("--bundle", ""),
        ("--bundle", "ours=somewhere"),
        ("--bundle", "a/b=somewhere"),
        ("--bundle", "a", "--bundle", "b"),
        ("--degradation", "fog"),
        ("--refine", "0"),
    ],
)
def test_wrong_arguments_are_refused(more, plain, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate.main(list(more))
    assert error.value.code == 2 and more[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 3, R, R), "candidates"),
        (torch.zeros(2, 0, 3, R, R), "candidates"),
        (torch.zeros(1, 1, 3, R, R), "candidates"),
        (torch.zeros(2, 1, 3, R, 2 * R), "candidates"),
        (torch.full((2, 1, 3, R, R), math.nan), "finite"),
    ],
)
def test_methods_that_break_the_contract_are_refused(pictures, message) -> None:
    with pytest.raises(ValueError, match=message):
        measures.as_written(pictures, 2, R)
