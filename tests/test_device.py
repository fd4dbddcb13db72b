"""Memory: blocks that compute again what they do not keep, and how many faces fit."""

from __future__ import annotations

import pytest
import torch

from models.device import bytes_per_face, faces_at_once
from models.generator import Generator


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(32, (8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2)


@pytest.mark.parametrize("again", [False, True])
def test_checkpointed_blocks_give_the_same_and_keep_less(generator, again) -> None:
    ws = generator.mapping(torch.randn(2, 8)).detach()

    def run(checkpointed: int) -> tuple[int, list[torch.Tensor]]:
        generator.synthesis.checkpointed = checkpointed
        kept, codes = [], ws.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            images = generator.synthesis(codes)
        (gradient,) = torch.autograd.grad(images.square().sum(), codes, create_graph=again)
        if again:  # as the path-length penalty does
            (gradient,) = torch.autograd.grad(gradient.square().sum(), codes)
        return sum(kept), [images.detach(), gradient.detach()]

    (all_kept, expected), (kept, found) = run(0), run(2)
    torch.testing.assert_close(found, expected)
    assert kept < 0.5 * all_kept


def test_fewer_faces_fit_where_they_are_larger_or_need_a_gradient(generator, monkeypatch) -> None:
    monkeypatch.setattr("models.device.memory_of", lambda device: 20_000_000)
    assert 64 > faces_at_once(generator) > faces_at_once(generator, gradient=True) > 1
    whole = bytes_per_face(generator, True)
    generator.synthesis.checkpointed = 2
    assert bytes_per_face(generator, True) < whole
    monkeypatch.setattr("models.device.memory_of", lambda device: 2**40)
    assert faces_at_once(generator) == 64 and faces_at_once(generator, most=5) == 5
    monkeypatch.setattr("models.device.memory_of", lambda device: 1)
    assert faces_at_once(generator) == 1
