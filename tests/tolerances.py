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

# pictures whose denoiser was computed in 16 bits, beside float32: what export promises
LEAST_DB_16_BITS = 40.0

# norm of the difference over the norm, a fused kernel against its reference in float64, values and gradients: a few
# roundings of each type (2**-53, 2**-24, 2**-11, 2**-8), the first two with room for sums of some 10**4 terms
KERNEL_NORM = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
# fp8_linear on a GPU, of float32: tensor cores of Hopper add products of e4m3 in some 14 bits (DeepSeek-V3,
# arXiv 2412.19437, section 3.3.2), where 1.7e-4 was seen
FP8_SUMS = 1e-3

# float64 means of squares, less squares of means, against sums about the mean
SSIM = 1e-10

# normals made in a kernel and on the host: both in float64 with libraries of their own, rounded once to float32, and
# at most 6.7 where half an ulp is 2.4e-7; the kernel takes its cosine from a polynomial good to 1e-8
KERNEL_NORMALS = 1e-6

# one formula against another in float64, by the norm: sums of some hundred terms
KERNEL_FORMULA = 1e-13
# a code times its scale, all rounded to float32 on the way, beside exact halves of a step
CODE_ROUNDING = 1e-5
# a layer of normals in 8 and 4 bits beside itself in float32, by the norm: a step's uniform error, 1 / sqrt(12), times
# some 2.5 deviations over 127 or 7 levels; for e4m3 some 2**-4 / sqrt(12) of each factor
LINEAR_INT8, LINEAR_INT4, LINEAR_FP8 = 0.015, 0.15, 0.05
# a layer in int8 whose weights are rounded once more to half as many steps, for CPUs that add products in 16 bits
LINEAR_7_BITS = 2 * LINEAR_INT8
# a quantised layer against its graph: float32 sums in another order, and the rare value that lies so near the middle of
# two codes that either is right, by the norm
QUANTISED_GRAPH = 2e-3
# OpenVINO goes to e4m3 by way of float16, which rounds twice
QUANTISED_GRAPH_FP8 = 5e-3


def relative_error(actual: object, expected: object, scale: float | None = None) -> float:
    """Largest absolute difference over `scale`, or over the largest expected magnitude."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(e).max() if scale is None else scale
    return float(np.abs(a - e).max() / (scale if scale else 1.0))
