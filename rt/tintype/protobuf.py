"""The fields of a protobuf message, for the few that are read and written without the protobuf package."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _EIGHT_BYTES, SIZED, _FOUR_BYTES = 0, 1, 2, 5


class Field(NamedTuple):
    """One field of a message: its number, its bytes where it is sized, and where in the message it is written."""

    number: int
    payload: memoryview | None
    message: memoryview
    begin: int
    end: int

    @property
    def whole(self) -> memoryview:
        """All that it is written as."""
        return self.message[self.begin : self.end]

    @property
    def float32(self) -> float:
        """The value of a field of four bytes."""
        return float(struct.unpack("<f", self.whole[-4:])[0])


def fields(message: memoryview) -> Iterator[Field]:
    """Every field in its order; IndexError where the message is cut off or none."""
    position, length = 0, len(message)
    while position < length:
        begin = position
        tag, position = varint(message, position)
        kind, payload = tag & 7, None
        if kind == SIZED:
            size, position = varint(message, position)
            payload = message[position : position + size]
            position += size
        elif kind == _VARINT:
            _, position = varint(message, position)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise IndexError(f"field of unknown kind {kind}")
        if position > length:
            raise IndexError("a field is longer than its message")
        yield Field(tag >> 3, payload, message, begin, position)


def payloads(message: memoryview, number: int) -> Iterator[memoryview]:
    """The bytes of every sized field of that number."""
    for field in fields(message):
        if field.number == number and field.payload is not None:
            yield field.payload


def texts(message: memoryview, number: int) -> Iterator[str]:
    """The texts of every sized field of that number."""
    return (bytes(payload).decode() for payload in payloads(message, number))


def varints(message: memoryview, number: int) -> Iterator[int]:
    """The numbers of every field of that number, packed into one or each by itself."""
    for field in fields(message):
        if field.number != number:
            continue
        if field.payload is None:
            _, begin = varint(field.whole, 0)
            yield varint(field.whole, begin)[0]
            continue
        position = 0
        while position < len(field.payload):
            value, position = varint(field.payload, position)
            yield value


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, and the position behind it."""
    byte = message[position]
    position += 1
    if byte < 0x80:  # as nearly all are
        return byte, position
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, position


def sized(number: int, payload: bytes) -> bytes:
    """A field of that number which holds bytes, a text or a message."""
    return _as_varint(number << 3 | SIZED) + _as_varint(len(payload)) + payload


def counted(number: int, value: int) -> bytes:
    """A field of that number which holds a number from 0 on."""
    return _as_varint(number << 3 | _VARINT) + _as_varint(value)


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
