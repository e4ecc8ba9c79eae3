"""Kernels of ours in TensorRT's engines: their graphs, and what TensorRT is told. No engine is built here."""

from __future__ import annotations

import sys
from inspect import signature
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import small_checkpoints
import small_flow_checkpoints
from tintype.checkpoints import open_checkpoint
from tintype.errors import BackendUnavailable, RequestError
from tintype.models.stages import build_stage
from tintype_export import plugins
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.graphs import trace
from tintype_export.plugins import Plugin, check_kernels, kept_in_graphs, register
from tintype_export.profiles import example_inputs
from tintype_kernels.launches import OPS, Kernel, Launched
from tolerances import STAGE_FP32

SIZES = ((16, 16),)
# At half of it some norms of the small UNet have a group of equal numbers, and rounding is all that they show.
PROFILE = "32x32-b1"


def in_one_launch(bodies):
    """In the place of `launched`, as Triton interprets here: every op as one launch, what it computes in `bodies`."""

    def launch(op, arguments, arch):
        assert arch == 90
        given = [each for each in arguments if isinstance(each, torch.Tensor)]
        made = op._op(*(_hollow(each) for each in arguments))
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        kinds = [
            (tuple(each.shape) if isinstance(each, torch.Tensor) else each) for each in arguments
        ]
        reads, writes = range(len(given)), range(len(given), len(given) + len(outputs))
        kernel = Kernel(op.name, "entry", str(kinds), (1, 1, 1), 32, 0, tuple(reads), tuple(writes))
        bodies[kernel.identity] = op, arguments
        return Launched((kernel,), (*given, *outputs), tuple(writes))

    return launch


