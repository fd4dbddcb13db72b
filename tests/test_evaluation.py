"""The parts of evaluation/ alone: cache, groups, methods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import CHANNELS, D

from data.operator import Downscale
from evaluation import groups, methods
from evaluation.cache import Cache, Processes
from evaluation.metrics import eight_bit
from evaluation.runner import noise_ratio, project
from models.bundle import Bundle
from models.encoder import Encoder
from models.generator import Generator
from pipeline import Upsampler

R = 32


# --- cache ---


def test_other_circumstances_never_share_a_cache(tmp_path) -> None:
    one, other = (Cache(tmp_path, {"seed": seed}) for seed in (0, 1))
    one.write("cell", slice(0, 2), {"x": torch.ones(2)})
    assert one.has("cell", slice(0, 2)) and not other.has("cell", slice(0, 2)) and not one.has("cell", slice(0, 3))
    assert torch.equal(one.read("cell", 2, 2)["x"], torch.ones(2))
    with pytest.raises(FileNotFoundError):
        other.read("cell", 2, 2)
    assert one.note("seconds") is None and one.note("seconds", 0.5) == one.note("seconds") == 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_share_all_faces(count: int) -> None:
    parts = [list(Processes(rank, count).share(20, 3)) for rank in range(count)]
    assert sorted(i for own in parts for part in own for i in range(part.start, part.stop)) == list(range(20))


# --- groups ---


def test_wilson_intervals_are_those_of_the_textbook() -> None:
    assert groups.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert groups.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_bootstrap_intervals_are_those_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = groups.bootstrap_interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert groups.bootstrap_interval(values[:1]) == (values[0], values[0])


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [("file,a\n00.png,1\n", "b", "columns b"), ("x,a\n0,1\n", "a", "file"), ("file,a\nother.png,1\n", "a", "none")],
)
def test_tables_that_do_not_fit(tmp_path, text, column, message) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        groups.read_grouping(f"{tmp_path / 't.csv'}:{column}", ["00.png"])


# --- methods ---


class Pixels(torch.nn.Module):
    def features(self, images):
        return (images,)

    def distance(self, a, b):
        return (a[0] - b[0]).square().flatten(1).mean(dim=1)


@pytest.mark.parametrize(
    ("name", "samples", "most"),
    [
        ("wplus-adam", 1, 10),
        ("brgm", 1, 10),
        ("pulse", 1, 10),
        ("mm-pulse", 2, 10),
        ("amortized+search", 2, 18),
        ("amortized", 2, 1),
    ],
)
def test_methods_are_reproducible_and_count_generator_calls(name, samples, most, bundle, monkeypatch) -> None:
    monkeypatch.setattr("losses.perceptual.LPIPS", Pixels)
    monkeypatch.setattr(methods, "SEARCHES", {key: (init, 3) for key, (init, _) in methods.SEARCHES.items()})
    method = methods.make_method(name, bundle, search=2)
    with torch.no_grad():  # faces that can be matched
        faces = bundle.generator(torch.randn(2, D, generator=torch.Generator().manual_seed(0)))
    lr = Downscale(8)(faces.clamp(-1, 1))[[0, 1, 0]]
    output = method(lr, 2, 5)
    assert output.images.shape == (3, samples, 3, R, R) and output.nfe.shape == (3, samples)
    assert torch.allclose(output.images[0], output.images[2], atol=1e-4)
    assert 1 <= output.nfe.min() and output.nfe.max() <= most
    assert torch.allclose(method(lr[1:2], 1, 5).images, output.images[1:2, :1], atol=1e-4)  # the same alone


@pytest.mark.parametrize("sigma", [0.0, 30.0])
def test_amortized_rows_are_what_the_pipeline_gives(bundle, tiny_bundle, sigma, monkeypatch) -> None:
    monkeypatch.setattr(Encoder, "noise_level", lambda self, lr: torch.full((len(lr),), sigma))
    lr = Downscale(8)(torch.rand(2, 3, R, R, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    raw = methods.make_method("amortized", bundle, 0)(lr, 3, 7).images
    upsampler = Upsampler.from_pretrained(tiny_bundle, "cpu")
    for fidelity, images in ((0.0, raw), (1.0, project(raw, lr, noise_ratio(bundle, lr)))):
        expected = upsampler(lr, k=3, seed=7, fidelity=fidelity).images
        assert torch.allclose(eight_bit(images), expected, atol=1.01 / 127.5)


def test_recipes_name_what_samples_depend_on(bundle) -> None:
    def hashes(of: Bundle, search: int = 10) -> dict[str, str]:
        names = ("bicubic", "mean", "pulse", "amortized", "amortized+search", "other")
        return {name: methods.recipe_hash(name, of, search) for name in names}

    now, trained, longer = hashes(bundle), hashes(replace(bundle, hash="01")), hashes(bundle, search=20)
    assert {name for name in now if now[name] != trained[name]} == {"amortized", "amortized+search", "other"}
    assert {name for name in now if now[name] != longer[name]} == {"amortized+search"}
    other = Generator(R, CHANNELS, z_dim=D, w_dim=D, mapping_layers=2)
    redrawn = hashes(replace(bundle, generator=other))
    assert {name for name in now if now[name] != redrawn[name]} == {"mean", "pulse"}  # its hash would differ as well


def test_rls_without_a_flow_says_how_to_get_one(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="flow_64.yaml"):
        methods.make_method("rls", bundle, 1)
