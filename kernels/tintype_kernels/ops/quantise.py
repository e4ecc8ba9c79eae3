"""Weights as codes and scales: int8 and e4m3 with a scale a row, int4 with a scale a group of a row.

All are symmetric: a code times its scale is the weight. On CPU tensors the integer ones run in C++, to the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tintype_kernels import native as extension
from tintype_kernels.dispatch import select
from tintype_kernels.torch_op import check_floating, describe, public

# The largest code of each 8-bit type.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Int8Weight(NamedTuple):
    """codes int8 [out, in], or a convolution's [out, in, kh, kw], scales float32 [out]."""

    codes: Tensor
    scales: Tensor


class Int4Weight(NamedTuple):
    """packed uint8 [out, in / 2], scales float32 [out, in / group].

    Byte j of a group of g values holds value j in its low nibble and value j + g/2 in its high one, each plus 8: so a
    kernel takes both halves of a group apart without shuffling them.
    """

    packed: Tensor
    scales: Tensor

    @property
    def group(self) -> int:
        return 2 * self.packed.shape[1] // self.scales.shape[1]


class Fp8Weight(NamedTuple):
    """codes float8_e4m3fn [out, in], scales float32 [out]."""

    codes: Tensor
    scales: Tensor


def scaled(values: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Values [..., n] stretched to +-limit along the last dimension, and what to multiply them back with [...]."""
    values = values.float()
    scales = values.abs().amax(-1) / limit
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (values * inverse[..., None]).clamp(-limit, limit), scales


def quantize_rows(values: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., n] of an 8-bit type, and scales [...]."""
    stretched, scales = scaled(values, LARGEST[codes])
    return (stretched.round() if codes == torch.int8 else stretched).to(codes), scales


def _reference_int8(w: Tensor) -> Int8Weight:
    return Int8Weight(*quantize_rows(w, torch.int8))


def _reference_int4(w: Tensor, group: int) -> Int4Weight:
    values, scales = scaled(w.reshape(len(w), -1, group), 7.0)
    low, high = (values.round().to(torch.int16) + 8).chunk(2, -1)
    return Int4Weight((low | high << 4).to(torch.uint8).flatten(1), scales)


def _reference_fp8(w: Tensor) -> Fp8Weight:
    return Fp8Weight(*quantize_rows(w, torch.float8_e4m3fn))


@public(_reference_int8)
def quantize_int8(w: Tensor) -> Int8Weight:
    """Codes of w [out, in], a scale for each row."""
    check_floating("w", w, 2)
    if _select(w) == "native":
        return Int8Weight(*extension.quantize_int8(w))
    return _reference_int8(w)


@public(_reference_int4)
def quantize_int4(w: Tensor, group: int) -> Int4Weight:
    """Packed codes of w [out, in], a scale for each `group` of 32, 64 or 128 values of a row."""
    check_floating("w", w, 2)
    if group not in extension.GROUPS or w.shape[1] % group:
        raise ValueError(
            f"group is {group}, expected one of {extension.GROUPS} that divides w's {w.shape[1]} columns"
        )
    if _select(w) == "native":
        return Int4Weight(*extension.quantize_int4(w, group))
    return _reference_int4(w, group)


@public(_reference_fp8)
def quantize_fp8(w: Tensor) -> Fp8Weight:
    """e4m3 codes of w [out, in], a scale for each row."""
    check_floating("w", w, 2)
    return _reference_fp8(w)


def _select(w: Tensor) -> str:
    obstacle = extension.reason
    if w.device.type != "cpu" or w.dtype == torch.float64:
        obstacle = (
            obstacle or f"w is {describe(w)}, and the native kernel takes 16 or 32 bits on cpu"
        )
    return select(triton="quantisers have no triton form", native=obstacle)


def dequantize(
    qw: Int8Weight | Int4Weight | Fp8Weight, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights that the codes stand for, [out, in] or a convolution's [out, in, kh, kw]."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(qw, Int4Weight):
        groups = qw.packed.reshape(*qw.scales.shape, -1)
        values = torch.cat([groups & 15, groups >> 4], -1).to(wide) - 8
        return (values * qw.scales.to(wide)[..., None]).flatten(1).to(dtype)
    scales = qw.scales.to(wide).reshape(-1, *[1] * (qw.codes.ndim - 1))
    return (qw.codes.to(wide) * scales).to(dtype)
