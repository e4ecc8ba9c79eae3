"""A linear layer whose output is cut in two, as a gate's is, made two layers over the same stored rows.

A runtime then fuses what follows each half to its product, and copies nothing apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from .graphs import StoredTensor

_ROWS = (".weight", ".bias", ".weight_scale")  # of which each half has its own
_SHARED = (".input_scale", ".smoothing")


@dataclass(frozen=True)
class _Gate:
    """The nodes of a linear layer [.., in] -> [.., out] whose output is cut in two halves."""

    split: ir.Node
    add: ir.Node
    product: ir.Node
    transpose: ir.Node
    weight: ir.Value
    bias: ir.Value

    @property
    def layer(self) -> str:
        assert self.weight.name is not None
        return self.weight.name.removesuffix(".weight")


def part_gates(model: ir.Model, weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Part the gates of a graph that has just been traced; ``weights`` and those that the halves read, by their names.

    int4 layers stay whole: the columns of their codes are the outputs, and no half of them lies together.
    """
    found = dict(weights)
    for node in list(model.graph):
        gate = _gate(node, model.graph)
        if gate is not None and weights[f"{gate.layer}.weight"].dtype != ir.DataType.UINT8:
            _part(model.graph, gate)
            found |= _halves(gate.layer, weights)
    return found


def _gate(split: ir.Node, graph: ir.Graph) -> _Gate | None:
    """The gate that a node ends, where it is one."""
    if split.op_type != "Split" or not _halves_last_axis(split):
        return None
    add = _only_user(split.inputs[0], "Add")
    product = None if add is None else _only_user(add.inputs[0], "MatMul")
    transpose = None if product is None else _only_user(product.inputs[1], "Transpose")
    if add is None or product is None or transpose is None:
        return None
    weight, bias = transpose.inputs[0], add.inputs[1]
    known = {id(value) for value in graph.initializers.values()}
    if weight is None or bias is None or not {id(weight), id(bias)} <= known:
        return None
    return _Gate(split, add, product, transpose, weight, bias)


def _halves_last_axis(split: ir.Node) -> bool:
    axis, whole = split.attributes.get("axis"), split.inputs[0]
    if axis is None or whole is None or whole.shape is None:
        return False
    shapes = [output.shape for output in split.outputs]
    return (
        len(shapes) == 2 and shapes[0] == shapes[1] and axis.as_int() in (-1, len(whole.shape) - 1)
    )


def _only_user(value: ir.Value | None, kind: str) -> ir.Node | None:
    """What makes a value that is read once, where it is of this kind."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != kind:
        return None
    return producer if len(value.uses()) == 1 else None


def _part(graph: ir.Graph, gate: _Gate) -> None:
    x = gate.product.inputs[0]
    for number, output in enumerate(gate.split.outputs):
        weight, bias = (
            _half(graph, value, f"{gate.layer}.{number}.{leaf}")
            for value, leaf in ((gate.weight, "weight"), (gate.bias, "bias"))
        )
        transpose = ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = ir.node("MatMul", [x, transpose.outputs[0]])
        add = ir.node("Add", [product.outputs[0], bias])
        for made in (transpose, product, add):
            made.outputs[0].type = output.type
        add.outputs[0].shape = product.outputs[0].shape = output.shape
        graph.insert_before(gate.split, [transpose, product, add])
        output.replace_all_uses_with(add.outputs[0])
    graph.remove([gate.split, gate.add, gate.product, gate.transpose], safe=True)
    for value in (gate.weight, gate.bias):
        assert value.name is not None
        del graph.initializers[value.name]


def _half(graph: ir.Graph, whole: ir.Value, name: str) -> ir.Value:
    """An initialiser with half of the rows, whose values are told when it is pointed to where they are stored."""
    assert whole.const_value is not None
    rows, *others = whole.const_value.shape.numpy()
    shape, dtype = ir.Shape((rows // 2, *others)), whole.const_value.dtype
    tensor = ir.LazyTensor(_untold, dtype, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _untold() -> ir.TensorProtocol:
    raise AssertionError("a half of a gate was not pointed to its weights")


def _halves(layer: str, weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Where the halves' tensors are stored."""
    found = {}
    for number in range(2):
        for leaf in _SHARED:
            if (stored := weights.get(f"{layer}{leaf}")) is not None:
                found[f"{layer}.{number}{leaf}"] = stored
        for leaf in _ROWS:
            if (stored := weights.get(f"{layer}{leaf}")) is not None:
                rows, *others = stored.shape
                length = stored.length // 2
                found[f"{layer}.{number}{leaf}"] = replace(
                    stored,
                    shape=(rows // 2, *others),
                    offset=stored.offset + number * length,
                    length=length,
                )
    return found
