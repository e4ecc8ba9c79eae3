"""How torch runs a stage: eagerly, compiled, or replayed from a CUDA graph, whose launches cost the host nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from tintype.errors import RequestError
from tintype.models.stage import Remembering, Stage
from tintype_kernels.choice import measuring

EXECUTIONS = ("eager", "compiled", "graph")
# How many times a graph has room for: what one tells is 2 MB of FLUX in 16 bits, and less of others.
_ROOMS = (64, 256)
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
    Such a stage may be told all ``times`` [s] of a picture, one of which its rows stand at: then what they tell is
    worked out with it, and each step finds its own.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._captures: dict[tuple[torch.Size, ...], _Capture] = {}
        self._remembering: dict[tuple[int, tuple[torch.Size, ...]], _Remembered] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor, times: Tensor | None = None) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        with self._lock:
            if isinstance(self._call, Remembering) and self._call.remembers:
                room = 0 if times is None else _room(len(times))
                times = times if room else None
                if (room, shapes) not in self._remembering:
                    self._remembering[room, shapes] = _Remembered(self._call, inputs, times)
                return self._remembering[room, shapes].replay(inputs, times)
            if shapes not in self._captures:
                self._captures[shapes] = _Capture(self._call, inputs)
            return self._captures[shapes].replay(inputs)


def _room(times: int) -> int:
    """For how many times a graph has room that is told so many; 0 where they are too many."""
    return next((room for room in _ROOMS if room >= times), 0)


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


class _Remembered:
    """A stage in two graphs: what it remembers lies where the graph of each step reads it, and beside it what all
    times of the picture tell, where there is room for them."""

    def __init__(self, stage: Remembering, inputs: Sequence[Tensor], times: Tensor | None) -> None:
        self._stage = stage
        changing, told = inputs[: stage.changing], inputs[stage.changing :]
        self._known: list[tuple[Tensor, int]] = []
        self._remember = _Capture(stage.remember, told)
        remembered = self._remember.outputs
        at = partial(stage.at, remembered)
        self._moments = None if times is None else _Moments(at, len(inputs[0]), times)
        self._tell(told, times)

        def recall(*changing: Tensor) -> Tensor | tuple[Tensor, ...]:
            time = stage.time(*changing)
            moments = self._moments
            moment = moments.at(time) if moments else [told[0] for told in at(time[None])]
            return stage.recall(remembered, moment, *changing)

        self._recall = _Capture(recall, changing)

    def replay(self, inputs: Sequence[Tensor], times: Tensor | None) -> tuple[Tensor, ...]:
        changing, told = inputs[: self._stage.changing], inputs[self._stage.changing :]
        self._tell(told, times)
        return self._recall.replay(changing)

    def _tell(self, told: Sequence[Tensor], times: Tensor | None) -> None:
        given = [*told] if times is None else [*told, times]
        if not self._is_known(given):
            self._remember.run(told)
            if self._moments is not None and times is not None:
                self._moments.tell(times)
            self._known = [(each, each._version) for each in given if not each.is_inference()]

    def _is_known(self, told: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were told last, unchanged; inference tensors do not say."""
        return len(told) == len(self._known) and all(
            given is known and given._version == version
            for given, (known, version) in zip(told, self._known, strict=True)
        )


class _Moments:
    """What each time of a picture tells each layer that reads times, in a row of a table in which a graph finds it."""

    def __init__(
        self, at: Callable[[Tensor], tuple[Tensor, ...]], samples: int, times: Tensor
    ) -> None:
        """With room for as many times as these, and more."""
        self._at, self._samples = at, samples
        room = _room(len(times))
        self._times = times.new_full((room,), torch.inf)
        layers = [told[0] for told in self._told(times[:1])]
        self._shapes = [told.shape for told in layers]
        self._table = layers[0].new_zeros(room, sum(told.numel() for told in layers))

    def tell(self, times: Tensor) -> None:
        """Work out what these times [s] tell."""
        self._times.fill_(torch.inf)[: len(times)] = times
        rows = [told.flatten(1) for told in self._told(times)]
        self._table[: len(times)] = torch.cat(rows, dim=1)

    def at(self, time: Tensor) -> list[Tensor]:
        """What the nearest time tells each layer, [n, c]; all samples [n] stand at one of the times."""
        found = (self._times - time[0]).abs().argmin(0, keepdim=True)
        row = self._table.index_select(0, found)[0]
        parts = torch.split(row, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _told(self, times: Tensor) -> tuple[Tensor, ...]:
        return self._at(times[:, None].expand(-1, self._samples))
