"""Ranger is RAdam with lookahead and centralised gradients; the learning rate follows numbers worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from training.optimizers import Ranger, update_average, warmup_cosine


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


@pytest.mark.parametrize(
    ("step", "total", "warmup", "decay", "factor"),
    [(0, 100, 0, True, 1.0), (50, 100, 0, True, 0.5), (100, 100, 0, True, 0.0), (130, 100, 0, True, 0.0),
     (0, 100, 4, False, 0.25), (3, 100, 4, False, 1.0), (90, 100, 4, False, 1.0), (25, 100, 52, True, 0.5 * 0.853553),
     (7, -1, 10, True, 0.8)],
)  # fmt: skip
def test_warmup_and_cosine(step, total, warmup, decay, factor):
    assert warmup_cosine(step, total, warmup, decay) == pytest.approx(factor, abs=1e-5)


def test_average_moves_half_the_way_in_a_half_life_with_batch_statistics() -> None:
    average, current = (torch.nn.BatchNorm1d(2) for _ in range(2))
    with torch.no_grad():
        for tensor in (current.weight, current.running_mean):
            tensor.fill_(3.0)
    for _ in range(4):
        update_average(average, current, halflife=4, step=1000)
    torch.testing.assert_close(average.weight.detach(), torch.full((2,), 2.0))
    torch.testing.assert_close(average.running_mean, torch.full((2,), 1.5))
    update_average(average, current, halflife=4, step=0)  # early in a run the half-life is one step
    torch.testing.assert_close(average.running_mean, torch.full((2,), 2.25))
