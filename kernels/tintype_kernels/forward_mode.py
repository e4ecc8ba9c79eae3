"""Whether somebody differentiates forwards, which PyTorch has no public name for."""

from __future__ import annotations

from torch.autograd import forward_ad


def is_active() -> bool:
    """Whether tensors may carry tangents, those of `torch.func.jvp` or of `torch.autograd.forward_ad`."""
    return forward_ad._current_level >= 0
