"""How pictures [n, c, h, w] lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """How an op on x [n, c, h, w] lays its output out: channels-last where x is that and not contiguous as well."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
