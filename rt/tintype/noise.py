"""Noise that depends on (seed, step, element) alone, so a seed's picture is the same alone or in any batch.

Integers come from Philox4x32-10; normals are Box and Muller's transform in float64, rounded once to float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import philox_uint32

_INITIAL_STREAM, _STEP_STREAM, _RENEWED_STREAM = 0, 1, 2


def initial_noise(
    seed: int, shape: tuple[int, ...], *, renewed: bool = False
) -> NDArray[np.float32]:
    """Standard normals float32 of `shape`: where the sampling of `seed` (0 .. 2**64-1) begins.

    `renewed`: where a second walk of the same picture does, which shares nothing with the first.
    """
    return _normals(seed, shape, step=0, stream=_RENEWED_STREAM if renewed else _INITIAL_STREAM)


def step_noise(seed: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normals float32 of `shape`, independent for each step (0-based) of a stochastic sampler."""
    return _normals(seed, shape, step=step, stream=_STEP_STREAM)


def _normals(seed: int, shape: tuple[int, ...], *, step: int, stream: int) -> NDArray[np.float32]:
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    bits = (
        philox_uint32(seed, 2 * pairs, step=step, stream=stream).astype(np.float64).reshape(-1, 2)
    )
    # (0, 1] for the radius, so that its logarithm is finite; [0, 1) for the angle.
    radius = np.sqrt(-2.0 * np.log((bits[:, 0] + 1.0) * 2.0**-32))
    angle = 2.0 * np.pi * 2.0**-32 * bits[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)[:count].astype(np.float32).reshape(shape)
