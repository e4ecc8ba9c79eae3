"""Euler's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1)."""

from __future__ import annotations

import numpy as np

from tintype.schedulers.config import ScheduleConfig, check_steps
from tintype.schedulers.predict import noise_weights
from tintype.schedulers.sigmas import Float64, alpha_sigma, karras, timestep_of, training_sigmas
from tintype.schedulers.table import Table


def euler(config: ScheduleConfig, steps: int) -> Table:
    """x holds signal + sigma*noise, so its derivative by sigma is the predicted noise, which is what h keeps."""
    check_steps(steps, config.num_train_timesteps)
    training = training_sigmas(config)
    times = _timesteps(config, steps)
    sigmas = np.interp(times, np.arange(len(training)), training)
    if config.use_karras_sigmas:
        sigmas = karras(sigmas[0], sigmas[-1], steps)
        times = timestep_of(sigmas, training)

    alpha, sigma = alpha_sigma(sigmas)
    n_x, n_m = noise_weights(config.prediction_type, alpha, sigma)
    deltas = np.append(sigmas[1:], 0.0) - sigmas
    largest = float(sigmas.max())
    from_pure_noise = config.spacing("linspace") in ("linspace", "trailing")
    return Table(
        name="euler",
        timesteps=times,
        c_in=alpha,
        u_x=n_x * alpha,
        u_m=n_m,
        a=np.ones(steps),
        c=np.zeros(steps),
        b=deltas[:, None],
        s=np.zeros(steps),
        init_scale=largest if from_pure_noise else float(np.hypot(largest, 1.0)),
    )


def _timesteps(config: ScheduleConfig, steps: int) -> Float64:
    total = config.num_train_timesteps
    spacing = config.spacing("linspace")
    if spacing == "linspace":
        # float32, because that is what such models were told when they were evaluated
        return np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    if spacing == "leading":
        return (np.arange(steps)[::-1] * (total // steps) + config.steps_offset).astype(np.float64)
    return np.round(total - np.arange(steps) * (total / steps)) - 1.0
