"""Where a component's tensors lie on disk and what they are called there. Imports no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tintype.errors import CheckpointError

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
_MOST_HEADER_BYTES = 100_000_000  # what the format itself allows
_SCALE = "scale_weight"  # beside "weight", in files of scaled float8
_LAYOUT = 8  # the header's length, a little-endian u64, comes first
_POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in a file's place


class Target(NamedTuple):
    """One of our parameters, as a piece of a stored tensor."""

    name: str
    part: int = 0  # the part-th of `parts` equal cuts along the first axis
    parts: int = 1
    span: int = 1  # how many of those cuts it takes
    transposed: bool = False
    swapped: bool = False  # its two halves stand the other way round
    squeezed: bool = False  # a 1x1 convolution is stored where we hold a linear layer

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the piece has for a stored tensor of shape `stored`."""
        cuts = self.parts > 1 and stored and stored[0] % self.parts == 0
        shape = (self.span * stored[0] // self.parts, *stored[1:]) if cuts else stored
        if self.squeezed and set(shape[2:]) <= {1}:
            shape = shape[:2]
        return shape[::-1] if self.transposed else shape

    def rows(self, stored: int) -> list[int]:
        """Which of a stored tensor's rows are the piece's, in its order."""
        cut = stored // self.parts
        rows = list(range(self.part * cut, (self.part + self.span) * cut))
        middle = len(rows) // 2
        return rows[middle:] + rows[:middle] if self.swapped else rows

    @property
    def as_stored(self) -> bool:
        """Whether the stored bytes are the parameter's own, in its order."""
        return self.parts == 1 and not self.transposed and not self.swapped


Translate = Callable[[str], tuple[Target, ...]]
"""A stored key -> the parameters it holds; none where the component has no use for it."""


def same_name(key: str) -> tuple[Target, ...]:
    """The translation of a layout whose names are ours."""
    return (Target(key),)


def within(prefix: str, translate: Translate, key: str) -> tuple[Target, ...]:
    """The translation of a file that has many components, one below each prefix."""
    return translate(key.removeprefix(prefix)) if key.startswith(prefix) else ()


def below(prefix: str, translate: Translate, key: str) -> tuple[Target, ...]:
    """The translation of a module's own file where the module is a part of another's."""
    return tuple(target._replace(name=prefix + target.name) for target in translate(key))


def tokenizers_beside(path: Path, names: Iterable[str]) -> tuple[Path, ...]:
    """The folders of these names beside a single file."""
    folders = tuple(path.parent / name for name in names)
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(
                f"{path} is a single file, which holds no tokenizer, and {folder} is missing; put "
                f"the model's {folder.name} folder there, or load the model by its hub id"
            )
    return folders


@dataclass(frozen=True)
class Weights:
    """The files that hold one component's tensors, and the names that those have there, in some ``apart`` others."""

    files: tuple[Path, ...]
    translate: Translate = same_name
    allow_pickle: bool = False
    apart: Mapping[Path, Translate] = field(default_factory=dict)

    def targets(self, path: Path, key: str) -> tuple[Target, ...]:
        """The parameters that a key of one of the files holds."""
        return self.apart.get(path, self.translate)(key)

    def entries(self) -> Iterator[Mapping[str, Any]]:
        """What the headers of safetensors files say of the tensors that are this component's: dtype, shape, place."""
        for path in self.files:
            header, _ = read_header(path)
            yield from (
                entry
                for key, entry in header.items()
                if key != "__metadata__" and not is_scale(key) and self.targets(path, key)
            )


class Stored(NamedTuple):
    """A tensor of a safetensors file: its type as the header has it, and the bytes ``begin`` to ``begin + size``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


def stored_whole(weights: Weights) -> Iterator[tuple[str, Stored]]:
    """The parameters that lie whole and untransposed in a component's safetensors files, by our names."""
    for path in weights.files:
        header, data_bytes = read_header(path)
        start = path.stat().st_size - data_bytes
        for key, entry in header.items():
            targets = () if key == "__metadata__" else weights.targets(path, key)
            if len(targets) == 1 and targets[0].as_stored:
                begin, end = entry["data_offsets"]
                shape = targets[0].shape(tuple(entry["shape"]))
                place = (start + begin, end - begin)
                yield targets[0].name, Stored(path, entry["dtype"], shape, *place)


def scale_of(key: str) -> str:
    """Where the factor lies that a weight in 8 bits was divided by, if it was."""
    return f"{key.removesuffix('weight')}{_SCALE}"


def is_scale(key: str) -> bool:
    """Whether a key holds no parameter but what belongs to weights in 8 bits."""
    return key.endswith((f".{_SCALE}", ".scale_input")) or key.rpartition(".")[2] == "scaled_fp8"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a missing or malformed one is a CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def check_pickle(path: Path, allow_pickle: bool) -> None:
    """Refuse a pickle, which can run code when it is read, unless the caller asked for it."""
    if path.suffix in PICKLES and not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read; use a .safetensors file, "
            "or pass allow_pickle=True if you trust where it comes from"
        )


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a safetensors file; a truncated file is an error."""
    header, data_bytes = read_header(path)
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        needed = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (KeyError, TypeError, IndexError) as error:
        raise _unreadable(path, "its header is malformed") from error
    if needed != data_bytes:
        raise _unreadable(path, f"it holds {data_bytes} bytes of tensors, its header says {needed}")
    return shapes


def read_header(path: Path) -> tuple[Mapping[str, Any], int]:
    """The header of a safetensors file, `__metadata__` included, and the number of bytes that follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LAYOUT)
            if start == _POINTER[:_LAYOUT]:
                raise _unreadable(
                    path, "it is git-lfs's pointer to one, which git lfs pull fetches"
                )
            length = struct.unpack("<Q", start)[0] if len(start) == _LAYOUT else size
            if length > min(size - _LAYOUT, _MOST_HEADER_BYTES):
                raise _unreadable(path, "its header is cut off")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; check its name, or download it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(header, dict):
        raise _unreadable(path, "its header is malformed")
    return header, size - _LAYOUT - length


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated or not a safetensors file: {why}; download it again"
    )
