"""Which implementation runs, and what is said where one cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tintype_kernels
from tintype_kernels import KernelUnavailable, implementation, native, philox_uint32
from tintype_kernels.dispatch import check_requested, select
from tintype_kernels.ops.quantise import quantize_fp8


def test_auto_picks_native_where_it_is_built():
    assert implementation() == {"selected": "native", "requested": "auto", "note": ""}


def test_without_the_extension_auto_is_numpy_and_native_an_error(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "not built")
    assert implementation()["selected"] == "reference"
    assert len(philox_uint32(1, 3)) == 3
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    with pytest.raises(KernelUnavailable, match="not built; choose one of auto, reference"):
        philox_uint32(1, 3)


def test_the_variable_is_read_at_each_call(monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "reference")
    assert implementation()["selected"] == "reference"
    monkeypatch.setenv("TINTYPE_KERNELS", "native")
    assert implementation()["selected"] == "native"
    monkeypatch.setenv("TINTYPE_KERNELS", "warp")
    with pytest.raises(KernelUnavailable, match="warp.*auto, native, reference"):
        philox_uint32(1, 3)


@pytest.mark.parametrize("wanted", ["native_typo", "reference_typo", "Auto", "triton-vector"])
def test_a_name_that_is_none_is_refused(wanted, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", wanted)
    for call in (lambda: select(triton="", native=""), lambda: quantize_fp8(torch.zeros(2, 32))):
        with pytest.raises(KernelUnavailable, match=f"{wanted} .*choose one of auto, .*reference"):
            call()


@pytest.mark.parametrize("wanted", ["", "auto", "triton", "triton_vector", "native", "reference"])
def test_a_form_of_some_op_may_be_asked_for(wanted, monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", wanted)
    check_requested()


def test_a_form_of_no_op_is_refused_beforehand(monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "warp")
    with pytest.raises(KernelUnavailable, match="warp is unknown; choose one of auto, triton, nat"):
        check_requested()


def test_an_op_without_a_variant_has_tritons_form(monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "triton_vector")
    assert select(triton="", native="") == "triton"


def test_arrays_have_no_triton_form(monkeypatch):
    monkeypatch.setenv("TINTYPE_KERNELS", "triton")
    with pytest.raises(KernelUnavailable, match="Triton takes torch tensors; choose one of auto"):
        philox_uint32(1, 3)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, "triton"),
        ({"TRITON_INTERPRET": "1"}, "native"),
        ({"TINTYPE_KERNELS": "triton", "TRITON_INTERPRET": "1"}, "triton"),
        ({"TINTYPE_KERNELS": "reference"}, "reference"),
    ],
)
def test_auto_takes_the_first_that_runs_and_never_interprets(environment, chosen, monkeypatch):
    for name in ("TINTYPE_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert select(triton="", native="") == chosen


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tintype_kernels.nonsense


def test_an_op_on_tensors_names_the_extra_that_brings_torch():
    code = "import sys; sys.modules['torch'] = None; from tintype_kernels import geglu"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "geglu works on torch tensors; pip install 'tintype[torch]'" in done.stderr
