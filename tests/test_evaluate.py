"""evaluate.py from command line to table, on a stub bundle and networks of one layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import evaluate
from data.faces import Faces
from data.figures import GAP, TILE, TITLE
from data.files import LEDGER
from data.image_io import from_uint8, to_uint8, write_image
from data.operator import Downscale, upscale_bicubic
from evaluation import cache, methods, metrics, options, runner
from evaluation.methods import Output
from models.encoder_base import face_noise

R, NUM_FACES = 32, 20  # more than one batch


class Pixels(nn.Module):
    """In place of LPIPS: the mean squared difference of pixels, summed over colours."""

    def __init__(self, net: str = "squeeze") -> None:
        super().__init__()

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images,)


class Colours(nn.Module):
    """In place of VGG11: three means of colour."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


class Direction(nn.Module):
    """In place of the face embedding: the picture itself, at unit length."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(images.flatten(1), dim=1)


class StubBundle:
    """Bicubic faces with noise that follows from seed and face."""

    name, hash, resolution, lr_sizes, device = "stub", "0123456789abcdef", R, (4, R), torch.device("cpu")
    encoder = SimpleNamespace(noise_level=lambda lr: torch.zeros(len(lr)))

    class Generator(SimpleNamespace):
        w_avg, num_ws, z_dim = torch.full((R * R,), 0.15), 3, 3
        state_dict = dict

        def __call__(self, z: Tensor) -> Tensor:
            return z[:, :, None, None].expand(-1, -1, R, R) / 4

    generator = Generator()

    def noise_ratio(self, sigma: Tensor) -> None:
        assert not sigma.any()

    def encode(self, lr: Tensor, k: int, seed: int, sigma: Tensor) -> Tensor:
        noise = 0.05 * face_noise(lr, k, 3 * R * R, seed).view(-1, k, 3, R * R)
        return upscale_bicubic(lr, R)[:, None].flatten(-2) + noise

    def generate(self, ws: Tensor) -> Tensor:
        return ws.unflatten(-1, (R, R))  # a style is a colour


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Faces: waves of random direction and colour, all within 0.1 to 0.9, with a grain that no LR picture shows."""
    path, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    y, x = np.mgrid[:R, :R] / R
    for i in range(NUM_FACES):
        a, b, c = rng.uniform(-9, 9, (3, 3, 1, 1))
        wave = 0.5 + 0.3 * np.sin(a * x + b * y + c) + rng.uniform(-0.1, 0.1, (3, R, R))  # (3, R, R)
        Image.fromarray((255 * wave).astype(np.uint8).transpose(1, 2, 0)).save(path / f"{i:02}.png")
    return path


@pytest.fixture(autouse=True)
def stub(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "load_bundle", lambda path, device: StubBundle())
    monkeypatch.setattr(options, "DEFAULT_METHODS", ("bicubic", "amortized"))
    monkeypatch.setattr(runner, "TIMED_FACES", 2)
    monkeypatch.setattr(metrics, "NETWORKS", {"lpips": Pixels, "vgg11": Colours, "identity": Direction})


@pytest.fixture
def enter(monkeypatch) -> Callable[[str, Callable], None]:
    """Lets a method take part that maps LR pictures, k and seeds to samples."""

    def add(name: str, upsample: Callable[[Tensor, int, int], Tensor]) -> None:
        def method(lr: Tensor, k: int, seed: int) -> Output:
            images = upsample(lr, k, seed)
            return Output(images, torch.ones(images.shape[:2]))

        monkeypatch.setitem(methods.DIRECT, name, lambda bundle: method)
        monkeypatch.setattr(options, "METHODS", (*options.METHODS, name))

    return add


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
    return lambda lr, k, seed: change(torch.stack([known[to_uint8(one[None]).numpy().tobytes()] for one in lr]))


