"""What a model's output says about the clean picture and the noise, as two weights: of x and of the output."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Weights = tuple[Float64, Float64]


def clean_weights(prediction: str, alpha: Float64, sigma: Float64) -> Weights:
    """(w_x, w_m) with x0 = w_x*x + w_m*m, where x = alpha*x0 + sigma*noise.

    Velocity is defined for alpha^2 + sigma^2 = 1 alone.
    """
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":  # v = alpha*noise - sigma*x0 (Salimans and Ho, ICLR 2022)
        return alpha, -sigma
    if prediction == "flow_prediction":  # m = noise - x0 (Liu et al., ICLR 2023)
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    return np.zeros_like(alpha), np.ones_like(alpha)


def noise_weights(prediction: str, alpha: Float64, sigma: Float64) -> Weights:
    """(w_x, w_m) with noise = w_x*x + w_m*m, under the same convention."""
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v_prediction":
        return sigma, alpha
    if prediction == "flow_prediction":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    return 1 / sigma, -alpha / sigma
