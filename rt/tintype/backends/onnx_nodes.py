"""The nodes of an ONNX graph, from its bytes without the onnx package."""

from __future__ import annotations

from typing import NamedTuple

from tintype.backends.onnx_weights import GRAPH
from tintype.errors import BundleError
from tintype.protobuf import fields, payloads, sized, texts, varints

# Field numbers of onnx.proto.
NODE, DESCRIBED = 1, 13  # of a graph
NODE_INPUT, NODE_OUTPUT, NODE_KIND, NODE_ATTRIBUTE = 1, 2, 4, 5
NAME = 1  # of an attribute and of a value's description
ATTRIBUTE_INT, ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 3, 8, 20


class Node(NamedTuple):
    """What is read of a node, and all of it."""

    kind: str
    inputs: list[str]
    outputs: list[str]
    message: memoryview

    @property
    def numbers(self) -> dict[str, list[int]]:
        """Its attributes, as far as they are whole numbers."""
        found = {}
        for attribute in payloads(self.message, NODE_ATTRIBUTE):
            (name,) = texts(attribute, NAME)
            ints = varints(attribute, ATTRIBUTE_INTS)
            found[name] = [*varints(attribute, ATTRIBUTE_INT), *ints]
        return found


def read_node(message: memoryview) -> Node:
    names: dict[int, list[str]] = {NODE_INPUT: [], NODE_OUTPUT: [], NODE_KIND: []}
    for field in fields(message):
        if field.number in names and field.payload is not None:
            names[field.number].append(bytes(field.payload).decode())
    (kind,) = names[NODE_KIND]
    return Node(kind, names[NODE_INPUT], names[NODE_OUTPUT], message)


def inner_graph(model: bytes) -> memoryview:
    """The message of a model's graph."""
    found = [*payloads(memoryview(model), GRAPH)]
    if len(found) != 1:
        raise BundleError(f"not an ONNX graph: there are {len(found)} in it")
    return found[0]


def with_graph(model: bytes, graph: bytes) -> bytes:
    """The model with another graph in the place of its own."""
    parts = (
        sized(GRAPH, graph) if each.number == GRAPH else each.whole
        for each in fields(memoryview(model))
    )
    return b"".join(parts)
