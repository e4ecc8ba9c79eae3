"""Codes against the arithmetic that defines them, and the C++ form against PyTorch's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import forced, normal
from tintype_kernels import KernelUnavailable, quantize_fp8, quantize_int4, quantize_int8
from tintype_kernels.ops.quantise import dequantize
from tolerances import CODE_ROUNDING

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one value, a rest after a register of any width, several rows and registers, and numbers up to a type's edges
SHAPES = [(1, 1), (3, 37), (5, 256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4])
def test_int8_in_cpp_has_pytorchs_bits(dtype, shape, spread):
    w = normal(*shape, spread=spread).to(dtype)
    with forced("native"):
        native = quantize_int8(w)
    for mine, plain in zip(native, quantize_int8.reference(w), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4])
def test_int4_in_cpp_has_pytorchs_bits(dtype, group, spread):
    w = normal(7, 384, spread=spread).to(dtype)
    with forced("native"):
        native = quantize_int4(w, group)
    assert native.group == group
    for mine, plain in zip(native, quantize_int4.reference(w, group), strict=True):
        assert torch.equal(mine, plain)


def test_large_weights_are_cut_over_threads_alike():
    w = normal(300, 1024).to(torch.bfloat16)
    with forced("native"):
        codes, packed = quantize_int8(w), quantize_int4(w, 64)
    assert torch.equal(codes.codes, quantize_int8.reference(w).codes)
    assert torch.equal(packed.packed, quantize_int4.reference(w, 64).packed)


@pytest.mark.parametrize(
    ("quantize", "levels"),
    [(quantize_int8, 127), (lambda w: quantize_int4(w, 32), 7)],
    ids=["int8", "int4"],
)
def test_no_weight_moves_by_more_than_half_a_step(quantize, levels):
    w = normal(6, 64).float()
    step = w.abs().amax(1, keepdim=True) / levels
    moved = (dequantize(quantize(w), torch.float64) - w).abs()
    assert (moved <= step / 2 * (1 + CODE_ROUNDING)).all()


def test_fp8_moves_no_weight_by_more_than_a_sixteenth():
    w = normal(6, 64).float()
    moved = (dequantize(quantize_fp8(w), torch.float64) - w).abs()
    least = w.abs().amax(1, keepdim=True) / 448 * 2**-6  # below it e4m3 has fixed steps
    assert (moved <= w.abs().maximum(least) / 16 * (1 + CODE_ROUNDING)).all()


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8, lambda w: quantize_int4(w, 32)])
def test_zeros_stay_zeros(quantize):
    assert not dequantize(quantize(torch.zeros(2, 32))).any()


def test_a_byte_holds_a_value_of_each_half_of_its_group():
    w = torch.zeros(1, 64)
    w[0, :2], w[0, 16:18] = torch.tensor([7.0, -7.0]), torch.tensor([3.0, 0.0])
    packed, scales = quantize_int4(w, 32)
    assert packed[0, :2].tolist() == [(7 + 8) | (3 + 8) << 4, (-7 + 8) | (0 + 8) << 4]
    assert scales.tolist() == [[1.0, 0.0]]


def test_strided_weights_and_float64():
    w = normal(64, 9).t()
    assert torch.equal(quantize_int8(w.float()).codes, quantize_int8.reference(w.float()).codes)
    assert torch.equal(quantize_int8(w).codes, quantize_int8.reference(w).codes)
    with forced("native"), pytest.raises(KernelUnavailable, match="w is torch.float64"):
        quantize_int8(w)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8, lambda w: quantize_int4(w, 32)])
def test_weights_are_checked_by_name(quantize):
    with pytest.raises(ValueError, match="w is .*expected a floating tensor of 2 dimensions"):
        quantize(torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match="w is torch.int8"):
        quantize(torch.zeros(2, 32, dtype=torch.int8))


@pytest.mark.parametrize(("group", "columns"), [(16, 32), (64, 96)])
def test_groups_are_checked(group, columns):
    with pytest.raises(ValueError, match=f"group is {group}, expected one of .*{columns} columns"):
        quantize_int4(torch.zeros(2, columns), group)
