"""Noise that depends on (seed, step, element) alone, so a seed's picture is the same alone or in any batch.

Integers come from Philox4x32-10, normals from `tintype_kernels.philox_normals`, which a kernel may make as well.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tintype_kernels.philox import philox_normals

# A picture may be walked towards more than once, or in parts, of which none shares anything with another. The streams
# of where each walk begins and of its steps; the second of two walks at one size counts on from the first's steps.
Walk = Literal["picture", "renewed", "prior", "enlarged"]
_STREAMS: dict[Walk, tuple[int, int]] = {
    "picture": (0, 1),
    "renewed": (2, 1),
    "prior": (3, 4),
    "enlarged": (5, 6),
}


def initial_noise(seed: int, shape: tuple[int, ...], walk: Walk = "picture") -> NDArray[np.float32]:
    """Standard normals float32 of `shape`: where the sampling of `seed` (0 .. 2**64-1) begins."""
    return _normals(seed, shape, step=0, stream=_STREAMS[walk][0])


def step_noise(
    seed: int, step: int, shape: tuple[int, ...], walk: Walk = "picture"
) -> NDArray[np.float32]:
    """Standard normals float32 of `shape`, independent for each step (0-based) of a stochastic sampler."""
    return _normals(seed, shape, step=step, stream=_STREAMS[walk][1])


def _normals(seed: int, shape: tuple[int, ...], *, step: int, stream: int) -> NDArray[np.float32]:
    return philox_normals(seed, int(np.prod(shape)), step=step, stream=stream).reshape(shape)
