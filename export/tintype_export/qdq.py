"""Graphs whose layers read codes: QuantizeLinear and DequantizeLinear around the products of a float graph.

int8 and e4m3 weights have a scale an output channel; int4 ones have one a block, which is opset 21's. onnxruntime
multiplies codes by codes where nothing else reads them and weights have zero points, and convolves them where the
output is rounded at one scale: that is 1, channels being in steps of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from tintype.backends.graphs import WHOLE_STEPS

from .graphs import StoredTensor, external

_BLOCKS_OPSET = 21
_SCALE = ".weight_scale"
_INPUT_SCALE = ".input_scale"
OUTPUT_SCALE = ".output_scale"
# A zero of the type that an input is rounded to says which type that is.
_ZEROS = {
    ir.DataType.INT8: np.zeros((), np.int8),
    ir.DataType.FLOAT8E4M3FN: np.zeros((), ml_dtypes.float8_e4m3fn),
}


def quantise_graph(model: ir.Model, weights: Mapping[str, StoredTensor]) -> None:
    """Make every layer that ``weights`` holds codes of read those, and its input rounded where there is a scale for it.

    ``weights`` are the component's tensors under the graph's names.
    """
    graph = _Graph(model.graph, weights)
    for name in [name.removesuffix(_SCALE) for name in weights if name.endswith(_SCALE)]:
        if f"{name}.weight" in model.graph.initializers:  # not every model uses all that it has
            graph.quantise(name)
    passes.RemoveUnusedNodesPass()(model)  # what turned weights that lie turned


class _Graph:
    """A graph under change."""

    def __init__(self, graph: ir.Graph, weights: Mapping[str, StoredTensor]) -> None:
        self.graph = graph
        self.weights = weights
        self.first = graph[0]

    def quantise(self, layer: str) -> None:
        value = self.graph.initializers[f"{layer}.weight"]
        codes = self.weights[f"{layer}.weight"]
        for index, product in enumerate(_products(value)):
            label = f"{layer}.{index}" if index else layer
            self._round_input(product, layer, label, codes.dtype)
            self._round_output(product, layer, label, codes.dtype)
        if codes.dtype == ir.DataType.UINT8:
            self._read_blocks(layer, value)
        else:
            value.replace_all_uses_with(self._dequantised(layer, codes, axis=0))
        del self.graph.initializers[f"{layer}.weight"]

    def _read_blocks(self, layer: str, value: ir.Value) -> None:
        """int4: a linear layer's codes lie as its product takes them, a convolution's in rows."""
        packed, scale = (self.weights[f"{layer}.{each}"] for each in ("weight", "weight_scale"))
        assert value.shape is not None
        shape = value.shape.numpy()
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        codes = replace(packed, dtype=ir.DataType.INT4, shape=(rows, columns))
        self.graph.opset_imports[""] = _BLOCKS_OPSET
        if len(shape) == 2:
            block = rows // scale.shape[0]
            _use_transposed(value, self._dequantised(layer, codes, axis=0, block_size=block))
            return
        block = columns // scale.shape[1]
        flat = self._dequantised(layer, codes, axis=1, block_size=block)
        sizes = self._initializer(ir.tensor(np.array(shape), name=f"{layer}.weight.shape"))
        whole = ir.node("Reshape", [flat, sizes], name=f"{layer}.weight.whole")
        value.replace_all_uses_with(self._begin(whole, scale.dtype, shape))

    def _dequantised(self, layer: str, codes: StoredTensor, **attributes: int) -> ir.Value:
        """The weight that stored codes stand for, or that in steps of its output, made at the graph's beginning."""
        name = f"{layer}.weight"
        scales = self._in_steps(self._stored(f"{layer}{_SCALE}"), layer)
        inputs = [self._initializer(external(f"{name}.codes", codes)), scales]
        if codes.dtype == ir.DataType.INT8 and f"{layer}{_INPUT_SCALE}" in self.weights:
            zeros = np.zeros(codes.shape[0], np.int8)
            inputs.append(self._initializer(ir.tensor(zeros, name=f"zeros.{zeros.size}")))
        node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}.dequantised")
        return self._begin(node, self.weights[f"{layer}{_SCALE}"].dtype, codes.shape)

    def _round_input(self, product: ir.Node, layer: str, label: str, kind: ir.DataType) -> None:
        """Let a product of a layer read its first input through 8 bits, where the layer has a scale for that; nodes are
        named by ``label``."""
        x = product.inputs[0]
        if f"{layer}{_INPUT_SCALE}" not in self.weights or x is None:
            return
        if f"{layer}.smoothing" in self.weights:
            factors = self._stored(f"{layer}.smoothing")
            node = ir.node("Mul", [x, factors], name=f"{label}.smoothed")
            x = self._follow(x, node, x.dtype)
        scale = self._stored(f"{layer}{_INPUT_SCALE}")
        product.replace_input_with(0, self._rounded(x, f"{label}.input", scale, kind))

    def _round_output(self, product: ir.Node, layer: str, label: str, kind: ir.DataType) -> None:
        """Round what a product gives, where the layer has a scale for that; a bias is added before."""
        stored = self.weights.get(f"{layer}{OUTPUT_SCALE}")
        if stored is None:
            return
        (output,) = product.outputs
        users = [node for node, _ in output.uses()]
        if not stored.shape and len(users) == 1 and users[0].op_type == "Add":
            (output,) = users[0].outputs  # a convolution adds its bias itself
        readers = list(output.uses())
        if stored.shape:
            rounded = self._rounded_steps(product, layer, stored, kind)
        else:
            scale = self._stored(f"{layer}{OUTPUT_SCALE}")
            rounded = self._rounded(output, f"{label}.output", scale, kind)
        for node, index in readers:
            node.replace_input_with(index, rounded)

    def _rounded_steps(
        self, product: ir.Node, layer: str, stored: StoredTensor, kind: ir.DataType
    ) -> ir.Value:
        """A convolution's output in whole steps of each channel, the weight being so already, times those."""
        for index, bias in enumerate(product.inputs[2:], start=2):
            assert bias is not None
            product.replace_input_with(index, self._in_steps(bias, layer))
        (output,) = product.outputs
        name = f"one.{stored.dtype.name.lower()}"
        one = self._initializer(ir.tensor(np.ones((), stored.dtype.numpy()), name=name))
        whole = self._rounded(output, f"{layer}{WHOLE_STEPS}", one, kind)
        shape = self._initializer(ir.tensor(np.array((-1, 1, 1)), name="shape.channels"))
        steps = self._stored(f"{layer}{OUTPUT_SCALE}")
        node = ir.node("Reshape", [steps, shape], name=f"{layer}.output.step")
        step = self._begin(node, stored.dtype, (*stored.shape, 1, 1))
        node = ir.node("Mul", [whole, step], name=f"{layer}.output")
        return self._follow(whole, node, output.dtype)

    def _in_steps(self, values: ir.Value, layer: str) -> ir.Value:
        """Values [out] of a convolution in the steps that its output is rounded to; as they are where it is not."""
        stored = self.weights.get(f"{layer}{OUTPUT_SCALE}")
        if stored is None or not stored.shape:
            return values
        steps = self._stored(f"{layer}{OUTPUT_SCALE}")
        node = ir.node("Div", [values, steps], name=f"{values.name}.in_steps")
        return self._begin(node, stored.dtype, stored.shape)

    def _rounded(self, x: ir.Value, name: str, scale: ir.Value, kind: ir.DataType) -> ir.Value:
        """x in codes of this kind and back."""
        zero = self._initializer(ir.tensor(_ZEROS[kind], name=f"zero.{kind.name.lower()}"))
        node = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}.codes")
        codes = self._follow(x, node, kind)
        node = ir.node("DequantizeLinear", [codes, scale, zero], name=name)
        return self._follow(codes, node, x.dtype)

    def _stored(self, name: str) -> ir.Value:
        """One of the component's tensors, by its own name."""
        return self._initializer(external(name, self.weights[name]))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        assert tensor.name is not None
        if tensor.name not in self.graph.initializers:
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[tensor.name]

    def _begin(self, node: ir.Node, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """The output of a node that is put before all that the graph had."""
        self.graph.insert_before(self.first, node)
        return _described(node, dtype, ir.Shape(shape))

    def _follow(self, x: ir.Value, node: ir.Node, dtype: ir.DataType | None) -> ir.Value:
        """The output, of x's shape, of a node that is put right behind what gives x."""
        if (producer := x.producer()) is None:
            self.graph.insert_before(self.first, node)
        else:
            self.graph.insert_after(producer, node)
        return _described(node, dtype, x.shape)


def _described(node: ir.Node, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    (output,) = node.outputs
    output.name, output.shape = node.name, shape
    output.type = None if dtype is None else ir.TensorType(dtype)
    return output


def _products(weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply by a weight, directly or through its transpose."""
    found = []
    for node, _ in weight.uses():
        turned = node.op_type in ("Transpose", "Cast")
        found += _products(node.outputs[0]) if turned else [node]
    return found


def _use_transposed(weight: ir.Value, transposed: ir.Value) -> None:
    """What multiplies by the transpose of ``weight`` [out, in] multiplies by ``transposed`` [in, out]."""
    for node, index in list(weight.uses()):
        if node.op_type == "Transpose":
            node.outputs[0].replace_all_uses_with(transposed)
        else:
            assert node.op_type == "Gemm", node
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
            node.replace_input_with(index, transposed)
