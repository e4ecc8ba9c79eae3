"""One step of any sampler: guidance, conversion, clipping, the table's row and its noise, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tintype_kernels import native
from tintype_kernels.dispatch import select_for_arrays
from tintype_kernels.philox import check_key, philox_normals

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.floating[Any]]
Values = TypeVar("Values", bound=Any)  # numpy arrays or torch tensors


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

    def coefficients(self) -> list[float]:
        """What a kernel reads of the row: guidance, u_x, u_m, clip, a, c, s and b."""
        clip = math.inf if self.clip is None else self.clip
        return [self.guidance, self.u_x, self.u_m, clip, self.a, self.c, self.s, *self.b]


class NoiseKey(NamedTuple):
    """Normals that the step makes itself: sample i's are those of `seeds[i]` at this step and stream of Philox."""

    seeds: Sequence[int]
    step: int
    stream: int = 1

    def normals(self, x: Array) -> Array:
        """An array like x."""
        count = int(np.prod(x.shape[1:]))
        rows = [philox_normals(s, count, step=self.step, stream=self.stream) for s in self.seeds]
        return np.array(rows, x.dtype).reshape(x.shape)  # which no rows are, too


def scheduler_step(
    x: Values,
    m: Values,
    m_uncond: Values | None,
    history: Sequence[Values],
    row: Row | Tensor,
    noise: Values | NoiseKey | Tensor | None = None,
) -> tuple[Values, Values]:
    """Return the next x and this step's h; all arrays, or torch tensors, share x's shape and dtype.

    `history` holds earlier h, newest first, at least as many as `row.b` has weights beyond the first; `m_uncond` is
    None where no guidance applies. `noise` is a NoiseKey where the step shall make it. Of arrays, float32 takes the
    native kernel, any other floating type and thresholds, which sort, the reference.

    For tensors `row` may be a tensor of its `coefficients()`, one for all or one a sample [n, ...], and `noise` an
    int64 tensor of rows (seed, step, stream), so that a captured CUDA graph is replayed with other numbers in them.
    """
    if isinstance(row, Row):
        _check_row(history, row, noise)
    if isinstance(noise, NoiseKey):
        _check_key(noise, x)
    step: Any = _step_arrays
    if not isinstance(x, np.ndarray):
        from tintype_kernels.ops.scheduler_step import scheduler_step as step  # needs torch
    result: tuple[Values, Values] = step(x, m, m_uncond, history, row, noise)
    return result


def _check_key(noise: NoiseKey, x: Any) -> None:
    if len(noise.seeds) != x.shape[0]:
        raise ValueError(
            f"noise has {len(noise.seeds)} seeds, expected one for each of x's {x.shape[0]} rows"
        )
    for seed in noise.seeds:
        check_key(seed, noise.step, noise.stream)


def _check_row(history: Sequence[Any], row: Row, noise: Any) -> None:
    if not row.b:
        raise ValueError("row.b is (), expected the weight of this step's h at least")
    if len(history) < len(row.b) - 1:
        raise ValueError(
            f"history has {len(history)} arrays, expected {len(row.b) - 1} as row.b asks"
        )
    if row.s and noise is None:
        raise ValueError(f"noise is None, expected an array because row.s={row.s}")


def _step_arrays(
    x: Array, m: Array, m_uncond: Array | None, history: Sequence[Array], row: Row, noise: Any
) -> tuple[Array, Array]:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}, expected a floating type")
    noise = noise.normals(x) if isinstance(noise, NoiseKey) else noise
    check_like(x, m=m, m_uncond=m_uncond, noise=noise, **by_age(history))
    arrays = {"x": x, "m": m, "m_uncond": m_uncond, "noise": noise, **by_age(history)}
    if select_for_arrays(_obstacle(row, **arrays)) == "reference":
        return reference(x, m, m_uncond, history, row, noise)
    assert native.module is not None
    guidance, u_x, u_m, clip, a, c, s, *b = row.coefficients()
    result: tuple[Array, Array] = native.module.scheduler_step(
        x, m, m_uncond, list(history), noise, (guidance, u_x, u_m, clip, a, c, s), b
    )
    return result


def by_age(history: Sequence[Any]) -> dict[str, Any]:
    """Name the arrays of a history as an error message does."""
    return {f"history[{age}]": h for age, h in enumerate(history)}


def check_like(x: Any, **others: Any) -> None:
    """Raise unless every array has x's shape and dtype."""
    for name, other in others.items():
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            found, expected = f"{other.dtype}{list(other.shape)}", f"{x.dtype}{list(x.shape)}"
            raise ValueError(f"{name} is {found}, expected {expected} like x")


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
    x: Any,
    m: Any,
    m_uncond: Any,
    history: Sequence[Any],
    row: Row,
    noise: Any = None,
) -> tuple[Any, Any]:
    """The step in numpy or torch, in x's own precision; the order of operations is the native kernel's."""
    scalar = x.dtype.type if isinstance(x, np.ndarray) else lambda value: value
    guided = m if m_uncond is None else m_uncond + scalar(row.guidance) * (m - m_uncond)
    h = scalar(row.u_x) * x + scalar(row.u_m) * guided
    if row.threshold is not None:
        h = _thresholded(h, *row.threshold)
    elif row.clip is not None:
        h = h.clip(scalar(-row.clip), scalar(row.clip))
    new = scalar(row.a) * x + scalar(row.c) * guided
    for weight, kept in zip(row.b, (h, *history), strict=False):
        new = new + scalar(weight) * kept
    if noise is not None:
        new = new + scalar(row.s) * noise
    return new, h


def _thresholded(h: Any, quantile: float, largest: float) -> Any:
    """Dynamic thresholding of each sample of h [n, ...] (Saharia et al., NeurIPS 2022, section 2.3)."""
    n = h.shape[0]
    magnitude = abs(h).reshape(n, math.prod(h.shape[1:]))
    if isinstance(h, np.ndarray):
        bound = np.quantile(magnitude, quantile, axis=1).clip(1, largest).astype(h.dtype)
    else:
        bound = _quantiles(magnitude, quantile).clip(1, largest)
    bound = bound.reshape(n, *[1] * (h.ndim - 1))
    return h.clip(-bound, bound) / bound


def _quantiles(rows: Tensor, quantile: float) -> Tensor:
    """Of rows [n, count], [n]; `torch.quantile` takes no more than 2**24 numbers."""
    count = rows.shape[1]
    ordered = rows.sort(1).values
    place = quantile * (count - 1)
    below = math.floor(place)
    low, high = ordered[:, below], ordered[:, min(below + 1, count - 1)]
    # NaN sorts last, and makes NaN of its row's quantile.
    return low.lerp(high, place - below).where(ordered[:, -1] >= 0, math.nan)


scheduler_step.reference = reference  # type: ignore[attr-defined]
