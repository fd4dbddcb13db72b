"""Boundaries: what is fitted, projected, written and refused; the directions against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import PixelDistance

from data.labels import ATTRIBUTES
from editing import boundaries
from editing.boundary import (
    Boundary,
    apply_edits,
    export_interfacegan,
    import_interfacegan,
    offset_of,
    parse_edit,
    read_boundaries,
    read_boundary,
    write_boundary,
)
from editing.choosing import Trial, rarer_side
from editing.fitting import (
    Hyperplane,
    TooFewSamples,
    Whitening,
    confident_ends,
    direction_of,
    fit_hyperplane,
    project_out,
)
from editing.names import DEFAULT_EDITS, EDITS, SYNONYMS, attribute_of, synonyms_of
from editing.sampling import sample_and_score, sample_w
from models.attributes import AttributeClassifier, save_attributes
from models.checkpoints import load_generator, save_generator, sha256_of
from models.generator import Generator

RNG = np.random.default_rng(0)
SHA = "0" * 64
D = 8


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values)


def boundary(name: str = "smile", layers: tuple[int, int] = (2, 5), seed: int = 0) -> Boundary:
    rng = np.random.default_rng(seed)
    normal = unit(rng.standard_normal(D))
    return Boundary(name, normal, 0.25, 0.5 * normal, layers, SHA, {"attribute": "Smiling", "conditions": []})


# ---------------------------------------------------------------- arithmetic


def test_an_edit_moves_its_layers_by_standard_deviations_along_the_normal() -> None:
    b, ws = boundary(), RNG.standard_normal((3, 10, D)).astype(np.float32)
    moved = apply_edits(ws, [(b, 2.0)])
    assert np.array_equal(moved[:, :2], ws[:, :2]) and np.array_equal(moved[:, 5:], ws[:, 5:])
    assert np.allclose((moved - ws)[:, 2:5] @ b.normal, 2 * b.spread, atol=1e-5)
    assert b.spread == pytest.approx(0.5)


def test_edits_add_up_in_any_order_and_cancel() -> None:
    a, b = boundary(), boundary("male", (0, 10), seed=1)
    ws = RNG.standard_normal((2, 10, D)).astype(np.float32)
    assert np.allclose(apply_edits(ws, [(a, 1.0), (b, -2.0)]), apply_edits(ws, [(b, -2.0), (a, 1.0)]))
    assert np.allclose(apply_edits(ws, [(a, 1.5), (a, -1.5)]), ws, atol=1e-6)
    assert np.array_equal(apply_edits(ws, []), ws)


def test_layers_may_have_steps_of_their_own(tmp_path) -> None:
    b, ws = boundary(), RNG.standard_normal((3, 10, D)).astype(np.float32)
    steps = np.stack([b.direction, -b.direction, 3 * b.direction])
    own = replace(b, direction=steps)
    write_boundary(own, tmp_path / "own.npz")
    own = read_boundary(tmp_path / "own.npz", SHA)
    expected = ws.copy()
    expected[:, 2:5] += 1.5 * steps
    assert np.allclose(apply_edits(ws, [(own, 1.5)]), expected, atol=1e-6)
    assert own.spread == pytest.approx(b.spread) and np.allclose(b.steps, b.direction) and b.steps.shape == (3, D)
    with pytest.raises(ValueError, match=r"or \(3, D\), one for each layer"):
        replace(b, direction=steps[:2])


def test_boundaries_of_larger_generators_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 4 styles"):
        offset_of([(boundary(), 1.0)], 4, D)
    with pytest.raises(ValueError, match="width"):
        apply_edits(np.zeros((1, 10, D + 1)), [(boundary(), 1.0)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("smile=+2", ("smile", 2.0)), ("pale-skin=-0.5", ("pale-skin", -0.5)), ("bangs=1e0", ("bangs", 1.0))],
)
def test_edits_are_read(text, expected) -> None:
    assert parse_edit(text) == expected


@pytest.mark.parametrize("text", ["smile", "smile=", "=2", "smile=nan", "smile=inf", "smile=101", "../x=1", "Smile=1"])
def test_other_words_are_refused(text) -> None:
    with pytest.raises(ValueError, match="NAME=STRENGTH"):
        parse_edit(text)


# ---------------------------------------------------------------- files


def test_a_file_holds_all_and_is_the_same_every_time(tmp_path) -> None:
    b = boundary()
    write_boundary(b, tmp_path / "a.npz")
    write_boundary(b, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = read_boundary(tmp_path / "a.npz", SHA)
    assert np.allclose(found.normal, b.normal, atol=1e-6) and np.allclose(found.direction, b.direction, atol=1e-6)
    assert (found.name, found.layers, found.intercept, found.about) == (b.name, b.layers, b.intercept, b.about)
    assert found.sha256 == sha256_of(tmp_path / "a.npz")


def test_boundaries_of_other_generators_are_refused(tmp_path) -> None:
    write_boundary(boundary(), tmp_path / "smile.npz")
    with pytest.raises(ValueError, match="another generator"):
        read_boundaries(tmp_path, ["smile"], "1" * 64)
    with pytest.raises(ValueError, match="there are: smile"):
        read_boundaries(tmp_path, ["frown"], SHA)


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut off"])
def test_damaged_files_are_refused(content, tmp_path) -> None:
    (tmp_path / "smile.npz").write_bytes(content)
    with pytest.raises(ValueError, match="found something else"):
        read_boundary(tmp_path / "smile.npz")


def test_arrays_with_code_or_of_other_shapes_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", info=np.array({"code": 1}, dtype=object))
    with pytest.raises(ValueError, match="found something else"):
        read_boundary(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="unit length"):
        replace(boundary(), normal=2 * boundary().normal)
    with pytest.raises(ValueError, match="finite"):
        replace(boundary(), direction=np.full(D, np.nan))
    with pytest.raises(ValueError, match="layers"):
        replace(boundary(), layers=(3, 3))


def test_interfacegan_files_go_in_and_out() -> None:
    normal = unit(RNG.standard_normal(D)).astype(np.float32)
    imported = import_interfacegan(normal[None], "smile", 0.7, SHA, 10)
    assert imported.layers == (0, 10) and imported.spread == pytest.approx(0.7)
    array = export_interfacegan(imported)
    assert array.shape == (1, D) and array.dtype == np.float32 and np.allclose(array[0], normal, atol=1e-6)
    for wrong in (np.zeros((2, D)), np.zeros(D), np.ones(D, int)):
        with pytest.raises(ValueError, match="InterFaceGAN"):
            import_interfacegan(wrong, "smile", 1.0, SHA, 10)


# ---------------------------------------------------------------- fitting


def codes(count: int = 6000) -> tuple[np.ndarray, Whitening]:
    mixing = np.eye(D) + 0.3 * RNG.standard_normal((D, D))
    w = RNG.standard_normal((count, D)) @ mixing.T + RNG.standard_normal(D)
    return w, Whitening.of(w)


def test_whitening_gives_unit_covariance() -> None:
    w, whitening = codes()
    u = whitening.whiten(w)
    assert np.allclose(np.cov(u, rowvar=False), np.eye(D), atol=1e-3) and np.allclose(u.mean(0), 0, atol=1e-6)


def test_the_machine_finds_the_plane_that_made_the_labels() -> None:
    w, whitening = codes()
    normal, intercept = unit(RNG.standard_normal(D)), 0.3
    logits = 4 * ((w - w.mean(0)) @ normal + intercept)
    plane = fit_hyperplane(whitening.whiten(w), logits, "x")
    n, _ = plane.in_w(whitening)
    assert float(n @ normal) > 0.99 and plane.accuracy > 0.97
    assert np.linalg.norm(n) == pytest.approx(1) and plane.ends >= 400


def test_the_plane_is_the_same_in_both_coordinates() -> None:
    w, whitening = codes(500)
    plane = Hyperplane(unit(RNG.standard_normal(D)), 0.4, 1.0, 1)
    n, b = plane.in_w(whitening)
    inner, outer = whitening.whiten(w) @ plane.normal + plane.intercept, w @ n + b
    assert np.allclose(inner / outer, (inner / outer)[0])


def test_too_few_samples_say_how_many_are_needed() -> None:
    logits = np.concatenate([np.full(900, -3.0), np.full(100, 3.0)])
    with pytest.raises(TooFewSamples, match="surely with it, 1000 samples hold 100; about 4000 are needed"):
        confident_ends(logits, "hat")
    with pytest.raises(TooFewSamples, match="at least 400000"):
        confident_ends(np.full(1000, -3.0), "hat")
    positive, negative = confident_ends(logits, "hat", least=100)
    assert len(positive) == len(negative) == 100 and logits[positive].min() > 0 > logits[negative].max()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_conditions_are_left_alone_and_the_own_score_moves_by_one_deviation(count) -> None:
    w, whitening = codes()
    plane, *others = (Hyperplane(unit(RNG.standard_normal(D)), 0.0, 1.0, 1) for _ in range(count + 1))
    d = direction_of(plane, others, whitening)
    n, _ = plane.in_w(whitening)
    assert float(n @ d) == pytest.approx((w @ n).std(), rel=1e-2)
    for other in others:
        assert abs(other.in_w(whitening)[0] @ d) < 1e-6 * np.linalg.norm(d)


def test_one_condition_is_interfacegans_projection() -> None:
    a, b = unit(RNG.standard_normal(D)), unit(RNG.standard_normal(D))
    assert np.allclose(project_out(a, [b]), a - (a @ b) * b)
    assert np.allclose(project_out(a, [b, b]), a - (a @ b) * b)  # said twice
    with pytest.raises(ValueError, match="next to nothing"):
        project_out(a, [a])


# ---------------------------------------------------------------- names and choice


def test_every_edit_has_an_attribute_and_all_attributes_have_an_edit() -> None:
    assert {attribute for attribute, _ in EDITS.values()} == set(ATTRIBUTES) and len(EDITS) == 40
    assert attribute_of("beard") == ("No_Beard", -1) and set(DEFAULT_EDITS) <= EDITS.keys() >= SYNONYMS.keys()
    assert all(synonyms_of(name) <= set(ATTRIBUTES) - {attribute_of(name)[0]} for name in EDITS)
    with pytest.raises(ValueError, match="smile"):
        attribute_of("frown")


def test_the_rarer_side_is_measured() -> None:
    assert [rarer_side(0.8, 1), rarer_side(0.1, 1), rarer_side(0.8, -1), rarer_side(0.5, 1)] == [-1, 1, 1, 1]


def test_disentanglement_is_drift_by_own_change() -> None:
    trial = Trial(0.5, {str(i): (-1) ** i * i / 100 for i in range(11)})
    assert trial.typical == pytest.approx(0.09) and trial.disentanglement == pytest.approx(0.18)


def test_of_edits_that_drag_little_the_larger_is_worth_more() -> None:
    def trial(own: float, drift: float) -> Trial:
        return Trial(own, {"other": drift})

    ordered = [trial(0.5, 0.4), trial(0.2, 0.1), trial(0.2, 0.05), trial(0.3, 0.0), trial(0.4, -0.12)]
    assert sorted(reversed(ordered), key=lambda t: t.worth) == ordered


# ---------------------------------------------------------------- samples and the command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A folder with a generator and a classifier."""
    path = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    save_generator(Generator(32, (8, 8, 6, 4), z_dim=D, w_dim=D, mapping_layers=2), path / "generator.safetensors")
    save_attributes(AttributeClassifier(ATTRIBUTES, 32, "test_resnet"), path / "attributes.safetensors")
    return path


