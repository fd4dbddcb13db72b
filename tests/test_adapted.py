"""Layers with a low-rank addition: each row takes as much of it as it is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.adapted import AdaptedConv2d, AdaptedLinear, additions, can_skip

SHARE = torch.tensor([0.0, 0.3, 1.0])


def dense(layer: AdaptedConv2d | AdaptedLinear, share: float) -> torch.Tensor:
    """W + g V U as one weight."""
    return layer.weight + share * torch.einsum("or...,ri...->oi...", layer.wide.weight, layer.narrow.weight)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_with_its_addition_is_one_convolution(stride):
    torch.manual_seed(0)
    layer = AdaptedConv2d(4, 5, 3, rank=2, stride=stride, padding=1)
    torch.nn.init.normal_(layer.wide.weight)
    x = torch.randn(3, 4, 6, 6)
    rows = [F.conv2d(x[i : i + 1], dense(layer, g), layer.bias, stride, 1) for i, g in enumerate(SHARE.tolist())]
    torch.testing.assert_close(layer(x, SHARE), torch.cat(rows))


def test_a_linear_layer_with_its_addition_is_one_linear_layer():
    torch.manual_seed(0)
    layer = AdaptedLinear(4, 5, rank=2)
    torch.nn.init.normal_(layer.wide.weight)
    x = torch.randn(3, 4)
    rows = [F.linear(x[i], dense(layer, g), layer.bias) for i, g in enumerate(SHARE.tolist())]
    torch.testing.assert_close(layer(x, SHARE), torch.stack(rows))


@pytest.mark.parametrize("make", [lambda rank: AdaptedConv2d(4, 5, 3, rank), lambda rank: AdaptedLinear(4, 5, rank)])
def test_before_training_an_addition_adds_nothing(make):
    layer = make(2)
    plain = make(0)
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name in ("weight", "bias")})
    x = torch.randn(3, 4, 6, 6) if isinstance(layer, AdaptedConv2d) else torch.randn(3, 4)
    for share in (None, SHARE):
        assert torch.equal(layer(x, share), plain(x, share))
    assert not additions(plain) and {p.shape[0] for p in additions(layer)} == {2, 5}


def test_additions_that_nobody_takes_are_skipped():
    assert not can_skip(torch.zeros(3))  # a training wants a gradient, even if it is zero
    with torch.inference_mode():
        assert can_skip(torch.zeros(3)) and not can_skip(SHARE)
