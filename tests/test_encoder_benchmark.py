"""What the benchmark of the encoders stands on: fair turns, and plain operations in place of pSp's CUDA ones."""

from __future__ import annotations

import torch

from benchmarks.encoder import OURS, report, take_turns
from benchmarks.references import _biased_leaky_relu, _filter_up_or_down
from models.layers import upsample_2x, upsampling_filter


def test_parts_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    times = take_turns({name: (lambda name=name: order.append(name)) for name in ("a", "b")}, repeats=2)
    assert order == ["a", "b"] * 3 and times.keys() == {"a", "b"}


def test_ratios_are_to_ours() -> None:
    rows = report("title", {OURS: (0.5, 1.0), "other": (2.0, 3.0)}, 4, "aim")
    assert rows[-2].split(" | ")[1:] == ["2.000", "2.00", "4.0", "3.000", "3.0 |"]


def test_plain_operations_do_what_the_cuda_ones_do() -> None:
    x, kernel = torch.randn(2, 3, 5, 5), upsampling_filter()
    found = _filter_up_or_down(x, kernel, up=2, pad=(2, 1))
    torch.testing.assert_close(found, upsample_2x(x, kernel))
    # Down is up read backwards: <up x, y> = <x, down y>, for a symmetric kernel.
    y = torch.randn(2, 3, 10, 10)
    down = _filter_up_or_down(y, kernel, down=2, pad=(1, 1))
    torch.testing.assert_close((found * y).sum(), (x * down).sum(), atol=1e-3, rtol=1e-4)
    bias = torch.tensor([0.0, 1.0, -3.0])
    found = _biased_leaky_relu(torch.ones(1, 3, 1, 1), bias).flatten()
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, -0.4]) * 2**0.5)
