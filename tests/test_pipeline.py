"""The pipeline: samples explain the input, depend on seed and face alone, and edits outlive the projection."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.operator import Downscale
from pipeline import Upsampler
from pipeline.selection import farthest_points
from pipeline.upsampler import batch_size
from pipeline.wanted import Wanted
from search.plan import SearchPlan


@pytest.fixture(scope="module")
def up(tiny_bundle) -> Upsampler:
    return Upsampler.from_pretrained(tiny_bundle, "cpu")


def faces(batch: int, size: int) -> torch.Tensor:
    smooth = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(size)) * 1.2 - 0.6
    lr = torch.nn.functional.interpolate(smooth, size, mode="bilinear", align_corners=True)
    return ((lr + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("size", [4, 8, 11, 32])
def test_every_sample_downscales_to_its_input(up, size):
    lr = faces(2, size)
    samples = up(lr, k=3, noise_sigma=0)
    error = ((Downscale(size)(samples.images.flatten(0, 1)) - lr.repeat_interleave(3, 0)) / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(samples.lr_psnr.flatten(), -10 * error.clamp(min=1e-10).log10(), atol=0.01, rtol=0)
    assert samples.lr_psnr.min() > 38
    grid = (samples.images + 1) * 127.5
    torch.testing.assert_close(grid, grid.round(), atol=1e-3, rtol=0)


def test_arrays_and_tensors_give_the_same(up):
    lr = faces(2, 8)
    tensors, arrays = up(lr, k=2), up(lr.numpy(), k=2)
    assert isinstance(arrays.images, np.ndarray) and len(arrays) == 2
    np.testing.assert_array_equal(tensors.images.numpy(), arrays.images)


def test_samples_depend_on_seed_and_face_alone(up):
    lr = faces(3, 8)
    many = up(lr, k=4, seed=1)
    few = up(lr[[2]], k=2, seed=1)
    torch.testing.assert_close(many.ws[2, :2], few.ws[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(many.ws[:, 1:], up(lr, k=4, seed=2).ws[:, 1:])


def test_many_faces_go_through_in_parts(up, monkeypatch):
    lr = faces(5, 8)
    whole = up(lr, k=2)
    monkeypatch.setattr("pipeline.upsampler.PIXELS", {"cpu": 2 * 2 * 32**2})  # of two faces
    sizes, sample = [], up.backend.sample
    monkeypatch.setattr(up.backend, "sample", lambda part, wanted: sizes.append(len(part)) or sample(part, wanted))
    parts = up(lr, k=2)
    assert sizes == [2, 2, 1] and parts.images.shape == whole.images.shape
    torch.testing.assert_close(parts.ws, whole.ws, rtol=1e-4, atol=1e-5)


def test_fidelity_zero_leaves_the_generators_face(up):
    samples = up(faces(1, 8), k=2, fidelity=0, noise_sigma=0)
    torch.testing.assert_close(samples.lr_psnr, (-10 * samples.residual.log10()).float(), atol=0.5, rtol=0)


def test_an_edit_keeps_what_the_unedited_sample_was_corrected_by(up, bundle):
    lr, edit = faces(1, 8), np.random.default_rng(0).normal(size=(bundle.encoder.num_ws, bundle.encoder.w_dim)) * 0.3
    plain, edited, kept = (
        up(lr, 2, noise_sigma=0, **how)
        for how in ({}, {"edit": edit.astype(np.float32)}, {"edit": edit.astype(np.float32), "preserve_lr": True})
    )
    torch.testing.assert_close(edited.ws, plain.ws + torch.from_numpy(edit).float(), atol=1e-5, rtol=0)
    changed = [float((x.images - plain.images).square().mean()) for x in (edited, kept)]
    assert changed[0] > changed[1] > 0
    assert kept.lr_psnr.min() > 38 > edited.lr_psnr.max()


def test_a_search_improves_the_residual_and_is_projected(up):
    lr = faces(2, 8).numpy()
    before = up(lr, 2, noise_sigma=0)
    samples, found = up.backend.search(lr, Wanted(k=2, noise_sigma=0.0), SearchPlan(steps=3))
    assert samples.residual.mean() < before.residual.mean() and samples.lr_psnr.min() > 38
    assert len(found.nfe) == 4 and samples.images.shape == before.images.shape


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"seed": -1}, {"fidelity": 1.5}, {"noise_sigma": 300.0}, {"lr": torch.zeros(1, 3, 3, 3)}]
)
def test_refuses_what_is_out_of_range(up, wrong):
    with pytest.raises(ValueError, match="Expected"):
        up(wrong.pop("lr", faces(1, 8)), **wrong)


def test_farthest_points():
    places = np.array([0.0, 0.1, 5.0, 2.0, 5.1])
    assert farthest_points(np.abs(places[:, None] - places), 3) == [0, 4, 3]


def test_batches_follow_from_size_and_device():
    assert batch_size(64, 4) > batch_size(1024, 4) == 1
    assert batch_size(64, 4, "cuda:1") > batch_size(64, 4)
