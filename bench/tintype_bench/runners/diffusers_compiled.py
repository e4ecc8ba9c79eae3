"""What diffusers' guide "Accelerate inference" publishes as fastest under torch.compile: layout, projections, flags."""

from __future__ import annotations

import torch
from torch import nn

_TUNED = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}


def inductor_flags(mode: str, *, freezing: bool) -> dict[str, bool]:
    """Of Inductor's configuration, for a mode of torch.compile's; frozen weights are constants of the code."""
    return {"freezing": freezing, **(_TUNED if mode.startswith("max-autotune") else {})}


def prepare(module: nn.Module) -> None:
    """Channels-last, and with queries, keys and values in one product where the module can."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if hasattr(module, "fuse_qkv_projections"):
        module.fuse_qkv_projections()  # type: ignore[operator]
