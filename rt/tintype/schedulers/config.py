"""What a checkpoint's `scheduler_config.json` says about how its model was trained and wants to be sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.errors import CheckpointError, RequestError
from tintype.schedulers.betas import BETAS, alphas_cumprod

# Fields that change the result where they hold another value than these; Tintype supports only these.
_ONLY: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False, None),
    "lambda_min_clipped": (-math.inf, None),
    "predict_x0": (True,),
    "solver_p": (None,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_lu_lambdas": (False, None),
}
# Fields without a say here: the last sigma is zero, so that every last step is of first order.
_INERT = {"euler_at_final", "noise_sampler_seed"}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": tuple(BETAS),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "sigma_schedule": ("karras", "exponential"),
    "solver_order": (None, 1, 2, 3),
    "solver_type": (None, "midpoint", "heun", "logrho", "bh1", "bh2"),
    "time_shift_type": ("exponential", "linear"),
    "flow_last_time": ("training", "step"),
    "timestep_spacing": (None, "leading", "trailing", "linspace"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
}
_MOST_TIMES = 100_000  # a hundred times what models are trained on; tables are as long
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True)
class ScheduleConfig:
    """The supported fields, under diffusers' names; None means the method's own default."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    # what happens to x0
    clip_sample: bool | None = None
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    # where the noise levels lie
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    # DDPM's noise; the order and form of multistep solvers; PNDM's beginning; LCM's distillation
    variance_type: str | None = None
    solver_order: int | None = None
    solver_type: str | None = None
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    skip_prk_steps: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    # EDM's preconditioning
    sigma_data: float = 0.5
    sigma_schedule: str = "karras"
    rho: float = 7.0
    # rectified flow; FlowMatch classes call flow_shift "shift"
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    # where the last step starts: at the last training time, or a step's length from the picture
    flow_last_time: str = "training"
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    stochastic_sampling: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ScheduleConfig:
        """Read the fields of diffusers' `scheduler_config.json`; one that cannot be honoured is an error."""
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        if "shift" in given:
            given["flow_shift"] = given.pop("shift")
        if str(config.get("_class_name")).startswith("FlowMatch"):
            given |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        known = {field.name for field in fields(cls)}
        for name, value in given.items():
            _refuse_unsupported(name, value, known)
        taken = {name: value for name, value in given.items() if name in known}
        for name, value in taken.items():
            _check_kind(name, value, getattr(cls, name))
        taken = {n: v for n, v in taken.items() if not _left_open(v, getattr(cls, n))}
        if "disable_corrector" in taken:
            taken["disable_corrector"] = tuple(taken["disable_corrector"])
        made = cls(**taken)
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(made, name), choices)
        if made.num_train_timesteps not in range(1, _MOST_TIMES + 1):
            raise CheckpointError(
                f"scheduler config: num_train_timesteps={made.num_train_timesteps!r} is not a whole number from 1 to "
                f"{_MOST_TIMES}"
            )
        if not 0 <= made.dynamic_thresholding_ratio <= 1:
            raise CheckpointError(
                f"scheduler config: dynamic_thresholding_ratio={made.dynamic_thresholding_ratio!r} is outside [0, 1]"
            )
        if sum(bool(getattr(made, name)) for name in SIGMAS) > 1:
            raise CheckpointError(f"scheduler config: more than one of {', '.join(SIGMAS)} is set")
        return made

    @property
    def is_flow(self) -> bool:
        """Whether the model was trained on straight paths, x = (1 - t)*x0 + t*noise."""
        return self.use_flow_sigmas or self.prediction_type == "flow_prediction"

    def alphas_cumprod(self) -> NDArray[np.float64]:
        """The signal's share of the variance at each training step, [num_train_timesteps]."""
        return alphas_cumprod(
            self.beta_schedule,
            self.beta_start,
            self.beta_end,
            self.num_train_timesteps,
            zero_terminal_snr=self.rescale_betas_zero_snr,
        )

    def spacing(self, default: str) -> str:
        """The timestep spacing, or the method's default where the checkpoint leaves it open."""
        return self.timestep_spacing or default

    def threshold(self) -> tuple[float, float] | None:
        """(quantile, largest) of dynamic thresholding, or None."""
        pair = (self.dynamic_thresholding_ratio, self.sample_max_value)
        return pair if self.thresholding else None

    def clip(self, *, default: bool) -> float | None:
        """The bound that x0 is clipped to, or None; thresholding takes its place."""
        wanted = default if self.clip_sample is None else self.clip_sample
        return self.clip_sample_range if wanted and not self.thresholding else None


@dataclass(frozen=True)
class Plan:
    """Which part of how many steps to run; `tokens` is the picture's length to a transformer, for its time shift."""

    steps: int
    start: int = 0
    tokens: int | None = None

    def check(self, limit: int) -> None:
        """Refuse a step count outside 1 .. limit."""
        if not 1 <= self.steps <= limit:
            raise RequestError(
                f"num_inference_steps={self.steps} is outside 1..{limit}, which this scheduler can place"
            )


def _refuse_unsupported(name: str, value: Any, known: set[str]) -> None:
    if name in known or name in _INERT:
        return
    if name not in _ONLY:
        raise CheckpointError(f"scheduler config: unknown field {name!r} (value {value!r})")
    if value not in _ONLY[name]:
        choices = " or ".join(repr(choice) for choice in _ONLY[name])
        raise CheckpointError(
            f"scheduler config: {name}={value!r} is not supported, only {choices}"
        )


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Refuse what is of another kind than the field's default; None leaves a field open."""
    kinds = (int, float) if isinstance(default, int | float) else (type(default), list)
    if value is not None and default is not None and not isinstance(value, kinds):
        raise CheckpointError(
            f"scheduler config: {name}={value!r} is a {type(value).__name__}, expected one like {default!r}"
        )


def _left_open(value: Any, default: Any) -> bool:
    """Whether a field is null that the default then fills; a switch that is null is off, as in diffusers."""
    return value is None and default is not None and not isinstance(default, bool)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        named = ", ".join(str(choice) for choice in choices if choice is not None)
        raise CheckpointError(
            f"scheduler config: {name}={value!r} is not supported; supported: {named}"
        )
