"""Training noise schedules: how the signal's share of the variance falls with the training step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


def alphas_cumprod(
    schedule: str, start: float, end: float, count: int, *, zero_terminal_snr: bool
) -> Float64:
    """The signal's share of the variance at each training step, [count].

    Trainers hold it in float32, so it is rounded as they round it and only then widened: near the first step
    1 - alpha has few bits left, and the model was trained on what remained.
    """
    betas = BETAS[schedule](start, end, count)
    if zero_terminal_snr:
        betas = _without_last_signal(betas)
    return _cumprod(np.float32(1) - betas).astype(np.float64)


def _cumprod(alphas: Float32) -> Float32:
    """Accumulated in float64 and rounded once an element, as torch.cumprod does."""
    product: Float32 = np.cumprod(alphas.astype(np.float64)).astype(np.float32)
    return product


def _without_last_signal(betas: Float32) -> Float32:
    """Shift and stretch the signal's amplitude until the last step holds none (Lin et al. 2024, algorithm 1)."""
    signal = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = signal[0], signal[-1]
    signal = (signal - last) * (first / (first - last))
    power = signal * signal
    alphas: Float32 = np.concatenate([power[:1], power[1:] / power[:-1]])
    one: Float32 = np.ones(1, np.float32)
    return one - alphas


def _linspace(start: float, end: float, count: int) -> Float32:
    """float32 points evaluated from the nearer end with one rounding each, as torch.linspace does."""
    if count == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(end)
    step = np.float64(np.float32((last - first) / np.float32(count - 1)))
    index = np.arange(count)
    from_end = np.float64(last) - step * (count - 1 - index)
    points = np.where(index < count // 2, np.float64(first) + step * index, from_end)
    rounded: Float32 = points.astype(np.float32)
    return rounded


def _linear(start: float, end: float, count: int) -> Float32:
    """Ho et al. (NeurIPS 2020)."""
    return _linspace(start, end, count)


def _scaled_linear(start: float, end: float, count: int) -> Float32:
    """Evenly spaced roots: the schedule of latent diffusion (Rombach et al., CVPR 2022)."""
    roots = _linspace(math.sqrt(start), math.sqrt(end), count)
    squares: Float32 = roots * roots
    return squares


def _sqrt(start: float, end: float, count: int) -> Float32:
    """Roots of evenly spaced numbers, the schedule that latent diffusion's code calls "sqrt"."""
    return np.sqrt(_linspace(start, end, count))


def _sigmoid(start: float, end: float, count: int) -> Float32:
    """A logistic curve from start to end over -6 .. 6 (GeoDiff, Xu et al., ICLR 2022)."""
    curve = 1 / (1 + np.exp(-_linspace(-6.0, 6.0, count).astype(np.float64)))
    betas: Float32 = curve.astype(np.float32) * np.float32(end - start) + np.float32(start)
    return betas


def _squaredcos(start: float, end: float, count: int) -> Float32:
    """The cosine schedule (Nichol and Dhariwal, ICML 2021); it has no use for start and end."""
    alpha_bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    betas = [min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(count)]
    return np.array(betas, np.float32)


BETAS: dict[str, Callable[[float, float, int], Float32]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "sqrt": _sqrt,
    "sigmoid": _sigmoid,
    "squaredcos_cap_v2": _squaredcos,
}
