"""Where an ONNX graph reads its weights from, and its outputs' names, from its bytes without the onnx package.

onnxruntime before 1.24 follows any path that a graph names, so the names are compared with the bundle's own list.
OpenVINO reads weights from the graph's own folder or from memory alone, so its graphs are pointed to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tintype.errors import BundleError
from tintype.protobuf import fields, payloads, sized, texts, varints

# Field numbers of onnx.proto that lead to a tensor's external_data, by the message that they are in.
_FIELDS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_EXTERNAL_DATA = 13
_LOCATION = b"location"
GRAPH = 7  # of a model
INITIALIZER, INPUT, OUTPUT, _NAME = 5, 11, 12, 1  # of a graph, and of a value's description
DIMS, _DATA_TYPE, TENSOR_NAME = 1, 2, 8  # of a tensor
INT8 = 3  # as onnx.proto numbers types
# What onnxruntime writes in place of a file's name where the offset is an address, and others have learned to read.
IN_MEMORY = "*/_ORT_MEM_ADDR_/*"

Place = Callable[[str, int, "int | None"], "tuple[int, int]"]
"""(location, offset, length or None for the rest) -> (address, length)"""


class ExternalTensor(NamedTuple):
    """An initialiser whose values lie in a file; ``data_type`` is ONNX's number of a type."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int | None


def external_tensors(graph: bytes) -> Iterator[ExternalTensor]:
    """The initialisers of a graph that lie in files."""
    for inner in payloads(memoryview(graph), GRAPH):
        for tensor in payloads(inner, INITIALIZER):
            entries = dict(_entry(entry) for entry in payloads(tensor, _EXTERNAL_DATA))
            if "location" in entries:
                (name,) = texts(tensor, TENSOR_NAME)
                (data_type,) = varints(tensor, _DATA_TYPE)
                yield ExternalTensor(
                    name,
                    data_type,
                    tuple(varints(tensor, DIMS)),
                    entries["location"],
                    int(entries.get("offset", 0)),
                    int(entries["length"]) if "length" in entries else None,
                )


def weight_files(graph: bytes) -> set[str]:
    """The `location` of every external tensor, as the graph writes it."""
    try:
        found = (_entry(entry) for entry in _entries(memoryview(graph), "model"))
        return {value for key, value in found if key == "location"}
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise BundleError(f"not an ONNX graph: {error}") from error


def read_from_memory(graph: bytes, place: Place) -> bytes:
    """The graph with every external tensor at the address that `place` gives for it."""
    return _moved(memoryview(graph), "model", place)


def output_names(graph: bytes) -> list[str]:
    """What a graph calls its outputs, in its order."""
    graphs = payloads(memoryview(graph), GRAPH)
    infos = (info for each in graphs for info in payloads(each, OUTPUT))
    return [name for info in infos for name in texts(info, _NAME)]


def _moved(message: memoryview, kind: str, place: Place) -> bytes:
    parts: list[bytes | memoryview] = []
    entries: dict[str, str] = {}
    for field in fields(message):
        inner = _FIELDS[kind].get(field.number)
        if inner is None or field.payload is None:
            parts.append(field.whole)
        elif inner == "entry":
            key, value = _entry(field.payload)
            entries[key] = value
        else:
            parts.append(sized(field.number, _moved(field.payload, inner, place)))
    if "location" in entries:
        length = int(entries["length"]) if "length" in entries else None
        address, size = place(entries["location"], int(entries.get("offset", 0)), length)
        told = {"location": IN_MEMORY, "offset": str(address), "length": str(size)}
        for key, value in told.items():
            entry = sized(1, key.encode()) + sized(2, value.encode())
            parts.append(sized(_EXTERNAL_DATA, entry))
    return b"".join(parts)


def _entries(message: memoryview, kind: str) -> Iterator[memoryview]:
    """Those that may name a file, wherever a model can have a tensor."""
    for field in fields(message):
        inner = _FIELDS[kind].get(field.number)
        # A key is written whole: what does not hold its bytes need not be read.
        if field.payload is None or inner is None or _LOCATION not in bytes(field.payload):
            continue
        if inner == "entry":
            yield field.payload
        else:
            yield from _entries(field.payload, inner)


def _entry(message: memoryview) -> tuple[str, str]:
    """A pair of texts, each empty where it is not written."""
    texts = {field.number: bytes(field.payload or b"").decode() for field in fields(message)}
    return texts.get(1, ""), texts.get(2, "")
