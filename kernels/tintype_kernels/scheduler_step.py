"""One step of any sampler: guidance, conversion, clipping, the table's row and its noise, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import native
from tintype_kernels.dispatch import select

Array = NDArray[np.floating[Any]]


class Row(NamedTuple):
    """One row of a scheduler's table.

    With g the guided output: `h = u_x*x + u_m*g` (clipped to +-clip, or thresholded), then
    `x <- a*x + c*g + b[0]*h + sum_k b[k]*history[k-1] + s*noise`. `threshold` is (quantile, largest): each
    sample's h is clipped to +-that quantile of its own magnitudes, held in 1 .. largest, and divided by it.
    """

    u_x: float
    u_m: float
    a: float
    c: float
    b: tuple[float, ...]
    s: float = 0.0
    clip: float | None = None
    guidance: float = 1.0
    threshold: tuple[float, float] | None = None


def scheduler_step(
    x: Array,
    m: Array,
    m_uncond: Array | None,
    history: Sequence[Array],
    row: Row,
    noise: Array | None = None,
) -> tuple[Array, Array]:
    """Return the next x and this step's h; all arrays share x's shape and dtype.

    `history` holds earlier h, newest first, at least as many as `row.b` has weights beyond the first; `m_uncond` is
    None where no guidance applies. float32 takes the native kernel, any other floating type and thresholds, which
    sort, the reference.
    """
    _check_like("m", m, x)
    if m_uncond is not None:
        _check_like("m_uncond", m_uncond, x)
    if noise is not None:
        _check_like("noise", noise, x)
    kept = {f"history[{age}]": h for age, h in enumerate(history)}
    for name, h in kept.items():
        _check_like(name, h, x)
    if len(history) < len(row.b) - 1:
        raise ValueError(
            f"history has {len(history)} arrays, expected {len(row.b) - 1} as row.b asks"
        )
    if row.s and noise is None:
        raise ValueError(f"noise is None, expected an array because row.s={row.s}")
    if select(_obstacle(row, x=x, m=m, m_uncond=m_uncond, noise=noise, **kept)) == "reference":
        return reference(x, m, m_uncond, history, row, noise)
    assert native.module is not None
    clip = np.inf if row.clip is None else row.clip
    scalars = (row.guidance, row.u_x, row.u_m, clip, row.a, row.c, row.s)
    result: tuple[Array, Array] = native.module.scheduler_step(
        x, m, m_uncond, list(history), noise, scalars, list(row.b)
    )
    return result


def _check_like(name: str, tensor: Array, x: Array) -> None:
    if tensor.shape != x.shape or tensor.dtype != x.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype}{list(tensor.shape)}, expected {x.dtype}{list(x.shape)} like x"
        )


def _obstacle(row: Row, **tensors: Array | None) -> str:
    """Why the native kernel cannot take these, or nothing."""
    if row.threshold is not None:
        return "row.threshold sorts, which only the reference does"
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != np.float32:
            return f"{name} is {tensor.dtype} and the native kernel takes float32"
        if not tensor.flags.c_contiguous:
            return f"{name} is not C-contiguous"
    return ""


def reference(
    x: Array,
    m: Array,
    m_uncond: Array | None,
    history: Sequence[Array],
    row: Row,
    noise: Array | None = None,
) -> tuple[Array, Array]:
    """The step in numpy, in x's own precision; the order of operations is the native kernel's."""
    scalar = x.dtype.type
    guided = m if m_uncond is None else m_uncond + scalar(row.guidance) * (m - m_uncond)
    h = scalar(row.u_x) * x + scalar(row.u_m) * guided
    if row.threshold is not None:
        h = _thresholded(h, *row.threshold)
    elif row.clip is not None:
        h = np.clip(h, scalar(-row.clip), scalar(row.clip))
    new = scalar(row.a) * x + scalar(row.c) * guided
    for weight, kept in zip(row.b, (h, *history), strict=False):
        new = new + scalar(weight) * kept
    if noise is not None:
        new = new + scalar(row.s) * noise
    return new, h


def _thresholded(h: Array, quantile: float, largest: float) -> Array:
    """Dynamic thresholding of each sample of h [n, ...] (Saharia et al., NeurIPS 2022, section 2.3)."""
    magnitude = np.quantile(np.abs(h).reshape(len(h), -1), quantile, axis=1)
    bound = np.clip(magnitude, 1, largest).astype(h.dtype).reshape(-1, *[1] * (h.ndim - 1))
    thresholded: Array = np.clip(h, -bound, bound) / bound
    return thresholded
