"""Every op compiled, on a GPU: what `tests/kernels` asks of it interpreted, real sizes, and graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_checks import (
    DTYPES,
    IDS,
    SAMPLES,
    check_same_bits_in_any_batch,
    check_values,
    check_values_and_gradients,
    every_check,
    forced,
    is_floating,
    norm_error,
)
from matrix_samples import ATTENTION, CONVOLUTION, LINEAR, ONE_TOKEN, WIDE, WITH_ROLES
from tintype_kernels import NoiseKey, Row, activate_quantized, group_norm_silu, scheduler_step
from tintype_kernels.ahead_of_time import op_modules
from tintype_kernels.ops import (
    attention,
    fp8_linear,
    group_norm_silu_quantized,
    int8_conv2d,
    int8_linear,
)
from tintype_kernels.ops.quantised_pictures import (
    QuantizedPictures,
    lies_channels_last,
    write_pictures,
)
from tintype_kernels.ops.quantised_rows import RowsOp
from tintype_kernels.philox import philox_normals
from tolerances import KERNEL_NORM, KERNEL_NORMALS, LINEAR_FP8, LINEAR_INT8

CHECKS = dict(every_check("cuda"))
OURS = {sample.op for sample in [*SAMPLES, *CONVOLUTION]}


@pytest.mark.parametrize("name", CHECKS)
def test_asked_of_every_op(name):
    with forced("triton"):
        CHECKS[name]()


@pytest.mark.parametrize(
    "sample", ATTENTION + LINEAR + CONVOLUTION, ids=lambda s: f"{s.op}: {s.label}"
)
class TestMatrices:
    """The ops that multiply matrices, bfloat16 included, which the interpreter gets wrong."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equals_the_reference_in_float64(self, sample, dtype):
        with forced("triton"):
            check_values_and_gradients(sample, dtype, "cuda")

    def test_same_bits_in_any_batch(self, sample):
        with forced("triton"):
            check_same_bits_in_any_batch(sample, torch.float16, "cuda")


@pytest.mark.parametrize(
    "sample", [s for s in ATTENTION if s.label in WITH_ROLES], ids=lambda s: s.label
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_with_roles_for_warps(sample, dtype):
    if torch.cuda.get_device_capability() not in {(9, 0), (10, 0), (10, 3)}:
        pytest.skip("no Hopper or data-centre Blackwell")
    with forced("triton_roles"), torch.no_grad():
        check_values(sample, dtype, "cuda")
        check_same_bits_in_any_batch(sample, dtype, "cuda")


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "dim"), [(2, 24, 4608, 4608, 128), (2, 10, 4250, 77, 64)]
)
def test_attention_with_roles_at_real_sizes(batch, heads, queries, keys, dim):
    if torch.cuda.get_device_capability() not in {(9, 0), (10, 0), (10, 3)}:
        pytest.skip("no Hopper or data-centre Blackwell")
    q, k, v = (normal(batch, t, heads, dim).transpose(1, 2) for t in (queries, keys, keys))
    with forced("triton_roles"):
        found = attention.attention(q, k, v)
    assert (
        norm_error(found, attention.reference(q.float(), k.float(), v.float()))
        < KERNEL_NORM["bfloat16"]
    )


