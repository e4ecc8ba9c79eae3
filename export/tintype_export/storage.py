"""Where a bundle's weights lie: in copies of the checkpoint's files, or rounded to 16 bits, once, under `weights/`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tintype.backends.torch import made_safe
from tintype.bundle import MANIFEST, describe
from tintype.checkpoints import Checkpoint
from tintype.checkpoints.controlnet import PART as CONTROLNET
from tintype.checkpoints.files import PICKLES, Weights
from tintype.checkpoints.weights import stored_type
from tintype.errors import RequestError

from .graphs import StoredTensor, stored_tensors
from .quantisation import HIGH, Quantised, write_quantised
from .writing import copy_described, save_shards

_WEIGHT_SUFFIXES = PICKLES | {".safetensors", ".msgpack", ".h5", ".gguf"}
_TERMS = ("README*", "LICENSE*", "NOTICE*")

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Precision:
    """What weights are stored in (None: as they are) and what a graph's products are written in.

    ``quantised``: so is what is not kept in codes, few layers of some components and all of others.
    bfloat16 is stored and not written: opset 20 has no bfloat16 convolution. A runtime that computes in it does so by
    its own setting, and the others widen the weights when they load them.
    """

    stored: torch.dtype | None
    computed: torch.dtype
    quantised: bool = False

    @property
    def in_engines(self) -> torch.dtype:
        """What engines compute in, of which TensorRT's convolve in bfloat16."""
        return self.computed if self.stored is None or self.quantised else self.stored


PRECISIONS = {
    "fp32": Precision(None, torch.float32),
    "fp16": Precision(torch.float16, torch.float16),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "int8": Precision(HIGH, torch.float32, quantised=True),
    "int4": Precision(HIGH, torch.float32, quantised=True),
    "fp8": Precision(HIGH, torch.float32, quantised=True),
}


@dataclass(frozen=True)
class Store:
    """The files that were written, and each component's parameters in them by our names."""

    files: Files
    tensors: dict[str, dict[str, StoredTensor]]


def precision(name: str, target: str = "onnx") -> Precision:
    """The precision of that name; what TensorRT does not do in codes, it does in float16."""
    if name not in PRECISIONS:
        raise RequestError(f"precision={name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    found = PRECISIONS[name]
    if found.quantised and target == "tensorrt":
        return replace(found, computed=torch.float16)
    return found


def store_weights(
    checkpoint: Checkpoint,
    root: Path,
    kept: Precision,
    quantised: Mapping[str, Quantised] = MappingProxyType({}),
) -> Store:
    """Write the checkpoint's weights, those of ``quantised`` in codes, tokenizers and terms into ``root``."""
    if kept.stored is None and _copies(checkpoint):
        return _copied(checkpoint, root)
    texts = [*checkpoint.tokenizer_folders, *_terms(checkpoint.source)]
    files = {name: copy_described(path, root / name) for name, path in _flattened(texts)}
    tensors = {}
    for name in checkpoint.components:
        part = checkpoint.components[name]
        if name in quantised:
            written = write_quantised(
                part.weights, root / f"weights/{name}", quantised[name], kept.computed
            )
        else:
            # In its stored type it stays in its files, whatever its size.
            dtype = stored_type(part.weights)
            module = made_safe(checkpoint.component(name, dtype), part.config, kept.computed)
            written = save_shards(
                module.state_dict(), root / f"weights/{name}", kept.stored or dtype
            )
        files |= {path.relative_to(root).as_posix(): describe(path) for path in written}
        tensors[name] = stored_tensors(root, Weights(written))
    return Store(files, tensors)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """At most how many bytes `store_weights` writes."""
    if not _copies(checkpoint):
        return sum(weight_bytes(part.weights) for part in checkpoint.components.values())
    names = wanted_files(checkpoint)
    return sum((checkpoint.source / name).stat().st_size for name in names)


def weight_bytes(weights: Weights) -> int:
    """How many bytes of a component's files are its own."""
    places = (entry["data_offsets"] for entry in weights.entries())
    return sum(int(end) - int(begin) for begin, end in places)


def wanted_files(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's files relative to it, but for hidden ones, graphs, and weights that it has in other forms."""
    root = checkpoint.source
    used = {path for part in checkpoint.components.values() for path in part.weights.files}
    own_folders = {root, *(root / name for name in checkpoint.components)}

    def wanted(path: Path) -> bool:
        parts = path.relative_to(root).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            return False
        if path.name == MANIFEST or ".onnx" in path.suffixes or path.suffix == ".engine":
            return False
        other_form = path.suffix in _WEIGHT_SUFFIXES and path.parent in own_folders
        return path in used or not other_form

    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if wanted(path))


def _copies(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a folder that says all of it: a ControlNet from elsewhere is in no index, nor is one
    whose weights were merged into the UNet's file."""
    source, unet = checkpoint.source, checkpoint.components.get("unet")
    if unet is None or CONTROLNET not in unet.config:
        return source.is_dir()
    apart = unet.weights.apart
    return source.is_dir() and bool(apart) and all(path.is_relative_to(source) for path in apart)


def _copied(checkpoint: Checkpoint, root: Path) -> Store:
    source = checkpoint.source
    files = {name: copy_described(source / name, root / name) for name in wanted_files(checkpoint)}
    tensors = {}
    for name, part in checkpoint.components.items():
        copies = {path: root / name for name, path in weight_files(checkpoint, name)}
        for path, copy in copies.items():
            if not path.is_relative_to(source):  # merged, and lying elsewhere
                files[copy.relative_to(root).as_posix()] = copy_described(path, copy)
        apart = {copies[path]: translate for path, translate in part.weights.apart.items()}
        weights = Weights(tuple(copies.values()), part.weights.translate, apart=apart)
        tensors[name] = stored_tensors(root, weights)
    return Store(files, tensors)


def weight_files(checkpoint: Checkpoint, component: str) -> Iterator[tuple[str, Path]]:
    """A component's files, each with the name that it has in a bundle."""
    weights = checkpoint.components[component].weights
    for path in weights.files:
        folder = CONTROLNET if path in weights.apart else component
        yield f"{folder}/{path.name}", path


def _terms(source: Path) -> list[Path]:
    """What says whose the weights are and how they may be used travels with them."""
    return sorted(path for pattern in _TERMS for path in source.glob(pattern) if path.is_file())


def _flattened(paths: Iterable[Path]) -> Iterable[tuple[str, Path]]:
    """(name in the bundle, file) of files and of the files in folders."""
    for path in paths:
        if path.is_file():
            yield path.name, path
        else:
            yield from ((f"{path.name}/{each.name}", each) for each in sorted(path.iterdir()))
