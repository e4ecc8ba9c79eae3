"""Weights as codes and scales: int8 and e4m3 with a scale a row, int4 with a scale a group of a row.

All are symmetric: a code times its scale is the weight, and no gradient passes. On CPU tensors the integer ones run in
C++, to the same bits. A row or group that holds what is not finite has a scale of that kind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tintype_kernels import native as extension
from tintype_kernels.dispatch import select
from tintype_kernels.torch_op import check, check_floating, describe, is_watched, public

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


_CODES = {Int8Weight: torch.int8, Fp8Weight: torch.float8_e4m3fn}


def scaled(values: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Values [..., n] stretched to +-limit along the last dimension, and what to multiply them back with [...]."""
    values = values.detach().float()
    scales = values.abs().amax(-1) / limit
    # What is so small that its inverse is infinite becomes zeros.
    inverse = torch.where(scales >= torch.finfo(scales.dtype).tiny, 1 / scales, 0.0)
    return (values * inverse[..., None]).clamp(-limit, limit), scales


def quantize_rows(values: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., n] of an 8-bit type, and scales [...]."""
    stretched, scales = scaled(values, LARGEST[codes])
    return (_integers(stretched) if codes == torch.int8 else stretched).to(codes), scales


def _integers(stretched: Tensor) -> Tensor:
    """The nearest ones; NaN, which the scale tells of, becomes 0: what a conversion makes of it is chance."""
    return stretched.nan_to_num(0.0).round()


def _reference_int8(w: Tensor) -> Int8Weight:
    return Int8Weight(*quantize_rows(w, torch.int8))


def _reference_int4(w: Tensor, group: int) -> Int4Weight:
    values, scales = scaled(w.reshape(w.shape[0], -1, group), 7.0)
    low, high = (_integers(values).to(torch.int16) + 8).chunk(2, -1)
    return Int4Weight((low | high << 4).to(torch.uint8).flatten(1), scales)


def _reference_fp8(w: Tensor) -> Fp8Weight:
    return Fp8Weight(*quantize_rows(w, torch.float8_e4m3fn))


@public(_reference_int8)
def quantize_int8(w: Tensor) -> Int8Weight:
    """Codes of w [out, in], a scale for each row."""
    check_floating("w", w, 2)
    if _select(_native_obstacle(w)) == "native":
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
    if _select(_native_obstacle(w)) == "native":
        return Int4Weight(*extension.quantize_int4(w, group))
    return _reference_int4(w, group)


@public(_reference_fp8)
def quantize_fp8(w: Tensor) -> Fp8Weight:
    """e4m3 codes of w [out, in], a scale for each row."""
    check_floating("w", w, 2)
    _select("weights in e4m3 have no native form")
    return _reference_fp8(w)


def _native_obstacle(w: Tensor) -> str:
    if extension.reason:
        return extension.reason
    if is_watched():
        return "w is traced, and the native kernel has to read it"
    if w.device.type != "cpu" or w.dtype == torch.float64:
        return f"w is {describe(w)}, and the native kernel takes 16 or 32 bits on cpu"
    return ""


def _select(native_obstacle: str) -> str:
    return select(triton="quantisers have no triton form", native=native_obstacle)


def check_weight(qw: Any, kind: type[Int8Weight] | type[Fp8Weight], ndim: int = 2) -> None:
    """Raise unless `qw` is of this kind, with codes of `ndim` dimensions and a scale for each output."""
    _check_kind(qw, kind)
    codes, expected = qw.codes, _CODES[kind]
    if codes.dtype != expected or codes.ndim != ndim:
        raise ValueError(
            f"qw has codes {describe(codes)}, expected {expected} of {ndim} dimensions"
        )
    _check_scales(qw.scales, codes, (len(codes),))


def check_int4_weight(qw: Any) -> tuple[int, int]:
    """Raise unless `qw` is an Int4Weight of whole groups; give the weight's shape, [out, in]."""
    _check_kind(qw, Int4Weight)
    packed, scales = qw.packed, qw.scales
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(f"qw is packed as {describe(packed)}, expected torch.uint8[out, in / 2]")
    outputs, columns = packed.shape[0], 2 * packed.shape[1]
    counts = [columns // group for group in extension.GROUPS if not columns % group]
    groups = scales.shape[-1] if scales.ndim else 0
    if groups not in counts or not groups:
        raise ValueError(
            f"qw has scales {describe(scales)}, expected [{outputs}, {columns} / group] with groups of "
            f"{extension.GROUPS}"
        )
    _check_scales(scales, packed, (outputs, groups))
    return outputs, columns


def _check_kind(qw: Any, kind: type[Any]) -> None:
    if not isinstance(qw, kind):
        raise TypeError(f"qw is {type(qw).__name__}, expected {kind.__name__}")


def _check_scales(scales: Tensor, codes: Tensor, shape: tuple[int, ...]) -> None:
    check("qw's scales", scales, shape, codes.new_empty(0, dtype=torch.float32))


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
