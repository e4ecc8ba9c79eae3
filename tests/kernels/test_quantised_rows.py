"""Ops that leave their rows in 8 bits, against the ops that they fuse, and the linear layers that take such rows."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernel_checks import forced, norm_error, normal
from matrix_samples import INTERPRETED_DTYPES
from tintype_kernels import (
    KernelUnavailable,
    activate_quantized,
    fp8_linear,
    gate_residual,
    geglu,
    geglu_quantized,
    int8_linear,
    layer_norm_modulate,
    layer_norm_modulate_quantized,
    residual_layer_norm,
    residual_layer_norm_quantized,
)
from tintype_kernels.ops.linear_epilogue import ACTIVATIONS
from tintype_kernels.ops.quantise import LARGEST, quantize_fp8, quantize_int8
from tintype_kernels.ops.quantised_rows import SCHEMES, plain_rows
from tintype_kernels.torch_op import TorchOp
from tolerances import CODE_ROUNDING, KERNEL_NORM

LINEAR = {"int8": (int8_linear, quantize_int8), "fp8": (fp8_linear, quantize_fp8)}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def _modulated(b, t, c):
    return normal(b, t, c, mean=0.4), normal(b, c), normal(b, 1, c)


def _beside(activation, before, x):
    return torch.cat([before, ACTIVATIONS[activation](x)], -1)


def _activated_beside(activation, before, x, scheme="int8"):
    return activate_quantized(x, scheme, activation, before)


def _joined(b, t, c):
    return normal(b, t, c), normal(b, t, c), normal(b, c), normal(b, c), normal(b, 1, c)


def _normed(op, *arguments, **scheme):
    return op(*arguments, **scheme)[1]


def _normed_exactly(*arguments):
    return residual_layer_norm.reference(*arguments)[1]


JOINED = partial(_normed, residual_layer_norm)
JOINED.reference = _normed_exactly  # type: ignore[attr-defined]


def beside(activation):
    """The fused op, what it fuses, and arguments."""
    arguments = normal(2, 7, 48), normal(2, 7, 300, spread=2)
    return partial(_activated_beside, activation), partial(_beside, activation), arguments


# by name: the fused op, the op that it fuses, arguments; rows that fill no block, one of them wider than a tile
FUSED = {
    "layer_norm_modulate": (layer_norm_modulate_quantized, layer_norm_modulate, _modulated(2, 11, 150)),
    "layer_norm_modulate, wide": (layer_norm_modulate_quantized, layer_norm_modulate, _modulated(2, 3, 4100)),
    "joined": (partial(_normed, residual_layer_norm_quantized), JOINED, _joined(2, 11, 150)),
    "geglu": (geglu_quantized, geglu, (normal(2, 3, 2 * 1030, spread=2),)),
    "none": (activate_quantized, ACTIVATIONS["none"], (normal(2, 7, 300),)),
    "beside": beside("none"),
}  # fmt: skip
ACTIVATED = {
    name: (partial(activate_quantized, activation=name), function, (normal(2, 5, 70, spread=2),))
    for name, function in ACTIVATIONS.items()
} | {"beside, gelu_tanh": beside("gelu_tanh")}


def each(fused):
    return pytest.mark.parametrize(("fused", "op", "arguments"), fused.values(), ids=fused.keys())


@each(FUSED)
@each_scheme
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_codes_are_those_of_the_op_and_the_rounding_one_after_the_other(
    fused, op, arguments, scheme, dtype
):
    arguments = [a.to(dtype) for a in arguments]
    with forced("triton"):
        rows, expected = fused(*arguments, scheme=scheme), plain_rows(op(*arguments), scheme)
    assert rows.dtype == dtype
    assert rows.codes.dtype == SCHEMES[scheme]
    assert torch.equal(rows.scales, expected.scales)
    if scheme == "int8":  # e4m3 is rounded wrongly by the interpreter
        assert torch.equal(rows.codes, expected.codes)


@each({**FUSED, **ACTIVATED})
@each_scheme
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_no_value_moves_by_more_than_half_a_step(fused, op, arguments, scheme, implementation):
    if implementation == "triton" and scheme == "fp8":
        pytest.skip("the interpreter rounds e4m3 wrongly")
    exact = getattr(op, "reference", op)(*arguments)
    with forced(implementation):
        rows = fused(*(a.float() for a in arguments), scheme=scheme)
    largest = LARGEST[rows.codes.dtype] * rows.scales
    assert norm_error(largest, exact.abs().amax(-1)) < KERNEL_NORM["float32"]
    step = rows.scales.double()[..., None]
    moved = (rows.codes.double() * step - exact).abs()
    if scheme == "fp8":  # whose steps are an eighth of the value, or of the least normal one
        step = exact.abs().maximum(step * 2**-6) / 8
    # 1 + erf of a low gate has but float32's absolute precision.
    rounding = KERNEL_NORM["float32"] * exact.abs().clamp_min(1)
    assert (moved <= step / 2 * (1 + CODE_ROUNDING) + rounding).all()


def test_without_the_unit_it_is_the_norm_with_weights():
    x, bias, weight = normal(2, 5, 64), normal(64), normal(64)
    expected = plain_rows(F.layer_norm(x, (64,), weight, bias, 1e-5), "int8")
    for implementation in ("triton", "reference"):
        with forced(implementation):
            each = [v.expand(2, -1) for v in (bias, weight)]
            rows = layer_norm_modulate_quantized(x, *each, eps=1e-5, unit=0.0)
        assert torch.equal(rows.codes, expected.codes)


def test_the_stream_is_the_sum_whatever_its_norm_is_kept_in():
    arguments = [a.half() for a in _joined(2, 5, 70)]
    with forced("triton"):
        stream, _ = residual_layer_norm_quantized(*arguments)
        assert torch.equal(stream, gate_residual(*arguments[:3]))
        assert torch.equal(stream, residual_layer_norm(*arguments)[0])


@each(FUSED)
def test_same_bits_in_any_batch(fused, op, arguments):
    with forced("triton"):
        both, last = fused(*arguments), fused(*(a[1:] for a in arguments))
    assert torch.equal(both.codes[1:], last.codes)
    assert torch.equal(both.scales[1:], last.scales)


@each(FUSED)
def test_strided(fused, op, arguments):
    x, *others = arguments
    gaps = x.new_zeros(2, 2 * x.shape[1], 2 * x.shape[2])[:, ::2, ::2].copy_(x)
    with forced("triton"):
        assert torch.equal(fused(gaps, *others).codes, fused(x, *others).codes)


@each_scheme
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_linear_layer_gives_the_same_for_rows_as_for_what_they_were(
    scheme, dtype, implementation
):
    linear, quantize = LINEAR[scheme]
    x, bias, residual = (normal(*s).to(dtype) for s in ((2, 35, 192), (70,), (2, 35, 70)))
    qw = quantize(normal(70, 192).float())
    with forced(implementation):
        rows = activate_quantized(x, scheme)
        for others in ((), (bias, "gelu_tanh", residual)):
            out = linear(rows, qw, *others)
            assert out.dtype == dtype
            assert torch.equal(out, linear(x, qw, *others))


@each_scheme
def test_torch_accepts_the_ops(scheme, monkeypatch):
    calls, run = [], TorchOp.__call__
    monkeypatch.setattr(TorchOp, "__call__", lambda op, *a: calls.append((op, a)) or run(op, *a))
    linear, quantize = LINEAR[scheme]
    for fused, _, arguments in FUSED.values():
        rows = fused(*(a.float() for a in arguments), scheme=scheme)
        linear(rows, quantize(normal(16, rows.shape[-1])), normal(16).float())
    writers = {
        "layer_norm_modulate_quantized", "residual_layer_norm_quantized", "geglu_quantized", "activate_quantized"
    }  # fmt: skip
    assert {op.name for op, _ in calls} == writers | {"quantized_rows_linear"}
    for op, inputs in calls:
        torch.library.opcheck(getattr(torch.ops.tintype, op.name).default, inputs)


@each_scheme
def test_compiles_and_exports_whole(scheme):
    linear, quantize = LINEAR[scheme]
    qw = quantize(normal(16, 150).float())

    class Module(torch.nn.Module):
        def forward(self, x, shift, scale):
            return linear(layer_norm_modulate_quantized(x, shift, scale, scheme), qw)

    arguments = tuple(a.float() for a in FUSED["layer_norm_modulate"][2])
    eager = Module()(*arguments)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), eager)
    assert torch.equal(torch.export.export(Module(), arguments).module()(*arguments), eager)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows, qw: int8_linear(rows._replace(codes=rows.codes.view(torch.float8_e4m3fn)), qw),
         r"x has codes torch.float8_e4m3fn\[2, 64\].*expected torch.int8\[..., 64\]"),
        (lambda rows, qw: int8_linear(rows, quantize_int8(torch.zeros(24, 32))), r"expected .*\[..., 32\]"),
        (lambda rows, qw: int8_linear(rows, qw, torch.zeros(24).half()), r"bias is torch.float16.*torch.float32\[24\]"),
        (lambda rows, qw: int8_linear(rows, qw, None, "none", torch.zeros(3, 24)), r"residual is .*\[2, 24\]"),
        (lambda rows, qw: int8_linear(rows._replace(scales=rows.scales[:1]), qw), r"x's scales is .*\[1\].*\[2\]"),
        (lambda rows, qw: int8_linear(rows, qw._replace(scales=qw.scales[:1])), r"qw's scales is .*\[1\].*\[24\]"),
        (lambda rows, qw: activate_quantized(torch.zeros(2, 0)), r"x is .*\[2, 0\]"),
        (lambda rows, qw: activate_quantized(torch.zeros(2, 64), "int4"), "scheme is 'int4', expected one of int8"),
        (lambda rows, qw: activate_quantized(torch.zeros(2, 64), activation="relu"), "activation is 'relu'"),
        (lambda rows, qw: activate_quantized(torch.zeros(2, 64).int()), "x is torch.int32"),
        (lambda rows, qw: activate_quantized(torch.zeros(2, 64), before=torch.zeros(3, 8)), r"before is .*\[3, 8\]"),
        (lambda rows, qw: geglu_quantized(torch.zeros(2, 5)), r"x is .*\[..., 2\*c\]"),
        (lambda rows, qw: layer_norm_modulate_quantized(torch.zeros(1, 2, 3), *torch.zeros(2, 1, 4)), "shift is"),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(activate_quantized(torch.zeros(2, 64)), quantize_int8(torch.zeros(24, 64)))


@each_scheme
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_row_next_to_zero_becomes_zeros_and_keeps_its_scale(scheme, implementation):
    x = torch.full((2, 40), 1e-38)
    with forced(implementation):
        rows = activate_quantized(x, scheme)
    assert not rows.codes.view(torch.uint8).any()
    assert torch.equal(rows.scales, x[:, 0] / LARGEST[rows.codes.dtype])


def test_a_row_that_fits_no_block_is_refused_to_triton():
    with forced("triton"), pytest.raises(KernelUnavailable, match="a row of 16385 elements"):
        activate_quantized(torch.zeros(1, 16385))


@each_scheme
@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_own_row_alone(scheme, implementation, value):
    linear, quantise = LINEAR[scheme]
    x, qw = normal(3, 40).float(), quantise(normal(8, 40).float())
    with forced(implementation), np.errstate(invalid="ignore"):
        clean = linear(x, qw)
        x[1, 7] = value
        found = linear(x, qw)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], clean[::2])
