"""Launches for other runtimes: compiled in a process of their own, as here Triton interprets, and assembled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tintype_kernels.launches import OPS, _Numbers, launched, with_parameters

LAUNCHES = """
import importlib, json, subprocess, sys, tempfile
from pathlib import Path
from unittest import mock
import torch
from tintype_kernels.ahead_of_time import cases
from tintype_kernels.launches import launched
from tintype_kernels.torch_op import TorchOp

programs = Path(importlib.import_module("triton.backends.nvidia").__path__[0], "bin")

def assembled(ptx, arch):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        program = programs / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        suffix = "a" if arch >= 90 else ""
        command = [program, f"-arch=sm_{arch}{suffix}", path, "-o", path.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True).returncode == 0

def launches(name, arch):
    module, found = importlib.import_module(f"tintype_kernels.ops.{name}"), []

    def call(op, *arguments):
        made, fake = launched(op, arguments, arch), op._op(*arguments)
        fake = [fake] if isinstance(fake, torch.Tensor) else fake
        given = sum(isinstance(each, torch.Tensor) for each in arguments)
        found.append({
            "given": given,
            "tensors": len(made.tensors),
            "outputs": [[list(made.tensors[n].shape), str(made.tensors[n].dtype)] for n in made.outputs],
            "promised": [[list(each.shape), str(each.dtype)] for each in fake],
            "kernels": [
                {**kernel._asdict(), "identity": kernel.identity, "assembled": assembled(kernel.ptx, arch)}
                for kernel in made.kernels
            ],
        })
        return fake[0] if len(fake) == 1 else tuple(fake)

    with mock.patch.object(TorchOp, "__call__", call):
        for case, arguments in list(cases(module, arch))[:4]:
            getattr(module, name)(**arguments)
    return found

print(json.dumps([launches(name, int(arch)) for name in sys.argv[2:] for arch in sys.argv[1].split(",")]))
"""
PTX = """.version 8.7
.target sm_90a
.visible .entry add(
	.param .u64 .ptr .global .align 1 add_param_0,
	.param .u64 .ptr .global .align 1 add_param_1,
	.param .u64 .ptr .global .align 1 add_param_2,
	.param .u64 .ptr .global .align 1 add_param_3,
	.param .u64 .ptr .global .align 1 add_param_4
)
{
	ld.param.b64 %rd1, [add_param_0];
	ld.param.b64 %rd2, [add_param_1];
	ld.param.b64 %rd3, [add_param_2];
	ret;
}
"""


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES, "80,90,120", *OPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    calls = [call for each in json.loads(done.stdout) for call in each]
    assert len(calls) >= 3 * len(OPS)
    return calls


def test_outputs_are_those_that_the_op_promises(found):
    for call in found:
        assert call["outputs"] == call["promised"]


def test_a_kernel_takes_a_pointer_to_each_tensor_that_it_reads_and_writes_and_no_more(found):
    for kernel in (kernel for call in found for kernel in call["kernels"]):
        declared = kernel["ptx"].split(".entry", 1)[1].split(")")[0]
        assert kernel["entry"] in declared
        assert declared.count(".param") == len(kernel["reads"]) + len(kernel["writes"])
        assert len({*kernel["reads"], *kernel["writes"]}) == declared.count(".param")
        assert kernel["assembled"]


def test_a_kernel_reads_what_was_given_or_written_before_it(found):
    for call in found:
        known = set(range(call["given"]))
        for kernel in call["kernels"]:
            assert known.issuperset(kernel["reads"])
            assert known.isdisjoint(kernel["writes"])
            known.update(kernel["writes"])
        assert known == set(range(call["tensors"]))


def test_code_names_no_folder(found):
    home = str(Path(__file__).parents[2])
    for kernel in (kernel for call in found for kernel in call["kernels"]):
        assert home not in kernel["ptx"]
        assert ".file" not in kernel["ptx"]


def test_identities_differ_where_code_or_launch_does(found):
    told = {}
    for kernel in (kernel for call in found for kernel in call["kernels"]):
        told.setdefault(kernel["identity"], set()).add((kernel["ptx"], tuple(kernel["grid"])))
    assert all(len(each) == 1 for each in told.values())
    assert len(told) > len(OPS)


def test_parameters_come_in_the_order_that_was_asked_for():
    ptx = with_parameters(PTX, places=[5, 7, 6], order=[6, 5, 7])
    names = [line.split()[-1].strip(",") for line in ptx.splitlines() if ".param " in line]
    assert names == ["add_param_2", "add_param_0", "add_param_1"]


def test_a_tensor_that_is_given_twice_is_passed_once():
    ptx = with_parameters(PTX, places=[5, 5, 6], order=[5, 6])
    assert ptx.count(".param ") == 2
    assert "%rd2, [add_param_0]" in ptx


def test_memory_that_another_runtime_would_not_give_is_refused():
    with pytest.raises(ValueError, match="memory that only Triton's runtime gives"):
        with_parameters(PTX, places=[5, 7], order=[5, 7])


def test_a_pointer_into_a_tensor_is_refused():
    numbers, whole = _Numbers(), torch.zeros(4, 6)
    assert numbers.of(whole) == numbers.of(whole.t()) == 0  # strides are constants of the code
    with pytest.raises(ValueError, match=r"a part of a tensor, \[2, 6\]"):
        numbers.of(whole[2:])


def test_an_output_that_no_kernel_writes_is_refused():
    op = SimpleNamespace(name="idle", implementations={"triton": torch.empty_like})
    with pytest.raises(ValueError, match="idle gives what no kernel of it writes"):
        launched(op, [torch.zeros(2, 3)], 90)


@pytest.mark.parametrize("form", [torch.neg, lambda x: x.t().contiguous()])
def test_an_op_that_does_more_than_launch_is_refused(form):
    op = SimpleNamespace(name="more", implementations={"triton": form})
    with pytest.raises(ValueError, match="beside the kernels"):
        launched(op, [torch.zeros(2, 3)], 90)
