"""Noise levels: sigma is the noise-to-signal ratio, as Karras et al. (NeurIPS 2022) count it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tintype.schedulers.config import ScheduleConfig

Float64 = NDArray[np.float64]
_RHO = 7.0  # Karras et al., table 1


def training_sigmas(config: ScheduleConfig) -> Float64:
    """Sigma at every training step, rising, [num_train_timesteps]."""
    alphas = config.alphas_cumprod()
    sigmas: Float64 = np.sqrt((1 - alphas) / alphas)
    return sigmas


def karras(sigma_max: float, sigma_min: float, steps: int) -> Float64:
    """Sigmas evenly spaced in their 7th root, falling, [steps]."""
    ramp = np.linspace(0, 1, steps)
    high, low = sigma_max ** (1 / _RHO), sigma_min ** (1 / _RHO)
    sigmas: Float64 = (high + ramp * (low - high)) ** _RHO
    return sigmas


def timestep_of(sigmas: Float64, training: Float64) -> Float64:
    """The fractional training step with each sigma, linear in log sigma between the neighbours."""
    steps: Float64 = np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))
    return steps


def alpha_sigma(sigmas: Float64) -> tuple[Float64, Float64]:
    """Signal and noise scale of the variance-preserving form, from the ratio."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return alpha, sigmas * alpha
