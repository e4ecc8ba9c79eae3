"""Every op on CPU tensors: Triton interpreted and plain PyTorch, and what torch asks of an op."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import (
    DTYPES,
    IDS,
    SAMPLES,
    check_same_bits_in_any_batch,
    check_strided,
    check_values_and_gradients,
    forced,
)
from tintype_kernels import KernelUnavailable
from torch_contract import check_compiles_and_exports, check_gradient_formula, check_op

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
BATCHED = [s for s in SAMPLES if s.batched]
# What traces an op sees shapes alone, so one sample of each op says it all, and one more of each optional tensor.
FIRST = [s for s in SAMPLES if s.label in {"on chip NHWC", "split", "rest", "no weights"}]
one_sample = pytest.mark.parametrize("sample", FIRST, ids=[f"{s.op}: {s.label}" for s in FIRST])


@every_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_equals_the_reference_in_float64(sample, dtype):
    with forced("triton"):
        check_values_and_gradients(sample, dtype, "cpu")


@one_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_a_cpu_without_triton_gets_the_same(sample, dtype, implementation):
    with forced(implementation):
        check_values_and_gradients(sample, dtype, "cpu")


@every_sample
def test_strided(sample):
    with forced("triton"):
        check_strided(sample, torch.float32, "cpu")


@pytest.mark.parametrize("sample", BATCHED, ids=[f"{s.op}: {s.label}" for s in BATCHED])
def test_same_bits_in_any_batch(sample):
    with forced("triton"):
        check_same_bits_in_any_batch(sample, torch.float16, "cpu")


@one_sample
def test_a_kernel_computes_in_float64_where_its_arguments_are(sample):
    with forced("triton"):
        check_values_and_gradients(sample, torch.float64, "cpu")


@one_sample
def test_gradients_are_those_of_finite_differences(sample):
    check_gradient_formula(sample)


@one_sample
def test_opcheck(sample):
    check_op(sample)


@one_sample
def test_compiles_and_exports_whole(sample):
    check_compiles_and_exports(sample)


def test_an_impossible_implementation_is_refused(monkeypatch):
    sample = SAMPLES[0]
    monkeypatch.setenv("TINTYPE_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    refusal = "triton cannot run here: on CPU tensors .*TRITON_INTERPRET=1; choose one of auto"
    with pytest.raises(KernelUnavailable, match=refusal):
        sample.call(sample.arguments())