def _hollow(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")


def operator(kind, op, arguments):
    """What runs a node: the op's reference on the arrays that it is given, in the place of its tensors."""

    def run(self, *arrays, **attributes):
        assert attributes == {"plugin_namespace": "tintype", "plugin_version": "1"}
        given = iter(arrays)
        filled = [
            torch.from_numpy(np.ascontiguousarray(next(given)))
            if isinstance(each, torch.Tensor)
            else each
            for each in arguments
        ]
        made = op.implementations["reference"](*filled)
        outputs = [made] if isinstance(made, torch.Tensor) else made
        return tuple(each.numpy() for each in outputs)

    return type(kind, (OpRun,), {"op_domain": "tintype", "_run": run})


def stage_and_inputs(checkpoint, name):
    module = build_stage(
        name, checkpoint.components, lambda part: checkpoint.component(part, torch.float32)
    ).eval()
    arrays = example_inputs(checkpoint, module.inputs, name, PROFILE)
    return module, {each: torch.from_numpy(array) for each, array in arrays.items()}


IN_UNETS = {"group_norm_silu", "layer_norm_modulate", "residual_layer_norm", "geglu"}
IN_FLUX = {"layer_norm_modulate", "residual_layer_norm", "qk_norm_rope", "gate_residual"}


@pytest.mark.parametrize(
    ("save", "kind", "stage", "ops"),
    [
        (small_checkpoints.save, "sd1", "denoise", IN_UNETS),
        (small_checkpoints.save, "sd1", "decode", {"group_norm_silu"}),
        (small_flow_checkpoints.save, "flux-dev", "denoise", IN_FLUX),
    ],
    ids=["unet", "decoder", "flux"],
)
def test_a_graph_that_keeps_ops_gives_what_the_stage_gives(
    tmp_path, monkeypatch, save, kind, stage, ops
):
    checkpoint = open_checkpoint(save(kind, tmp_path / kind))
    bodies = {}
    monkeypatch.setattr(plugins, "launched", in_one_launch(bodies))
    module, tensors = stage_and_inputs(checkpoint, stage)
    with kept_in_graphs(OPS, "sm_90") as found:
        model = trace(module, tensors)
    assert found.keys() == bodies.keys()
    assert {op.name for op, _ in bodies.values()} == ops
    proto = ir.serde.serialize_model(model)
    assert {node.op_type for node in proto.graph.node if node.domain == "tintype"} == found.keys()
    evaluator = ReferenceEvaluator(
        proto, new_ops=[operator(name, *body) for name, body in bodies.items()]
    )
    (made,) = evaluator.run(None, {name: each.numpy() for name, each in tensors.items()})
    with torch.no_grad():
        wanted = module(*tensors.values()).numpy()
    error = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert error < STAGE_FP32


def test_ops_that_nobody_asked_for_stay_plain(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(small_flow_checkpoints.save("flux-dev", tmp_path / "flux"))
    bodies = {}
    monkeypatch.setattr(plugins, "launched", in_one_launch(bodies))
    module, tensors = stage_and_inputs(checkpoint, "denoise")
    with kept_in_graphs(["gate_residual"], "sm_90"):
        kept = trace(module, tensors)
    assert {op.name for op, _ in bodies.values()} == {"gate_residual"}
    assert {node.domain for node in kept.graph} == {"", "tintype"}
    assert {node.domain for node in trace(module, tensors).graph} == {""}


@pytest.fixture
def told(monkeypatch):
    """What a package `tensorrt` is told, by the names of its decorators."""
    told = {"register": {}, "aot_impl": {}}
    parts = ModuleType("tensorrt.plugin")
    parts.TensorDesc = type("TensorDesc", (), {})
    parts.SymIntExprs = type("SymIntExprs", (), {"__init__": lambda self, n: setattr(self, "n", n)})
    parts.KernelLaunchParams = SimpleNamespace
    parts.from_shape_expr = lambda shape, dtype: (shape, dtype)
    parts.op = SimpleNamespace(tintype=SimpleNamespace())
    whole = ModuleType("tensorrt")
    whole.float16, whole.float32 = "half", "float"

    class Launch(SimpleNamespace):
        def __init__(self, x, y, z, **named):
            super().__init__(grid=(x, y, z), **named)

    parts.KernelLaunchParams = Launch

    def decorator(which):
        def named(identity):
            def keep(function):
                assert identity not in told[which]
                told[which][identity] = function
                setattr(parts.op.tintype, identity.removeprefix("tintype::"), function)

            return keep

        return named

    parts.register, parts.aot_impl = decorator("register"), decorator("aot_impl")
    monkeypatch.setitem(sys.modules, "tensorrt", whole)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", parts)
    return told


def test_tensorrt_is_told_of_a_launch_once_and_as_it_is(told):
    kernel = Kernel("norm_kernel", "entry", "code", (7, 5, 1), 128, 512, (0, 2), (3, 4))
    outputs = (((2, 8), torch.float16), ((2, 3, 4), torch.float32))
    for _ in range(2):
        register({kernel.identity: Plugin(kernel, outputs)})
    (describe,) = told["register"].values()
    assert [*signature(describe).parameters] == ["input_0", "input_1"]
    assert describe("x", "y") == (((2, 8), "half"), ((2, 3, 4), "float"))
    (launch,) = told["aot_impl"].values()
    assert [*signature(launch).parameters] == ["input_0", "input_1", "outputs", "tactic"]
    entry, code, how, arguments = launch("x", "y", ("a", "b"), 0)
    assert (entry, code, arguments.n) == ("entry", "code", 0)
    assert (how.grid, how.block_x, how.shared_mem) == ((7, 5, 1), 128, 512)


def test_no_plugin_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    register({})


@pytest.mark.parametrize(
    ("ops", "package", "error", "says"),
    [
        (["geglu", "gelu"], "tensorrt", RequestError, "--kernels gelu is unknown; choose from .*geglu"),
        (["geglu"], "tensorrt_rtx", BackendUnavailable, r"tensorrt_rtx, .* for sm_89, does not.*tintype\[tensorrt\]"),
    ],
)  # fmt: skip
def test_what_no_engine_takes_is_refused_in_one_line(ops, package, error, says):
    with pytest.raises(error, match=says) as raised:
        check_kernels(ops, {"sm_89": package})
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("target", "weightless", "says"),
    [("onnx", False, "--target tensorrt"), ("tensorrt", True, "do not go together")],
)
def test_kernels_go_with_engines_that_hold_weights_alone(
    tmp_path, monkeypatch, target, weightless, says
):
    monkeypatch.setattr("tintype_export.checks.check_gpus", lambda *_: None)
    source = small_checkpoints.save_smallest(tmp_path / "checkpoint")
    config = ExportConfig(
        SIZES, target=target, gpus=("sm_90",), weightless=weightless, kernels=("geglu",)
    )
    with pytest.raises(RequestError, match=says):
        export_bundle(source, tmp_path / "bundle", config)
    assert not (tmp_path / "bundle").exists()
