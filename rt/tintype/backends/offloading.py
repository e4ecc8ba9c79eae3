"""Weights that wait on the host and are on the device only while they are needed, for models larger than its memory.

The names are diffusers': `model` keeps one component on the device, from its first run until another's; `sequential`
one block and the next, which is fetched on a stream of its own while the first computes. Nothing is copied back: the
host keeps what it had, in the type that it is stored in where that is narrower, so that a large model may stay in its
files. Runs of different threads go one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tintype.errors import RequestError

Slot = tuple[dict[str, Any], str]  # of a module's own table of tensors
_BLOCKS = (nn.ModuleList,)


class Placed:
    """Some of a module's parameters and buffers: at home on the host, or as copies in ``dtype`` on the device."""

    def __init__(self, slots: Iterable[Slot], device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._home = [(table, name, self._kept(table[name])) for table, name in slots]
        self._here = False
        self._ready: torch.cuda.Event | None = None

    def fetch(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to copy to the device, on the stream where there is one."""
        if self._here:
            return
        self._here = True
        with torch.cuda.stream(stream):  # of None it does nothing
            for table, name, tensor in self._home:
                dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
                copy = tensor.detach().to(self._device, dtype, copy=True, non_blocking=True)
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
        self._ready = stream.record_event() if stream is not None else None

    def wait(self) -> None:
        """Let what computes next wait for the copies, and the copies' memory for what computes."""
        if self._ready is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._ready)
        for table, name, _ in self._home:
            table[name].record_stream(current)
        self._ready = None

    def leave(self) -> None:
        """Free the device's copies."""
        for table, name, tensor in self._home:
            table[name] = tensor
        self._here = False

    def _kept(self, tensor: Tensor) -> Tensor:
        """A tensor of the host; a GPU copies from pinned memory while it computes."""
        if self._device.type != "cuda":
            return tensor
        pinned = tensor.detach().pin_memory()
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(pinned, requires_grad=False) if is_parameter else pinned


class ModelOffload:
    """One component on the device at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._components: dict[int, Placed] = {}
        self._resident: Placed | None = None

    def attach(self, stage: nn.Module, component: nn.Module, dtype: torch.dtype) -> None:
        """Have the stage's runs fetch its component in ``dtype``, and send home whichever was there before."""
        if id(component) not in self._components:
            self._components[id(component)] = Placed(_slots(component), self._device, dtype)
        placed = self._components[id(component)]
        stage.register_forward_pre_hook(lambda *_: self._enter(placed))
        stage.register_forward_hook(lambda *_: self._lock.release(), always_call=True)

    def _enter(self, placed: Placed) -> None:
        self._lock.acquire()
        if self._resident is not None and self._resident is not placed:
            self._resident.leave()
        placed.fetch()
        self._resident = placed


class SequentialOffload:
    """One block on the device, and the next on its way; what is in no block is there while the stage runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._components: dict[int, list[Placed]] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def attach(self, stage: nn.Module, component: nn.Module, dtype: torch.dtype) -> None:
        """Have the stage's runs fetch what they need in ``dtype``, block after block."""
        if id(component) not in self._components:
            self._components[id(component)] = self._blocks(component, dtype)
        rest, *_ = parts = self._components[id(component)]
        stage.register_forward_pre_hook(lambda *_: self._enter(rest))
        stage.register_forward_hook(lambda *_: self._leave(parts), always_call=True)

    def _blocks(self, component: nn.Module, dtype: torch.dtype) -> list[Placed]:
        """What is in no block, then every block, with hooks that fetch it, begin the next, and send it home."""
        blocks = list(_outermost_blocks(component))
        inside = {id(table) for block in blocks for table, _ in _slots(block)}
        rest = [slot for slot in _slots(component) if id(slot[0]) not in inside]
        placed = [Placed(_slots(block), self._device, dtype) for block in blocks]
        for block, (own, after) in zip(blocks, pairwise([*placed, None]), strict=True):
            block.register_forward_pre_hook(lambda *_, a=own, b=after: self._begin(a, b))
            block.register_forward_hook(lambda *_, a=own: a.leave(), always_call=True)
        return [Placed(rest, self._device, dtype), *placed]

    def _begin(self, own: Placed, after: Placed | None) -> None:
        own.fetch(self._stream)
        if after is not None:
            after.fetch(self._stream)
        own.wait()

    def _enter(self, rest: Placed) -> None:
        self._lock.acquire()
        rest.fetch(self._stream)
        rest.wait()

    def _leave(self, parts: list[Placed]) -> None:
        for part in parts:
            part.leave()
        self._lock.release()


OFFLOADS: dict[str, type[ModelOffload] | type[SequentialOffload]] = {
    "model": ModelOffload,
    "sequential": SequentialOffload,
}


def offload(name: str | None, device: torch.device) -> ModelOffload | SequentialOffload | None:
    """The offloading of that name, or None for weights that stay on the device."""
    if name is None:
        return None
    if name not in OFFLOADS:
        raise RequestError(f"offload={name!r} is unknown; choose None, {', '.join(OFFLOADS)}")
    return OFFLOADS[name](device)


def _slots(module: nn.Module) -> Iterator[Slot]:
    """Every parameter and buffer of a module and those in it, by the table that it is in."""
    for each in module.modules():
        for table in (each._parameters, each._buffers):
            yield from ((table, name) for name, tensor in table.items() if tensor is not None)


def _outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the first lists of modules on the way down, in the order of their making."""
    for child in module.children():
        if isinstance(child, _BLOCKS):
            yield from child
        else:
            yield from _outermost_blocks(child)
