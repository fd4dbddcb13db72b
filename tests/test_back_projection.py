"""The projection onto {x : D(x) = y}: exact, shortest, and wary of noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.operator import Downscale, back_project, resize_matrix, trusted_part

RNG = torch.Generator().manual_seed(0)


def pair(size: int, lr_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images well within [-1, 1], and inputs that they do not explain."""
    images = torch.rand(2, 3, size, size, generator=RNG) * 0.2 - 0.1
    return images, Downscale(lr_size)(torch.rand(2, 3, size, size, generator=RNG) * 0.4 - 0.2)


@pytest.mark.parametrize(("size", "lr_size"), [(64, 4), (64, 8), (64, 16), (64, 21), (64, 48), (32, 31), (32, 32)])
def test_projected_images_downscale_to_the_input(size, lr_size):
    images, lr = pair(size, lr_size)
    torch.testing.assert_close(Downscale(lr_size)(back_project(images, lr)), lr, atol=1e-5, rtol=0)


def test_it_is_the_shortest_way():
    images, lr = pair(32, 8)
    matrix = resize_matrix(32, 8).double().numpy()
    joint = np.kron(matrix, matrix)  # D as one matrix on flattened channels
    shortest = (
        np.linalg.pinv(joint)
        @ (lr.flatten(2).double().numpy() - images.flatten(2).double().numpy() @ joint.T)[..., None]
    )
    found = (back_project(images, lr, rounds=1) - images).flatten(2).double().numpy()
    np.testing.assert_allclose(found, shortest[..., 0], atol=1e-6)


def test_rounds_mend_what_clamping_breaks():
    images = torch.rand(4, 3, 32, 32, generator=RNG) * 2 - 1
    lr = Downscale(8)(torch.rand(4, 3, 32, 32, generator=RNG).round() * 2 - 1).clamp(-1, 1)
    errors = [float((Downscale(8)(back_project(images, lr, rounds=r)) - lr).square().mean()) for r in (1, 2, 8)]
    assert errors[0] > errors[1] > errors[2]
    assert back_project(images, lr).abs().max() <= 1


@pytest.mark.parametrize("fidelity", [0.0, 0.25, 1.0])
def test_fidelity_takes_that_share_of_the_way(fidelity):
    images, lr = pair(32, 8)
    before, after = (Downscale(8)(x) for x in (images, back_project(images, lr, fidelity)))
    torch.testing.assert_close(after, before + fidelity * (lr - before), atol=1e-5, rtol=0)


def test_an_input_of_full_size_is_passed_through():
    images, lr = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(back_project(images, lr), lr, atol=1e-5, rtol=0)


def test_the_trusted_part_is_the_posterior_mean():
    """Against the ridge formula with D as one matrix: K = D Dᵀ (D Dᵀ + ρ)⁻¹."""
    residual, ratio = torch.randn(2, 3, 8, 8, generator=RNG), torch.tensor([0.0, 0.3])
    matrix = resize_matrix(32, 8).double().numpy()
    gram = np.kron(matrix @ matrix.T, matrix @ matrix.T)
    for row, rho, got in zip(residual, ratio, trusted_part(residual, 32, ratio), strict=True):
        wanted = np.linalg.solve(gram + float(rho) * np.eye(64), gram) @ row.flatten(1).double().numpy().T
        np.testing.assert_allclose(got.flatten(1).numpy(), wanted.T, atol=1e-5)


def test_noise_is_followed_less_the_stronger_it_is():
    images, lr = pair(32, 8)
    errors = [
        float((Downscale(8)(back_project(images, lr, noise_ratio=torch.full((2,), r))) - lr).square().mean())
        for r in (0.0, 0.01, 1.0)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_gradients_pass_the_clamp():
    images = (torch.ones(1, 3, 32, 32) * 3).requires_grad_()
    back_project(images, torch.ones(1, 3, 8, 8)).sum().backward()
    assert images.grad.abs().sum() > 0


def test_refuses_a_fidelity_out_of_range():
    with pytest.raises(ValueError, match="fidelity"):
        back_project(*pair(32, 8), fidelity=1.5)