@pytest.mark.parametrize("sample", ONE_TOKEN, ids=lambda s: f"{s.op}: {s.label}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_token_a_sample_without_tiles(sample, dtype):
    with forced("triton_vector"):
        check_values(sample, dtype, "cuda")
        check_same_bits_in_any_batch(sample, dtype, "cuda")


@pytest.mark.parametrize("sample", WIDE, ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_of_wide_heads_by_products(sample, dtype):
    with forced("triton_products"), torch.no_grad():
        check_values(sample, dtype, "cuda")
        check_same_bits_in_any_batch(sample, dtype, "cuda")


ROWS = [m for m in op_modules() if isinstance(getattr(m, "OP", None), RowsOp)]


@pytest.mark.parametrize("module", ROWS)
def test_rows_in_eight_bits(module):
    """A value in the middle of two codes may go either way, as its kernels round in another order than PyTorch's."""
    function = getattr(module, module.__name__.rpartition(".")[2])
    for case, arguments in module.cases(normal, batch=1):
        with forced("triton"):
            rows = function(**arguments)
        expected = function.reference(**arguments)
        assert norm_error(rows.scales, expected.scales) < KERNEL_NORM["bfloat16"], case
        close = {"int8": LINEAR_INT8, "fp8": LINEAR_FP8}[arguments["scheme"]]
        found, right = (r.codes.float() * r.scales[..., None] for r in (rows, expected))
        assert norm_error(found, right) < close, case


@pytest.mark.parametrize("module", [int8_linear, fp8_linear])
def test_a_linear_layer_gives_the_same_for_rows_as_for_what_they_were(module):
    function = getattr(module, f"{module.SCHEME}_linear")
    for _, arguments in module.cases(normal, batch=1):
        if isinstance(arguments["x"], torch.Tensor):
            with forced("triton"):
                rows = activate_quantized(arguments["x"], module.SCHEME)
                assert torch.equal(function(**{**arguments, "x": rows}), function(**arguments))


def test_pictures_in_eight_bits_are_those_of_the_ops_one_after_the_other():
    """But for a value in the middle of two codes, as the compiler may order a kernel's sums otherwise."""
    for case, arguments in group_norm_silu_quantized.cases(normal, batch=2):
        with forced("triton"):
            pictures = group_norm_silu_quantized.group_norm_silu_quantized(**arguments)
            scale = arguments.pop("input_scale", None)
            codes, scales = write_pictures(group_norm_silu(**arguments), scale)
        assert norm_error(pictures.scales, scales) < KERNEL_NORM["bfloat16"], case
        expected = pictures._replace(codes=codes, scales=scales)
        assert norm_error(pictures.numbers(), expected.numbers()) < LINEAR_INT8, case


def test_a_convolution_gives_the_same_for_codes_as_for_what_they_were():
    for case, arguments in int8_conv2d.cases(normal, batch=2):
        x, scale = arguments["x"], arguments.get("input_scale")
        if isinstance(x, torch.Tensor):
            with forced("triton"):
                written = write_pictures(x, scale)
                pictures = QuantizedPictures(*written, x.dtype, lies_channels_last(x))
                found = int8_conv2d.int8_conv2d(**{**arguments, "x": pictures, "input_scale": None})
                assert torch.equal(found, int8_conv2d.int8_conv2d(**arguments)), case


@pytest.mark.parametrize(
    "module", [m for m in op_modules() if m.__name__.rpartition(".")[2] in OURS]
)
def test_real_sizes(module):
    name = module.__name__.rpartition(".")[2]
    function = getattr(module, name)
    for case, arguments in module.cases(normal, batch=1):
        if arguments.get("noise") is not None:
            continue  # the reference has no keys; the noise has a test of its own
        exact = {n: v.double() if is_floating(v) else v for n, v in arguments.items()}
        if "history" in arguments:
            exact["history"] = [kept.double() for kept in arguments["history"]]
        plain = getattr(module, "baseline", function.reference)
        with forced("triton"):
            found = function(**arguments)
        pairs = zip(as_tuple(found), as_tuple(plain(**exact)), strict=True)
        for actual, expected in pairs:
            assert norm_error(actual, expected) < KERNEL_NORM["bfloat16"], case


def normal(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def as_tuple(outputs):
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_inductor_compiles_whole(sample):
    arguments = sample.arguments(torch.float16, "cuda")
    compiled = torch.compile(sample.call, fullgraph=True)
    for fused, eager in zip(compiled(arguments), sample.call(arguments), strict=True):
        assert torch.equal(fused, eager)


def test_noise_made_on_the_device_is_the_hosts():
    x = torch.zeros(2, 4, 64, 64, device="cuda")
    row = Row(u_x=0, u_m=0, a=0, c=0, b=(0,), s=1)
    with forced("triton"):
        made, _ = scheduler_step(x, x, None, [], row, NoiseKey([7, 2**64 - 1], step=3))
    for sample, seed in zip(made.cpu(), (7, 2**64 - 1), strict=True):
        expected = torch.from_numpy(philox_normals(seed, sample.numel(), step=3, stream=1))
        assert (sample.flatten() - expected).abs().max() < KERNEL_NORMALS


def test_a_captured_step_is_replayed_with_another_row_and_key():
    x, m, uncond, kept = (torch.randn(2, 4, 64, 64, device="cuda") for _ in range(4))
    rows = [
        Row(1.2, -0.7, 0.4, 0.3, (0.9, -0.2), s=s, clip=0.8, guidance=g)
        for s, g in ((1, 2), (2, 7))
    ]
    keys = [NoiseKey([5, 6], step=step) for step in (0, 1)]
    row = torch.tensor(rows[0].coefficients(), device="cuda")
    key = torch.tensor([[5, 0, 1], [6, 0, 1]], device="cuda")
    with forced("triton"):
        scheduler_step(x, m, uncond, [kept], row, key)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            new, h = scheduler_step(x, m, uncond, [kept], row, key)
        row.copy_(torch.tensor(rows[1].coefficients()))
        key[:, 1] = 1
        graph.replay()
        expected = scheduler_step(x, m, uncond, [kept], rows[1], keys[1])
    assert torch.equal(new, expected[0])
    assert torch.equal(h, expected[1])
