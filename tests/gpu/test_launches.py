"""Kernels as another runtime launches them: their code alone, with pointers alone."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._utils import _cuda_load_module

from kernel_checks import norm_error
from tintype_kernels.launches import launched
from tintype_kernels.ops import (
    gate_residual,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    qk_norm_rope,
    residual_layer_norm,
)
from tolerances import KERNEL_NORM

Arguments = tuple[Any, ...]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").half()


def of_norm(side: int, residual: bool) -> Arguments:
    added = drawn(2, 64, 1, 1) if residual else None
    return drawn(2, 64, side, side + 1), drawn(64), drawn(64), 8, 1e-5, True, added


def of_rotation() -> Arguments:
    q, k, *weights = drawn(2, 3, 77, 64), drawn(2, 3, 77, 64), drawn(64), drawn(64)
    return q, k, *weights, drawn(77, 64).float(), drawn(77, 64).float(), 1e-6


def of_rows(count: int, *rest: Any) -> Arguments:
    """So many [n, t, c], then a shift and a scale [n, c]."""
    return *(drawn(2, 77, 320) for _ in range(count)), *rest, drawn(2, 320), drawn(2, 320)


CALLS: dict[str, tuple[ModuleType, Callable[[], Arguments]]] = {
    "norm on chip": (group_norm_silu, lambda: of_norm(7, residual=False)),
    "split norm": (group_norm_silu, lambda: of_norm(96, residual=True)),
    "modulated": (layer_norm_modulate, lambda: (*of_rows(1), 1e-6, 1.0)),
    "added and normed": (residual_layer_norm, lambda: (*of_rows(2, None), 1e-6, 0.0)),
    "gated": (gate_residual, lambda: (drawn(2, 77, 320), drawn(2, 77, 320), drawn(2, 320))),
    "rotated": (qk_norm_rope, of_rotation),
    "geglu": (geglu, lambda: (drawn(77, 640),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_alone_give_what_the_op_gives(name):
    torch.manual_seed(0)
    module, draw = CALLS[name]
    arguments = draw()
    major, minor = torch.cuda.get_device_capability()
    made = launched(module.FORWARD, arguments, 10 * major + minor)
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    new = made.tensors[len(tensors) :]
    tensors += [torch.full(each.shape, torch.nan, dtype=each.dtype, device="cuda") for each in new]
    for kernel in made.kernels:
        code = _cuda_load_module(kernel.ptx, [kernel.entry])[kernel.entry]
        pointers = [tensors[number] for number in (*kernel.reads, *kernel.writes)]
        code(kernel.grid, (kernel.threads, 1, 1), pointers, kernel.shared_bytes)
    wide = [each.double() if isinstance(each, Tensor) else each for each in arguments]
    wanted = module.FORWARD.implementations["reference"](*wide)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    # Statistics of norms are float32 beside outputs of 16 bits.
    for number, right in zip(made.outputs, wanted, strict=True):
        assert norm_error(tensors[number], right) < KERNEL_NORM["float16"]
