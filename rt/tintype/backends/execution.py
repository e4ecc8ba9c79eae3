"""How torch runs a stage: eagerly, compiled, or replayed from a CUDA graph, whose launches cost the host nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tintype.errors import RequestError
from tintype.models.stages import Stage

EXECUTIONS = ("eager", "compiled", "graph")
_WARM_UPS = (
    3  # libraries pick their kernels and workspaces in the first calls, which a capture may not do
)
Call = Callable[..., Tensor | tuple[Tensor, ...]]


def check_execution(execution: str, device: torch.device, *, offloaded: bool, sliced: bool) -> str:
    """The execution, or a RequestError where this device, moving weights or attention in slices do not go with it."""
    if execution not in EXECUTIONS:
        raise RequestError(
            f"execution={execution!r} is unknown; choose one of {', '.join(EXECUTIONS)}"
        )
    if execution == "graph" and device.type != "cuda":
        raise RequestError(
            f"execution='graph' needs a CUDA device, and this is {device}; use 'compiled'"
        )
    if execution != "eager" and offloaded:
        raise RequestError(
            f"execution={execution!r} needs weights that stay where they are; leave out offload"
        )
    if execution == "compiled" and sliced:
        raise RequestError(
            "execution='compiled' would be cut at every attention; use 'eager', or leave out attention_slicing"
        )
    return execution


def prepared(stage: Stage, execution: str, device: torch.device) -> Call:
    """What runs the stage; static shapes each have their own code and, on CUDA, their own graph."""
    if execution == "eager":
        return stage
    call: Call = stage
    if execution == "compiled":
        call = torch.compile(stage, mode="max-autotune-no-cudagraphs", dynamic=False)
    return Replayed(call) if device.type == "cuda" else call


class Replayed:
    """A call captured in a CUDA graph at each set of shapes that it meets; threads take turns."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._captures: dict[tuple[torch.Size, ...], _Capture] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        with self._lock:
            if shapes not in self._captures:
                self._captures[shapes] = _Capture(self._call, inputs)
            return self._captures[shapes].replay(inputs)


@contextmanager
def _convolutions_tried_out() -> Iterator[None]:
    """Within it cuDNN times its algorithms where it first meets a shape, which a graph repeats often enough to pay."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Capture:
    """One graph, with the inputs that it reads and the outputs that it writes every time."""

    def __init__(self, call: Call, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with _convolutions_tried_out():
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    call(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                outputs = call(*self._inputs)
        self._outputs = outputs if isinstance(outputs, tuple) else (outputs,)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, copied out before the next replay writes over them."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
