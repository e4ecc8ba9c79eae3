"""How alike two pictures are, in the field's two measures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EQUAL_DB = 100.0  # what equal pictures are said to have, where the formula has infinity
_SIDE, _SIGMA = 11, 1.5  # Wang et al., "Image quality assessment" (2004): window and constants
_C1, _C2 = 0.01**2, 0.03**2


def psnr(image: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of arrays in 0..1."""
    error = float(np.mean((np.asarray(image, np.float64) - reference) ** 2))
    return EQUAL_DB if error == 0 else min(EQUAL_DB, float(-10 * np.log10(error)))


def ssim(image: NDArray[Any], reference: NDArray[Any]) -> float:
    """Structural similarity of arrays [n, h, w, c] in 0..1, each channel by itself, 1 where they are equal."""
    x, y = np.asarray(image, np.float64), np.asarray(reference, np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    shared = _blur(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * shared + _C2)
    return float(np.mean(likeness / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))))


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gaussian mean around every pixel that has a whole window; smaller pictures have a smaller one."""
    side = min(_SIDE, *x.shape[1:3])
    weights = np.exp(-((np.arange(side) - (side - 1) / 2) ** 2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        x = np.lib.stride_tricks.sliding_window_view(x, side, axis=axis) @ weights
    return x
