"""Time on straight paths: how it is shifted towards noise for larger pictures (Esser et al., ICML 2024)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tintype.errors import RequestError
from tintype.schedulers.config import ScheduleConfig

Float64 = NDArray[np.float64]


def time_shifted(config: ScheduleConfig, times: Float64, tokens: int | None) -> Float64:
    """t -> r*t / (1 + (r - 1)*t), with r fixed or, where the model shifts dynamically, from the picture's tokens."""
    if not config.use_dynamic_shifting:
        ratio = config.flow_shift
    else:
        mu = resolution_mu(config, tokens)
        ratio = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return ratio * times / (1 + (ratio - 1) * times)


def resolution_mu(config: ScheduleConfig, tokens: int | None) -> float:
    """The shift's logarithm on the line through (base_image_seq_len, base_shift) and (max..., max_shift)."""
    if tokens is None:
        raise RequestError(
            "this model shifts its times with the picture's size, which this pipeline does not tell the scheduler"
        )
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def stretched(config: ScheduleConfig, times: Float64) -> Float64:
    """Times rescaled about 1 so that the last is `shift_terminal`, where the model asks for it."""
    if not config.shift_terminal:
        return times
    if len(times) == 1:
        raise RequestError(
            f"num_inference_steps=1 is too few for this model's shift_terminal={config.shift_terminal:g}, where the "
            "last of several steps begins; take at least 2"
        )
    scale = (1 - config.shift_terminal) / (1 - times[-1])
    return 1 - (1 - times) * float(scale)
