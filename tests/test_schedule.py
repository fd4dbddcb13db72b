"""The learning rate over a run, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from training.optimizers import warmup_cosine


@pytest.mark.parametrize(
    ("step", "total", "warmup", "decay", "factor"),
    [(0, 100, 0, True, 1.0), (50, 100, 0, True, 0.5), (100, 100, 0, True, 0.0), (130, 100, 0, True, 0.0),
     (0, 100, 4, False, 0.25), (3, 100, 4, False, 1.0), (90, 100, 4, False, 1.0), (25, 100, 52, True, 0.5 * 0.853553),
     (7, -1, 10, True, 0.8)],
)  # fmt: skip
def test_warmup_and_cosine(step, total, warmup, decay, factor):
    assert warmup_cosine(step, total, warmup, decay) == pytest.approx(factor, abs=1e-5)
