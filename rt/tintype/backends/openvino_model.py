"""An ONNX graph as OpenVINO takes it: weights stay in the mapped files, in the bits that they are stored in.

What the reader makes of a graph holds a copy of the weights, and what the compiler keeps of that holds them in
float32 beside what it packs for its kernels. Here the copy goes before anything is compiled, and nothing is widened
but what is packed.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
from openvino import opset13 as ops

from tintype.backends.graphs import WHOLE_STEPS, MappedWeights
from tintype.backends.onnx_weights import external_tensors, read_from_memory

_FLOATS_OF_16_BITS = (ov.Type.bf16, ov.Type.f16)
_THAT_SAY_A_TYPE = ("Constant", "Convert", "Parameter")
# A conversion so marked is left to whoever packs the weights, and is not made a constant of more bits before.
_LEFT_TO_KERNELS = ("decompression_0", "disabled_constant_folding_0")


def read_model(core: ov.Core, graph: bytes, weights: MappedWeights) -> ov.Model:
    """The model of a graph; it reads the mapped files, as does what is compiled from it."""
    model = core.read_model(read_from_memory(graph, weights.place))
    _leave_in_files(model, graph, weights)
    _unround_convolutions(model)
    return model


def widen_late(model: ov.Model) -> None:
    """Leave it to the kernels of a CPU, which compute in more bits, to widen stored floats of 16 bits."""
    _compute_in_float32(model)
    for constant in _constants(model):
        if constant.get_element_type() not in _FLOATS_OF_16_BITS:
            continue
        for reader in _readers(constant):
            if reader.get_node().get_type_name() == "Convert":
                for mark in _LEFT_TO_KERNELS:
                    reader.get_node().get_rt_info()[mark] = ""


def chooses(model: ov.Model) -> bool:
    """Whether a graph goes on with the place of the least or the largest of some floats."""
    searches = (node for node in model.get_ops() if node.get_type_name() == "TopK")
    return any(node.get_input_element_type(0).is_real() for node in searches)


def _leave_in_files(model: ov.Model, graph: bytes, weights: MappedWeights) -> None:
    """Replace the copies that the reader made of stored weights by what they were copied from."""
    stored = {tensor.name: tensor for tensor in external_tensors(graph)}
    for copy in _constants(model):
        place = stored.get(copy.get_friendly_name())
        if place is None:
            continue
        data = weights.find(place.location, place.offset, place.length)
        tensor = ov.Tensor(data, copy.get_shape(), copy.get_element_type())
        mapped = ov.op.Constant(tensor, shared_memory=True)
        mapped.set_friendly_name(copy.get_friendly_name())
        for reader in _readers(copy):
            reader.replace_source_output(mapped.output(0))


def _unround_convolutions(model: ov.Model) -> None:
    """Leave what convolutions give unrounded: that serves runtimes that convolve codes to codes alone.

    Here a convolution of codes gives floats as fast, and what follows it reads those.
    """
    for node in model.get_ops():
        if not node.get_friendly_name().endswith(WHOLE_STEPS):
            continue
        rounding = node
        while rounding.get_type_name() != "FakeQuantize":
            rounding = rounding.input_value(0).get_node()
        for reader in _readers(node):
            reader.replace_source_output(rounding.input_value(0))


def _compute_in_float32(model: ov.Model) -> None:
    """Say float32 where a graph says float16, but of what is stored, which is widened where it is read.

    The compiler would do the same where it does not compute in float16, to the stored weights as well.
    """
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in _THAT_SAY_A_TYPE or node.get_element_type() != ov.Type.f16:
            continue
        if kind == "Constant":
            for reader in _readers(node):
                if reader.get_node().get_type_name() != "Convert":
                    reader.replace_source_output(ops.convert(node, "f32").output(0))
        elif kind == "Convert":
            node.set_destination_type(ov.Type.f32)
        else:
            node.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()


def _constants(model: ov.Model) -> list[ov.Node]:
    return [node for node in model.get_ops() if node.get_type_name() == "Constant"]


def _readers(node: ov.Node) -> list[Any]:
    """The inputs that a node's only output goes to."""
    return list(node.output(0).get_target_inputs())
