"""Compile every Triton kernel for NVIDIA's architectures, with no GPU: `python -m tintype_kernels.ahead_of_time`.

Each op runs forward and backward over its `cases` on tensors without memory, under a driver that stands for the
architecture; so what is compiled is what a GPU would be asked to launch. Registers, spills and stack are read from the
assembler's own report, tensor-core instructions and the widest access to memory from its input. Instructions an element
are the length of the machine code times the threads launched over the elements of the largest tensor: code in a loop
counts once, so for kernels that loop it is a lower bound.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from tintype_kernels import ops
from tintype_kernels.ops.quantised_rows import OLDEST_ARCH
from tintype_kernels.torch_op import TorchOp

ARCHITECTURES = (80, 89, 90, 100, 120)
# In PTX, from the newest: what Hopper, data-centre Blackwell and all the others multiply matrices with.
_INSTRUCTIONS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


@dataclass(frozen=True)
class _Launch:
    """What was asked of a GPU: threads, and the elements of the largest tensor that they were given."""

    kernel: str
    binary: Any
    threads: int
    elements: int


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture, compiled for the first case that needs it."""

    op: str
    case: str
    kernel: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_cores: str
    multiplies: bool
    awaits: bool
    instructions: float
    widest_bytes: int

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes"
        if self.multiplies and not self.tensor_cores:
            return "multiplies matrices without tensor cores"
        if not self.awaits:
            return "reads or writes before it awaits earlier launches"
        return ""


class _Driver:
    """What Triton asks of a driver before it compiles; the device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _Context:
    """Stands for autograd's, between the two functions of a gradient."""

    saved_tensors: tuple[Any, ...]

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.needs_input_grad = (False,) * len(inputs)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Nothing asks."""


def op_modules() -> Iterator[ModuleType]:
    """Every op that has cases."""
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        if hasattr(module, "cases"):
            yield module


def compile_op(
    module: ModuleType, arch: int, given: Iterable[tuple[str, dict[str, Any]]]
) -> Iterator[Compiled]:
    """Compile what the op launches over given cases; a kernel that an earlier case compiled is passed over."""
    name = module.__name__.rpartition(".")[2]
    seen: set[str] = set()
    for case, arguments in given:
        for launch in _launched(getattr(module, name), arguments, arch):
            if launch.binary.hash not in seen:
                seen.add(launch.binary.hash)
                yield _report(name, case, arch, launch)


def cases(
    module: ModuleType, arch: int, dtype: str = "float16"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the op is compiled for: arguments without memory, where they ask for no codes newer than `arch`."""

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    for case, arguments in module.cases(make, batch=1):
        scheme = arguments.get("scheme", getattr(module, "SCHEME", ""))
        if arch >= OLDEST_ARCH.get(scheme, 0):
            yield case, arguments


def _launched(function: Callable[..., Any], arguments: dict[str, Any], arch: int) -> list[_Launch]:
    calls: list[tuple[TorchOp, tuple[Any, ...], Any]] = []

    def call(op: TorchOp, *inputs: Any) -> Any:
        able = [name for name in (*op.variants, "triton") if not op.obstacle_of(name, inputs)]
        outputs = [op.implementations[name](*inputs) for name in able][-1]
        if "triton" in able:  # the form that has a gradient
            calls.append((op, inputs, outputs))
        return outputs

    with mock.patch.object(TorchOp, "__call__", call), _recorded(arch) as launches:
        function(**arguments)
        for op, inputs, outputs in list(calls):
            if op.gradient:
                setup_context, backward = op.gradient
                context = _Context(inputs)
                setup_context(context, inputs, outputs)
                backward(context, *([outputs] if isinstance(outputs, torch.Tensor) else outputs))
    return launches


