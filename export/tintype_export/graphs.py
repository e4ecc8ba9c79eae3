"""A stage as a static-shaped ONNX graph whose weights stay where they are: in the checkpoint's safetensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from torch import Tensor

from tintype.checkpoints.files import Weights, stored_whole
from tintype.errors import CheckpointError
from tintype.models.stage import Stage

OPSET = 20
_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "I8": ir.DataType.INT8,
    "U8": ir.DataType.UINT8,  # int4 codes, two a byte
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: ``location`` relative to the bundle's root, ``offset`` from the file's start."""

    location: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_tensors(root: Path, weights: Weights) -> dict[str, StoredTensor]:
    """The parameters that graphs can point to in the component's safetensors files, by our names."""
    found: dict[str, StoredTensor] = {}
    for name, stored in stored_whole(weights):
        location = stored.path.relative_to(root).as_posix()
        dtype = _dtype(location, stored.dtype)
        found[name] = StoredTensor(location, dtype, stored.shape, stored.begin, stored.size)
    return found


def _dtype(location: str, name: str) -> ir.DataType:
    if name not in _DTYPES:
        raise CheckpointError(f"{location} holds {name}; graphs read {', '.join(_DTYPES)}")
    return _DTYPES[name]


def trace(stage: Stage, inputs: Mapping[str, Tensor]) -> ir.Model:
    """Export ``stage`` for exactly the shapes of ``inputs``; parameters keep their torch names."""
    # The exporter reports every optional operator library that it does not find.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # Attention that may need a gradient is traced to other memory layouts than it is then decomposed to.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        program = torch.onnx.export(
            stage,
            tuple(inputs[name] for name in stage.inputs),
            input_names=list(stage.inputs),
            output_names=list(stage.outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    _fold_shapes(program.model)
    return program.model


def _fold_shapes(model: ir.Model) -> None:
    """Compute what depends on shapes alone; a parameter has no value meanwhile, so that none is copied."""
    parameters = list(model.graph.initializers.values())
    values = [parameter.const_value for parameter in parameters]
    for parameter in parameters:
        parameter.const_value = None
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.const_value = value
    for simplification in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),  # the exporter notes a Python stack at every node
    ):
        simplification(model)


def point_to_weights(model: ir.Model, weights: Mapping[str, StoredTensor]) -> None:
    """Replace the initialisers that ``weights`` names by references, cast where they are stored narrower.

    Raises CheckpointError where a stored tensor has another shape than the graph.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        stored = weights.get(name)
        if stored is None:
            continue
        assert value.const_value is not None
        if tuple(value.const_value.shape.numpy()) != stored.shape:
            raise CheckpointError(
                f"{stored.location}: {name} is stored as {list(stored.shape)}, the graph has another"
            )
        if value.const_value.dtype == stored.dtype:
            value.const_value = external(name, stored)
        else:
            _cast_from_storage(graph, value, stored)


def external(name: str, stored: StoredTensor) -> ir.ExternalTensor:
    """The tensor where it is stored."""
    return ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        stored.dtype,
        shape=ir.Shape(stored.shape),
        name=name,
    )


def _cast_from_storage(graph: ir.Graph, value: ir.Value, stored: StoredTensor) -> None:
    """``value`` becomes Cast(stored tensor); runtimes fold it once, when a session is made."""
    assert value.const_value is not None
    assert value.name is not None
    name, wide = value.name, value.const_value.dtype
    source = ir.Value(
        name=f"{name}.stored",
        type=ir.TensorType(stored.dtype),
        shape=ir.Shape(stored.shape),
        const_value=external(f"{name}.stored", stored),
    )
    cast = ir.node("Cast", [source], {"to": wide}, name=f"{name}.cast")
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = (
        f"{name}.wide",
        value.type,
        value.shape,
    )
    value.replace_all_uses_with(cast.outputs[0])
    del graph.initializers[name]
    graph.register_initializer(source)
    graph.insert_before(graph[0], cast)


def save(model: ir.Model, path: Path) -> None:
    """Write the graph; external tensors are written as references."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model.producer_name, model.producer_version, model.doc_string = "tintype", "", ""
    ir.save(model, path)
