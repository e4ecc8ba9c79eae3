"""What onnxruntime is given of a graph whose linear layers are in codes.

A graph has such a layer's codes as [out, in] and transposes the numbers that they stand for. onnxruntime finds its
products of codes behind that too, but widens every weight on the way: ten bytes a parameter while a session is made. So
codes are transposed before, and what the graph says of them with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from tintype.backends.onnx_nodes import (
    ATTRIBUTE_INT,
    ATTRIBUTE_TYPE,
    DESCRIBED,
    NAME,
    NODE,
    NODE_ATTRIBUTE,
    NODE_KIND,
    Node,
    inner_graph,
    read_node,
    with_graph,
)
from tintype.backends.onnx_weights import (
    DIMS,
    INITIALIZER,
    INT8,
    TENSOR_NAME,
    ExternalTensor,
    external_tensors,
)
from tintype.protobuf import counted, fields, payloads, sized, texts, varints

Codes = NDArray[np.int8]
_IS_INT = 2  # an attribute's type
_SCALING = "DequantizeLinear"


def straightened(
    graph: bytes, turn: Callable[[ExternalTensor], Codes]
) -> tuple[bytes, dict[str, Codes]]:
    """The graph with its linear layers' codes as [in, out], and those by the names of their initialisers.

    `turn` gives a tensor's codes so. Layers whose input is not in codes stay as they are.
    """
    tensors = {
        tensor.name: tensor
        for tensor in external_tensors(graph)
        if tensor.data_type == INT8 and len(tensor.shape) == 2
    }
    inner = inner_graph(graph)
    nodes = [read_node(message) for message in payloads(inner, NODE)]
    turned = dict(_turned(nodes, tensors))
    if not turned:
        return graph, {}
    changed = {number: nodes[number] for numbers in turned.values() for number in numbers}
    rewritten = _rewritten(inner, turned.keys(), changed)
    return with_graph(graph, rewritten), {name: turn(tensors[name]) for name in turned}


def _turned(
    nodes: list[Node], tensors: Mapping[str, ExternalTensor]
) -> Iterator[tuple[str, list[int]]]:
    """Names of codes of products of codes, each read by one scaling alone, whose numbers nothing reads untransposed;
    with the places of these nodes."""
    readers: dict[str, list[int]] = defaultdict(list)
    makers: dict[str, str] = {}
    for number, node in enumerate(nodes):
        for name in node.inputs:
            readers[name].append(number)
        makers |= dict.fromkeys(node.outputs, node.kind)

    def multiplies_codes(number: int) -> bool:
        node = nodes[number]
        return node.kind == "MatMul" and makers.get(node.inputs[0]) == _SCALING

    for name in tensors:
        scalings = readers[name]
        if len(scalings) != 1 or not _scales_rows(nodes[scalings[0]]):
            continue
        behind = readers[nodes[scalings[0]].outputs[0]]
        products = [reader for number in behind for reader in readers[nodes[number].outputs[0]]]
        transposed = all(_transposes(nodes[number]) for number in behind)
        if products and transposed and all(map(multiplies_codes, products)):
            yield name, [*scalings, *behind]


def _scales_rows(node: Node) -> bool:
    return node.kind == _SCALING and node.numbers.get("axis") == [0]


def _transposes(node: Node) -> bool:
    return node.kind == "Transpose" and node.numbers.get("perm") == [1, 0]


def _rewritten(graph: memoryview, names: Collection[str], changed: Mapping[int, Node]) -> bytes:
    """The graph's message with the dimensions of named tensors and the axes of numbered nodes the other way round."""
    undescribed = {node.outputs[0] for node in changed.values()}
    parts: list[bytes | memoryview] = []
    number = 0
    for each in fields(graph):
        new: bytes | memoryview = each.whole
        if each.payload is None:
            pass
        elif each.number == NODE:
            new = _other_axes(each.payload, changed[number]) if number in changed else new
            number += 1
        elif each.number == INITIALIZER and next(texts(each.payload, TENSOR_NAME)) in names:
            new = _other_dimensions(each.payload)
        elif each.number == DESCRIBED and next(texts(each.payload, NAME)) in undescribed:
            continue
        parts.append(new)
    return b"".join(parts)


def _other_axes(message: memoryview, node: Node) -> bytes:
    """A scaling of rows as one of columns, a transposition as none."""
    axis = sized(NAME, b"axis") + counted(ATTRIBUTE_INT, 1) + counted(ATTRIBUTE_TYPE, _IS_INT)
    kind = sized(NODE_KIND, (_SCALING if _scales_rows(node) else "Identity").encode())
    told = [kind, sized(NODE_ATTRIBUTE, axis)] if _scales_rows(node) else [kind]
    kept = (
        each.whole for each in fields(message) if each.number not in (NODE_KIND, NODE_ATTRIBUTE)
    )
    return sized(NODE, b"".join([*kept, *told]))


def _other_dimensions(tensor: memoryview) -> bytes:
    rows, columns = varints(tensor, DIMS)
    rest = (each.whole for each in fields(tensor) if each.number != DIMS)
    dimensions = counted(DIMS, columns) + counted(DIMS, rows)
    return sized(INITIALIZER, dimensions + b"".join(rest))