@contextmanager
def _recorded(arch: int) -> Iterator[list[_Launch]]:
    """Have Triton compile each launch for `arch` and stop there."""
    runtime = importlib.import_module("triton.runtime")
    kind = importlib.import_module("triton.runtime.jit").JITFunction
    run, launches = kind.run, list[_Launch]()

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> None:
        binary = run(kernel, *arguments, **{**options, "warmup": True})
        threads = 32 * binary.metadata.num_warps * math.prod(options["grid"])
        given = tree_leaves((arguments, options))
        elements = max(each.numel() for each in given if isinstance(each, torch.Tensor))
        launches.append(_Launch(kernel.__name__, binary, threads, elements))

    # The driver stays: a process that compiles for other machines launches nothing on its own.
    runtime.driver.set_active(_Driver(arch))
    with mock.patch.object(kind, "run", compile_only):
        yield launches


def _report(op: str, case: str, arch: int, launch: _Launch) -> Compiled:
    binary = launch.binary
    used = _resources(binary.asm["cubin"])
    found = (name for name, text in _INSTRUCTIONS.items() if text in binary.asm["ptx"])
    return Compiled(
        op=op,
        case=case,
        kernel=launch.kernel,
        arch=arch,
        registers=used["REG"],
        spilled_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=binary.metadata.shared,
        tensor_cores=next(found, ""),
        multiplies="tt.dot" in binary.asm["ttir"],
        awaits=_awaits(binary.asm["ptx"]) or not binary.metadata.launch_pdl,
        instructions=_instructions(binary.asm["cubin"]) * launch.threads / launch.elements,
        widest_bytes=_widest_bytes(binary.asm["ptx"]),
    )


def _instructions(cubin: bytes) -> int:
    """The length of the machine code: of an ELF file's sections those that are executed, 16 bytes an instruction."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = (struct.unpack_from("<8xQ16xQ", cubin, table + n * size) for n in range(count))
    return sum(int(length) for flags, length in sections if flags & 4) // 16


def _awaits(ptx: str) -> bool:
    """Whether code waits for earlier launches before it touches memory that they may write."""
    before, waits, _ = ptx.partition("griddepcontrol.wait")
    return bool(waits) and not re.search(r"\b(?:ld|st|atom|red)\.global|\bcp\.async", before)


def _widest_bytes(ptx: str) -> int:
    """Of what a thread moves between memory and registers in one instruction, the most; 0 where nothing is."""
    found = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s", ptx)
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in found), default=0)


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and more, as Triton's own cuobjdump reads them from the machine code."""
    nvidia = Path(importlib.import_module("triton.backends.nvidia").__path__[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(nvidia / "bin" / "cuobjdump"), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}


def compile_all(
    architectures: tuple[int, ...] = ARCHITECTURES, dtype: str = "float16"
) -> Iterator[Compiled]:
    """Every op for every architecture, in as many processes as there are cores."""
    tasks = [(module.__name__, arch, dtype) for arch in architectures for module in op_modules()]
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for compiled in pool.map(_compile_task, tasks):
            yield from compiled


def _compile_task(task: tuple[str, int, str]) -> list[Compiled]:
    name, arch, dtype = task
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # once a process is too often
    module = importlib.import_module(name)
    return list(compile_op(module, arch, cases(module, arch, dtype)))


def line(compiled: Compiled) -> str:
    """One row of the table."""
    c = compiled
    resources = f"sm_{c.arch:<4} {c.registers:4} {c.shared_bytes:7} {c.spilled_bytes:5}"
    numbers = f"{resources} {c.instructions:7.1f} {c.widest_bytes:6}"
    return f"{c.op:30} {c.case:32} {c.kernel:26} {numbers} {c.tensor_cores:8} {c.fault}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("arch", nargs="*", type=int, help=f"of {ARCHITECTURES}; all by default")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set; a kernel that is interpreted cannot be compiled")
    print(
        f"{'op':30} {'case':32} {'kernel':26} {'arch':7} {'regs':>4} {'shared':>7} {'spill':>5} {'instr':>7} "
        f"{'widest':>6} tensor cores"
    )
    rows = []
    for compiled in compile_all(tuple(options.arch) or ARCHITECTURES, options.dtype):
        print(line(compiled), flush=True)
        rows.append(compiled)
    faults = sum(bool(row.fault) for row in rows)
    print(f"{len(rows)} kernels, {faults} faults")
    if options.json:
        report = [{**asdict(row), "fault": row.fault} for row in rows]
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