def test_samples_are_taken_up_where_they_were_left(bundle, tmp_path, monkeypatch) -> None:
    generator = load_generator(bundle / "generator.safetensors")
    classifier = AttributeClassifier(("x", "y"), 32, "test_resnet").eval()
    monkeypatch.setattr("editing.sampling.CHUNK", 40)
    whole = sample_and_score(generator, classifier, 100, 3, tmp_path / "a", "x")
    sample_and_score(generator, classifier, 80, 3, tmp_path / "b", "x")
    drawn = []
    monkeypatch.setattr(
        "editing.sampling.draw_and_score",
        lambda g, c, ws, progress: drawn.append(len(ws)) or torch.zeros(len(ws), 2),
    )
    again = sample_and_score(generator, classifier, 100, 3, tmp_path / "b", "x")
    assert drawn == [20] and np.array_equal(again.logits[:80], whole.logits[:80])
    assert np.array_equal(whole.w, sample_w(generator, 100, 3).numpy()) and whole.logits.shape == (100, 2)
    sample_and_score(generator, classifier, 40, 3, tmp_path / "b", "another classifier")
    assert drawn == [20, 40]


def call(*arguments: object) -> int:
    return boundaries.main([str(argument) for argument in arguments])


@pytest.fixture
def truth(bundle, monkeypatch) -> np.ndarray:
    """True normals (D, 40): scores that are linear in w stand for those of a classifier."""
    truth = np.random.default_rng(5).standard_normal((D, 40)).astype(np.float32)
    mean = sample_w(load_generator(bundle / "generator.safetensors"), 1000, 9).mean(0)

    def score(g, c, ws, progress=None) -> torch.Tensor:
        w = ws if ws.ndim == 2 else ws[:, 2]  # as if the faces showed one style alone
        return 20 * (w - mean) @ torch.from_numpy(truth)

    for module in ("sampling", "choosing"):
        monkeypatch.setattr(f"editing.{module}.draw_and_score", score)
    return truth


