"""DPM-Solver++(2M), midpoint form (Lu et al., arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

import numpy as np

from tintype.errors import RequestError
from tintype.schedulers.config import ScheduleConfig, check_steps
from tintype.schedulers.predict import clean_weights
from tintype.schedulers.sigmas import Float64, alpha_sigma, karras, timestep_of, training_sigmas
from tintype.schedulers.table import Table


def dpmpp_2m(config: ScheduleConfig, steps: int) -> Table:
    """h keeps x0; the second order extrapolates it from the last two, the first and the last step are first order."""
    check_steps(steps, config.num_train_timesteps)
    training = training_sigmas(config)
    if config.use_karras_sigmas:
        sigmas = karras(training[-1], training[0], steps)
        times = timestep_of(sigmas, training)
        if config.beta_schedule != "squaredcos_cap_v2":
            times = times.round()
    else:
        times = _timesteps(config, steps)
        sigmas = np.interp(times, np.arange(len(training)), training)

    alpha, sigma = alpha_sigma(np.append(sigmas, 0.0))
    u_x, u_m = clean_weights(config.prediction_type, alpha[:-1], sigma[:-1])
    return Table(
        name="dpmpp_2m",
        timesteps=times,
        c_in=np.ones(steps),
        u_x=u_x,
        u_m=u_m,
        a=sigma[1:] / sigma[:-1],
        c=np.zeros(steps),
        b=_history_weights(sigmas, alpha[1:]),
        s=np.zeros(steps),
    )


def _history_weights(sigmas: Float64, alpha_next: Float64) -> Float64:
    """Weights of this and the last x0, [steps, 2], from the steps' lengths in log signal-to-noise."""
    log_snr = np.append(-np.log(sigmas), np.inf)
    length = np.diff(log_snr)
    gain = -alpha_next * np.expm1(-length)
    tilt = np.zeros(len(sigmas))
    # A last step of infinite length has no second order, nor has one after a step of no length.
    usable = np.isfinite(length[1:]) & (length[:-1] > 0)
    tilt[1:][usable] = length[1:][usable] / (2 * length[:-1][usable])
    return np.stack([gain * (1 + tilt), -gain * tilt], axis=1)


def _timesteps(config: ScheduleConfig, steps: int) -> Float64:
    """Falling training steps; the point after the last is time zero, which gets no evaluation."""
    total = config.num_train_timesteps
    spacing = config.spacing("linspace")
    if spacing == "linspace":
        points: Float64 = np.linspace(0, total - 1, steps + 1).round()
        return points[:0:-1]
    if spacing == "leading":
        stride = total // (steps + 1)
        if stride == 0:
            raise RequestError(
                f"num_inference_steps={steps}: dpmpp_2m with leading spacing places at most {total - 1} steps"
            )
        return (np.arange(1, steps + 1)[::-1] * stride + config.steps_offset).astype(np.float64)
    times: Float64 = np.round(total - np.arange(steps) * (total / steps)) - 1.0
    return times
