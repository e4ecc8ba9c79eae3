"""How strongly the prompt steers, step by step (classifier-free guidance, Ho and Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tintype.errors import RequestError

Floats = NDArray[np.float32]
Scale = float | Sequence[float] | Callable[[float], float]


@dataclass(frozen=True)
class Guidance:
    """A scale for each evaluation of the model, of which 1 or less means none.

    `rescale` says how far deviations are drawn back to the prompt's own, `parallel` how much stays of what guidance
    does along the output itself.
    """

    scales: tuple[float, ...]
    rescale: float = 0.0
    parallel: float = 1.0

    @property
    def applies(self) -> bool:
        """Whether any step is guided."""
        return any(scale > 1 for scale in self.scales)

    @property
    def is_linear(self) -> bool:
        """Whether it is the plain extrapolation, which the fused step does in passing."""
        return self.rescale == 0 and self.parallel == 1

    def steered(self, m: Floats, m_uncond: Floats, scale: float) -> Floats:
        """The guided output of m and m_uncond [n, c, h, w] where it is not linear."""
        guided = projected(m, m_uncond, scale, self.parallel)
        return rescaled(guided, m, self.rescale) if self.rescale else guided


def interval(scale: float, begin: float = 0.0, end: float = 1.0) -> Callable[[float], float]:
    """Guidance of `scale` while begin <= progress < end, none elsewhere (Kynkäänniemi et al., NeurIPS 2024)."""
    return lambda progress: scale if begin <= progress < end else 1.0


def check_scale(value: Scale, steps: int) -> Scale:
    """A finite number, one number a step, or a function of progress; else a RequestError."""
    if callable(value):
        return value
    shape = getattr(value, "shape", ())
    if len(shape) > 1:
        raise RequestError(
            f"guidance_scale has shape {list(shape)}; give a number, or one number for each of {steps} steps"
        )
    if len(shape) == 1 or (isinstance(value, Sequence) and not isinstance(value, str | bytes)):
        each = [*value]  # type: ignore[misc]
        if len(each) != steps:
            raise RequestError(f"guidance_scale has {len(each)} entries for {steps} steps")
        return tuple(_finite(number) for number in each)
    return _finite(value)


def scales(value: Scale, evaluations: int, begin: float) -> tuple[float, ...]:
    """One scale an evaluation; progress is the share of all steps done, and `begin` the share left out at first."""
    progress = [begin + (1 - begin) * i / evaluations for i in range(evaluations)]
    if callable(value):
        return tuple(_called(value, share) for share in progress)
    if isinstance(value, Sequence):
        # Rounding may put a whole step's share just below it.
        return tuple(value[math.floor(share * len(value) + 1e-6)] for share in progress)
    return (value,) * evaluations


def projected(m: Floats, m_uncond: Floats, scale: float, parallel: float) -> Floats:
    """Guidance with `parallel` of its part along m, which saturates colours, and all of the rest.

    Sadat et al., ICLR 2025 (arXiv 2410.02416), section 4; `parallel` 1 is the plain extrapolation.
    """
    axes = tuple(range(1, m.ndim))
    difference = m - m_uncond
    along, square = (
        np.sum(each * m, axis=axes, keepdims=True, dtype=np.float64) for each in (difference, m)
    )
    share = np.float32(parallel - 1) * (along / np.maximum(square, np.finfo(np.float32).tiny))
    update = difference + share.astype(np.float32) * m
    return np.asarray(m + np.float32(scale - 1) * update, np.float32)


def rescaled(guided: Floats, m: Floats, amount: float) -> Floats:
    """`guided` with its deviation drawn back to that of m by `amount` (Lin et al. 2024, section 3.4).

    Arrays are [n, c, h, w]; deviations are each sample's own.
    """
    axes = tuple(range(1, m.ndim))
    ratio = m.std(axis=axes, keepdims=True, ddof=1) / guided.std(axis=axes, keepdims=True, ddof=1)
    factor = np.float32(amount) * ratio + np.float32(1 - amount)
    return np.asarray(factor * guided, np.float32)


def _called(value: Callable[[float], float], progress: float) -> float:
    try:
        scale = value(progress)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # it was called, and what it says is its own
        raise RequestError(
            f"guidance_scale={value!r} cannot be called with the progress: {error}"
        ) from error
    return _finite(scale)


def as_number(value: object) -> float:
    """Its float, or NaN where it is no number; words and truths are none, though float() takes them."""
    if isinstance(value, str | bytes | bool | np.bool_):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return math.nan


def _finite(value: object) -> float:
    number = as_number(value)
    if not math.isfinite(number):
        raise RequestError(f"guidance_scale={value!r} is not a finite number")
    return number
