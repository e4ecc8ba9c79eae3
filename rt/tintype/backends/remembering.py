"""What a graph makes of a picture's texts alone, which every step would make again, made once: a graph in two.

Of Stable Diffusion that is each cross-attention's keys and values, of SDXL its sizes and pooled text, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from tintype.backends.onnx_nodes import (
    DESCRIBED,
    NAME,
    NODE,
    Node,
    inner_graph,
    read_node,
    with_graph,
)
from tintype.backends.onnx_weights import INITIALIZER, INPUT, OUTPUT, TENSOR_NAME
from tintype.protobuf import Field, fields, sized, texts

# Inputs that differ from one step of a picture to the next; whatever else a denoiser is told stays as it is.
CHANGING = frozenset({"sample", "timestep", "history", "row", "noise"})
_PRODUCTS = ("MatMul", "Gemm")
_HOLD_GRAPHS = ("If", "Loop", "Scan")
S = TypeVar("S")
Values = Mapping[str, Any]


class Parted(NamedTuple):
    """`remember` makes of what is ``told`` what `recall` reads beside what changes; ``unread`` of it by `recall`."""

    remember: bytes
    recall: bytes
    told: frozenset[str]
    unread: frozenset[str]


def parted(model: bytes) -> Parted | None:
    """A denoiser's graph in two; None of any other graph, or where nothing worth keeping depends on texts alone."""
    graph = _read(model)
    inputs, outputs = graph.described[INPUT], graph.described[OUTPUT]
    if not CHANGING & inputs.keys() or any(node.kind in _HOLD_GRAPHS for node in graph.nodes):
        return None
    alone, changed = _told_alone(graph.nodes, inputs.keys() - CHANGING)
    read = {name for node in changed for name in node.inputs} - outputs.keys()
    kept = [name for node in alone for name in node.outputs if name in read]
    between = graph.described[DESCRIBED]
    if not between.keys() >= {*kept} or not any(node.kind in _PRODUCTS for node in alone):
        return None
    faces = {name: between[name] for name in kept}
    remember, told = _cut(graph, given=inputs, outputs=faces)
    recall, seen = _cut(graph, given=inputs | faces, outputs=outputs)
    return Parted(with_graph(model, remember), with_graph(model, recall), told, told - seen)


class _Graph(NamedTuple):
    """A graph's fields; what describes inputs, outputs, initialisers and values between, by their names; its nodes."""

    rest: list[Field]
    described: dict[int, dict[str, memoryview]]
    nodes: list[Node]


def _read(model: bytes) -> _Graph:
    graph = _Graph([], {INPUT: {}, OUTPUT: {}, DESCRIBED: {}, INITIALIZER: {}}, [])
    for part in fields(inner_graph(model)):
        if part.payload is not None and part.number == NODE:
            graph.nodes.append(read_node(part.payload))
        elif part.payload is not None and part.number in graph.described:
            number = TENSOR_NAME if part.number == INITIALIZER else NAME
            name = next(texts(part.payload, number))
            graph.described[part.number][name] = part.payload
        else:
            graph.rest.append(part)
    return graph


def _told_alone(nodes: list[Node], told: Collection[str]) -> tuple[list[Node], list[Node]]:
    """The nodes that depend on what is told alone, and those that depend on what changes."""
    from_told, from_changing = set(told), set(CHANGING)
    alone, changed = [], []
    for node in nodes:
        if not from_changing.isdisjoint(node.inputs):
            changed.append(node)
            from_changing.update(node.outputs)
        elif not from_told.isdisjoint(node.inputs):
            alone.append(node)
            from_told.update(node.outputs)
    return alone, changed


def _cut(
    graph: _Graph, *, given: Mapping[str, memoryview], outputs: Mapping[str, memoryview]
) -> tuple[bytes, frozenset[str]]:
    """The part of a graph that makes `outputs` of what is given, by their descriptions; and what it reads of that."""
    wanted, taken = set(outputs), []
    for node in reversed(graph.nodes):
        if not wanted.isdisjoint(node.outputs) and given.keys().isdisjoint(node.outputs):
            wanted.update(node.inputs)
            taken.append(node.message)
    read = frozenset(wanted & given.keys())
    between = wanted - outputs.keys() - read

    def described(number: int, names: Collection[str]) -> list[bytes]:
        found = graph.described[number]
        return [sized(number, bytes(found[name])) for name in found if name in names]

    pieces: list[bytes | memoryview] = [
        *(part.whole for part in graph.rest),
        *(sized(NODE, bytes(message)) for message in reversed(taken)),
        *described(INITIALIZER, between),
        *(sized(INPUT, bytes(given[name])) for name in given if name in read),
        *(sized(OUTPUT, bytes(each)) for each in outputs.values()),
        *described(DESCRIBED, between),
    ]
    return b"".join(pieces), read


@dataclass(frozen=True)
class InTwo(Generic[S]):
    """What runs a graph: one session, or one before it for what is ``told``, of which it leaves some ``unread``."""

    recall: S
    remember: S | None = None
    told: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()


def opened(model: bytes, session: Callable[[bytes], S]) -> InTwo[S]:
    """The sessions of a graph, made of the bytes of one."""
    parts = parted(model)
    if parts is None:
        return InTwo(session(model))
    return InTwo(session(parts.recall), session(parts.remember), parts.told, parts.unread)


class Memory(threading.local):
    """What was told last in the thread that asks, and what came of it: a thread walks one picture at a time."""

    def __init__(self) -> None:
        self._graph: object = None
        self._told: dict[str, Any] = {}
        self._kept: Values = {}

    def run(
        self,
        graph: InTwo[S],
        inputs: Values,
        call: Callable[[S, Values], dict[str, Any]],
        hold: Callable[[dict[str, Any]], Values] = dict,
    ) -> dict[str, Any]:
        """What a graph gives; `call` runs a session. What was told the last time, too, is not worked out again: what
        came of it is kept as `hold` makes of it."""
        # Where something is missing the session says so.
        if graph.remember is None or not graph.told <= inputs.keys():
            return call(graph.recall, inputs)
        told = {name: inputs[name] for name in graph.told}
        if self._graph is not graph or not all(
            _same(self._told[name], told[name]) for name in told
        ):
            # May be large, and is not needed beside what takes its place, if anything does.
            self._graph, self._kept = None, {}
            self._kept = hold(call(graph.remember, told))
            self._graph, self._told = graph, {name: _apart(told[name]) for name in told}
        changing = {name: inputs[name] for name in inputs if name not in graph.unread}
        return call(graph.recall, {**changing, **self._kept})


def _same(known: Any, told: Any) -> bool:
    """Whether values are the same: arrays by what is in them, those that lie on a device by which they are."""
    return known is told or (isinstance(told, np.ndarray) and np.array_equal(known, told))


def _apart(told: Any) -> Any:
    """A copy of an array, which its owner may write to."""
    return told.copy() if isinstance(told, np.ndarray) else told
