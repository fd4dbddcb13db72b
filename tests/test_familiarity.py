"""What is familiar to a bundle: the Gaussian against its covariance matrix, limits, the file, and the words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from cli.doubts import UNEXPLAINED, UNFAMILIAR
from evaluation.familiarity import calibrate, main
from models.checkpoints import sha256_of
from pipeline.familiarity import FILE, SHARE, Familiarity, fit_gaussian, gaussian_distance

RNG = np.random.default_rng(0)


def photos(count: int, spread: float = 1.0) -> np.ndarray:
    """Codes (count, 12) with two wide directions."""
    mixing = np.random.default_rng(1).normal(size=(2, 12))
    return spread * (3 * RNG.normal(size=(count, 2)) @ mixing + 0.3 * RNG.normal(size=(count, 12))) + 5


def test_distance_is_that_of_the_covariance_matrix() -> None:
    codes = photos(400)
    mean, directions, variances, rest = fit_gaussian(codes, 2)
    covariance = directions.T * (variances - rest) @ directions + rest * np.eye(12)
    offsets = codes[:20] - mean
    expected = np.einsum("bi,ij,bj->b", offsets, np.linalg.inv(covariance), offsets)
    np.testing.assert_allclose(gaussian_distance(codes[:20], mean, directions, variances, rest), expected, rtol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(codes.T, bias=True), atol=0.1)


@pytest.fixture
def known() -> Familiarity:
    residuals = RNG.uniform(size=1000)
    return calibrate("hash", {8: (photos(1000), 0.01 * residuals), 32: (photos(1000), 0.04 * residuals)}, rank=2)


def test_limits_are_those_of_held_out_photos(known: Familiarity) -> None:
    for size in (8, 16, 32):
        outside = np.mean([known.is_unfamiliar(code.reshape(3, 4), size) for code in photos(2000)])
        assert outside == pytest.approx(1 - SHARE, abs=0.015)
        assert np.mean([known.is_unfamiliar(code, size) for code in photos(200, 4.0)]) > 0.6
    assert known.residuals == pytest.approx([0.01 * SHARE, 0.04 * SHARE], rel=0.02)
    assert not known.is_unexplained(0.019, 0, 16) and known.is_unexplained(0.021, 0, 16)  # the geometric mean
    assert not known.is_unexplained(0.021, 255 * 0.002**0.5, 16)  # 0.002 of it is noise
    assert known.is_unexplained(0.011, 0, 4) and known.is_unexplained(0.041, 0, 64)


def test_file_is_read_for_its_bundle_alone(known: Familiarity, tmp_path: Path) -> None:
    assert Familiarity.load(tmp_path, "hash") is None
    known.save(tmp_path / FILE)
    again = Familiarity.load(tmp_path, "hash")
    assert again is not None and Familiarity.load(tmp_path, "other") is None
    codes = photos(50).reshape(50, 3, 4)
    np.testing.assert_allclose(again.distance(codes), known.distance(codes), rtol=1e-3)


def test_too_few_faces_are_refused() -> None:
    with pytest.raises(ValueError, match="6 faces or more, got 5"):
        calibrate("hash", {8: (photos(5), np.ones(5))})


def test_command_and_the_words(bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faces = tmp_path / "faces"
    faces.mkdir()
    for i in range(12):
        small = Image.fromarray(RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(faces / f"{i:02}.png")
    command = ["--bundle", str(bundle_copy), "--data", str(faces), "--device", "cpu"]
    assert main(command) == 0 and main(command) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    known = Familiarity.load(bundle_copy, sha256_of(bundle_copy / "bundle.json"))
    assert known is not None and known.sizes.tolist() == [4, 8, 16, 32]
    words = [UNEXPLAINED, UNFAMILIAR]
    for scale, expected in ((1e-6, words), (1e6, [])):
        limits = replace(known, distances=known.distances * scale, residuals=known.residuals * scale)
        limits.save(bundle_copy / FILE)
        out = tmp_path / f"out{scale}"
        options = ["--bundle", str(bundle_copy), "-k", "1", "--device", "cpu", "-o", str(out)]
        assert infer.main([str(faces / "00.png"), *options]) == 0
        assert json.loads((out / "00" / "report.json").read_text())["doubts"] == expected
