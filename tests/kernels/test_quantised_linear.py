"""What is particular to the quantised linear layers; `test_ops.py` asks of them what it asks of every op."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_checks import (
    check_same_bits_in_any_batch,
    check_values_and_gradients,
    forced,
    norm_error,
    normal,
)
from matrix_samples import INTERPRETED_DTYPES, LINEAR, ONE_TOKEN
from tintype_kernels import KernelUnavailable, fp8_linear, int4_linear, int8_linear
from tintype_kernels.native import GROUPS
from tintype_kernels.ops.int4_linear import FORWARD, unpacked_weight
from tintype_kernels.ops.linear_epilogue import ACTIVATIONS
from tintype_kernels.ops.quantise import (
    Int8Weight,
    dequantize,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from tolerances import KERNEL_NORM, LINEAR_FP8, LINEAR_INT4, LINEAR_INT8
from torch_contract import check_gradient_formula

OPS = {
    "int8_linear": (int8_linear, quantize_int8, LINEAR_INT8),
    "fp8_linear": (fp8_linear, quantize_fp8, LINEAR_FP8),
    "int4_linear": (int4_linear, lambda w: quantize_int4(w, 32), LINEAR_INT4),
}
every_op = pytest.mark.parametrize("name", OPS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    """Of the op that rounds no tokens; the others' gradient is the same function, and rounding has none to compare."""
    sample = next(s for s in LINEAR if s.op == "int4_linear")
    draw = sample.draw
    check_gradient_formula(sample._replace(draw=lambda: {**draw(), "activation": activation}))


@every_op
def test_it_stands_for_the_linear_layer_that_was_quantised(name):
    op, quantize, tolerance = OPS[name]
    x, w, bias = normal(3, 5, 64).float(), normal(24, 64).float(), normal(24).float()
    expected = torch.nn.functional.linear(x, w, bias)
    assert norm_error(op(x, quantize(w), bias), expected) < tolerance


def test_int8_products_are_exact_integers():
    x, codes = (torch.randint(-127, 128, (n, 40)).float() for n in (5, 6))
    x[:, 0] = codes[:, 0] = 127  # so that every scale is 1
    qw = Int8Weight(codes.to(torch.int8), torch.ones(6))
    with forced("triton"):
        assert torch.equal(int8_linear(x, qw), (x.double() @ codes.double().t()).float())


@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
@pytest.mark.parametrize("sample", ONE_TOKEN, ids=lambda s: f"{s.op}: {s.label}")
def test_one_token_a_sample_without_tiles_equals_the_reference(sample, dtype):
    with forced("triton_vector"):
        check_values_and_gradients(sample, dtype, "cpu")
        check_same_bits_in_any_batch(sample, dtype, "cpu")