def run(folder: Path | str, out: Path, *more: str) -> dict:
    assert evaluate.main(["--data", str(folder), "--out", str(out), "--device", "cpu", "--overwrite", *more]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def table_of(out: Path) -> str:
    return (out / "table.md").read_text(encoding="utf-8")


# --- what is measured ---


def test_a_perfect_method(folder, tmp_path, enter) -> None:
    enter("perfect", oracle(folder))
    rows = run(folder, tmp_path, "--methods", "bicubic", "perfect", "--lr", "16")["results"]["16"]
    assert list(rows) == ["bicubic", "bicubic+projection", "perfect", "perfect+projection"]
    perfect = rows["perfect"]
    assert perfect["psnr"] == 100 and perfect["lpips_point"] == 0 and perfect["rank1_point"] == 1
    assert perfect["identity_point"] == pytest.approx(1, abs=1e-5) and perfect["ssim"] == pytest.approx(1, abs=1e-5)
    assert perfect["lr_psnr_worst"] >= -20 * math.log10(0.5 / 255)  # the rounding of the LR picture
    assert rows["bicubic"]["lpips_point"] > 0.01 and rows["bicubic"]["nfe"] == 0 and perfect["nfe"] == 1


def test_projection_explains_the_input_whatever_the_method(folder, tmp_path, enter) -> None:
    enter("grey", lambda lr, k, seed: torch.zeros(len(lr), k, 3, R, R))
    rows = run(folder, tmp_path, "--methods", "grey", "--lr", "8")["results"]["8"]
    assert rows["grey"]["lr_psnr"] < 25 and rows["grey+projection"]["lr_psnr_worst"] > 50
    assert rows["grey+projection"]["lpips_point"] < rows["grey"]["lpips_point"]
    for choice, expected in (("without", "grey"), ("only", "grey+projection")):
        some = run(folder, tmp_path, "--methods", "grey", "--lr", "8", "--projection", choice)["results"]["8"]
        assert list(some) == [expected] and some[expected] == rows[expected]


def test_methods_see_the_rounded_lr_picture(folder, tmp_path, enter) -> None:
    seen = []

    def spy(lr: Tensor, k: int, seed: int) -> Tensor:
        seen.append((lr, k))
        return torch.zeros(len(lr), k, 3, R, R)

    enter("spy", spy)
    run(folder, tmp_path, "--methods", "spy", "--lr", "8", "--k", "3")
    judged = torch.cat([lr for lr, k in seen if k == 3])  # once for both rows
    assert torch.equal(judged, from_uint8(to_uint8(Downscale(8)(from_uint8(truths(folder))))))
    timed = [lr for lr, k in seen if k == 1]
    assert len(timed) == runner.WARM_UP + runner.TIMED_FACES and {tuple(lr.shape) for lr in timed} == {(1, 3, 8, 8)}


def test_batches_do_not_change_the_means(folder, tmp_path, monkeypatch) -> None:
    whole = run(folder, tmp_path)["results"]
    monkeypatch.setattr(runner, "BATCH", 3)
    parts = run(folder, tmp_path)["results"]
    for condition, row in (("8", "bicubic"), ("16", "amortized+projection")):
        assert parts[condition][row] == pytest.approx(whole[condition][row], rel=1e-4)


def test_degraded_inputs_are_told_from_clean_ones(folder, tmp_path) -> None:
    more = ["--methods", "bicubic", "--lr", "8", "--projection", "without", "--degradation"]
    results = run(folder, tmp_path, *more, "clean", "noise50")
    assert results["conditions"] == {"8": "8 px", "8_noise50": "8 px, noise50"}
    clean, noisy = results["results"]["8"]["bicubic"], results["results"]["8_noise50"]["bicubic"]
    assert clean["lr_psnr"] == pytest.approx(clean["lr_psnr_clean"])
    assert noisy["lr_psnr_clean"] < noisy["lr_psnr"] and noisy["psnr"] < clean["psnr"]
    assert (tmp_path / "faces_8_noise50.png").is_file() and "| 8 px, noise50 | bicubic |" in table_of(tmp_path)
    alone = run(folder, tmp_path / "alone", *more, "noise50")
    assert alone["results"]["8_noise50"]["bicubic"] == noisy  # a face meets the same noise alone


def test_distances_between_sets_need_enough_faces(folder, tmp_path, monkeypatch, enter) -> None:
    enter("shifted", oracle(folder, lambda truth: truth[:, None] + 0.2))  # 0.1 in [0, 1] for each of three colours
    command = ["--methods", "shifted", "--lr", "16", "--projection", "without"]
    assert "fd_vgg11" not in run(folder, tmp_path, *command)["results"]["16"]["shifted"]
    monkeypatch.setattr(metrics, "FRECHET_FACES", NUM_FACES)
    monkeypatch.setitem(metrics.NETWORKS, "inception", Colours)
    found = run(folder, tmp_path, *command, "--networks", "vgg11", "inception", "lpips", "--lpips", "alex")
    assert "| FID |" in table_of(tmp_path) and "LPIPS on alex" in table_of(tmp_path)
    found = found["results"]["16"]["shifted"]
    assert found["fd_vgg11"] == found["fid"] == pytest.approx(3 * 0.1**2, rel=0.05) and found["kid_vgg11"] > 0


def test_the_generators_own_faces(tmp_path) -> None:
    results = run("generated", tmp_path, "--faces", "5", "--lr", "8")
    assert results["data"] == "generated" and results["faces"] == 5
    assert results["results"]["8"]["bicubic"]["psnr"] > 45  # the stub's faces are plain
    other = run("generated", tmp_path, "--faces", "5", "--lr", "8", "--seed", "1")
    assert other["data_hash"] != results["data_hash"]


def test_another_bundle_is_a_row(folder, tmp_path, monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr(evaluate, "load_bundle", lambda path, device: loaded.append(str(path)) or StubBundle())
    more = ["--bundle", "here", "--bundle", "psp=there", "--methods", "amortized", "--lr", "8", "--faces", "2"]
    results = run(folder, tmp_path, *more)
    assert loaded == ["here", "there"] and results["other_bundles"]["psp"] == {"name": "stub", "hash": StubBundle.hash}
    assert results["results"]["8"]["psp"] == results["results"]["8"]["amortized"]


def test_attributes_are_counted(folder, tmp_path, enter, monkeypatch) -> None:
    class Bright(nn.Module):
        names = ("Bright", "Dark")

        def forward(self, images: Tensor) -> Tensor:
            level = images.mean(dim=(1, 2, 3))
            return torch.stack([level + 0.5, -0.5 - level], dim=1)

    monkeypatch.setattr("models.attributes.load_attributes", lambda path, device: Bright())
    (tmp_path / "bright.safetensors").write_bytes(b"x")
    shift = torch.tensor([0.0, -0.9, -0.9, -0.9])[:, None, None, None]
    enter("darker", oracle(folder, lambda truth: truth[:, None] + shift))
    more = ["--methods", "darker", "--lr", "8", "--attributes", str(tmp_path / "bright.safetensors")]
    rates = run(folder, tmp_path / "out", *more)["results"]["8"]["darker"]["attributes"]
    assert rates["Bright"] == {"rate": 0.25, "truth": 1.0, "agreement": 1.0}
    assert rates["Dark"] == {"rate": 0.75, "truth": 0.0, "agreement": 1.0}
    assert "| Dark | 0.0% | 75.0% (100.0%) |" in table_of(tmp_path / "out")


def test_groups(folder, tmp_path, enter) -> None:
    rows = "".join(f"{i:02}.jpg,{'even' if i % 2 == 0 else 'odd'}\n" for i in range(NUM_FACES - 1))
    (tmp_path / "labels.csv").write_text("file,parity\n" + rows)
    enter("perfect", oracle(folder))
    more = ["--methods", "perfect", "--lr", "8", "--group-by", f"{tmp_path}/labels.csv:parity"]
    found = run(folder, tmp_path / "out", *more)["groups"]["parity"]["8"]["perfect"]
    assert list(found) == ["even", "odd"] and found["even"]["faces"] == 10 and found["odd"]["faces"] == 9
    assert found["odd"]["success"] == 1 and found["odd"]["success_interval"] == pytest.approx([0.701, 1.0], abs=1e-3)
    assert found["odd"]["identity"] == pytest.approx(1, abs=1e-5)
    assert "| 8 px | perfect | odd | 9 | 100.0% (70.1% – 100.0%) |" in table_of(tmp_path / "out")


def test_a_part_of_a_split_is_measured_alone(folder, tmp_path) -> None:
    for part, names in {"train": range(10), "val": range(10, 15), "test": range(15, 20)}.items():
        (tmp_path / f"{part}.txt").write_text("".join(f"{i:02}.png\n" for i in names))
    results = run(folder, tmp_path / "out", "--split", str(tmp_path), "--part", "test", "--lr", "8")
    assert results["faces"] == 5 and results["split"] == [str(tmp_path.name), "test"]


# --- what is written ---


def test_the_table_has_a_row_per_size_and_method(folder, tmp_path, capsys) -> None:
    run(folder, tmp_path, "--lr", "8", "16", "--faces", "5")
    text = table_of(tmp_path)
    assert capsys.readouterr().out == text
    for words in ("5 faces", "from 8 px; 16 px", "seed 0", "bundle stub (0123456789ab)"):
        assert words in text.splitlines()[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["bicubic", "bicubic+projection", "amortized", "amortized+projection"]
    assert [row[:2] for row in rows[2:]] == [[f"{size} px", name] for size in (8, 16) for name in names]
    assert len({len(row) for row in rows}) == 1 and len(set(rows[0])) == len(rows[0])
    column = rows[0].index("ratio LPIPS")
    assert rows[2][column] == "–" and float(rows[4][column]) > 0


def test_results_say_how_they_came_about(folder, tmp_path) -> None:
    results = run(folder, tmp_path, "--faces", "99", "--seed", "3", "--lr", "8")
    assert results["faces"] == NUM_FACES and results["seed"] == 3 and results["data"] == folder.name
    assert results["bundle"] == {"name": "stub", "hash": StubBundle.hash}
    assert results["versions"] == {"torch": torch.__version__, "numpy": np.__version__}
    assert "--faces 99 --seed 3" in results["command"] and "a = -0.5" in results["operator"]
    assert results["networks"] == {"lpips": True, "vgg11": True, "identity": True}
    assert results["timing"]["seconds_per_face"]["8"]["amortized"] > 0


def test_the_same_seed_gives_the_same_figures(folder, tmp_path) -> None:
    runs, pictures = [], []
    for _ in range(2):
        runs.append(run(folder, tmp_path, "--seed", "0", "--lr", "16"))
        pictures.append((tmp_path / "faces_16.png").read_bytes())
        del runs[-1]["timing"]
    assert runs[0] == runs[1] and pictures[0] == pictures[1]
    other, first = run(folder, tmp_path, "--seed", "1", "--lr", "16")["results"]["16"], runs[0]["results"]["16"]
    assert other["bicubic"] == first["bicubic"] and other["amortized"]["lpips_draw"] != first["amortized"]["lpips_draw"]
    alone = run(folder, tmp_path, "--methods", "amortized", "--lr", "16")["results"]["16"]
    assert alone["amortized"] == first["amortized"]


def test_the_figure_shows_the_truth_last(folder, tmp_path) -> None:
    run(folder, tmp_path, "--lr", "16", "--projection", "without")
    truth = truths(folder)[: runner.SHOWN_FACES]
    pixels = np.array(Image.open(tmp_path / "faces_16.png"))
    assert pixels.shape[:2] == (runner.SHOWN_FACES * (TILE + GAP + TITLE) + GAP, 7 * (TILE + GAP) + GAP)
    lr = to_uint8(Downscale(16)(from_uint8(truth)))
    for column, shown in ((0, lr), (6, truth)):  # between them bicubic and amortized
        for row, picture in enumerate(shown):
            top, left = GAP + TITLE + row * (TILE + GAP + TITLE), GAP + column * (TILE + GAP)
            block = TILE // picture.shape[-1]
            part = pixels[top : top + TILE : block, left : left + TILE : block]
            assert np.array_equal(part, picture.permute(1, 2, 0).numpy())


# --- folders ---


def write_samples(folder: Path, out: Path, k: int) -> None:
    for path, truth in zip(sorted(folder.iterdir()), from_uint8(truths(folder)), strict=True):
        (out / path.stem).mkdir(parents=True)
        for i in range(1, k + 1):
            write_image(truth + 0.02 * i, out / path.stem / f"{i}.png")
        write_image(Downscale(8)(truth[None])[0], out / path.stem / "input.png")


def test_folders_are_measured_like_methods(folder, tmp_path, enter) -> None:
    write_samples(folder, tmp_path / "samples", 3)
    command = ["--folders", str(folder), str(tmp_path / "samples"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main(command) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["faces"] == NUM_FACES and found["k"] == 3
    means = found["results"]["8"]["samples"]
    shifts = torch.tensor([0.02, 0.04, 0.06])[:, None, None, None]
    enter("shifted", oracle(folder, lambda truth: truth[:, None] + shifts))
    more = ["--methods", "shifted", "--lr", "8", "--k", "3", "--projection", "without"]
    expected = run(folder, tmp_path / "methods", *more)["results"]["8"]["shifted"]
    common = set(means) & set(expected)
    assert {name: means[name] for name in common} == pytest.approx({name: expected[name] for name in common})
    assert "lr_psnr" in common and "ratio_lpips" in common
    assert "samples in samples" in table_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: [path.unlink() for path in (out / "03").iterdir()], "samples of 03"),
        (lambda out: (out / "03" / "2.png").unlink(), "3 samples"),
        (lambda out: (out / "03" / "input.png").unlink(), "--lr"),
        (lambda out: write_image(torch.zeros(3, 8, 8), out / "03" / "1.png"), "32 x 32"),
    ],
)
def test_folders_that_do_not_fit(folder, tmp_path, capsys, spoil, message) -> None:
    write_samples(folder, tmp_path / "samples", 3)
    spoil(tmp_path / "samples")
    command = ["--folders", str(folder), str(tmp_path / "samples"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main(command) == 1
    assert message in capsys.readouterr().err


def test_a_plain_folder_of_pictures_needs_the_size_of_the_inputs(folder, tmp_path) -> None:
    command = ["--folders", str(folder), str(folder), "--lr", "8", "--out", str(tmp_path), "--device", "cpu"]
    assert evaluate.main(command) == 0
    assert json.loads((tmp_path / "results.json").read_text())["results"]["8"][folder.name]["lpips_point"] == 0


# --- what goes wrong ---


def no_weights() -> nn.Module:
    raise FileNotFoundError("Expected the weights 'x.pt', found none.")


def test_a_measure_without_weights_is_left_out(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(metrics.NETWORKS, "identity", no_weights)
    results = run(folder, tmp_path, "--lr", "8")
    assert not results["networks"]["identity"] and "identity_point" not in results["results"]["8"]["amortized"]
    assert "for want of weights: identity" in table_of(tmp_path)
    some = run(folder, tmp_path, "--lr", "8", "--networks", "lpips")
    assert some["networks"] == {"lpips": True} and "for want of" not in table_of(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"), [(("--lr", "64"), "from 4 to 32 px"), (("--data", "no_such_faces.zip"), "no_such_faces.zip")]
)
def test_what_is_missing_is_named(more, message, folder, tmp_path, capsys) -> None:
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").rglob("*")] in ([], ["cache"])


def test_bundles_of_other_resolutions_are_refused(folder, tmp_path, monkeypatch, capsys) -> None:
    small = StubBundle()
    small.resolution = 16
    monkeypatch.setattr(evaluate, "load_bundle", lambda path, device: small if "small" in str(path) else StubBundle())
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path), "--bundle", "x=small", "--lr", "8"]) == 2
    assert "one resolution" in capsys.readouterr().err


def test_a_failure_is_a_message_and_leaves_the_sizes_before_it(folder, tmp_path, capsys, enter) -> None:
    def breaks(lr: Tensor, k: int, seed: int) -> Tensor:
        if lr.shape[-1] == 16:
            raise RuntimeError("out of memory")
        return torch.zeros(len(lr), 1, 3, R, R)

    enter("breaks", breaks)
    command = ["--data", str(folder), "--out", str(tmp_path), "--methods", "breaks", "--lr", "8", "16"]
    assert evaluate.main(command) == 1
    assert "evaluate.py: out of memory" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "faces_8.png", "cache", LEDGER}
    assert list(json.loads((tmp_path / "results.json").read_text())["results"]) == ["8"]


@pytest.mark.parametrize("images", [torch.zeros(2, 3, R, R), torch.zeros(2, 1, 3, R, 2 * R), torch.full((), math.nan)])
def test_methods_that_break_the_contract_are_refused(folder, tmp_path, enter, capsys, images) -> None:
    enter("broken", lambda lr, k, seed: images.expand(len(lr), 1, 3, R, R) if images.ndim == 0 else images)
    more = ["--methods", "broken", "--lr", "8", "--projection", "without", "--faces", "2"]
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path), *more]) == 1
    assert "Expected" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_first(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate, "load_bundle", lambda *arguments: pytest.fail("the bundle came first"))
    (tmp_path / "out").write_text("mine")
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "--out" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "more",
    [
        ("--k", "0"),
        ("--faces", "0"),
        ("--seed", "-1"),
        ("--lr", "3"),
        ("--methods", "magic"),
        ("--projection", "never"),
        ("--networks", "magic"),
        ("--device", "abacus"),
        ("--out", ""),
        ("--bundle", ""),
        ("--bundle", "amortized=somewhere"),
        ("--bundle", "a/b=somewhere"),
        ("--bundle", "a", "--bundle", "b"),
        ("--degradation", "fog"),
        ("--search", "0"),
        ("--lr", "8", "16", "--folders", "a", "b"),
    ],
)
def test_wrong_arguments_are_refused(more, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        evaluate.main(list(more))
    assert error.value.code == 2 and more[0] in capsys.readouterr().err


# --- the cache ---


def test_an_interrupted_run_continues_with_the_same_bytes(folder, tmp_path, enter, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runner, "BATCH", 4)
    calls = []

    def noisy(lr: Tensor, k: int, seed: int) -> Tensor:
        if k > 1:
            calls.append(lr.numpy().tobytes())
            if len(calls) == 3:
                raise KeyboardInterrupt
        return upscale_bicubic(lr, R)[:, None] + face_noise(lr, k, R * R, seed).view(-1, k, 1, R, R) / 10

    enter("noisy", noisy)
    command = ["--data", str(folder), "--device", "cpu", "--methods", "noisy", "--lr", "8"]
    assert evaluate.main([*command, "--out", str(tmp_path / "a")]) == 130
    assert "continues" in capsys.readouterr().err and (tmp_path / "a" / "cache").is_dir()
    assert evaluate.main([*command, "--out", str(tmp_path / "a")]) == 0
    assert calls[2] == calls[3] and len(calls) == 6 and len(set(calls)) == 5  # five batches, one of them tried twice
    assert not (tmp_path / "a" / "cache").exists()
    assert evaluate.main([*command, "--out", str(tmp_path / "b")]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    for result in results:
        del result["timing"], result["command"]
    assert results[0] == results[1]


def test_a_later_run_measures_only_what_is_new(folder, tmp_path, enter, monkeypatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[[Tensor, int, int], Tensor]:
        def upsample(lr: Tensor, k: int, seed: int) -> Tensor:
            calls.append(name)
            return upscale_bicubic(lr, R)[:, None]

        return upsample

    enter("old", counted("old"))
    enter("new", counted("new"))
    hashes = {"old": "0", "new": "1"}
    monkeypatch.setattr(evaluate, "recipe_hash", lambda name, bundle, search: hashes[name])
    command = [
        "--data",
        str(folder),
        "--lr",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--keep",
        "--overwrite",
        "--methods",
    ]
    assert evaluate.main([*command, "old"]) == 0 and set(calls) == {"old"}
    for change in (None, "2"):  # the second as after a training
        calls.clear()
        hashes["new"] = change or hashes["new"]
        assert evaluate.main([*command, "old", "new"]) == 0 and set(calls) == {"new"}
    calls.clear()
    assert evaluate.main([*command, "old", "--seed", "1"]) == 0 and set(calls) == {"old"}
    calls.clear()
    monkeypatch.setattr(StubBundle, "noise_ratio", lambda self, sigma: torch.ones(len(sigma)))  # another estimator
    assert evaluate.main([*command, "old", "--projection", "without"]) == 0 and not calls
    assert evaluate.main([*command, "old"]) == 0 and set(calls) == {"old"}


def test_processes_give_what_one_gives(folder, tmp_path, monkeypatch) -> None:
    """The first of two processes writes the results, once the second has done its share."""
    monkeypatch.setattr(runner, "BATCH", 4)
    command = ["--data", str(folder), "--lr", "8", "--device", "cpu"]
    assert evaluate.main([*command, "--out", str(tmp_path / "one")]) == 0
    for name in ("wait", "leave"):
        monkeypatch.setattr(cache.Processes, name, lambda self: None)
    for rank in (1, 0):
        monkeypatch.setattr(cache.Processes, "join", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        assert evaluate.main([*command, "--out", str(tmp_path / "two")]) == 0
        assert (tmp_path / "two" / "table.md").exists() == (rank == 0)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["results"] == results[1]["results"]


def test_a_broken_face_costs_no_other(folder, tmp_path, capsys) -> None:
    faces = tmp_path / "faces"
    faces.mkdir()
    for path in folder.iterdir():
        (faces / path.name).write_bytes(path.read_bytes())
    (faces / "00a.png").write_bytes(b"no picture")
    command = ["--data", str(faces), "--lr", "8", "--device", "cpu", "--methods", "bicubic"]
    assert evaluate.main([*command, "--out", str(tmp_path / "broken")]) == 1
    assert "00a.png" in capsys.readouterr().err
    broken = json.loads((tmp_path / "broken" / "results.json").read_text())
    assert len(broken["unreadable"]) == 1 and "1 more cannot be read" in table_of(tmp_path / "broken")
    whole = run(folder, tmp_path / "whole", "--lr", "8", "--methods", "bicubic")
    assert broken["results"]["8"]["bicubic"]["psnr"] == pytest.approx(whole["results"]["8"]["bicubic"]["psnr"])
