"""Ops of `tintype_kernels` in TensorRT's engines: a plugin for each launch, whose machine code the engine holds.

Whatever runs such an engine needs neither Python's plugins nor Triton. It takes the package `tensorrt`, whose plugins
may be compiled ahead of time; an engine with them has not been built or run yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import Parameter, Signature
from types import GenericAlias
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tintype.errors import BackendUnavailable, RequestError
from tintype.models.fused import kept_whole
from tintype_kernels import triton_support
from tintype_kernels.launches import OPS, Kernel, launched
from tintype_kernels.torch_op import TorchOp

_PACKAGE = "tensorrt"
_NAMESPACE = "tintype"
_ATTRIBUTES = {"plugin_namespace": _NAMESPACE, "plugin_version": "1"}  # as the parser finds plugins
_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Plugin(NamedTuple):
    """A launch, and the shapes and types of what it writes."""

    kernel: Kernel
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]


Plugins = dict[str, Plugin]
"""by the kind of their nodes"""


def check_kernels(ops: Sequence[str], packages: Mapping[str, str]) -> None:
    """Refuse ops that no engine takes, and GPUs, by name, for which another package than `tensorrt` builds."""
    if unknown := [op for op in ops if op not in OPS]:
        raise RequestError(f"--kernels {unknown[0]} is unknown; choose from {', '.join(OPS)}")
    if ops and triton_support.reason:
        raise BackendUnavailable(
            f"--kernels: {triton_support.reason}; install it with: pip install triton"
        )
    for gpu, package in packages.items() if ops else ():
        if package != _PACKAGE:
            raise BackendUnavailable(
                f"--kernels needs plugins, which {_PACKAGE} takes and {package}, which builds for {gpu}, does not; "
                f'install the one in place of the other: pip install "tintype[{_PACKAGE}]"'
            )


@contextmanager
def kept_in_graphs(ops: Sequence[str], gpu: str) -> Iterator[Plugins]:
    """Within it a graph that is traced has each launch of these ops as a node; the plugins, for a GPU such as sm_90,
    that these need."""
    arch = int(gpu.removeprefix("sm_"))
    found: Plugins = {}

    def call(op: TorchOp, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        # In a thread of its own, where nothing traces.
        made = aside.submit(launched, op, arguments, arch).result()
        for kernel in made.kernels:
            outputs = [made.tensors[number] for number in kernel.writes]
            plugin = Plugin(kernel, tuple((tuple(each.shape), each.dtype) for each in outputs))
            found[kernel.identity] = plugin
            tensors += _node(plugin, [tensors[number] for number in kernel.reads])
        outputs = [tensors[number] for number in made.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    with (
        kept_whole(ops),
        mock.patch.object(TorchOp, "__call__", call),
        ThreadPoolExecutor(1) as aside,
    ):
        yield found


def _node(plugin: Plugin, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    shapes, dtypes = zip(*plugin.outputs, strict=True)
    return torch.onnx.ops.symbolic_multi_out(
        f"{_NAMESPACE}::{plugin.kernel.identity}",
        inputs,
        dict(_ATTRIBUTES),
        dtypes=dtypes,
        shapes=shapes,
        version=1,
    )


def register(plugins: Plugins) -> None:
    """Tell TensorRT of them, which remembers them as long as the process lives."""
    if not plugins:
        return
    trt, trtp = (importlib.import_module(name) for name in (_PACKAGE, f"{_PACKAGE}.plugin"))
    known = getattr(trtp.op, _NAMESPACE, None)
    for kind, plugin in plugins.items():
        if not hasattr(known, kind):
            _register(trt, trtp, f"{_NAMESPACE}::{kind}", plugin)


def _register(trt: Any, trtp: Any, identity: str, plugin: Plugin) -> None:
    """One plugin, whose functions say in their signatures how many tensors they take."""
    kernel = plugin.kernel
    inputs = [
        Parameter(f"input_{number}", Parameter.POSITIONAL_OR_KEYWORD, annotation=trtp.TensorDesc)
        for number in range(len(kernel.reads))
    ]
    outputs: Any = GenericAlias(tuple, (trtp.TensorDesc,) * len(kernel.writes))

    def describe(*inputs: Any) -> Any:
        return tuple(
            trtp.from_shape_expr(shape, getattr(trt, _TYPES[dtype]))
            for shape, dtype in plugin.outputs
        )

    def launch(*tensors: Any) -> tuple[Any, ...]:
        x, y, z = kernel.grid
        how = trtp.KernelLaunchParams(
            x, y, z, block_x=kernel.threads, shared_mem=kernel.shared_bytes
        )
        return kernel.entry, kernel.ptx, how, trtp.SymIntExprs(0)

    describe.__signature__ = Signature(inputs, return_annotation=outputs)  # type: ignore[attr-defined]
    launch.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            *inputs,
            Parameter("outputs", Parameter.POSITIONAL_OR_KEYWORD, annotation=outputs),
            Parameter("tactic", Parameter.POSITIONAL_OR_KEYWORD, annotation=int),
        ],
        return_annotation=GenericAlias(
            tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs)
        ),
    )
    trtp.register(identity)(describe)
    trtp.aot_impl(identity)(launch)
