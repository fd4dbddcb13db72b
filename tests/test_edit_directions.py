"""Edit directions: what is fitted, projected, written and refused; steps against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import PixelDistance

import editing.hyperplane
from data.labels import ATTRIBUTES
from editing.__main__ import main, whitening_of
from editing.direction import (
    EditDirection,
    EditPlan,
    UnknownDirection,
    export_interfacegan,
    import_interfacegan,
    parse_edit,
    read_direction,
    read_directions,
    write_direction,
)
from editing.hyperplane import (
    Hyperplane,
    Whitening,
    confident_ends,
    fit_hyperplane,
    project_out,
    sample_and_score,
    sample_w,
    step_of,
)
from editing.learning import Effect, rarer_side
from editing.names import DEFAULT_EDITS, EDITS, SYNONYMS, attribute_of, synonyms_of
from models.attributes import AttributeClassifier, save_attributes
from models.checkpoints import load_generator, save_generator, sha256_of
from models.generator import Generator
from models.pretrained import ROOT

RNG = np.random.default_rng(0)
SHA = "0" * 64
D = 8


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values)


def direction(name: str = "smile", seed: int = 0, styles: int = 10) -> EditDirection:
    rng = np.random.default_rng(seed)
    normal = unit(rng.standard_normal(D))
    shares = rng.uniform(0, 1, (styles, 1))
    return EditDirection(name, normal, 0.25, shares / shares.mean() / 2 * normal, SHA, {"attribute": "Smiling"})


# ---------------------------------------------------------------- arithmetic


def test_edits_add_up_in_any_order_and_cancel() -> None:
    a, b = direction(), direction("male", seed=1)
    offset = EditPlan(((a, 1.0), (b, -2.0))).offset(10, D)
    assert np.allclose(offset, a.steps - 2 * b.steps, atol=1e-6)
    assert np.array_equal(offset, EditPlan(((b, -2.0), (a, 1.0))).offset(10, D))
    assert np.allclose(EditPlan(((a, 1.5), (a, -1.5))).offset(10, D), 0) and not EditPlan().offset(10, D).any()
    assert a.sigma == pytest.approx(0.5)  # a strength of 1 is σ along the normal, in the mean of the styles
    for shape in ((8, D), (10, D + 1)):
        with pytest.raises(ValueError, match="for this generator"):
            EditPlan(((a, 1.0),)).offset(*shape)


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
    d = direction()
    for name in ("a", "b"):
        write_direction(d, tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = read_direction(tmp_path / "a.npz", SHA)
    assert np.allclose(found.normal, d.normal, atol=1e-6) and np.allclose(found.steps, d.steps, atol=1e-6)
    assert (found.name, found.intercept, found.about) == (d.name, d.intercept, d.about)
    assert found.sha256 == sha256_of(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert json.loads(str(arrays["info"]))["generator_sha256"] == SHA


def test_directions_of_other_generators_are_refused(tmp_path) -> None:
    write_direction(direction(), tmp_path / "smile.npz")
    with pytest.raises(ValueError, match="another generator"):
        read_directions(tmp_path, ["smile"], "1" * 64)
    with pytest.raises(ValueError, match="there are: smile"):
        read_directions(tmp_path, ["frown"], SHA)


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut off", {"code": 1}])
def test_damaged_files_are_refused(content, tmp_path) -> None:
    if isinstance(content, dict):
        np.savez(tmp_path / "smile.npz", info=np.array(content, dtype=object))
    else:
        (tmp_path / "smile.npz").write_bytes(content)
    with pytest.raises(ValueError, match="found something else"):
        read_direction(tmp_path / "smile.npz")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"normal": np.full(D, 2.0)}, "unit length"), ({"steps": np.full((10, D), np.nan)}, "finite"),
     ({"steps": np.ones(D)}, "steps"), ({"steps": np.ones((10, D + 1))}, "steps"), ({"name": "../x"}, "hyphens")],
)  # fmt: skip
def test_directions_that_cannot_be(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        replace(direction(), **wrong)


def test_interfacegan_files_go_in_and_out() -> None:
    normal = unit(RNG.standard_normal(D)).astype(np.float32)
    imported = import_interfacegan(normal[None], "smile", 0.7, SHA, 10)
    assert imported.steps.shape == (10, D) and imported.sigma == pytest.approx(0.7)
    array = export_interfacegan(imported)
    assert array.shape == (1, D) and array.dtype == np.float32 and np.allclose(array[0], normal, atol=1e-6)
    for wrong in (np.zeros((2, D)), np.zeros(D), np.ones(D, int)):
        with pytest.raises(ValueError, match="InterFaceGAN"):
            import_interfacegan(wrong, "smile", 1.0, SHA, 10)
    with pytest.raises(ValueError, match="--as NEW"):
        export_interfacegan(direction())


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
    back = Hyperplane.of_w(n, b, whitening)
    assert np.allclose(back.normal, plane.normal) and back.intercept == pytest.approx(plane.intercept)


def test_too_few_samples_say_how_many_are_needed() -> None:
    logits = np.concatenate([np.full(900, -3.0), np.full(100, 3.0)])
    with pytest.raises(ValueError, match="surely with it, 1000 samples hold 100; about 4000 are needed"):
        confident_ends(logits, "hat")
    with pytest.raises(ValueError, match="at least 400000"):
        confident_ends(np.full(1000, -3.0), "hat")
    positive, negative = confident_ends(logits, "hat", least=100)
    assert len(positive) == len(negative) == 100 and logits[positive].min() > 0 > logits[negative].max()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_conditions_are_left_alone_and_the_own_score_moves_by_one_deviation(count) -> None:
    w, whitening = codes()
    plane, *others = (Hyperplane(unit(RNG.standard_normal(D)), 0.0, 1.0, 1) for _ in range(count + 1))
    d = step_of(plane, others, whitening)
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


# ---------------------------------------------------------------- names and effects


def test_every_edit_has_an_attribute_and_all_attributes_have_an_edit() -> None:
    assert {attribute for attribute, _ in EDITS.values()} == set(ATTRIBUTES) and len(EDITS) == 40
    assert attribute_of("beard") == ("No_Beard", -1) and set(DEFAULT_EDITS) <= EDITS.keys() >= SYNONYMS.keys()
    assert all(synonyms_of(name) <= set(ATTRIBUTES) - {attribute_of(name)[0]} for name in EDITS)
    with pytest.raises(ValueError, match="smile"):
        attribute_of("frown")


def test_the_rarer_side_is_measured() -> None:
    assert [rarer_side(0.8, 1), rarer_side(0.1, 1), rarer_side(0.8, -1), rarer_side(0.5, 1)] == [-1, 1, 1, 1]


def test_effects_leave_synonyms_out() -> None:
    changes = dict.fromkeys(ATTRIBUTES, 0.0) | {"Young": -0.5, "Gray_Hair": 0.9, "Male": 0.3}
    found = Effect.of("young", changes, side=-1)
    others = sorted([0.3] + [0.0] * (38 - len(synonyms_of("young"))))
    assert found.target == 0.5 and found.synonyms["Gray_Hair"] == 0.9 and "Gray_Hair" not in found.others
    assert found.leakage == pytest.approx(np.percentile(others, 90)) and found.others["Male"] == 0.3
    assert Effect.of("beard", changes | {"No_Beard": -0.4}, side=1).target == pytest.approx(0.4)  # less of No_Beard


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
    monkeypatch.setattr(editing.hyperplane, "CHUNK", 40)
    w, logits = sample_and_score(generator, classifier, 100, 3, tmp_path / "a", "x")
    sample_and_score(generator, classifier, 80, 3, tmp_path / "b", "x")
    scored = []
    monkeypatch.setattr(editing.hyperplane, "score", lambda g, c, w: scored.append(len(w)) or torch.zeros(len(w), 2))
    again = sample_and_score(generator, classifier, 100, 3, tmp_path / "b", "x")[1]
    assert scored == [20] and np.array_equal(again[:80], logits[:80])
    assert np.array_equal(w, sample_w(generator, 100, 3).numpy()) and logits.shape == (100, 2)
    sample_and_score(generator, classifier, 40, 3, tmp_path / "b", "another classifier")
    assert scored == [20, 40]


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_fit_combine_and_exchange(bundle, tmp_path, monkeypatch, capsys) -> None:
    """Scores that are linear in w stand for those of a classifier, while hyperplanes are fitted."""
    truth = np.random.default_rng(5).standard_normal((D, 40)).astype(np.float32)
    generator = load_generator(bundle / "generator.safetensors")
    mean = sample_w(generator, 1000, 9).mean(0)
    monkeypatch.setattr(editing.hyperplane, "score", lambda g, c, w: 20 * (w - mean) @ torch.from_numpy(truth))
    monkeypatch.setattr("losses.perceptual.LPIPS", PixelDistance)
    options = ("--bundle", bundle, "--samples", 10_000, "--cache", tmp_path, "--device", "cpu", "--steps", 3)
    assert call("fit", "smile", "beard", *options) == 0
    assert "smile: σ" in capsys.readouterr().out
    folder = bundle / "directions"
    found = read_directions(folder, ["smile", "beard"], sha256_of(bundle / "generator.safetensors"))
    w, whitening = sample_w(generator, 1000, 11).numpy(), whitening_of(bundle)
    for d, attribute, sign in ((found["smile"], "Smiling", 1), (found["beard"], "No_Beard", -1)):
        assert sign * np.corrcoef(w @ d.normal, w @ truth[:, ATTRIBUTES.index(attribute)])[0, 1] > 0.97
        raw = step_of(Hyperplane.of_w(d.normal, d.intercept, whitening), [], whitening)
        assert d.steps.shape == (8, D) and d.sigma == pytest.approx(float(d.normal @ raw), rel=0.05)
        assert np.ptp(d.steps, axis=0).max() > 0.01 * np.abs(raw).max()  # the styles have gone apart

    path = folder / "smile.npz"
    before = path.read_bytes()
    path.unlink()  # made anew, and nothing else
    assert call("fit", "smile", "beard", *options) == 0 and path.read_bytes() == before
    assert f"made earlier, remove {folder / 'beard.npz'}" in capsys.readouterr().out
    path.write_bytes(before[:100])  # no longer ours
    assert call("fit", "smile", *options, "--overwrite") == 1 and path.read_bytes() == before[:100]
    path.write_bytes(before)
    assert call("fit", "smile", *options[:-1], 2) == 1 and path.read_bytes() == before
    assert call("fit", "smile", *options[:-1], 2, "--overwrite") == 0 and path.read_bytes() != before

    assert call("inspect", "--bundle", bundle) == 0
    assert {"smile", "beard"} <= {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert call("combine", "smile", "--without", "beard", "--as", "smile-only", "--bundle", bundle) == 0
    only = read_direction(folder / "smile-only.npz")
    assert np.abs(only.steps @ found["beard"].normal).max() < 1e-3 * np.linalg.norm(only.steps[0])
    assert only.about["conditions"] == ["No_Beard"] and only.sigma == pytest.approx(found["smile"].sigma, rel=1e-2)
    assert call("combine", "smile", "--as", "smile-only", "--bundle", bundle) == 1  # it exists
    assert call("export", "smile", tmp_path / "smile.npy", "--bundle", bundle) == 1
    assert "combine smile --without OTHERS --as NEW" in capsys.readouterr().err
    assert call("export", "smile-only", tmp_path / "smile.npy", "--bundle", bundle) == 0
    assert call("import", tmp_path / "smile.npy", "--as", "smile-back", "--bundle", bundle) == 0
    assert np.allclose(read_direction(folder / "smile-back.npz").normal, unit(only.steps[0]), atol=1e-5)


def test_the_command_refuses_in_words(bundle, tmp_path, capsys) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, D + 1)))
    np.save(tmp_path / "y.npy", np.array([{"code": 1}], dtype=object))
    cases = [
        (("fit", "smile", "--samples", 100, "--cache", tmp_path), "10000 samples or more"),
        (("fit", "frown"), "expected an edit among"),
        (("import", tmp_path / "x.npy", "--as", "x"), f"normal of {D} numbers"),
        (("import", tmp_path / "y.npy", "--as", "x"), "without objects"),
        (("import", tmp_path / "z.npy", "--as", "x"), "whose largest number is 0"),
    ]
    np.save(tmp_path / "z.npy", np.zeros((1, D)))
    for arguments, words in cases:
        assert call(*arguments, "--bundle", bundle) in (1, 2)
        assert words in capsys.readouterr().err
    assert call("combine", "hat", "--as", "x", "--bundle", bundle) == 2  # a mistake on the command line
    assert "no edit direction 'hat'" in capsys.readouterr().err
    assert call("inspect", "--bundle", tmp_path) == 1


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1])
def test_normals_of_any_length_are_imported(bundle, tmp_path, scale) -> None:
    normal = np.random.default_rng(0).standard_normal(D)
    np.save(tmp_path / "x.npy", (normal * scale).astype(np.float32)[None])
    assert call("import", tmp_path / "x.npy", "--as", f"x{int(np.log10(scale)) + 30}", "--bundle", bundle) == 0
    found = read_direction(bundle / "directions" / f"x{int(np.log10(scale)) + 30}.npz")
    np.testing.assert_allclose(found.normal, normal / np.linalg.norm(normal), atol=1e-6)
    assert found.sigma > 0.01


def test_an_unknown_name_is_told_the_nearest(tmp_path) -> None:
    for name in ("smile", "beard"):
        (tmp_path / f"{name}.npz").touch()
    with pytest.raises(UnknownDirection, match="did you mean 'smile'"):
        read_directions(tmp_path, ["smlie"], None)


def test_shipped_directions_are_for_the_shipped_generator() -> None:
    folder = ROOT / "bundles" / "celeba64"
    found = read_directions(folder / "directions", list(DEFAULT_EDITS), sha256_of(folder / "generator.safetensors"))
    assert len(found) == 14 and all(d.steps.shape == (10, 256) for d in found.values())
