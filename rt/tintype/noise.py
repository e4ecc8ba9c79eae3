"""Noise that depends on (seed, step, element) alone, so a seed's picture is the same alone or in any batch.

Integers come from Philox4x32-10, normals from `tintype_kernels.philox_normals`, which a kernel may make as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tintype_kernels.philox import philox_normals

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
    return philox_normals(seed, int(np.prod(shape)), step=step, stream=stream).reshape(shape)
