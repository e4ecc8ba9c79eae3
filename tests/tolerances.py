"""Every tolerance of the test suite, with its reason. Differences are relative to the largest expected magnitude."""

from __future__ import annotations

import numpy as np

# float64 coefficients from float64 logarithms of the same float32 schedule
SCHEDULER_STEP = 1e-6
# diffusers rounds its sigmas to float32
DIFFUSERS_SIGMAS = 1e-6
# torch's float32 square root is some library's, which need not give the nearest number
RESCALED_SCHEDULE = 1e-6
# one half ulp of float32 for each of ten operations, relative to their largest term
KERNEL_STEP = 10 * 2.0**-24
# Python that one step of the loop may cost beyond the model and the arithmetic
LOOP_MICROSECONDS = 30
# a graph of two float32 matrix products, done in another order
TINY_GRAPH = 1e-5
# moments of 2**16 normals, five standard errors
NORMAL_MOMENT = 5 / 2**8

# one float32 module against diffusers' or transformers' own, whose sums run in another order
MODULE_FP32 = 1e-5
# a small float16 decoder against itself in float32: about twenty layers of 2**-11 rounding
MODULE_FP16 = 2e-2
# an exported float32 graph against torch: the runtime fuses and sums in another order
STAGE_FP32 = 1e-4
# latents after 20 guided steps against diffusers' own pipeline
LATENTS_20_STEPS = 1e-3


def relative_error(actual: object, expected: object, scale: float | None = None) -> float:
    """Largest absolute difference over `scale`, or over the largest expected magnitude."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(e).max() if scale is None else scale
    return float(np.abs(a - e).max() / (scale if scale else 1.0))
