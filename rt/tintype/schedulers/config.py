"""What a checkpoint's `scheduler_config.json` says about how its model was trained and wants to be sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.errors import CheckpointError, RequestError

# Fields that change the result where they hold another value than these; Tintype supports only these.
_ONLY: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "euler_at_final": (False,),
    "final_sigmas_type": ("zero",),
    "flow_shift": (1.0,),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, None),
    "rescale_betas_zero_snr": (False,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "variance_type": (None, "fixed_small"),
}
# Fields without a say in the methods that exist here, or only together with one of the above.
_INERT = {
    "dynamic_thresholding_ratio",
    "lower_order_final",
    "sample_max_value",
    "skip_prk_steps",
    "time_shift_type",
}
_SPACINGS = ("leading", "trailing", "linspace")
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class ScheduleConfig:
    """The supported fields, under diffusers' names; `timestep_spacing` None means the method's own default."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    use_karras_sigmas: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ScheduleConfig:
        """Read the fields of diffusers' `scheduler_config.json`; one that cannot be honoured is an error."""
        known = {field.name for field in fields(cls)}
        for name, value in config.items():
            _refuse_unsupported(name, value, known)
        made = cls(**{name: value for name, value in config.items() if name in known})
        _check_choice("timestep_spacing", made.timestep_spacing, (None, *_SPACINGS))
        _check_choice("prediction_type", made.prediction_type, _PREDICTIONS)
        _check_choice("beta_schedule", made.beta_schedule, tuple(_BETAS))
        return made

    def alphas_cumprod(self) -> NDArray[np.float64]:
        """The signal's share of the variance at each training step, [num_train_timesteps].

        Trainers hold it in float32, so it is rounded as they round it and only then widened: near the first step
        1 - alpha has few bits left, and the model was trained on what remained.
        """
        betas = _BETAS[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)
        alphas = (np.float32(1) - betas).astype(np.float64)
        return np.cumprod(alphas).astype(np.float32).astype(np.float64)

    def spacing(self, default: str) -> str:
        """The timestep spacing, or the method's default where the checkpoint leaves it open."""
        return self.timestep_spacing or default


def check_steps(steps: int, limit: int) -> None:
    """Refuse a step count outside 1 .. limit."""
    if not 1 <= steps <= limit:
        raise RequestError(
            f"num_inference_steps={steps} is outside 1..{limit}, which this scheduler can place"
        )


def _refuse_unsupported(name: str, value: Any, known: set[str]) -> None:
    if name in known or name in _INERT or name.startswith("_"):
        return
    if name not in _ONLY:
        raise CheckpointError(f"scheduler config: unknown field {name!r} (value {value!r})")
    if value not in _ONLY[name]:
        choices = " or ".join(repr(choice) for choice in _ONLY[name])
        raise CheckpointError(
            f"scheduler config: {name}={value!r} is not supported, only {choices}"
        )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        named = ", ".join(str(choice) for choice in choices if choice is not None)
        raise CheckpointError(
            f"scheduler config: {name}={value!r} is not supported; supported: {named}"
        )


def _linspace32(start: float, end: float, count: int) -> NDArray[np.float32]:
    """float32 points evaluated from the nearer end with one rounding each, as torch.linspace does."""
    if count == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(end)
    step = np.float64(np.float32((last - first) / np.float32(count - 1)))
    index = np.arange(count)
    from_end = np.float64(last) - step * (count - 1 - index)
    points = np.where(index < count // 2, np.float64(first) + step * index, from_end)
    rounded: NDArray[np.float32] = points.astype(np.float32)
    return rounded


def _linear(start: float, end: float, count: int) -> NDArray[np.float32]:
    return _linspace32(start, end, count)


def _scaled_linear(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Evenly spaced roots: the schedule of latent diffusion (Rombach et al., CVPR 2022)."""
    roots = _linspace32(math.sqrt(start), math.sqrt(end), count)
    squares: NDArray[np.float32] = roots * roots
    return squares


def _squaredcos(start: float, end: float, count: int) -> NDArray[np.float32]:
    """The cosine schedule (Nichol and Dhariwal, ICML 2021); it has no use for start and end."""
    alpha_bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    betas = [min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(count)]
    return np.array(betas, np.float32)


_BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _squaredcos}
