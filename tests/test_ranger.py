"""Ranger is RAdam with lookahead and centralised gradients."""

from __future__ import annotations

import copy

import torch

from training.optimizers import Ranger


def steps(optimiser: torch.optim.Optimizer, weight: torch.Tensor, target: torch.Tensor, count: int) -> None:
    for _ in range(count):
        optimiser.zero_grad()
        (weight - target).square().sum().backward()
        optimiser.step()


def test_vectors_are_radams_until_the_slow_weights_move() -> None:
    target = torch.tensor([1.0, -2.0, 3.0])
    ours, plain = torch.zeros(2, 3).unbind()
    ours, plain = ours.clone().requires_grad_(), plain.clone().requires_grad_()
    ranger = Ranger([ours], 0.1)
    radam = torch.optim.RAdam([plain], 0.1, (0.95, 0.999), 1e-5)
    steps(ranger, ours, target, 5)
    steps(radam, plain, target, 5)
    assert torch.equal(ours, plain)
    steps(ranger, ours, target, 1)
    steps(radam, plain, target, 1)
    torch.testing.assert_close(ours, plain / 2)  # half of the way from the start, which is 0
    steps(ranger, ours, target, 300)
    torch.testing.assert_close(ours.detach(), target, atol=5e-2, rtol=0)


def test_gradients_of_matrices_are_centred() -> None:
    """Until the slow weights move, Ranger is RAdam on gradients without their mean over the inputs of each output."""
    ours = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, target = ours.detach().clone().requires_grad_(), torch.arange(24.0).view(4, 6)
    steps(Ranger([ours], 0.1), ours, target, 5)
    radam = torch.optim.RAdam([plain], 0.1, (0.95, 0.999), 1e-5)
    for _ in range(5):
        gradient = 2 * (plain - target).detach()
        plain.grad = gradient - gradient.mean(dim=1, keepdim=True)
        radam.step()
    torch.testing.assert_close(ours, plain)


def test_a_resumed_run_goes_on_exactly() -> None:
    target, whole = torch.tensor([1.0, -2.0]), torch.zeros(2, requires_grad=True)
    ranger = Ranger([whole], 0.1)
    steps(ranger, whole, target, 8)
    again = whole.detach().clone().requires_grad_()
    other = Ranger([again], 0.1)
    other.load_state_dict(copy.deepcopy(ranger.state_dict()))
    steps(ranger, whole, target, 6)
    steps(other, again, target, 6)
    assert torch.equal(whole, again)