def test_fit_writes_boundaries_of_this_generator(bundle, truth, tmp_path, capsys) -> None:
    options = ("--bundle", bundle, "--samples", 10_000, "--cache", tmp_path, "--device", "cpu", "--shared")
    assert call("fit", "smile", "beard", *options) == 0
    found = read_boundaries(bundle / "boundaries", ["smile", "beard"], sha256_of(bundle / "generator.safetensors"))
    smile, beard = found["smile"], found["beard"]
    w = sample_w(load_generator(bundle / "generator.safetensors"), 1000, 11).numpy()
    for b, attribute, sign in ((smile, "Smiling", 1), (beard, "No_Beard", -1)):
        true = w @ truth[:, ATTRIBUTES.index(attribute)]
        assert sign * np.corrcoef(b.distance(w), true)[0, 1] > 0.97
    assert smile.layers[0] <= 2 < smile.layers[1] and smile.about["own_change"] > 0.2
    assert "smile: layers" in capsys.readouterr().out
    path = bundle / "boundaries" / "smile.npz"
    before = path.read_bytes()
    path.unlink()
    assert call("fit", "smile", "beard", *options) == 0
    assert path.read_bytes() == before
    assert f"made earlier, remove {path.with_name('beard.npz')}" in capsys.readouterr().out  # it was not made twice

    assert call("inspect", "--bundle", bundle) == 0
    assert "cosines" in capsys.readouterr().out
    assert call("combine", "smile", "--without", "beard", "--as", "smile-only", "--bundle", bundle) == 0
    only = read_boundary(bundle / "boundaries" / "smile-only.npz")
    assert abs(only.direction @ beard.normal) < 1e-3 * np.linalg.norm(only.direction)
    assert only.about["conditions"] == ["No_Beard"] and only.spread == pytest.approx(smile.spread, rel=1e-2)
    assert call("combine", "smile", "--as", "smile-only", "--bundle", bundle) == 1  # it exists
    assert call("export", "smile", tmp_path / "smile.npy", "--bundle", bundle) == 0
    assert call("import", tmp_path / "smile.npy", "--as", "smile-back", "--bundle", bundle) == 0
    back = read_boundary(bundle / "boundaries" / "smile-back.npz")
    assert np.allclose(back.normal, unit(smile.direction), atol=1e-5)


