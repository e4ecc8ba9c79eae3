"""How torch runs a stage: eagerly, compiled, or replayed from a CUDA graph, whose launches cost the host nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from tintype.errors import RequestError
from tintype.models.stages import Stage
from tintype_kernels.choice import measuring

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
    """What runs the stage; static shapes each have their own code and, on CUDA, their own graphs."""
    if execution == "eager":
        return stage
    if execution == "graph":
        return Replayed(stage)
    call: Call = torch.compile(stage, mode="max-autotune-no-cudagraphs", dynamic=False)
    return Replayed(call) if device.type == "cuda" else call


class Replayed:
    """A call captured in a CUDA graph at each set of shapes that it meets; threads take turns.

    Of a stage that remembers, what it remembers has a graph of its own, replayed where a picture tells other things.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._captures: dict[tuple[torch.Size, ...], _Capture | _Remembering] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        with self._lock:
            if shapes not in self._captures:
                self._captures[shapes] = self._captured(inputs)
            return self._captures[shapes].replay(inputs)

    def _captured(self, inputs: Sequence[Tensor]) -> _Capture | _Remembering:
        if isinstance(self._call, Stage) and self._call.remembers:
            return _Remembering(self._call, inputs)
        return _Capture(self._call, inputs)


@contextmanager
def _tried_out() -> Iterator[None]:
    """Within it cuDNN times its algorithms, and ops their forms, where they first meet a shape: a graph repeats it
    often enough to pay."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with measuring():
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
        with _tried_out():
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    call(*self._inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                outputs = call(*self._inputs)
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)

    def run(self, inputs: Sequence[Tensor]) -> None:
        """Write the outputs anew."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, copied out before the next replay writes over them."""
        self.run(inputs)
        return tuple(output.clone() for output in self.outputs)


class _Remembering:
    """A stage in two graphs: what it remembers lies where the graph of each step reads it."""

    def __init__(self, stage: Stage, inputs: Sequence[Tensor]) -> None:
        self._changing = stage.changing
        changing, told = inputs[: self._changing], inputs[self._changing :]
        self._told: list[tuple[Tensor, int]] = []
        self._remember = _Capture(stage.remember, told)
        self._tell(told)
        self._recall = _Capture(partial(stage.recall, self._remember.outputs), changing)

    def replay(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self._tell(inputs[self._changing :])
        return self._recall.replay(inputs[: self._changing])

    def _tell(self, told: Sequence[Tensor]) -> None:
        if not self._is_known(told):
            self._remember.run(told)
            self._told = [(tensor, tensor._version) for tensor in told if not tensor.is_inference()]

    def _is_known(self, told: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were told last, unchanged; inference tensors do not say."""
        return len(told) == len(self._told) and all(
            given is known and given._version == version
            for given, (known, version) in zip(told, self._told, strict=True)
        )
