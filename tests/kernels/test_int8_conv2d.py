"""What is particular to the convolution in int8; `test_ops.py` asks of it what it asks of every op."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from kernel_checks import forced, norm_error, normal
from tintype.models.quantised import fake_quantise
from tintype_kernels import KernelUnavailable, choice, int8_conv2d
from tintype_kernels.ops.int8_conv2d import FORWARD, LIBRARIES, LONGEST, is_preferred
from tintype_kernels.ops.quantise import Int8Weight, dequantize, quantize_int8
from tolerances import KERNEL_FORMULA, KERNEL_NORM, LINEAR_INT8

each_form = pytest.mark.parametrize("implementation", ["triton", "reference"])


def quantised(w):
    codes, scales = quantize_int8(w.flatten(1))
    return Int8Weight(codes.view(w.shape), scales)


def whole(*shape):
    """Integers that are codes of themselves at a scale of 1."""
    return torch.randint(-100, 101, shape).double()


@pytest.mark.parametrize("stride", [1, 2])
def test_it_stands_for_the_convolution_that_was_quantised(stride):
    x, w, bias = normal(2, 16, 9, 8).float(), normal(24, 16, 3, 3).float(), normal(24).float()
    expected = F.conv2d(x, w, bias, stride, 1)
    assert norm_error(int8_conv2d(x, quantised(w), bias, stride=stride), expected) < LINEAR_INT8


@each_form
@pytest.mark.parametrize(("stride", "padding", "taps"), [(1, 1, 3), (2, 0, 3), (2, 2, 1)])
def test_sums_are_exact_integers(implementation, stride, padding, taps):
    x, codes = whole(2, 70, 6, 5), whole(9, 70, taps, taps)
    x[:, 0, 0, 0] = 127  # so that every scale is 1
    qw = Int8Weight(codes.to(torch.int8), torch.ones(9))
    with forced(implementation):
        found = int8_conv2d(x.float(), qw, stride=stride, padding=padding)
    assert torch.equal(found, F.conv2d(x, codes, None, stride, padding).float())


def test_kernels_that_are_not_square():
    x, codes = whole(1, 5, 6, 7), whole(3, 5, 1, 3)
    qw, one = Int8Weight(codes.to(torch.int8), torch.ones(3)), torch.tensor(1.0)
    with forced("triton"):
        found = int8_conv2d(x.float(), qw, input_scale=one)
    assert torch.equal(found, F.conv2d(x, codes, padding=1).float())


@each_form
def test_a_calibrated_scale_rounds_as_a_layer_that_is_exported_does(implementation):
    x, w, scale = normal(2, 12, 5, 6).float(), normal(8, 12, 3, 3).float(), torch.tensor(0.01)
    qw = quantised(w)
    rounded = fake_quantise(x, scale, "int8")
    assert rounded.abs().max() < x.abs().max()  # some are cut off
    with forced(implementation):
        found = int8_conv2d(x, qw, input_scale=scale)
    expected = F.conv2d(rounded.double(), dequantize(qw, torch.float64), padding=1)
    assert norm_error(found, expected) < KERNEL_NORM["float32"]


@each_form
def test_a_sample_of_zeros_gives_bias_and_residual(implementation):
    x, qw = torch.zeros(2, 4, 3, 3), quantised(normal(5, 4, 3, 3))
    bias, residual = normal(5).float(), normal(2, 5, 3, 3).float()
    with forced(implementation):
        found = int8_conv2d(x, qw, bias, residual)
    assert torch.equal(found, bias[:, None, None] + residual)


@each_form
def test_a_sample_next_to_zero_counts_as_zeros(implementation):
    x, qw, bias = torch.full((2, 4, 3, 3), 1e-38), quantised(normal(5, 4, 3, 3)), normal(5).float()
    qw = qw._replace(scales=qw.scales * 1e38)  # so that no more than zeros is none
    with forced(implementation):
        found = int8_conv2d(x, qw, bias)
    assert torch.equal(found, bias[:, None, None].expand_as(found))


@each_form
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_sample_alone(implementation, value):
    x, qw = normal(3, 4, 5, 5).float(), quantised(normal(6, 4, 3, 3))
    clean = int8_conv2d(x, qw)
    x[1, 2, 3, 0] = value
    with forced(implementation), np.errstate(invalid="ignore"):
        found = int8_conv2d(x, qw)
    assert not found[1].isfinite().any()
    assert norm_error(found[::2], clean[::2]) < KERNEL_NORM["float32"]


@each_form
def test_nan_shows_in_its_sample_on_a_calibrated_scale_too(implementation):
    x, qw, scale = normal(3, 4, 5, 5).float(), quantised(normal(6, 4, 3, 3)), torch.tensor(0.02)
    clean = int8_conv2d(x, qw, input_scale=scale)
    x[1, 2, 3, 0] = float("nan")
    with forced(implementation), np.errstate(invalid="ignore"):
        found = int8_conv2d(x, qw, input_scale=scale)
    assert found[1].isnan().all()
    assert norm_error(found[::2], clean[::2]) < KERNEL_NORM["float32"]
    assert scale == torch.tensor(0.02)


@each_form
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_output_lies_as_the_input_does(implementation, layout):
    x = normal(2, 4, 5, 6).float().contiguous(memory_format=layout)
    qw, residual = quantised(normal(8, 4, 3, 3)), normal(2, 8, 3, 3).float()
    with forced(implementation):
        found = int8_conv2d(x, qw, None, residual, stride=2)
    assert found.is_contiguous(memory_format=layout)
    other = residual.contiguous(memory_format=torch.channels_last)
    with forced(implementation):
        assert torch.equal(found, int8_conv2d(x, qw, None, other, stride=2))


def test_codes_may_be_held_either_way():
    x, (codes, scales) = normal(2, 4, 5, 6).float(), quantised(normal(8, 4, 3, 3))
    last = codes.contiguous(memory_format=torch.channels_last)
    with forced("triton"):
        one, other = (int8_conv2d(x, Int8Weight(c, scales)) for c in (codes, last))
    assert torch.equal(one, other)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_by_steps_of_one_code(stride):
    """On whole numbers at a scale of 1 rounding changes nothing, and a difference over a step of 1 is exact."""
    x, bias = whole(2, 3, 5, 4).requires_grad_(), whole(4).requires_grad_()
    residual = whole(2, 4, *F.conv2d(x, whole(4, 3, 3, 3), stride=stride, padding=1).shape[2:])
    qw = Int8Weight(whole(4, 3, 3, 3).to(torch.int8), torch.full((4,), 0.25))

    def call(*tensors):
        return int8_conv2d(*tensors, stride=stride, input_scale=torch.tensor(1.0))

    with forced("reference"):
        leaves = (x, bias, residual.requires_grad_())
        assert torch.autograd.gradcheck(lambda x, b, r: call(x, qw, b, r), leaves, eps=1.0)


KERNELS = Int8Weight(torch.zeros(6, 4, 3, 3, dtype=torch.int8), torch.ones(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5, 5)}, r"x is torch.float32\[4, 5, 5\].*4 dimensions"),
        ({"x": torch.zeros(2, 4, 5, 5).int()}, "x is torch.int32"),
        ({"x": torch.zeros(2, 3, 5, 5)}, r"qw has codes .*expected torch.int8\[out, 3, kh, kw\]"),
        ({"qw": KERNELS._replace(codes=KERNELS.codes[0])}, "qw has codes .* of 4 dimensions"),
        ({"qw": KERNELS._replace(codes=KERNELS.codes.view(torch.uint8))}, "expected torch.int8 of"),
        ({"qw": KERNELS._replace(scales=torch.ones(1))}, r"scales is .*\[1\].*\[6\]"),
        ({"qw": KERNELS._replace(scales=torch.ones(6).half())}, "scales is torch.float16"),
        ({"x": torch.zeros(2, 4, 5, 0)}, r"x is .*that hold a kernel of \[3, 3\]"),
        ({"bias": torch.zeros(6).half()}, r"bias is torch.float16\[6\].*torch.float32\[6\]"),
        ({"residual": torch.zeros(2, 6, 5, 4)}, r"residual is .*\[2, 6, 5, 5\]"),
        ({"stride": 2, "residual": torch.zeros(2, 6, 5, 5)}, r"residual is .*\[2, 6, 3, 3\]"),
        ({"input_scale": torch.ones(2)}, r"input_scale is torch.float32\[2\].*torch.float32\[\]"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": -1}, "padding -1"),
    ],
)
def test_arguments_are_checked_by_name(change, message):
    arguments = {"x": torch.zeros(2, 4, 5, 5), "qw": quantised(torch.zeros(6, 4, 3, 3))}
    with pytest.raises(ValueError, match=message):
        int8_conv2d(**{**arguments, **change})


def test_sums_that_an_int32_cannot_hold_are_refused_to_triton():
    x = torch.zeros(1, LONGEST + 1, 1, 1)
    qw = Int8Weight(torch.zeros(1, LONGEST + 1, 1, 1, dtype=torch.int8), torch.ones(1))
    with forced("triton"), pytest.raises(KernelUnavailable, match=f"pass int32's {LONGEST}"):
        int8_conv2d(x, qw, padding=0)


@pytest.mark.parametrize("measured", ["triton", "library", ""])
def test_on_a_gpu_it_is_preferred_where_it_was_faster_than_the_library(measured, monkeypatch):
    asked = []

    def on_gpu(op, tensor, arguments, forms):
        asked.append((op, set(forms)))
        return measured

    monkeypatch.setattr(choice, "on_gpu", on_gpu)
    monkeypatch.setenv("TINTYPE_KERNELS", "auto")
    with FakeTensorMode():
        x, codes = torch.empty(1, 4, 5, 5, device="cuda"), torch.empty(8, 4, 3, 3, device="cuda")
        qw = Int8Weight(codes.to(torch.int8), torch.empty(8, device="cuda"))
        assert is_preferred(x, qw) == (measured == "triton")
    assert asked == [("int8_conv2d", {"triton", "library"})]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_librarys_form_takes_the_picture_as_it_is(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, qw = normal(2, 4, 5, 6).contiguous(memory_format=layout), quantised(normal(8, 4, 3, 3))
    bias, residual = normal(8), normal(2, 8, 3, 3)
    expected = F.conv2d(x, dequantize(qw, torch.float64), bias, 2, 1) + residual
    found = FORWARD.implementations["library"](x, *qw, bias, residual, None, 2, 1)
    assert found.is_contiguous(memory_format=layout)
    timed = LIBRARIES["conv2d"](x, qw, bias, residual, stride=2)
    for output in (found, timed):
        assert norm_error(output, expected) < KERNEL_FORMULA
