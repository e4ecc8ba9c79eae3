"""Codes against the arithmetic that defines them, and the C++ form against PyTorch's, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernel_checks import forced, normal
from tintype_kernels import KernelUnavailable, quantize_fp8, quantize_int4, quantize_int8
from tintype_kernels.ops.quantise import dequantize
from tolerances import CODE_ROUNDING

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one value, a rest after a register of any width, several rows and registers, and numbers up to a type's edges
SHAPES = [(1, 1), (3, 37), (5, 256)]


QUANTISERS = {"int8": quantize_int8, "int4": partial(quantize_int4, group=32), "fp8": quantize_fp8}
REFERENCES = {
    "int8": quantize_int8.reference,
    "int4": partial(quantize_int4.reference, group=32),
    "fp8": quantize_fp8.reference,
}
# the least of them so small that a scale has no inverse in float32
SPREADS = [1e-38, 1e-6, 1.0, 1e4]
each_scheme = pytest.mark.parametrize("scheme", QUANTISERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", SPREADS)
def test_int8_in_cpp_has_pytorchs_bits(dtype, shape, spread):
    w = normal(*shape, spread=spread).to(dtype)
    with forced("native"):
        native = quantize_int8(w)
    for mine, plain in zip(native, quantize_int8.reference(w), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("spread", SPREADS)
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


@each_scheme
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45])
def test_zeros_stay_zeros_and_what_is_next_to_them_becomes_that(scheme, value):
    for quantize in (QUANTISERS[scheme], REFERENCES[scheme]):
        assert not dequantize(quantize(torch.full((2, 32), value))).any()


@each_scheme
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_own_row_alone_and_in_every_form(scheme, value):
    w = normal(3, 64).float()
    clean = dequantize(REFERENCES[scheme](w))
    w[1, 7] = w[1, 40] = value
    plain = REFERENCES[scheme](w)
    for found in (QUANTISERS[scheme](w), plain):
        numbers = dequantize(found)
        assert not numbers[1].isfinite().any()
        assert torch.equal(numbers[::2], clean[::2])
        assert torch.equal(found[0].view(torch.uint8), plain[0].view(torch.uint8))


@each_scheme
def test_no_gradient_passes(scheme):
    w = torch.nn.Parameter(normal(4, 64).float())
    for quantize in (QUANTISERS[scheme], REFERENCES[scheme]):
        assert not any(tensor.requires_grad for tensor in quantize(w))


@each_scheme
def test_compiles_and_exports_whole(scheme):
    quantize, w = QUANTISERS[scheme], normal(10, 64).float()

    class Module(torch.nn.Module):
        def forward(self, w):
            return tuple(quantize(w))

    eager = tuple(quantize(w))
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    rows = {"w": {0: torch.export.Dim("rows")}}
    exported = torch.export.export(Module(), (w,), dynamic_shapes=rows).module()
    for given, expected in ((w, eager), (w[:3], [part[:3] for part in eager])):
        for form in (compiled, exported):
            for found, part in zip(form(given), expected, strict=True):
                assert torch.equal(found.view(torch.uint8), part.view(torch.uint8))


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


@each_scheme
def test_weights_are_checked_by_name(scheme):
    quantize = QUANTISERS[scheme]
    with pytest.raises(ValueError, match="w is .*expected a floating tensor of 2 dimensions"):
        quantize(torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match="w is torch.int8"):
        quantize(torch.zeros(2, 32, dtype=torch.int8))


@pytest.mark.parametrize(("group", "columns"), [(16, 32), (64, 96)])
def test_groups_are_checked(group, columns):
    with pytest.raises(ValueError, match=f"group is {group}, expected one of .*{columns} columns"):
        quantize_int4(torch.zeros(2, columns), group)