def test_fit_learns_a_step_for_each_layer(bundle, truth, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("losses.perceptual.LPIPS", PixelDistance)
    options = ("--bundle", bundle, "--samples", 10_000, "--cache", tmp_path, "--device", "cpu", "--steps", 3)
    assert call("fit", "pale-skin", *options) == 0
    assert "a step for each layer" in capsys.readouterr().out
    path = bundle / "boundaries" / "pale-skin.npz"
    learned, before = read_boundary(path), path.read_bytes()
    raw = boundaries.raw_direction(learned, boundaries.whitening_of(bundle))
    assert learned.direction.shape == (*learned.layers[1:], D)
    assert np.ptp(learned.direction, axis=0).max() > 0.01 * np.abs(raw).max()  # the layers have gone apart
    assert learned.spread == pytest.approx(float(learned.normal @ raw), rel=0.05)  # a strength means the same
    path.unlink()
    assert call("fit", "pale-skin", *options) == 0
    assert path.read_bytes() == before
    assert call("export", "pale-skin", tmp_path / "x.npy", "--bundle", bundle) == 1
    assert "combine pale-skin --without OTHERS --as NEW" in capsys.readouterr().err
    assert call("combine", "pale-skin", "--as", "pale-skin-shared", "--bundle", bundle) == 0
    assert call("export", "pale-skin-shared", tmp_path / "x.npy", "--bundle", bundle) == 0
    path.write_bytes(before[:100])  # damaged: no longer ours
    assert call("fit", "pale-skin", *options, "--overwrite") == 1 and path.read_bytes() == before[:100]
    path.write_bytes(before)
    assert call("fit", "pale-skin", *options[:-1], 2, "--overwrite") == 0 and path.read_bytes() != before
    assert call("fit", "pale-skin", *options, "--shared", "--overwrite") == 0 and read_boundary(
        path
    ).direction.shape == (D,)
    path.unlink()
    path.with_name("pale-skin-shared.npz").unlink()


def test_the_command_refuses_in_words(bundle, tmp_path, capsys) -> None:
    assert call("fit", "smile", "--bundle", bundle, "--samples", 100, "--cache", tmp_path) == 1
    assert "10000 samples or more" in capsys.readouterr().err
    assert call("fit", "frown", "--bundle", bundle) == 1
    assert "expected an edit among" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", np.ones((1, D + 1)))
    assert call("import", tmp_path / "x.npy", "--as", "x", "--bundle", bundle) == 1
    assert f"normal of {D} numbers" in capsys.readouterr().err
    np.save(tmp_path / "y.npy", np.array([{"code": 1}], dtype=object))
    assert call("import", tmp_path / "y.npy", "--as", "x", "--bundle", bundle) == 1
    assert "without objects" in capsys.readouterr().err
    assert call("inspect", "--bundle", tmp_path) == 1


def test_about_is_json(tmp_path) -> None:
    write_boundary(boundary(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert json.loads(str(arrays["info"]))["generator_sha256"] == SHA
