"""The noise of samples: frozen, normal, and a function of seed and face alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.image_io import from_uint8
from data.noise import face_key, face_noise, philox, standard_normal
from models import encoder_base

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [  # of Random123, tests/kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
FROZEN_KEY = (1976518000, 1993832546)
FROZEN_NOISE = [1.355505, -1.74391, -1.766463, 0.2245566, 1.405934]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]) -> None:
    assert philox(np.array([counter], np.uint32), key)[0].tolist() == list(wanted)


def faces(batch: int, size: int = 8) -> np.ndarray:
    return from_uint8(np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), dtype=np.uint8))


def test_frozen_values() -> None:
    """The samples of a seed: they change only with a new format of bundles."""
    face = (np.arange(48) * 5).astype(np.uint8).reshape(3, 4, 4)
    assert face_key(face, 0) == FROZEN_KEY
    noise = face_noise(face[None] / np.float32(127.5) - 1, 2, 5, 0)
    np.testing.assert_allclose(noise[0, 1], FROZEN_NOISE, rtol=1e-6)


def test_normal() -> None:
    values = standard_normal(400_000, 1, (2, 3)).astype(np.float64)
    assert abs(values.mean()) < 0.006 and abs(values.var() - 1) < 0.01 and abs((values**4).mean() - 3) < 0.05
    assert abs((np.abs(values) > 2).mean() - 0.0455) < 0.002 and np.abs(values).max() < 6.7
    for other in (values[1:], values[2:], standard_normal(400_000, 2, (2, 3)), standard_normal(400_000, 1, (2, 4))):
        assert abs(np.corrcoef(values[: len(other)], other)[0, 1]) < 0.007


def test_seed_and_face_alone() -> None:
    lr = faces(3)
    noise = face_noise(lr, 4, 10, 5)
    assert (noise[:, 0] == 0).all() and noise.dtype == np.float32
    np.testing.assert_array_equal(face_noise(lr[1:2], 2, 10, 5)[0], noise[1, :2])  # not on the batch, nor on k
    np.testing.assert_array_equal(face_noise(lr + 1e-4, 4, 10, 5), noise)  # the bytes count
    changed = lr.copy()
    changed[0, 0, 0, 0] = -changed[0, 0, 0, 0]
    assert not np.isclose(face_noise(changed, 4, 10, 5)[0, 1:], noise[0, 1:]).any()
    for seed in (6, 5 + 2**32):
        assert not np.isclose(face_noise(lr, 4, 10, seed)[:, 1:], noise[:, 1:]).any()
    assert len({tuple(row[:3]) for row in noise[:, 1:].reshape(-1, 10)}) == 9


def test_the_same_for_tensors() -> None:
    lr = faces(2)
    noise = encoder_base.face_noise(torch.from_numpy(lr), 3, 7, 1)
    np.testing.assert_array_equal(noise.numpy(), face_noise(lr, 3, 7, 1))
