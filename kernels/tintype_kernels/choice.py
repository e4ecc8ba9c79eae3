"""Which form of an op is the fastest for a shape on this GPU: measured once, and remembered on disk.

Within `measuring`, as where a CUDA graph is to be captured, the forms that can run are timed when an op first meets a
shape; elsewhere what was measured before is used, and an op's own default for the rest. `TINTYPE_AUTOTUNE=1` measures
anywhere, and 0 nowhere. `TINTYPE_KERNELS` overrides all of it. The batch is no part of a shape, so that a row has the
same bits in any.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintype_kernels.cache import cache_folder, replace_text
from tintype_kernels.layout import memory_format
from tintype_kernels.replay_times import replay_times

VARIABLE = "TINTYPE_AUTOTUNE"
_RUNS = 10
Forms = Mapping[str, Callable[[], Any]]
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of a call


_measuring = ContextVar("measuring", default=False)


@contextmanager
def measuring() -> Iterator[None]:
    """Time forms whose times are not known, within it: for calls that will be repeated often enough to pay."""
    token = _measuring.set(True)
    try:
        yield
    finally:
        _measuring.reset(token)


def measures() -> bool:
    """Whether a form whose time is not known is timed now."""
    asked = os.environ.get(VARIABLE, "")
    return asked != "0" if asked else _measuring.get()


class Choices:
    """A table (op, dtype, shape) -> milliseconds by form in a JSON file, which several processes may share."""

    def __init__(self, path: Path, timer: Timer) -> None:
        self._path, self._timer = path, timer
        self._table = _read(path)

    def fastest(self, key: str, forms: Forms, *, measure: bool) -> str:
        """The name of the form that is known to be the fastest of these, or nothing."""
        times = self._table.get(key, {})
        if not forms.keys() <= times.keys():
            if not measure:
                return ""
            times = {name: self._timer(form) for name, form in forms.items()}
            # What others have measured since is kept.
            table = _read(self._path)
            times = table.get(key, {}) | times
            self._table = table | {key: times}
            replace_text(self._path, json.dumps(self._table, indent=1) + "\n")
        return min(forms, key=lambda name: times[name])


def shape_class(op: str, arguments: tuple[Any, ...]) -> str:
    """The key of a call: its tensors' types, and their sizes without the batch, rounded up to powers of two.

    Pictures that lie channels-last have a key of their own. Whole numbers, such as a stride, count as they are.
    """
    first = next(value for value in arguments if isinstance(value, Tensor))
    parts = [
        _described(value, first) if isinstance(value, Tensor) else str(value)
        for value in arguments
        if isinstance(value, Tensor) or type(value) is int
    ]
    return " ".join([op, *parts])


def on_gpu(op: str, tensor: Tensor, arguments: tuple[Any, ...], forms: Forms) -> str:
    """The fastest form for these arguments on the tensor's GPU, or nothing where that is not known."""
    capturing = torch.cuda.is_current_stream_capturing()
    measure = measures() and not capturing
    return _choices(tensor.device).fastest(shape_class(op, arguments), forms, measure=measure)


@cache
def _choices(device: torch.device) -> Choices:
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).lower()
    about = f"{name}-torch{torch.__version__}-triton{version('triton')}-replayed.json"
    return Choices(cache_folder() / "kernels" / about, _milliseconds)


def _milliseconds(form: Callable[[], Any]) -> float:
    """As a graph replays it: a small op that is called takes Python longer than any GPU. Forever where none can."""
    try:
        for _ in range(2):
            form()
        return statistics.median(replay_times(form, _RUNS)) / 1000
    except RuntimeError:  # memory for a reference in float64, say
        return math.inf


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut short: measured again
        return {}
    return table if isinstance(table, dict) else {}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor, first: Tensor) -> str:
    """A matrix or a convolution's kernels in eight bits, behind what they weigh, have no batch to leave out."""
    weight = tensor.element_size() == 1 and tensor.ndim in {2, 4} and tensor is not first
    sizes = tensor.shape if weight else tensor.shape[1:]
    rounded = "x".join(str(1 << max(size - 1, 0).bit_length()) for size in sizes)
    return f"{_short(tensor.dtype)}[{rounded}]{_lies(tensor)}"


def _lies(tensor: Tensor) -> str:
    pictures = tensor.ndim == 4 and tensor.is_floating_point()
    return "last" if pictures and memory_format(tensor) == torch.channels_last else ""
