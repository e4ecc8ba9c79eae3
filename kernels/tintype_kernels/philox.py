"""Philox4x32-10: uniform 32-bit integers that depend on (seed, stream, step, position) alone.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
The counter's four words are (block low, block high, step, stream); the key is the seed's low and high word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import native
from tintype_kernels.dispatch import select_for_arrays

WORDS = 4
ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_LOW, _SHIFT = np.uint64(_MASK), np.uint64(32)


def philox_uint32(
    seed: int, count: int, *, step: int = 0, stream: int = 0, first_block: int = 0
) -> NDArray[np.uint32]:
    """Return `count` uint32; element i is word i % 4 of the block `first_block + i // 4`.

    `seed` and `first_block` are 64 bits wide, `step` and `stream` 32.
    """
    check_key(seed, step, stream)
    _check_unsigned("first_block", first_block, 64)
    if count < 0:
        raise ValueError(f"count={count} is negative")
    if select_for_arrays() == "native":
        assert native.module is not None
        numbers: NDArray[np.uint32] = native.module.philox_uint32(
            seed, count, step, stream, first_block
        )
        return numbers
    return reference(seed, count, step=step, stream=stream, first_block=first_block)


def check_key(seed: int, step: int, stream: int) -> None:
    """Raise unless the generator takes them."""
    _check_unsigned("seed", seed, 64)
    _check_unsigned("step", step, 32)
    _check_unsigned("stream", stream, 32)


def _check_unsigned(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}={value} is not an unsigned integer of {bits} bits")


def reference(
    seed: int, count: int, *, step: int = 0, stream: int = 0, first_block: int = 0
) -> NDArray[np.uint32]:
    """The generator in numpy, all blocks at once; 64-bit lanes hold the 32-bit words so that products fit."""
    blocks = -(-count // WORDS)
    index = np.arange(blocks, dtype=np.uint64) + np.uint64(first_block)
    words = [
        index & _LOW,
        index >> _SHIFT,
        np.full(blocks, step, np.uint64),
        np.full(blocks, stream, np.uint64),
    ]
    key = [seed & _MASK, seed >> 32]
    for _ in range(ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * words[0], _MULTIPLIERS[1] * words[2]
        words = [
            (product1 >> _SHIFT) ^ words[1] ^ np.uint64(key[0]),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ words[3] ^ np.uint64(key[1]),
            product0 & _LOW,
        ]
        key = [(word + step_) & _MASK for word, step_ in zip(key, _KEY_STEPS, strict=True)]
    return np.stack(words, axis=1).astype(np.uint32).reshape(-1)[:count]


def philox_normals(seed: int, count: int, *, step: int = 0, stream: int = 0) -> NDArray[np.float32]:
    """Return `count` standard normals: Box and Muller's transform in float64, rounded once.

    Elements 2i and 2i + 1 come from the integers of those places, the first of which gives their radius.
    """
    pairs = (count + 1) // 2
    bits = (
        philox_uint32(seed, 2 * pairs, step=step, stream=stream).astype(np.float64).reshape(-1, 2)
    )
    # (0, 1] for the radius, so that its logarithm is finite; [0, 1) for the angle.
    radius = np.sqrt(-2.0 * np.log((bits[:, 0] + 1.0) * 2.0**-32))
    angle = 2.0 * np.pi * 2.0**-32 * bits[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    normals: NDArray[np.float32] = both.reshape(-1)[:count].astype(np.float32)
    return normals