@every_op
@pytest.mark.parametrize(
    ("shape", "obstacle"),
    [((2, 3, 64), "one token a sample"), ((64,), "one token a sample")],
    ids=str,
)
def test_the_forms_without_tiles_say_what_they_cannot_take(name, shape, obstacle):
    op, quantize, _ = OPS[name]
    x, qw = torch.zeros(shape), quantize(torch.zeros(24, 64))
    with forced("triton_vector"), pytest.raises(KernelUnavailable, match=obstacle):
        op(x, qw)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_int4_weights_unpack_in_one_pass_to_the_same_bits(group, dtype):
    qw = quantize_int4(normal(70, 3 * group).float(), group)
    assert torch.equal(unpacked_weight(qw, dtype), dequantize(qw, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_the_librarys_int4_form_equals_the_reference(dtype):
    sample = next(s for s in LINEAR if s.op == "int4_linear")
    arguments = sample.arguments(dtype)
    x, qw, bias, residual, activation = (
        arguments[n] for n in ("x", "qw", "bias", "residual", "activation")
    )
    actual = FORWARD.implementations["library"](x, *qw, bias, residual, activation)
    assert actual.dtype == dtype
    tolerance = KERNEL_NORM[str(dtype).removeprefix("torch.")]
    assert norm_error(actual, sample.reference(arguments)[0]) < tolerance


@every_op
def test_a_token_of_zeros_gives_the_bias(name):
    op, quantize, _ = OPS[name]
    bias, qw = normal(24).float(), quantize(normal(24, 64).float())
    for implementation in ("triton", "reference"):
        with (
            forced(implementation),
            np.errstate(divide="ignore"),
        ):  # of the scale that a select then passes over
            assert torch.equal(op(torch.zeros(2, 64), qw, bias), bias.expand(2, -1))


@every_op
def test_gradients_of_a_single_token(name):
    op, quantize, _ = OPS[name]
    qw = quantize(normal(24, 64).float())
    x, bias = (normal(n).float().requires_grad_() for n in (64, 24))
    grad = normal(24).float()
    dx, dbias = torch.autograd.grad(op(x, qw, bias), [x, bias], grad)
    assert norm_error(dx, grad.double() @ dequantize(qw, torch.float64)) < KERNEL_NORM["float32"]
    assert torch.equal(dbias, grad)


I8, F8, I4 = (quantize(torch.zeros(24, 64)) for _, quantize, _ in OPS.values())
WEIGHTS = [
    (int8_linear, I4, TypeError, "qw is Int4Weight, expected Int8Weight"),
    (int8_linear, tuple(I8), TypeError, "qw is tuple, expected Int8Weight"),
    (fp8_linear, I8, TypeError, "qw is Int8Weight, expected Fp8Weight"),
    (int4_linear, I8, TypeError, "qw is Int8Weight, expected Int4Weight"),
    (int8_linear, I8._replace(codes=F8.codes), ValueError, "qw has codes torch.float8_e4m3fn.*expected torch.int8"),
    (fp8_linear, F8._replace(codes=I8.codes), ValueError, "qw has codes torch.int8.*expected torch.float8_e4m3fn"),
    (int8_linear, I8._replace(codes=I8.codes[0]), ValueError, r"qw has codes torch.int8\[64\].*of 2 dimensions"),
    (int8_linear, I8._replace(scales=I8.scales[:1]), ValueError, r"scales is torch.float32\[1\].*torch.float32\[24\]"),
    (fp8_linear, F8._replace(scales=F8.scales.half()), ValueError, r"scales is torch.float16.*torch.float32\[24\]"),
    (int4_linear, I4._replace(packed=I4.packed.view(torch.int8)), ValueError, "qw is packed as .*torch.uint8"),
    (int4_linear, I4._replace(scales=I4.scales[:5]), ValueError, r"scales is torch.float32\[5, 2\].*\[24, 2\]"),
    (int4_linear, I4._replace(scales=I4.scales.half()), ValueError, r"scales is torch.float16.*torch.float32\[24, 2\]"),
    (int4_linear, I4._replace(scales=torch.ones(24, 3)), ValueError, r"qw has scales .*\[24, 3\].* groups of \(32, 64"),
    (int4_linear, I4._replace(scales=torch.ones(24)), ValueError, r"qw has scales torch.float32\[24\]"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "qw", "error", "message"), WEIGHTS)
def test_weights_that_do_not_fit_are_named(op, qw, error, message):
    with pytest.raises(error, match=message):
        op(torch.zeros(2, 64), qw)


@every_op
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float8_e5m2)}, "x is torch.float8_e5m2"),
        ({"x": torch.zeros(2, 32)}, r"x is .*expected a floating tensor \[..., 64\]"),
        ({"x": torch.zeros(2, 64, dtype=torch.int32)}, "x is torch.int32"),
        ({"bias": torch.zeros(25)}, r"bias is .*expected torch.float32\[24\]"),
        ({"residual": torch.zeros(2, 64)}, r"residual is .*expected torch.float32\[2, 24\]"),
        (
            {"activation": "relu"},
            "activation is 'relu', expected one of none, gelu, gelu_tanh, silu",
        ),
    ],
)
def test_arguments_are_checked_by_name(name, change, message):
    op, quantize, _ = OPS[name]
    arguments = {"x": torch.zeros(2, 64), "qw": quantize(torch.zeros(24, 64))}
    with pytest.raises(ValueError, match=message):
        op(**{**arguments, **change})
