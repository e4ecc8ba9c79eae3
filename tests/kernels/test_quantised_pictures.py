"""The norm that leaves its pictures in 8 bits, against the ops that it fuses, and the convolution of such pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernel_checks import DTYPES, SAMPLES, forced, is_floating, norm_error, normal
from matrix_samples import INTERPRETED_DTYPES
from tintype_kernels import group_norm_silu, group_norm_silu_quantized, int8_conv2d
from tintype_kernels.ops.quantise import Int8Weight
from tintype_kernels.ops.quantised_pictures import LEAST, MOST, plain_pictures, write_pictures
from tintype_kernels.torch_op import TorchOp
from tolerances import CODE_ROUNDING, KERNEL_NORM

# On chip and split, each way that x lies and each kind of residual; what overflows or cancels in 16 bits.
NORMS = [sample for sample in SAMPLES if sample.op == "group_norm_silu"]
SCALES = {"dynamic": None, "static": torch.tensor(0.02)}  # which cuts some off
each_norm = pytest.mark.parametrize("sample", NORMS, ids=[sample.label for sample in NORMS])
each_scale = pytest.mark.parametrize("input_scale", SCALES.values(), ids=SCALES.keys())
each_form = pytest.mark.parametrize("implementation", ["triton", "reference"])
each_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=str
)


def drawn(label, dtype=torch.float32):
    """The arguments of a sample, by its label."""
    return next(sample for sample in NORMS if sample.label == label).arguments(dtype)


def weight(outputs, c, taps=3):
    codes = torch.randint(-127, 128, (outputs, c, taps, taps), dtype=torch.int8)
    return Int8Weight(codes, torch.rand(outputs) + 0.5)


@each_norm
@each_scale
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_that_the_convolution_would_have_made(sample, input_scale, dtype):
    arguments = sample.arguments(dtype)
    with forced("triton"):
        pictures = group_norm_silu_quantized(**arguments, input_scale=input_scale)
        codes, scales = write_pictures(group_norm_silu(**arguments), input_scale)
    assert pictures.dtype == dtype
    assert torch.equal(pictures.codes, codes)
    assert torch.equal(pictures.scales, scales)


@each_scale
@each_form
@pytest.mark.parametrize("label", ["on chip", "split NHWC"])
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_the_convolution_behind_gives_what_it_gave(label, input_scale, implementation, dtype):
    arguments = drawn(label, dtype)
    qw, bias = weight(9, arguments["x"].shape[1]), normal(9).to(dtype)
    with forced(implementation):
        fused = int8_conv2d(
            group_norm_silu_quantized(**arguments, input_scale=input_scale), qw, bias, stride=2
        )
        plain = int8_conv2d(
            group_norm_silu(**arguments), qw, bias, stride=2, input_scale=input_scale
        )
    assert torch.equal(fused, plain)
    assert fused.stride() == plain.stride()


@each_norm
@each_scale
@each_form
def test_no_value_moves_by_more_than_half_a_step(sample, input_scale, implementation):
    arguments = sample.arguments(torch.float32)
    with forced(implementation):
        pictures = group_norm_silu_quantized(**arguments, input_scale=input_scale)
    exact = group_norm_silu.reference(
        **{name: v.double() if is_floating(v) else v for name, v in arguments.items()}
    )
    step = pictures.scales.double()[:, None, None, None]
    if input_scale is None:
        peaks = exact.abs().amax((1, 2, 3))
        assert norm_error(MOST * pictures.scales, peaks) < KERNEL_NORM["float32"]
    else:
        assert torch.equal(pictures.scales, input_scale.expand(len(exact)))
        exact = exact.minimum(MOST * step).maximum(LEAST * step)
    moved = (pictures.numbers() - exact).abs()
    rounding = KERNEL_NORM["float32"] * exact.abs().clamp_min(1)
    assert (moved <= step / 2 * (1 + CODE_ROUNDING) + rounding).all()


@pytest.mark.parametrize("label", ["on chip", "split", "split NHWC"])
@each_scale
def test_same_bits_in_any_batch(label, input_scale):
    arguments = drawn(label)
    alone = {
        **arguments,
        **{n: v[1:] for n in ("x", "residual") if (v := arguments[n]) is not None},
    }
    with forced("triton"):
        both, last = (
            group_norm_silu_quantized(**a, input_scale=input_scale) for a in (arguments, alone)
        )
    assert torch.equal(both.codes[1:], last.codes)
    assert torch.equal(both.scales[1:], last.scales)


@pytest.mark.parametrize("label", ["on chip", "split"])
def test_strided(label):
    arguments = drawn(label)
    x = arguments["x"]
    gaps = x.new_zeros([2 * size for size in x.shape])[::2, ::2, ::2, ::2].copy_(x)
    with forced("triton"):
        pair = [group_norm_silu_quantized(**{**arguments, "x": given}) for given in (gaps, x)]
    assert torch.equal(pair[0].codes, pair[1].codes)


@each_form
@each_scale
@pytest.mark.parametrize("label", ["on chip", "split NHWC"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_sample_alone(implementation, input_scale, label, value):
    arguments = drawn(label)
    qw = weight(4, arguments["x"].shape[1])

    def call():
        return int8_conv2d(group_norm_silu_quantized(**arguments, input_scale=input_scale), qw)

    with forced(implementation), np.errstate(invalid="ignore"):
        clean = call()
        arguments["x"][1, 1, 2, 3] = value
        found = call()
    assert not found[1].isfinite().any()
    assert torch.equal(found[0], clean[0])


@each_form
@each_layout
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)
def test_a_convolution_gives_the_same_for_codes_as_for_what_they_were(
    implementation, layout, dtype
):
    x = normal(2, 70, 6, 5).to(dtype).contiguous(memory_format=layout)
    qw, bias, residual = weight(9, 70), normal(9).to(dtype), normal(2, 9, 3, 3).to(dtype)
    with forced(implementation):
        pictures = plain_pictures(x)
        for others in ((), (bias, residual)):
            out = int8_conv2d(pictures, qw, *others, stride=2)
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=layout)
            assert torch.equal(out, int8_conv2d(x, qw, *others, stride=2))


@each_scale
def test_torch_accepts_the_ops(input_scale, monkeypatch):
    calls, run = [], TorchOp.__call__
    monkeypatch.setattr(TorchOp, "__call__", lambda op, *a: calls.append((op, a)) or run(op, *a))
    pictures = group_norm_silu_quantized(**drawn("split NHWC"), input_scale=input_scale)
    int8_conv2d(pictures, weight(9, 70), normal(9).float(), stride=2)
    assert [op.name for op, _ in calls] == [
        "group_norm_silu_quantized",
        "quantized_pictures_conv2d",
    ]
    for op, inputs in calls:
        torch.library.opcheck(getattr(torch.ops.tintype, op.name).default, inputs)


@each_scale
def test_compiles_and_exports_whole(input_scale):
    qw = weight(9, 6)

    class Module(torch.nn.Module):
        def forward(self, x, weight, bias):
            return int8_conv2d(
                group_norm_silu_quantized(x, weight, bias, 3, input_scale=input_scale), qw
            )

    arguments = tuple(drawn("on chip")[name] for name in ("x", "weight", "bias"))
    eager = Module()(*arguments)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), eager)
    assert torch.equal(torch.export.export(Module(), arguments).module()(*arguments), eager)


PICTURES = plain_pictures(torch.zeros(2, 8, 5, 5))
WEIGHT = Int8Weight(torch.zeros(4, 8, 3, 3, dtype=torch.int8), torch.ones(4))
X, V = torch.zeros(2, 8, 5, 5), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: int8_conv2d(PICTURES._replace(codes=PICTURES.codes.float()), WEIGHT),
         r"x has codes torch.float32\[2, 5, 5, 8\].*expected torch.int8\[n, h, w, c\]"),
        (lambda: int8_conv2d(PICTURES._replace(scales=torch.ones(3)), WEIGHT), r"x's scales is .*\[3\].*\[2\]"),
        (lambda: int8_conv2d(PICTURES, WEIGHT, input_scale=torch.tensor(1.0)), "input_scale .*none beside x in codes"),
        (lambda: int8_conv2d(PICTURES, weight(4, 7)), r"qw has codes .*\[out, 8, kh, kw\]"),
        (lambda: int8_conv2d(PICTURES, WEIGHT, V[:4].half()), r"bias is torch.float16.*torch.float32\[4\]"),
        (lambda: int8_conv2d(PICTURES, WEIGHT, None, X), r"residual is .*\[2, 4, 5, 5\]"),
        (lambda: int8_conv2d(PICTURES, weight(4, 8, 7), padding=0), r"x is \[2, 8, 5, 5\].*kernel of \[7, 7\]"),
        (lambda: group_norm_silu_quantized(X, V, V, 3), "groups is 3, expected a divisor of x's 8 channels"),
        (lambda: group_norm_silu_quantized(X, V[1:], V, 2), r"weight is .*\[7\].*\[8\]"),
        (lambda: group_norm_silu_quantized(X, V, V, 2, input_scale=V), r"input_scale is .*\[8\].*torch.float32\[\]"),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
