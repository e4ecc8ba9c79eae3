"""What torch asks of an op that is to be differentiated, compiled and exported, for any sample of `kernel_checks`."""

from __future__ import annotations

from unittest import mock

import torch

from kernel_checks import Sample, forced
from tintype_kernels.torch_op import TorchOp


def check_gradient_formula(sample: Sample) -> None:
    """The plain backward pass in float64 against finite differences."""
    arguments, names = sample.arguments(), sample.tensors()

    def call(*tensors):
        return sample.call({**arguments, **dict(zip(names, tensors, strict=True))})

    with forced("reference"):
        leaves = [arguments[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def check_op(sample: Sample) -> None:
    """`torch.library.opcheck` of every op that the sample and its gradient call."""
    calls = []
    run = TorchOp.__call__
    arguments = sample.arguments(torch.float32)
    leaves = [arguments[name].requires_grad_() for name in sample.tensors()]

    def call(op, *inputs):
        calls.append((op, inputs))
        return run(op, *inputs)

    with mock.patch.object(TorchOp, "__call__", call):
        torch.autograd.grad([out.sum() for out in sample.call(arguments)], leaves)
    (forward, inputs), *others = calls
    torch.library.opcheck(getattr(torch.ops.tintype, forward.name).default, inputs)
    for op, given in others:  # not differentiated again
        inputs = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in given)
        torch.library.opcheck(getattr(torch.ops.tintype, op.name).default, inputs)


def check_compiles_and_exports(sample: Sample) -> None:
    """One graph, the op whole in it, and the same numbers."""
    arguments = sample.arguments(torch.float32)
    arguments[sample.batched[0]].requires_grad_()
    eager = sample.call(arguments)
    torch.compiler.reset()  # samples share their code, and recompilations of it are counted
    compiled = torch.compile(sample.call, fullgraph=True, backend="aot_eager")
    for fused, plain in zip(compiled(arguments), eager, strict=True):
        assert torch.equal(fused, plain)
        assert fused.grad_fn is not None

    tensors = {name: arguments[name] for name in sample.tensors()}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return sample.call({**arguments, **tensors})

    program = torch.export.export(Module(), (tensors,))
    assert f"torch.ops.tintype.{sample.op}.default" in program.graph_module.code
    for exported, plain in zip(program.module()(tensors), eager, strict=True):
        assert torch.equal(exported, plain)
