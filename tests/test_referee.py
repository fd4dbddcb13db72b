"""The referee's further measures, groups, partial results and searches; evaluate.py itself is in test_evaluate.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import NUM_FACES, PixelDistance, R, StubBundle, enter, folder, oracle, plain, run, stub
from torch import Tensor, nn

import evaluate
from data.operator import Downscale, upscale_bicubic
from models.bundle import Bundle
from models.encoder import Encoder
from models.generator import Generator
from referee import cells, contest, frechet, groups, judge, methods

__all__ = ["enter", "folder", "plain", "stub"]  # fixtures


def table_of(out: Path) -> str:
    return (out / "table.md").read_text(encoding="utf-8")


# --- degradations, candidates, other bundles ---


def test_errors_count_against_what_was_seen_and_against_the_clean_picture(folder, tmp_path, plain, enter) -> None:
    enter("copy", lambda lr, k, seeds: upscale_bicubic(lr, R)[:, None])
    options = ["--methods", "copy", "--lr", "8", "--degradation"]
    results = run(folder, tmp_path, *options, "clean", "noise50")
    assert results["settings"] == {"8": "8 px", "8_noise50": "8 px, noise50"}
    clean, noisy = results["results"]["8"]["copy"], results["results"]["8_noise50"]["copy"]
    assert clean["error"] == clean["error_clean"]
    assert noisy["error_clean"] > 0.4 * (50 / 255) ** 2 and noisy["error"] < 0.5 * noisy["error_clean"]
    assert noisy["psnr"] < clean["psnr"] and (tmp_path / "faces_8_noise50.png").is_file()
    assert "error, clean" in table_of(tmp_path) and "| 8 px, noise50 | copy |" in table_of(tmp_path)
    alone = run(folder, tmp_path / "alone", *options, "noise50")
    assert alone["results"]["8_noise50"]["copy"]["error"] == noisy["error"]  # a face meets the same noise alone


def test_shares_of_all_candidates_and_work(folder, tmp_path, plain, enter) -> None:
    level = 1 / 127.5
    shift = torch.tensor([0.0, 3 * level, 25 * level, 25 * level])[:, None, None, None]  # errors 0, 1.4e-4, 1e-2, 1e-2
    enter("four", oracle(folder, lambda truth: truth[:, None] + shift))
    means = run(folder, tmp_path, "--methods", "four", "bicubic", "--lr", "8")["results"]["8"]
    assert means["four"]["within"] == 1 and means["four"]["within_all"] == 0.5
    assert means["four"]["count_epsilon"] == 0.5 and means["four"]["passes"] == 1 and means["bicubic"]["passes"] == 0
    assert means["four"]["error_all"] == pytest.approx((3**2 + 2 * 25**2) / 255**2 / 4, rel=0.02)
    assert means["four"]["diversity_epsilon"] == pytest.approx((3 * level) ** 2, rel=1e-3)


def test_another_bundle_is_a_row(folder, tmp_path, plain, monkeypatch) -> None:
    loaded = []
    monkeypatch.setattr(evaluate, "load_bundle", lambda path, device: loaded.append(str(path)) or StubBundle())
    more = ["--bundle", "here", "--bundle", "pSp=there", "--methods", "ours", "--lr", "8", "--faces", "2"]
    results = run(folder, tmp_path, *more)
    assert loaded == ["here", "there"] and results["other_bundles"]["pSp"] == {"name": "stub", "hash": StubBundle.hash}
    assert results["results"]["8"]["pSp"] == results["results"]["8"]["ours"]
    assert "| 8 px | pSp |" in table_of(tmp_path)


def test_bundles_of_other_resolutions_are_refused(folder, tmp_path, plain, monkeypatch, capsys) -> None:
    small = StubBundle()
    small.resolution = 16
    monkeypatch.setattr(evaluate, "load_bundle", lambda path, device: small if "small" in str(path) else StubBundle())
    assert evaluate.main(["--data", str(folder), "--out", str(tmp_path), "--bundle", "x=small", "--lr", "8"]) == 1
    assert "one resolution" in capsys.readouterr().err


def test_attributes_are_counted(folder, tmp_path, plain, enter, monkeypatch) -> None:
    class Bright(nn.Module):
        names = ("Bright", "Dark")

        def forward(self, images: Tensor) -> Tensor:
            level = images.mean(dim=(1, 2, 3))
            return torch.stack([level + 0.5, -0.5 - level], dim=1)

    monkeypatch.setattr("models.attributes.load_attributes", lambda path, device: Bright())
    (tmp_path / "bright.safetensors").write_bytes(b"x")
    shift = torch.tensor([0.0, -0.9, -0.9, -0.9])[:, None, None, None]
    enter("darker", oracle(folder, lambda truth: truth[:, None] + shift))
    options = ["--methods", "darker", "--lr", "8", "--attributes", str(tmp_path / "bright.safetensors")]
    rates = run(folder, tmp_path / "out", *options)["results"]["8"]["darker"]["attributes"]
    assert rates["Bright"] == {"rate": 0.25, "truth": 1.0, "agreement": 1.0}
    assert rates["Dark"] == {"rate": 0.75, "truth": 0.0, "agreement": 1.0}
    assert "| Dark | 0.0% | 75.0% (100.0%) |" in table_of(tmp_path / "out")


@pytest.mark.parametrize(("size", "expected"), [(256, True), (128, False)])
def test_niqe_needs_large_faces(size: int, expected: bool, plain) -> None:
    class Constant:
        def distance(self, images: Tensor) -> Tensor:
            return torch.full((len(images),), 3.0)

    referee = judge.Referee(size, torch.device("cpu"), pristine=Constant())
    pictures = torch.zeros(1, 1, 3, size, size, dtype=torch.uint8)
    values = referee.measure(pictures, pictures[:, 0], torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    assert ("niqe" in values) == expected


# --- groups ---


def test_groups(folder, tmp_path, plain, enter) -> None:
    rows = "".join(f"{i:02}.jpg,{'even' if i % 2 == 0 else 'odd'}\n" for i in range(NUM_FACES - 1))
    (tmp_path / "labels.csv").write_text("file,parity\n" + rows)
    enter("perfect", oracle(folder))
    more = ["--methods", "perfect", "--lr", "8", "--group-by", f"{tmp_path}/labels.csv:parity"]
    found = run(folder, tmp_path / "out", *more)["groups"]["parity"]["8"]["perfect"]
    assert list(found) == ["even", "odd"] and found["even"]["faces"] == 10 and found["odd"]["faces"] == 9
    assert found["odd"]["within"] == 1 and found["odd"]["within_interval"] == pytest.approx([0.701, 1.0], abs=1e-3)
    assert "| 8 px | perfect | odd | 9 | 100.0% (70.1% – 100.0%) |" in table_of(tmp_path / "out")


def test_wilson_intervals_are_those_of_the_textbook() -> None:
    assert groups.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert groups.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert groups.wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_bootstrap_intervals_are_those_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = groups.bootstrap_interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [("file,a\n00.png,1\n", "b", "columns b"), ("x,a\n0,1\n", "a", "file"), ("file,a\nother.png,1\n", "a", "none")],
)
def test_tables_that_do_not_fit(tmp_path, text, column, message) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        groups.read_grouping(f"{tmp_path / 't.csv'}:{column}", ["00.png"])


# --- the Fréchet distance ---


def test_frechet_distance_of_gaussians() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 3, generator=rng), 2 * torch.randn(4000, 3, generator=rng) + 1
    first, second = frechet.Moments(3), frechet.Moments(3)
    for part in a.split(7):
        first.add(part)
    second.add(b)
    assert torch.allclose(first.covariance, torch.cov(a.double().T)) and torch.allclose(first.mean, a.double().mean(0))
    assert frechet.frechet_distance(first, second) == pytest.approx(3 * 1 + 3 * (1 + 4 - 2 * 2), rel=0.06)
    assert frechet.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


# --- going on ---


def test_an_interrupted_run_goes_on_with_the_same_bytes(folder, tmp_path, plain, enter, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cells, "BATCH", 4)
    monkeypatch.setattr(contest, "TIMED_FACES", 2)
    calls = []

    def draw(lr: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
        if k > 1:
            calls.append(tuple(seeds))
            if len(calls) == 3:
                raise KeyboardInterrupt
        noise = [np.random.default_rng(seed).standard_normal((k, 3, R, R), dtype=np.float32) for seed in seeds]
        return upscale_bicubic(lr, R)[:, None] + 0.1 * torch.from_numpy(np.stack(noise))

    enter("noisy", draw)
    command = ["--data", str(folder), "--device", "cpu", "--methods", "noisy", "--lr", "8"]
    assert evaluate.main([*command, "--out", str(tmp_path / "a")]) == 130
    assert "goes on" in capsys.readouterr().err and (tmp_path / "a" / "partial").is_dir()
    assert evaluate.main([*command, "--out", str(tmp_path / "a")]) == 0
    assert calls[2] == calls[3] and len(calls) == 6 and len(set(calls)) == 5  # five batches, one of them tried twice
    assert not (tmp_path / "a" / "partial").exists()
    assert evaluate.main([*command, "--out", str(tmp_path / "b")]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    for result in results:
        del result["timing"], result["command"]
    assert results[0] == results[1]
    assert (tmp_path / "a" / "faces_8.png").read_bytes() == (tmp_path / "b" / "faces_8.png").read_bytes()


def test_other_circumstances_never_share_partial_results(tmp_path) -> None:
    one, other = (cells.Store(tmp_path, {"seed": seed}) for seed in (0, 1))
    one.write("cell", slice(0, 2), {"x": torch.ones(2)}, ["broken.png: no"])
    assert one.has("cell", slice(0, 2)) and not other.has("cell", slice(0, 2)) and not one.has("cell", slice(0, 3))
    ((values, problems),) = one.batches("cell", 2, 2)
    assert torch.equal(values["x"], torch.ones(2)) and problems == ["broken.png: no"]
    with pytest.raises(FileNotFoundError):
        list(other.batches("cell", 2, 2))
    assert one.note("seconds") is None and one.note("seconds", 0.5) == one.note("seconds") == 0.5


def test_a_later_run_measures_only_what_is_new(folder, tmp_path, plain, enter, monkeypatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[[Tensor, int, Sequence[int]], Tensor]:
        def draw(lr: Tensor, k: int, seeds: Sequence[int]) -> Tensor:
            calls.append(name)
            return upscale_bicubic(lr, R)[:, None]

        return draw

    enter("old", counted("old"))
    enter("new", counted("new"))
    hashes = {"old": "0", "new": "1"}
    monkeypatch.setattr(evaluate, "made_of", lambda name, bundle, refine: hashes[name])
    command = ["--data", str(folder), "--lr", "8", "--device", "cpu", "--out", str(tmp_path), "--keep", "--methods"]
    assert evaluate.main([*command, "old"]) == 0 and set(calls) == {"old"}
    calls.clear()
    assert evaluate.main([*command, "old", "new"]) == 0 and set(calls) == {"new"}
    calls.clear()
    hashes["new"] = "2"  # as after a training
    assert evaluate.main([*command, "old", "new"]) == 0 and set(calls) == {"new"}


def test_what_methods_are_made_of(tiny) -> None:
    def hashes(bundle: Bundle, refine: int = 10) -> dict[str, str]:
        names = ("bicubic", "mean", "pulse", "ours", "refined", "other")
        return {name: methods.made_of(name, bundle, refine) for name in names}

    now, trained, longer = hashes(tiny), hashes(replace(tiny, hash="01")), hashes(tiny, refine=20)
    assert {name for name in now if now[name] != trained[name]} == {"ours", "refined", "other"}
    assert {name for name in now if now[name] != longer[name]} == {"refined"}
    other = Generator(R, channels=(8, 8, 8, 8), z_dim=8, w_dim=8, mapping_layers=2)
    drawn = hashes(replace(tiny, generator=other))
    assert {name for name in now if now[name] != drawn[name]} == {"mean", "pulse"}  # its hash would differ as well


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_share_all_faces(count: int) -> None:
    parts = [list(cells.Processes(rank, count).mine(NUM_FACES, 3)) for rank in range(count)]
    seen = sorted(i for own in parts for part in own for i in range(part.start, part.stop))
    assert seen == list(range(NUM_FACES))


def test_processes_give_what_one_gives(folder, tmp_path, plain, monkeypatch) -> None:
    """The first of two processes writes the results, once the second has done its share."""
    monkeypatch.setattr(cells, "BATCH", 4)
    monkeypatch.setattr(contest, "TIMED_FACES", 2)
    command = ["--data", str(folder), "--lr", "8", "--device", "cpu", "--methods", "bicubic", "ours"]
    assert evaluate.main([*command, "--out", str(tmp_path / "one")]) == 0
    for name in ("wait", "leave"):
        monkeypatch.setattr(cells.Processes, name, lambda self: None)
    for rank in (1, 0):
        monkeypatch.setattr(cells.Processes, "join", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        assert evaluate.main([*command, "--out", str(tmp_path / "two")]) == 0
        assert (tmp_path / "two" / "table.md").exists() == (rank == 0)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["results"] == results[1]["results"]


def test_a_broken_face_costs_no_other(folder, tmp_path, plain, capsys) -> None:
    faces = tmp_path / "faces"
    faces.mkdir()
    for path in folder.iterdir():
        (faces / path.name).write_bytes(path.read_bytes())
    (faces / "00a.png").write_bytes(b"no picture")
    command = ["--data", str(faces), "--lr", "8", "--device", "cpu", "--methods", "bicubic"]
    assert evaluate.main([*command, "--out", str(tmp_path / "broken")]) == 1
    assert "00a.png" in capsys.readouterr().err
    broken = json.loads((tmp_path / "broken" / "results.json").read_text())
    assert len(broken["unreadable"]) == 1 and "1 of them" in table_of(tmp_path / "broken")
    whole = run(folder, tmp_path / "whole", "--lr", "8", "--methods", "bicubic")
    assert broken["results"]["8"]["bicubic"]["psnr"] == pytest.approx(whole["results"]["8"]["bicubic"]["psnr"])


# --- the searches ---


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    torch.manual_seed(0)
    generator = Generator(R, channels=(8, 8, 8, 8), z_dim=8, w_dim=8, mapping_layers=2).eval()
    encoder = Encoder(R, generator.num_ws, 8, backbone="test_resnet", width=8).eval()
    encoder.latents.fit(generator, samples=500)
    return Bundle("tiny", R, (4, R), {}, "00", generator, encoder, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "candidates", "most"),
    [("adam", 1, 10), ("brgm", 1, 10), ("pulse", 1, 10), ("mm-pulse", 2, 10), ("refined", 2, 18), ("ours", 2, 1)],
)
def test_searches_take_part(name: str, candidates: int, most: int, tiny: Bundle, monkeypatch) -> None:
    monkeypatch.setattr("search.candidates._lpips", lambda device: PixelDistance())
    short = {key: replace(plan, steps=3) for key, plan in methods.SEARCHES.items()}
    monkeypatch.setattr(methods, "SEARCHES", short)
    method = methods.make_method(name, tiny, refine=2)
    # A face that can be matched: on the way to one that cannot, second-order steps enlarge rounding a thousandfold.
    with torch.no_grad():
        face = tiny.generator(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)))
    lr = Downscale(8)(face.clamp(-1, 1)).repeat(3, 1, 1, 1)
    drawn = method(lr, 2, [5, 6, 5])
    assert drawn.images.shape == (3, candidates, 3, R, R) and drawn.passes.shape == (3, candidates)
    assert torch.allclose(drawn.images[0], drawn.images[2], atol=1e-4)
    assert 1 <= drawn.passes.min() and drawn.passes.max() <= most
    if name in ("pulse", "mm-pulse"):
        assert not torch.allclose(drawn.images[0], drawn.images[1], atol=1e-2)  # seeds of their own


def test_feedback_of_the_encoder_is_work(tiny: Bundle, monkeypatch) -> None:
    """It is counted as it is done: the first codes are drawn, and the result of each pass."""
    monkeypatch.setattr(methods, "SEARCHES", {"adam": methods.Plan("plain", "mean", 0)})
    for feedback in (0, 2):
        encoder = Encoder(R, tiny.generator.num_ws, 8, backbone="test_resnet", width=8, feedback=feedback).eval()
        drawn: list[int] = []
        hook = tiny.generator.synthesis.register_forward_hook(lambda *_, drawn=drawn: drawn.append(1))
        bundle, lr = replace(tiny, encoder=encoder), torch.zeros(1, 3, 8, 8)
        ours = float(methods.make_method("ours", bundle, 1)(lr, 1, [0]).passes)
        assert ours == len(drawn) == 1 + feedback
        drawn.clear()
        alone = float(methods.make_method("encoder", bundle, 1)(lr, 1, [0]).passes)
        hook.remove()
        assert alone == len(drawn) == 1  # it takes none
        assert float(methods.make_method("adam", bundle, 1)(lr, 1, [0]).passes) == 1


def test_rls_without_a_flow_says_how_to_get_one(tiny: Bundle) -> None:
    with pytest.raises(ValueError, match="load it from one"):
        methods.make_method("rls", tiny, 1)
