"""Masked layers as they are stored."""

from __future__ import annotations

import pytest
import torch
import zuko

from models.masked import pack_masked, unpack_masked


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return zuko.flows.MAF(7, 3, transforms=2, hidden_features=(10, 9), passes=2, randperm=True).state_dict()


def size(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def test_what_counts_comes_back(state) -> None:
    packed = pack_masked(state)
    assert packed.keys() == state.keys() and size(packed) < 0.7 * size(state)
    again = unpack_masked(packed, {name: tensor.shape for name, tensor in state.items()})
    masks = {name.removesuffix(".mask"): mask for name, mask in state.items() if name.endswith(".mask")}
    assert len(masks) == 6
    for name, tensor in state.items():
        mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        assert torch.equal(again[name], tensor if mask is None else tensor * mask), name


def test_a_whole_state_stays_as_it_is(state) -> None:
    again = unpack_masked(state, {name: tensor.shape for name, tensor in state.items()})
    assert all(again[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize(("end", "message"), [(".mask", "bits"), (".weight", "numbers")])
def test_parts_that_do_not_fit_are_refused(end: str, message: str, state) -> None:
    packed = pack_masked(state)
    name = next(name for name in packed if name.endswith("0" + end))
    packed[name] = packed[name][:-1]
    with pytest.raises(ValueError, match=message):
        unpack_masked(packed, {name: tensor.shape for name, tensor in state.items()})
