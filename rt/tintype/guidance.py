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
    """A scale for each evaluation of the model, of which 1 or less means none, and how far deviations are restored."""

    scales: tuple[float, ...]
    rescale: float = 0.0

    @property
    def applies(self) -> bool:
        """Whether any step is guided."""
        return any(scale > 1 for scale in self.scales)


def interval(scale: float, begin: float = 0.0, end: float = 1.0) -> Callable[[float], float]:
    """Guidance of `scale` while begin <= progress < end, none elsewhere (Kynkäänniemi et al., NeurIPS 2024)."""
    return lambda progress: scale if begin <= progress < end else 1.0


def check_scale(value: Scale, steps: int) -> Scale:
    """A finite number, one number a step, or a function of progress; else a RequestError."""
    if callable(value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != steps:
            raise RequestError(f"guidance_scale has {len(value)} entries for {steps} steps")
        return tuple(_finite(each) for each in value)
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


def rescaled(m: Floats, m_uncond: Floats, scale: float, amount: float) -> Floats:
    """Guided output whose deviation is drawn back to the conditional one's by `amount` (Lin et al. 2024, section 3.4).

    Arrays are [n, c, h, w]; deviations are each sample's own.
    """
    guided = m_uncond + np.float32(scale) * (m - m_uncond)
    axes = tuple(range(1, m.ndim))
    ratio = m.std(axis=axes, keepdims=True, ddof=1) / guided.std(axis=axes, keepdims=True, ddof=1)
    factor = np.float32(amount) * ratio + np.float32(1 - amount)
    return np.asarray(factor * guided, np.float32)


def _called(value: Callable[[float], float], progress: float) -> float:
    try:
        scale = value(progress)
    except TypeError as error:
        raise RequestError(
            f"guidance_scale={value!r} cannot be called with the progress: {error}"
        ) from error
    return _finite(scale)


def _finite(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"guidance_scale={value!r} is not a finite number")
    return number
