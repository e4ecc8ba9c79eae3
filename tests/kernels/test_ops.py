"""Every op on CPU tensors: Triton interpreted and plain PyTorch, and what torch asks of an op."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from kernel_checks import (
    DTYPES,
    SAMPLES,
    check_same_bits_in_any_batch,
    check_strided,
    check_values_and_gradients,
    forced,
)
from matrix_samples import ATTENTION, CONVOLUTION, INTERPRETED_DTYPES, LINEAR
from tintype_kernels import KernelUnavailable, group_norm_silu
from tintype_kernels.torch_op import is_watched
from torch_contract import check_compiles_and_exports, check_gradient_formula, check_op

ROUNDING = [*LINEAR, *CONVOLUTION]
ALL = [*SAMPLES, *ATTENTION, *ROUNDING]
# What traces an op sees shapes alone, so one sample of each op says it all, and one more of each optional tensor.
_TELLING = {
    "on chip NHWC", "split", "rest", "NHWC, skip", "no weights", "tokens inside", "64, image prompt", "72, lengths",
    "static NHWC",
}  # fmt: skip
TELLING = [s for s in ALL if s.label in _TELLING]


def each(samples):
    """Parametrise by samples, named as people would."""
    return pytest.mark.parametrize("sample", samples, ids=[f"{s.op}: {s.label}" for s in samples])


def dtypes_of(sample):
    """The types that Triton's interpreter computes the sample in as a GPU would."""
    return DTYPES if sample in SAMPLES else INTERPRETED_DTYPES


TYPED = [(sample, dtype) for sample in ALL for dtype in dtypes_of(sample)]


@pytest.mark.parametrize(
    ("sample", "dtype"), TYPED, ids=[f"{s.op}: {s.label} {d}" for s, d in TYPED]
)
def test_triton_equals_the_reference_in_float64(sample, dtype):
    with forced("triton"):
        check_values_and_gradients(sample, dtype, "cpu")


@each([s for s in ALL if s in SAMPLES or s in TELLING])
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_a_cpu_without_triton_gets_the_same(sample, implementation):
    for dtype in dtypes_of(sample):
        with forced(implementation):
            check_values_and_gradients(sample, dtype, "cpu")


@each([s for s in ALL if s in SAMPLES or s in TELLING])
def test_strided(sample):
    with forced("triton"):
        check_strided(sample, torch.float32, "cpu")


def matmul_in_one_order(a, b, dtype):
    """What the interpreter multiplies by, without a library that rounds a row by its place on some CPUs."""
    return np.einsum("...ij,...jk->...ik", a.astype(dtype), b.astype(dtype))


@each([s for s in ALL if s.batched])
def test_same_bits_in_any_batch(sample, monkeypatch):
    monkeypatch.setattr(np, "matmul", matmul_in_one_order)
    with forced("triton"):
        check_same_bits_in_any_batch(sample, torch.float16, "cpu")


@each([s for s in ALL if s.batched])
def test_same_bits_in_any_batch_on_a_cpu_without_triton(sample):
    check_same_bits_in_any_batch(sample, torch.float32, "cpu")


@each([s for s in SAMPLES if s.batched])
def test_the_reference_has_the_same_bits_in_any_batch_though_threads_share_its_sums(sample):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with forced("reference"):
            check_same_bits_in_any_batch(sample, torch.float16, "cpu")
    finally:
        torch.set_num_threads(before)


@each([s for s in TELLING if s.batched])
@pytest.mark.parametrize("implementation", ["triton", "auto"])
def test_a_batch_of_none_gives_none(sample, implementation):
    arguments = sample.arguments(torch.float32)
    none = {
        n: arguments[n][:0] for n in sample.batched if isinstance(arguments.get(n), torch.Tensor)
    }
    with forced(implementation):
        found = sample.call({**arguments, **none})
    for each_found, some in zip(found, sample.call(arguments), strict=True):
        assert each_found.shape == (0, *some.shape[1:])


@each([s for s in TELLING if s in SAMPLES])
def test_a_kernel_computes_in_float64_where_its_arguments_are(sample):
    with forced("triton"):
        check_values_and_gradients(sample, torch.float64, "cpu")


@each([s for s in TELLING if s not in ROUNDING])  # to codes, which has no differences to compare
def test_gradients_are_those_of_finite_differences(sample):
    check_gradient_formula(sample)


@each(TELLING)
def test_opcheck(sample):
    check_op(sample)


@each(TELLING)
def test_compiles_and_exports_whole(sample):
    check_compiles_and_exports(sample)


@each(TELLING)
def test_autocast_changes_nothing(sample):
    arguments = sample.arguments(torch.float32)
    plain = sample.call(arguments)
    with torch.autocast("cpu"):
        found = sample.call(arguments)
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _normed(x):
    return group_norm_silu(x, torch.ones(4), torch.zeros(4), 2)


@torch.no_grad()
def test_a_recorded_trace_holds_the_op_whole():
    traced = torch.jit.trace(_normed, torch.randn(1, 4, 3, 3))
    assert "tintype::group_norm_silu" in str(traced.graph)


@torch.no_grad()
def test_an_op_is_mapped_over_a_batch_of_batches():
    x = torch.randn(3, 2, 4, 3, 3)
    assert torch.equal(torch.func.vmap(_normed)(x), torch.stack([_normed(each) for each in x]))


@pytest.mark.parametrize("watching", [forward_ad.dual_level, FakeTensorMode])
@torch.no_grad()
def test_what_watches_is_seen(watching):
    assert not is_watched()
    with watching():
        assert is_watched()


def test_an_impossible_implementation_is_refused(monkeypatch):
    sample = SAMPLES[0]
    sample.call(sample.arguments())  # which imports the op while kernels are interpreted
    monkeypatch.setenv("TINTYPE_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    refusal = "triton cannot run here: on CPU tensors .*TRITON_INTERPRET=1; choose one of auto"
    with pytest.raises(KernelUnavailable, match=refusal):
        sample.call(sample.arguments())
