"""The C++ kernels, or the reason why this installation has none.

The functions take numpy arrays and torch's CPU tensors, read them where they lie, and give back the same kind.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

module: ModuleType | None
try:
    module = importlib.import_module("tintype_kernels._native")
except ImportError as error:
    module, reason = None, f"the C++ extension is not usable: {error}"
else:
    reason = ""

_THREADS = "TINTYPE_NUM_THREADS"
_told_threads = os.environ.get(_THREADS, "").lstrip()
if _told_threads and not (
    _told_threads.isascii() and _told_threads.isdecimal() and int(_told_threads)
):
    warnings.warn(
        f"{_THREADS}={_told_threads} is ignored; give a whole number of threads, at least 1",
        stacklevel=2,
    )

GROUPS = (32, 64, 128)


def threads() -> int:
    """How many threads the kernels use: TINTYPE_NUM_THREADS at first, or as many as there are cores."""
    count: int = _extension().threads()
    return count


def set_threads(count: int) -> None:
    """Use `count` threads from now on, or 256 if that is fewer."""
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    _extension().set_threads(count)


def share_openmp(share: bool = True) -> bool:
    """Let the threads of the OpenMP that the process has loaded do the work, or own ones again; whether OpenMP's do."""
    return bool(module is not None and module.share_openmp(share))


def group_norm_silu(
    x: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool, residual: Any = None
) -> tuple[Any, Any]:
    """`silu(group_norm(x + residual))` of float32 x [n, c, h, w], contiguous or channels-last, and its statistics.

    Those are [n, 3, groups]: mean, what the mean lost in rounding, inverse standard deviation.
    """
    given, values = x, _float32("x", x)
    if values.ndim != 4:
        raise ValueError(f"x has {values.ndim} dimensions, expected 4")
    n, c, h, w = values.shape
    if groups < 1 or c % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of x's {c} channels")
    last = not values.flags.c_contiguous
    if last and not values.transpose(0, 2, 3, 1).flags.c_contiguous:
        raise ValueError(f"x has strides {values.strides}, expected it contiguous or channels-last")
    out, stats = np.empty_like(values), np.empty((n, 3, groups), np.float32)
    channels = {"weight": _float32("weight", weight), "bias": _float32("bias", bias)}
    for name, vector in channels.items():
        if vector.shape != (c,):
            raise ValueError(f"{name} is {list(vector.shape)}, expected [{c}]")
    added = None if residual is None else _residual(_float32("residual", residual), values, last)
    _extension().group_norm_silu(
        _flat(values, last), *map(np.ascontiguousarray, channels.values()), added,
        (n, c, h * w, groups), eps, silu, last, _flat(out, last), stats,
    )  # fmt: skip
    return _like(given, out), _like(given, stats)


def _residual(residual: NDArray[Any], x: NDArray[Any], last: bool) -> NDArray[Any]:
    if residual.shape == (*x.shape[:2], 1, 1):
        return np.ascontiguousarray(residual)
    if residual.shape != x.shape:
        expected = f"{list(x.shape)} or {[*x.shape[:2], 1, 1]}"
        raise ValueError(f"residual is {list(residual.shape)}, expected {expected}")
    return np.ascontiguousarray(_flat(residual, last))


def _flat(x: NDArray[Any], last: bool) -> NDArray[Any]:
    """x in the order in which it lies in memory."""
    return x.transpose(0, 2, 3, 1) if last else x


def quantize_int8(w: Any) -> tuple[Any, Any]:
    """Codes int8 [out, in] and scales float32 [out] of w [out, in]; torch's bfloat16 is taken too."""
    values, bfloat16 = _weights(w)
    codes, scales = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
    _extension().quantize_int8(values, bfloat16, codes, scales)
    return _like(w, codes), _like(w, scales)


def quantize_int4(w: Any, group: int) -> tuple[Any, Any]:
    """Packed uint8 [out, in / 2] and scales float32 [out, in / group] of w [out, in]."""
    values, bfloat16 = _weights(w)
    rows, columns = values.shape
    if group not in GROUPS or columns % group:
        raise ValueError(
            f"group is {group}, expected one of {GROUPS} that divides w's {columns} columns"
        )
    packed = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // group), np.float32)
    _extension().quantize_int4(values, bfloat16, group, packed, scales)
    return _like(w, packed), _like(w, scales)


def _extension() -> ModuleType:
    if module is None:
        raise RuntimeError(reason)
    return module


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _array(name: str, value: Any) -> tuple[NDArray[Any], bool]:
    """The memory of an array or a tensor, and whether its two bytes are a bfloat16."""
    if isinstance(value, np.ndarray):
        return value, False
    if not _is_tensor(value):
        raise TypeError(f"{name} is {type(value).__name__}, expected a numpy array or torch tensor")
    torch = sys.modules["torch"]
    bfloat16 = value.dtype == torch.bfloat16
    tensor = value.detach().view(torch.uint16) if bfloat16 else value.detach()
    return tensor.numpy(), bfloat16


def _float32(name: str, value: Any) -> NDArray[np.float32]:
    array, _ = _array(name, value)
    if array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype}, expected float32")
    return array


def _weights(w: Any) -> tuple[NDArray[Any], bool]:
    values, bfloat16 = _array("w", w)
    if values.ndim != 2 or not (bfloat16 or values.dtype in (np.float32, np.float16)):
        raise ValueError(
            f"w is {values.dtype}{list(values.shape)}, expected [out, in] of float32, float16 or bfloat16"
        )
    return np.ascontiguousarray(values), bfloat16


def _like(given: Any, array: NDArray[Any]) -> Any:
    return sys.modules["torch"].from_numpy(array) if _is_tensor(given) else array
