"""Triton where it is installed, and what several kernels share. Op files import without it."""

# mypy: disable-error-code="name-defined, no-untyped-def, untyped-decorator"

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

jit: Any
entry: Any
await_earlier: Any
set_allocator: Any
try:
    jit = importlib.import_module("triton").jit
    set_allocator = importlib.import_module("triton").set_allocator
    tl = importlib.import_module("triton.language")
    reason = ""
except ImportError as error:
    jit, tl, reason = lambda kernel: kernel, None, f"Triton is not usable: {error}"  # type: ignore[assignment]
    set_allocator = None

if tl is None or importlib.import_module("triton.knobs").runtime.interpret:
    entry = jit

    @jit
    def await_earlier():  # noqa: ANN201
        """Nothing to wait for."""

else:
    _JITFunction: Any = importlib.import_module("triton.runtime.jit").JITFunction
    _driver: Any = importlib.import_module("triton.runtime").driver

    class entry(_JITFunction):  # type: ignore[no-redef, misc]  # noqa: N801
        """A kernel that is launched: where it may begin while earlier launches end, it awaits them first."""

        def run(self, *arguments: Any, **options: Any) -> Any:
            if _begins_early(_driver.active.get_current_device()):
                options["launch_pdl"] = True
            return super().run(*arguments, **options)

    @tl.core.builtin
    def await_earlier(_semantic=None):  # noqa: ANN001, ANN201
        """Let the next launch begin where there is room for it, and wait for all that earlier ones write.

        An entry does so before it reads or writes. Where launches begin one behind the other it is nothing.
        """
        if getattr(_semantic.builder.options, "launch_pdl", False):
            dependent = importlib.import_module("triton.language.extra.cuda.gdc")
            dependent.gdc_launch_dependents(_semantic=_semantic)
            dependent.gdc_wait(_semantic=_semantic)

    @cache
    def _begins_early(_: int) -> bool:
        """Whether launches on the device do, which takes Hopper or later, and asking for it: no GPU has run it yet."""
        target = _driver.active.get_current_target()
        asked = os.environ.get("TINTYPE_EARLY_LAUNCHES") == "1"
        return asked and target.backend == "cuda" and int(target.arch) >= 90


# What is less has no inverse in float32. Kernels see globals that are constants of Triton's alone.
LEAST_NORMAL: Any = 2.0**-126 if tl is None else tl.constexpr(2.0**-126)


@jit
def widen(x):  # noqa: ANN001, ANN201
    """Give the type to compute in: float32, or float64 where x is that already."""
    wide: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    return x.to(wide)


@jit
def sigmoid(x):  # noqa: ANN001, ANN201
    """Give 1 / (1 + exp(-x)): exp2 and rsqrt are an instruction each, exp and a division about five."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@jit
def normal_below(x):  # noqa: ANN001, ANN201
    """Give the weight of the normal distribution below x, by Abramowitz and Stegun's formula 7.1.26 (1964).

    In float32 it is as near as 1 + erf, whose terms cancel for low x, in half the instructions.
    """
    if x.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(x))
    t = root * root
    series = ((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368
    above = (series * t + 0.127414796) * t * tl.exp2(x * x * -0.7213475204444817)
    return tl.where(x > 0.0, 1.0 - above, above)


@jit
def magnitude_bits(x):  # noqa: ANN001, ANN201
    """Give the bits of |x| of float32: integers that order as magnitudes do, NaN, which a maximum drops, above all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@jit
def nearest_int8(x):  # noqa: ANN001, ANN201
    """Round float32 within int8 to the nearest integers, halves to even: the low bits after adding 1.5 * 2**23."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


def arch_of(x: Any) -> int:
    """The architecture of a tensor's GPU, such as 90; 0 of a tensor whose kernels are interpreted."""
    if x.device.type == "cpu":
        return 0
    target = importlib.import_module("triton.runtime").driver.active.get_current_target()
    return int(target.arch)


def ceil_div(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """Give the smallest power of two that is at least `count`: Triton's blocks have such lengths."""
    return 1 << max(count - 1, 0).bit_length()


WIDEST_ROW = 16384  # elements of a row that a block can hold


# Left to itself the assembler holds fewer a thread on some chips, for more blocks at a time, and spills.
REGISTERS = {"maxnreg": 128}


def too_wide(n: int) -> str:
    """Why a row of n elements cannot be held, or nothing."""
    return f"a row of {n} elements does not fit a block's {WIDEST_ROW}" if n > WIDEST_ROW else ""
