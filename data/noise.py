"""The noise of samples: a function of seed and face alone, the same in every runtime.

Numbers come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which maps a
counter and a key to four random words without any state: 20 lines in every language. web/noise.js is the same in
JavaScript. Philox also hashes the face, so that equal faces have equal noise, whatever the batch they come in.
"""

from __future__ import annotations

import numpy as np

from data.image_io import to_uint8

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Maps counters (N, 4) to random words (N, 4), uint32, by Philox4x32-10 with a key of two words."""
    a, b, c, d = (word.astype(np.uint64) for word in counter.T)
    first, second = (np.uint64(word) for word in key)
    for _ in range(10):
        x, y = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (y >> _SHIFT) ^ b ^ first, y & _LOW, (x >> _SHIFT) ^ d ^ second, x & _LOW
        first, second = (first + _KEY_STEPS[0]) & _LOW, (second + _KEY_STEPS[1]) & _LOW
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def standard_normal(count: int, stream: int, key: tuple[int, int]) -> np.ndarray:
    """Samples standard normal numbers (count,), float32: Philox by a counter, then Box and Muller (1958).

    Other streams, below 2³², are independent; the key is two words below 2³².
    """
    blocks = -(-count // 4)
    counter = np.zeros((blocks, 4), np.uint32)
    counter[:, 0], counter[:, 1] = np.arange(blocks), stream
    words = philox(counter, key).reshape(-1, 2).astype(np.float64)  # pairs
    radius = np.sqrt(-2 * np.log((words[:, 0] + 1) / 2**32))
    angle = 2 * np.pi * (words[:, 1] / 2**32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count].astype(np.float32)


def face_key(face: np.ndarray, seed: int) -> tuple[int, int]:
    """Hashes a face (3, s, s) to two words: the exclusive or of Philox over its bytes, 12 of them in each counter."""
    content = face.tobytes()
    words = np.frombuffer(content + bytes(-len(content) % 12), "<u4").reshape(-1, 3)
    counter = np.concatenate([np.arange(len(words), dtype=np.uint32)[:, None], words], axis=1)
    hashed = np.bitwise_xor.reduce(philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), axis=0)
    return int(hashed[0]), int(hashed[1])


def face_noise(lr: np.ndarray, k: int, noise_dim: int, seed: int) -> np.ndarray:
    """Samples the noise (B, k, E) of k encodings of faces (B, 3, s, s); the first is 0, for the point estimate.

    It depends on the seed and the face alone, never on the batch, on k or on the machine.
    """
    noise = np.zeros((len(lr), k, noise_dim), np.float32)
    for row, face in zip(noise, to_uint8(lr), strict=True):
        key = face_key(face, seed)
        for i in range(1, k):
            row[i] = standard_normal(noise_dim, i, key)
    return noise
