"""What takes the place of bytes of a bundle's files: low-rank updates, and smaller codes. Needs no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tintype.backends.codes import LARGEST_CODE
from tintype.backends.onnx_weights import ExternalTensor, external_tensors
from tintype.bundle import DTYPES, Bundle
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.diffusers import INDEX
from tintype.checkpoints.files import Stored, Target, Weights, stored_whole
from tintype.checkpoints.lora_files import Lora, Updatable, Updates, fitted, layer_of
from tintype.errors import CheckpointError, RequestError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_PRECISIONS = (*DTYPES, "int8")
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I8": np.int8}


class UpdatedWeights:
    """What stands in place of stretches of a bundle's files, in memory, as long as this object lives."""

    def __init__(
        self, bundle: Bundle, loras: Iterable[Lora] = (), *, largest_code: int = LARGEST_CODE
    ) -> None:
        """Add the files' updates up, and round int8 layers that multiply codes by codes anew, to `largest_code`.

        CheckpointError for a file that does not fit, RequestError for codes that take no updates: e4m3 and int4, whose
        rounding asks for the model's own inputs."""
        loras = tuple(loras)
        if loras and bundle.precision not in _PRECISIONS:
            raise RequestError(
                f"lora: a bundle in {bundle.precision} takes no updates, those in {', '.join(_PRECISIONS)} do; merge "
                f"them before they are rounded: tintype export --lora FILE --precision {bundle.precision}"
            )
        changed: dict[str, dict[int, Bytes]] = defaultdict(dict)
        for stored, new in _changes(bundle, loras, largest_code):
            changed[stored.path.relative_to(bundle.folder).as_posix()][stored.begin] = new
        self.stretches = {
            location: (begins := sorted(found), [found[begin] for begin in begins])
            for location, found in changed.items()
        }
        """file -> where its changed stretches begin, in their order, and what stands for each"""

    def find(self, location: str, offset: int, length: int | None) -> Bytes | None:
        """What stands for these bytes of a file, where anything does."""
        begins, changed = self.stretches.get(location, ([], []))
        number = bisect_right(begins, offset) - 1
        if number < 0:
            return None
        inside, new = offset - begins[number], changed[number]
        return None if inside >= len(new) else new[inside:][:length]

    def in_graph(self, graph: bytes) -> Iterator[tuple[ExternalTensor, Bytes]]:
        """The initialisers of a graph that were updated, and what stands for their bytes."""
        for tensor in external_tensors(graph):
            new = self.find(tensor.location, tensor.offset, tensor.length)
            if new is not None:
                yield tensor, new


def _changes(
    bundle: Bundle, loras: tuple[Lora, ...], largest_code: int
) -> Iterator[tuple[Stored, Bytes]]:
    """Every stored tensor that changes, and its new bytes."""
    stored = stored_components(bundle)
    shapes = {name: dict(_layer_shapes(tensors)) for name, tensors in stored.items()}
    model = Updatable(bundle.folder, bundle.family, tuple(stored), lambda name: shapes[name])
    pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
    for lora in loras:
        for piece in _pieces(fitted(model, lora)):
            pieces[piece.component, layer_of(piece.target)].append(piece)
    if largest_code < LARGEST_CODE:
        for component, tensors in stored.items():
            for layer in _multiplying_codes(tensors):
                pieces.setdefault((component, layer), [])
                yield from _fewer_outputs(layer, tensors, largest_code)
    for (component, layer), found in pieces.items():
        update = sum(map(_update, found), start=np.zeros((), np.float32))
        yield from _updated(layer, stored[component], update, largest_code)


def _multiplying_codes(tensors: Mapping[str, Stored]) -> Iterator[str]:
    """The layers in int8 whose inputs are rounded, too."""
    for name in tensors:
        layer = name.removesuffix(".input_scale")
        if layer != name and tensors[f"{layer}.weight"].dtype == "I8":
            yield layer


def _fewer_outputs(
    layer: str, tensors: Mapping[str, Stored], largest_code: int
) -> Iterator[tuple[Stored, Bytes]]:
    """Of two outputs that are multiplied as codes, one is rounded to no more than the largest: the keys."""
    scale = tensors.get(f"{layer}.output_scale")
    if scale is not None and layer.endswith(".to_k"):
        wider = _floats(scale) * (LARGEST_CODE / largest_code)
        yield scale, _narrowed(wider, scale.dtype)


