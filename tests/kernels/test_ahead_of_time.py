"""Every kernel compiles for every architecture, in a process of its own: here Triton interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tintype_kernels.ahead_of_time import ARCHITECTURES, _awaits, cases, op_modules

# Small and odd samples, one pixel or one row among them, which Triton sees as constants.
COMPILE_SAMPLES = """
import importlib, torch
from kernel_checks import SAMPLES, _folded
from tintype_kernels.ahead_of_time import compile_op
for sample in SAMPLES:
    op = importlib.import_module(f"tintype_kernels.ops.{sample.op}")
    given = [(sample.label, _folded(sample.arguments(torch.float16, "meta")))]
    assert [each for each in compile_op(op, 90, given) if not each.fault], sample
"""


def compiling(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    environment["TINTYPE_EARLY_LAUNCHES"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead_of_time") / "report.json"
    done = compiling("-m", "tintype_kernels.ahead_of_time", "--json", str(path))
    assert path.exists(), done.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_sample_of_the_checks_compiles():
    done = compiling("-c", COMPILE_SAMPLES)
    assert not done.returncode, done.stderr


def test_every_op_compiles_for_every_architecture(report):
    found = {(row["op"], row["arch"]) for row in report}
    assert found == {
        (module.__name__.rpartition(".")[2], arch)
        for module in op_modules()
        for arch in ARCHITECTURES
        if any(cases(module, arch))
    }


def test_nothing_spills_or_multiplies_without_tensor_cores(report):
    faults = [f"{r['op']} {r['case']} {r['kernel']} sm_{r['arch']} {r['fault']}" for r in report]
    assert not [fault for fault, row in zip(faults, report, strict=True) if row["fault"]]


def test_every_kernel_for_hopper_and_later_awaits_earlier_launches(report):
    assert {row["awaits"] for row in report} == {True}


@pytest.mark.parametrize(
    "touch", ["ld.global.v4.b32", "st.global.b16", "cp.async.cg.shared.global"]
)
def test_code_that_touches_memory_before_it_awaits_is_found(touch):
    assert _awaits(f"ld.param.b64; griddepcontrol.wait; {touch}")
    assert not _awaits(f"{touch}; griddepcontrol.wait;")
    assert not _awaits(touch)


def test_registers_are_what_the_assembler_reports(report):
    assert all(0 < row["registers"] <= 255 for row in report)
    assert all(row["shared_bytes"] <= 227 * 1024 for row in report)


def test_what_moves_whole_rows_moves_sixteen_bytes_at_a_time(report):
    rows = [row for row in report if row["kernel"] == "_forward_kernel" and not row["multiplies"]]
    assert min(row["widest_bytes"] for row in rows) >= 16
