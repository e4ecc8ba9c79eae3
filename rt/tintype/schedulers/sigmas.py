"""Noise levels: sigma is the noise-to-signal ratio, as Karras et al. (NeurIPS 2022) count it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tintype.schedulers.config import ScheduleConfig

Float64 = NDArray[np.float64]
_RHO = 7.0  # Karras et al., table 1
_BETA_SHAPE = 0.6  # "Beta sampling is all you need" (Lee et al. 2024)


def training_sigmas(config: ScheduleConfig) -> Float64:
    """Sigma at every training step, rising, [num_train_timesteps]."""
    alphas = config.alphas_cumprod()
    if config.rescale_betas_zero_snr:
        # No signal at all would be an infinite ratio; the least positive half-precision number stands in.
        alphas[-1] = 2.0**-24
    sigmas: Float64 = np.sqrt((1 - alphas) / alphas)
    return sigmas


def respaced(config: ScheduleConfig, high: float, low: float, steps: int) -> Float64 | None:
    """Falling sigmas [steps] where the config asks for a distribution of their own, else None."""
    high = high if config.sigma_max is None else config.sigma_max
    low = low if config.sigma_min is None else config.sigma_min
    if config.use_karras_sigmas:
        return karras(high, low, steps)
    if config.use_exponential_sigmas:
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if config.use_beta_sigmas:
        return low + (high - low) * beta_quantile(1 - np.linspace(0, 1, steps))
    return None


def karras(sigma_max: float, sigma_min: float, steps: int, rho: float = _RHO) -> Float64:
    """Sigmas evenly spaced in their rho-th root, falling, [steps]."""
    ramp = np.linspace(0, 1, steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas: Float64 = (high + ramp * (low - high)) ** rho
    return sigmas


def beta_quantile(p: Float64, shape: float = _BETA_SHAPE) -> Float64:
    """The inverse of the regularised incomplete beta function I_x(shape, shape), for p in 0..1."""
    small = np.minimum(p, 1 - p)  # the distribution is symmetric about 1/2
    inside = small > 0
    x = np.zeros_like(small)
    x[inside] = _lower_half_quantile(small[inside], shape)
    return np.where(p <= 0.5, x, 1 - x)


def _lower_half_quantile(p: Float64, shape: float) -> Float64:
    """x <= 1/2 with I_x = p, by Newton's method on log I as a function of log x, which is nearly straight."""
    whole = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x = (p * shape * whole) ** (1 / shape)
    for _ in range(8):
        ratio = _series(x, shape) * x**shape / whole
        slope = x**shape * (1 - x) ** (shape - 1) / whole / ratio
        x = np.minimum(x * np.exp(np.log(p / ratio) / slope), 0.5)
    return x


def _series(x: Float64, shape: float) -> Float64:
    """Sum of (1 - shape)_k / k! / (shape + k) * x^k, the incomplete beta function over x^shape, for x <= 1/2."""
    total, term = np.zeros_like(x), np.ones_like(x)
    for k in range(60):
        total += term / (shape + k)
        term = term * (1 - shape + k) / (k + 1) * x
    return total


def timestep_of(sigmas: Float64, training: Float64) -> Float64:
    """The fractional training step with each sigma, linear in log sigma between the neighbours."""
    steps: Float64 = np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))
    return steps


def alpha_sigma(sigmas: Float64) -> tuple[Float64, Float64]:
    """Signal and noise scale of the variance-preserving form, from the ratio."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return alpha, sigmas * alpha
