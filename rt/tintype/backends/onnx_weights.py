"""Which files an ONNX graph reads its weights from, told from its bytes without the onnx package.

onnxruntime before 1.24 follows any path that a graph names, so the names are compared with the bundle's own list.
"""

from __future__ import annotations

from collections.abc import Iterator

from tintype.errors import BundleError

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
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5


def weight_files(graph: bytes) -> set[str]:
    """The `location` of every external tensor, as the graph writes it."""
    try:
        return {
            bytes(fields[2]).decode()
            for entry in _entries(memoryview(graph), "model")
            if bytes((fields := dict(_parts(entry))).get(1, b"")) == b"location"
        }
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise BundleError(f"not an ONNX graph: {error}") from error


def _entries(message: memoryview, kind: str) -> Iterator[memoryview]:
    for number, part in _parts(message):
        inner = _FIELDS[kind].get(number)
        if inner == "entry":
            yield part
        elif inner:
            yield from _entries(part, inner)


def _parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of the sized fields of a protobuf message; numbers are passed over."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _SIZED:
            size, position = _varint(message, position)
            if position + size > len(message):
                raise IndexError("a field is longer than its message")
            yield tag >> 3, message[position : position + size]
            position += size
        elif kind == _VARINT:
            _, position = _varint(message, position)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise IndexError(f"field of unknown kind {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
