"""What an export refuses before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tintype.checkpoints import Checkpoint
from tintype.errors import RequestError
from tintype.request import whole_number
from tintype.schedulers import ScheduleConfig

from .tensorrt import check_gpus

if TYPE_CHECKING:
    from .bundle import ExportConfig

MOST_PICTURES = 1024  # of a call, which verification makes whole, in memory
# The options that are for engines, each under the name of its field.
_FOR_ENGINES = {
    "gpus": "--gpu",
    "plain": "--plain",
    "weightless": "--weightless",
    "kernels": "--kernels",
}


def check_target(config: ExportConfig) -> None:
    """Refuse batches that are too large, and what a target has no use for."""
    for count in config.batches:
        if whole_number("batch", count, least=1) > MOST_PICTURES:
            raise RequestError(
                f"batch={count} is more than a call of a bundle holds, at most {MOST_PICTURES}; export for fewer, and "
                "call it again for the others"
            )
    for_engines = [name for name in _FOR_ENGINES if getattr(config, name)]
    if config.target == "tensorrt":
        check_gpus(config.gpus, config.kernels)
    elif for_engines:
        flags = ", ".join(_FOR_ENGINES[name] for name in for_engines)
        raise RequestError(f"{flags}: for engines alone; ask for them with --target tensorrt")
    if config.kernels and config.weightless:
        raise RequestError("--kernels and --weightless do not go together yet; leave one out")


def check_steps(checkpoint: Checkpoint, config: ExportConfig) -> None:
    """Refuse steps that no request of the bundle, and no calibration, could have."""
    own, defaults = checkpoint.scheduler_config, checkpoint.defaults
    schedulers = {
        "num_inference_steps": own,
        "prior_num_inference_steps": defaults.get("prior_scheduler", own),
        "super_res_num_inference_steps": defaults.get("super_res_scheduler", own),
    }
    asked = [(name, value) for name, value in (config.defaults or {}).items() if name in schedulers]
    if config.kept.quantised and config.calibration is not None:
        asked.append(("num_inference_steps", config.calibration.steps))
    for name, steps in asked:
        limit = ScheduleConfig.from_config(schedulers[name]).num_train_timesteps
        if whole_number(name, steps, least=1) > limit:
            raise RequestError(
                f"{name}={steps} is outside 1..{limit}, which the model's scheduler can place; ask for fewer"
            )