def stored_components(bundle: Bundle) -> dict[str, dict[str, Stored]]:
    """component -> name -> tensor, of all the bundle's weights."""
    if (bundle.folder / INDEX).is_file():  # a checkpoint, whose files the graphs point into
        parts = open_checkpoint(bundle.folder).components.items()
        return {name: dict(stored_whole(part.weights)) for name, part in parts}
    files: dict[str, list[Path]] = defaultdict(list)
    for relative in map(PurePosixPath, bundle.files):
        if relative.suffix == ".safetensors":  # weights/NAME.safetensors, or a shard of it
            files[relative.stem.split("-")[0]].append(bundle.path(str(relative)))
    return {name: dict(stored_whole(Weights(tuple(paths)))) for name, paths in files.items()}


def _layer_shapes(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The linear layers and convolutions among the tensors."""
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) > 1:
            yield name.removesuffix(".weight"), tensor.shape


class _Piece(NamedTuple):
    """What one file adds to one layer; ``parts`` are down, up and perhaps alpha."""

    updates: Updates
    component: str
    target: Target
    parts: Mapping[str, Stored]


def _pieces(updates: Updates) -> Iterator[_Piece]:
    """What a file adds."""
    file = dict(stored_whole(Weights((updates.lora.path,))))
    for component, layers in updates.layers.items():
        for target, keys in layers.items():
            parts = {part: file[key] for part, key in keys.items()}
            yield _Piece(updates, component, target, parts)


def _update(piece: _Piece) -> Floats:
    """strength * up @ down, float32 [out, in * kernel height * width]."""
    values = {part: _floats(stored) for part, stored in piece.parts.items()}
    down, up = values["down"], values["up"]
    alpha = float(values["alpha"].item()) if "alpha" in values else None
    rows = up.reshape(len(up), -1)[piece.target.rows(len(up))]
    scale = piece.updates.strength(piece.component, piece.target, len(down), alpha)
    strength = np.float32(scale)
    update: Floats = strength * (rows @ down.reshape(len(down), -1))
    return update


def _updated(
    layer: str, tensors: Mapping[str, Stored], update: Floats, largest_code: int
) -> Iterator[tuple[Stored, Bytes]]:
    """The layer's tensors that change with an update [out, in * kernel], or [] of nothing."""
    weight = tensors[f"{layer}.weight"]
    whole = _floats(weight).reshape(weight.shape[0], -1)
    if weight.dtype != "I8":
        yield weight, _narrowed(whole + update, weight.dtype)
        return
    if f"{layer}.input_scale" not in tensors:
        largest_code = LARGEST_CODE  # nothing is added up in codes
    scale = tensors[f"{layer}.weight_scale"]
    if (smoothing := tensors.get(f"{layer}.smoothing")) is not None:
        update = update / _floats(smoothing)  # as the weight was
    whole = whole * _floats(scale)[:, None] + update
    scales = np.abs(whole).max(1) / largest_code
    scales[scales == 0] = 1
    new_scale = _narrowed(scales, scale.dtype)
    # Codes are of the scale as it is stored.
    codes = np.rint(whole / _widened(new_scale, scale.dtype)[:, None])
    yield scale, new_scale
    yield weight, codes.clip(-largest_code, largest_code).astype(np.int8).view(np.uint8).ravel()


def _floats(stored: Stored) -> Floats:
    """A stored tensor widened to float32, or its codes as such."""
    mapped = np.memmap(stored.path, np.uint8, "r", stored.begin, (stored.size,))
    return _widened(mapped, stored.dtype).reshape(stored.shape)


def _widened(stored: Bytes, dtype: str) -> Floats:
    """Stored values as float32; CheckpointError for a type that there are no updates in."""
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in _STORED:
        raise CheckpointError(
            f"updates are read and added in BF16, {', '.join(_STORED)}, not in {dtype}"
        )
    wide: Floats = stored.view(_STORED[dtype]).astype(np.float32)
    return wide


def _narrowed(values: Floats, dtype: str) -> Bytes:
    """float32 values as they are stored, rounded to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8).ravel()
    return np.ascontiguousarray(values, _STORED[dtype]).view(np.uint8).ravel()
