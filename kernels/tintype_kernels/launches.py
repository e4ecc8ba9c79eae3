"""What an op launches at given shapes, in machine code for any runtime to load: compiled with no GPU.

Whatever is no pointer is a constant in the code, so that a kernel takes tensors alone: those that it reads, then those
that it writes.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tintype_kernels.torch_op import TorchOp
from tintype_kernels.triton_support import entry

# Whose Triton forms launch kernels on whole tensors, and do no more.
OPS = (
    "group_norm_silu",
    "layer_norm_modulate",
    "residual_layer_norm",
    "gate_residual",
    "qk_norm_rope",
    "geglu",
)
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_ALIGNMENT = 16  # bytes, of what a runtime allocates at least
_PTX = 87  # the oldest version that has every architecture here; drivers load what is not newer than they are


class Kernel(NamedTuple):
    """One launch. ``entry`` is its function's name in ``ptx``; ``reads`` and ``writes`` number the `Launched.tensors`
    that its pointers are to, in that order."""

    name: str
    entry: str
    ptx: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def identity(self) -> str:
        """A name that no other code or launch has."""
        told = f"{self.ptx} {self.grid} {self.threads} {self.shared_bytes}"
        return f"{self.name}_{hashlib.sha256(told.encode()).hexdigest()[:16]}"


class Launched(NamedTuple):
    """What an op makes of tensors. ``tensors``, all contiguous, begin with its own; ``outputs`` number some of them."""

    kernels: tuple[Kernel, ...]
    tensors: tuple[Tensor, ...]
    outputs: tuple[int, ...]


class _Launch(NamedTuple):
    kernel: Any
    values: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]


class _NothingMoved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators that give other numbers, or the same at another place, which no kernel would repeat."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty")):
            raise ValueError(f"{func.name()} runs beside the kernels")
        return func(*args, **(kwargs or {}))


def launched(op: TorchOp, arguments: Sequence[Any], arch: int) -> Launched:
    """The op's Triton form for contiguous tensors of the shapes and types of `arguments`, compiled for sm_`arch`.

    ValueError where the form does more than launch kernels on whole tensors.
    """
    given = [_hollow(each) if isinstance(each, Tensor) else each for each in arguments]
    made, launches = _recorded(op.implementations["triton"], given)
    numbers = _Numbers()
    for tensor in given:
        if isinstance(tensor, Tensor):
            numbers.of(tensor)
    kernels = tuple(_compiled(op.name, launch, numbers, arch) for launch in launches)
    tensors = tuple(numbers.tensors)
    outputs = tuple(map(numbers.of, tree_leaves(made)))
    if max(outputs) >= len(tensors):
        raise ValueError(f"{op.name} gives what no kernel of it writes")
    return Launched(kernels, tensors, outputs)


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


def _recorded(form: Callable[..., Any], arguments: list[Any]) -> tuple[Any, list[_Launch]]:
    """What the form gives, and what it launched, of which nothing ran."""
    launches: list[_Launch] = []

    def record(kernel: Any, *values: Any, grid: tuple[int, ...], **named: Any) -> None:
        del named["warmup"]
        own = {name: named.pop(name) for name in kernel.arg_names if name in named}
        given = dict(zip(kernel.arg_names, values, strict=False)) | own
        launches.append(_Launch(kernel, given, grid, named))

    # Where kernels are interpreted nothing is launched, and there is no such class.
    recorded = mock.patch.object(entry, "run", record) if isinstance(entry, type) else nullcontext()
    with recorded, _NothingMoved():  # type: ignore[no-untyped-call]
        return form(*arguments), launches


class _Numbers:
    """Tensors by where they lie, in the order in which they are met."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._of: dict[int, int] = {}

    def of(self, tensor: Tensor) -> int:
        """The number of what lies there, the next one where nothing did. Pointers are to beginnings."""
        place: int = tensor.untyped_storage()._cdata
        new = place not in self._of
        if tensor.storage_offset() or (new and not tensor.is_contiguous()):
            raise ValueError(f"a kernel is given a part of a tensor, {list(tensor.shape)}")
        if new:
            self._of[place] = len(self.tensors)
            self.tensors.append(tensor)
        return self._of[place]


def _compiled(op: str, launch: _Launch, numbers: _Numbers, arch: int) -> Kernel:
    """The launch's kernel. It writes what nobody has met before."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    pointers = {name: each for name, each in launch.values.items() if isinstance(each, Tensor)}
    constants = {name: each for name, each in launch.values.items() if name not in pointers}
    names = launch.kernel.arg_names
    signature = {
        name: _TYPES[pointers[name].dtype] if name in pointers else "constexpr" for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", _ALIGNMENT]] for name in pointers}
    source = compiler.ASTSource(launch.kernel, signature, constants, aligned)
    options = {**launch.options, "ptx_version": _PTX}
    knobs = importlib.import_module("triton.knobs").compilation
    with knobs.scope():
        knobs.disable_line_info = True  # which names this machine's folders
        binary = compiler.compile(source, target=target, options=options)
    met = len(numbers.tensors)
    places = [numbers.of(each) for each in pointers.values()]
    reads = tuple(dict.fromkeys(place for place in places if place < met))
    writes = tuple(dict.fromkeys(place for place in places if place >= met))
    function = binary.metadata.name
    x, y, z, *_ = (*launch.grid, 1, 1)
    return Kernel(
        f"{op}_{function.strip('_')}",
        function,
        with_parameters(binary.asm["ptx"], places, [*reads, *writes]),
        (x, y, z),
        32 * binary.metadata.num_warps,
        binary.metadata.shared,
        reads,
        writes,
    )


def with_parameters(ptx: str, places: Sequence[int], order: Sequence[int]) -> str:
    """The code of a kernel whose parameters are pointers to `places`, with one to each place, in an order, and no more.

    Triton's own runtime passes two more, to memory that kernels may ask for. ValueError where this one uses it.
    """
    entry = re.search(r"(\.entry\s+\S+?\s*\()([^)]*)(\))", ptx)
    assert entry is not None
    declared = [line.strip() for line in entry[2].split(",")]
    body = ptx[entry.end() :]
    first: dict[int, str] = {}
    for number, line in enumerate(declared):
        name = line.split()[-1]
        used = re.compile(rf"\b{re.escape(name)}\b")
        if number < len(places):
            known = first.setdefault(places[number], line)
            body = used.sub(known.split()[-1], body)
        elif used.search(body):
            raise ValueError("the kernel asks for memory that only Triton's runtime gives")
    kept = ",\n\t".join(first[place] for place in order)
    return f"{ptx[: entry.start()]}{entry[1]}\n\t{kept}\n{entry[3]}{body}"
