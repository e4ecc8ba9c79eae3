"""Loads weights into a module: memory-mapped, strict, cast on the way to the device."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tintype.checkpoints.files import (
    PICKLES,
    Target,
    Weights,
    check_pickle,
    is_scale,
    safetensors_shapes,
    scale_of,
)
from tintype.errors import CheckpointError

# What reading a file meets that is no pickle of weights alone.
_NO_WEIGHTS = (OSError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError)
_NAMED_KEYS = 3  # how many wrong keys an error spells out
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64", "I32", "U8", "BOOL"}  # tables of positions and the like


class _Piece(NamedTuple):
    """Where one parameter's values are: tensor `key` of file number `file`."""

    file: int
    key: str
    target: Target
    shape: tuple[int, ...]


def load_module(
    name: str,
    build: Callable[[], nn.Module],
    weights: Weights,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    """Build component `name` and fill it. Parameters of the stored type on CPU stay file-backed."""
    with torch.device("meta"):  # no memory and no random numbers for values about to be replaced
        module = build()
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    shapes = [stored_shapes(path, weights.allow_pickle) for path in weights.files]
    pieces = {
        target.name: _Piece(number, key, target, target.shape(stored))
        for number, file in enumerate(shapes)
        for key, stored in file.items()
        if not is_scale(key)
        for target in weights.targets(weights.files[number], key)
    }
    _check_complete(name, expected, pieces, weights.files)
    state: dict[str, Tensor] = {}
    for number, path in enumerate(weights.files):
        wanted = [piece for piece in pieces.values() if piece.file == number]
        state.update(_read(path, wanted, dtype, device))
    module.load_state_dict(state, assign=True)
    return module.eval()


def parameters(weights: Weights, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Our parameters that lie in one of the safetensors files, each read as it is asked for, in its stored type."""
    with safe_open(path, framework="pt", device="cpu") as file:
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            if is_scale(key):
                continue
            for target in weights.targets(path, key):
                stored = _stored(file, key)
                yield target.name, cut(stored, target, stored.dtype, "cpu")


def stored_type(weights: Weights) -> torch.dtype:
    """What holds all that a component's files do: a 16-bit type where nothing is in another, else float32."""
    if any(path.suffix in PICKLES for path in weights.files):
        return torch.float32
    floating = {entry["dtype"] for entry in weights.entries()} - _INTEGERS
    return _HALVES.get(floating.pop(), torch.float32) if len(floating) == 1 else torch.float32


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, read without running code."""
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except _NO_WEIGHTS as error:
        # torch's own message is of many lines, and tells how to run the code.
        raise CheckpointError(
            f"{path} cannot be read as plain weights ({type(error).__name__}): it is damaged, or holds more than "
            "weights; use a .safetensors file"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a state dict")
    step = content.get("global_step")
    steps = {"global_step": torch.tensor(step)} if isinstance(step, int | float) else {}
    return {
        k: v for k, v in (state | steps).items() if isinstance(k, str) and isinstance(v, Tensor)
    }


def stored_shapes(path: Path, allow_pickle: bool) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a file; CheckpointError for a pickle that was not asked for."""
    check_pickle(path, allow_pickle)
    if path.suffix in PICKLES:
        return {key: tuple(value.shape) for key, value in read_pickle(path).items()}
    return safetensors_shapes(path)


def _read(
    path: Path, pieces: Iterable[_Piece], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The pieces that lie in one file, each cast and moved before the next is touched."""
    if path.suffix in PICKLES:
        stored = read_pickle(path)
        return {p.target.name: cut(stored[p.key], p.target, dtype, device) for p in pieces}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {
                p.target.name: cut(_stored(file, p.key), p.target, dtype, device) for p in pieces
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error


def _stored(file: Any, key: str) -> Tensor:
    """A tensor of an open safetensors file; one in 8 bits may have a scale beside it."""
    stored: Tensor = file.get_tensor(key)
    scale = scale_of(key)
    if stored.element_size() > 1 or scale not in file.keys():  # noqa: SIM118 - it is no mapping
        return stored
    factor: Tensor = file.get_tensor(scale)
    return stored.float() * factor


def cut(stored: Tensor, target: Target, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The piece of a stored tensor that is one of our parameters; CheckpointError where it holds no floating point."""
    if not stored.is_floating_point():
        raise CheckpointError(
            f"{target.name} is stored as {stored.dtype}; expected floating-point weights"
        )
    cuts = stored.chunk(target.parts) if target.parts > 1 else (stored,)
    piece = cuts[0] if len(cuts) == 1 else _joined(cuts[target.part : target.part + target.span])
    if target.swapped:
        piece = torch.cat(piece.chunk(2)[::-1])
    if target.squeezed and piece.ndim > 2:
        piece = piece.flatten(1)
    if target.transposed:
        piece = piece.t()
    return piece.to(device=device, dtype=dtype).contiguous()


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _check_complete(
    name: str,
    expected: Mapping[str, tuple[int, ...]],
    pieces: Mapping[str, _Piece],
    files: Iterable[Path],
) -> None:
    missing = [key for key in expected if key not in pieces]
    unexpected = [piece.key for key, piece in pieces.items() if key not in expected]
    misshapen = [
        f"{key} (expected {list(expected[key])}, got {list(piece.shape)})"
        for key, piece in pieces.items()
        if key in expected and piece.shape != expected[key]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    wrong = [_first_few(kind, keys) for kind, keys in kinds.items() if keys]
    if wrong:
        raise CheckpointError(
            f"{name}: the weights in {', '.join(str(path) for path in files)} do not fit its "
            f"configuration: {'; '.join(wrong)}"
        )


def _first_few(kind: str, keys: list[Any]) -> str:
    rest = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:_NAMED_KEYS])}{rest}"
