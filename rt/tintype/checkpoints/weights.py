"""Loads weights into a module: memory-mapped, strict, cast on the way to the device."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
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
    safetensors_shapes,
)
from tintype.errors import CheckpointError

_NAMED_KEYS = 3  # how many wrong keys an error spells out


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
    shapes = [_shapes(path, weights.allow_pickle) for path in weights.files]
    pieces = {
        target.name: _Piece(number, key, target, target.shape(stored))
        for number, file in enumerate(shapes)
        for key, stored in file.items()
        for target in weights.translate(key)
    }
    _check_complete(name, expected, pieces, weights.files)
    state: dict[str, Tensor] = {}
    for number, path in enumerate(weights.files):
        wanted = [piece for piece in pieces.values() if piece.file == number]
        state.update(_read(path, wanted, dtype, device))
    module.load_state_dict(state, assign=True)
    return module.eval()


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, read without running code."""
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as plain weights: {str(error).splitlines()[0]}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a state dict")
    steps = {k: torch.tensor(v) for k, v in content.items() if k == "global_step"}
    return {k: v for k, v in (state | steps).items() if isinstance(v, Tensor)}


def _shapes(path: Path, allow_pickle: bool) -> dict[str, tuple[int, ...]]:
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
        return {p.target.name: _cut(stored[p.key], p.target, dtype, device) for p in pieces}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {
                p.target.name: _cut(file.get_tensor(p.key), p.target, dtype, device) for p in pieces
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error


def _cut(stored: Tensor, target: Target, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if not stored.is_floating_point():
        raise CheckpointError(
            f"{target.name} is stored as {stored.dtype}; expected floating-point weights"
        )
    piece = stored.chunk(target.parts)[target.part] if target.parts > 1 else stored
    if target.squeezed and piece.ndim > 2:
        piece = piece.flatten(1)
    if target.transposed:
        piece = piece.t()
    return piece.to(device=device, dtype=dtype).contiguous()


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
