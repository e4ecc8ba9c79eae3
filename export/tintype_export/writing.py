"""A folder written whole or not at all: made beside its target, brought to the disk, and renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.bundle import MANIFEST, read_manifest
from tintype.errors import BundleError, RequestError
from tintype.profiles import Profile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK = 1 << 20
_SHARD = 2 << 30


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``target`` when the block ends well; else nothing is left of it.

    A killed process leaves a hidden folder, which the next one sweeps.
    """
    target = target.absolute()  # which has a name and a parent, whatever was typed
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    work = _hidden(target)
    try:
        work.mkdir()
        yield work
        _sync(work)
        _take_place(work, target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise BundleError(
            f"the disk of {target.parent} is full; free some space and export again; nothing was written"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_replaceable(target: Path) -> None:
    """Refuse a target that is somebody's other folder, which would be deleted."""
    if target.parent == target.absolute():
        raise RequestError(f"{target} is the root of a disk; name another folder with -o")
    if target.is_dir() and (strange := _not_of_a_bundle(target)):
        raise RequestError(
            f"{target} holds {strange[0]}, which is not of a bundle; name another folder with -o"
        )
    if target.exists() and not target.is_dir():
        raise RequestError(f"{target} is a file; name a folder with -o")


def replaced(target: Path) -> str:
    """What a bundle that ``target`` already is was made for, in a line; "" where there is none."""
    try:
        manifest = read_manifest(target)
    except BundleError:
        return ""
    graphs = [manifest, *manifest.get("engines", {}).values()]
    names = {name for each in graphs for profiles in each["stages"].values() for name in profiles}
    profiles = sorted(filter(None, map(Profile.parse, names)))
    sizes = ", ".join(dict.fromkeys(profile.size for profile in profiles))
    return (
        f"{target} holds a bundle in {manifest['precision']}{sizes and ' of '}{sizes}; the new one takes its place "
        "when it is whole"
    )


def _not_of_a_bundle(folder: Path) -> list[str]:
    """The files in a folder that the bundle there, if there is one, does not list."""
    try:
        own = {MANIFEST, *read_manifest(folder)["files"]}
    except BundleError:
        own = set()
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(set(found) - own)


def sweep(target: Path) -> None:
    """Remove what killed exports of ``target`` left, and put back a bundle that one had just moved aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.tintype(\.old)?")
    for path in sorted(target.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found is None or (_alive(int(found[1])) and int(found[1]) != os.getpid()):
            continue
        if found[2] and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def require_room(target: Path, needed: int) -> int:
    """The free bytes where ``target`` will be; BundleError where fewer than ``needed``."""
    whole = target.absolute()
    folder = next((folder for folder in whole.parents if folder.is_dir()), whole)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"the export needs about {gigabytes(needed)} of disk and {folder} has {gigabytes(free)} free; "
            "free some space, or write to another disk with -o"
        )
    return free


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def copy_described(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file and say what a manifest says of it, having read it once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that whoever runs a bundle can read; the library makes it its owner's alone."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    path.chmod(0o644)


def save_shards(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> tuple[Path, ...]:
    """Write tensors in ``dtype`` as `shard_paths` of ``path``, so that no more than a shard of them is in memory."""
    shards = list(_shards(tensors, dtype.itemsize))
    paths = shard_paths(path, len(shards))
    for names, target in zip(shards, paths, strict=True):
        save_tensors({name: tensors[name].to(dtype) for name in names}, target)
    return paths


def _shards(tensors: Mapping[str, Tensor], itemsize: int) -> Iterator[list[str]]:
    """The names in their order, in runs of at most `_SHARD` bytes where one tensor is not more."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        own = itemsize * tensor.numel()
        if names and size + own > _SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def shard_paths(path: Path, count: int) -> tuple[Path, ...]:
    """``path`` with .safetensors added, or so many files that are numbered where there are several."""
    parts = [f"-{number:05}-of-{count:05}" for number in range(1, count + 1)] if count > 1 else [""]
    return tuple(path.with_name(f"{path.name}{part}.safetensors") for part in parts)


def _take_place(work: Path, target: Path) -> None:
    """A full folder cannot be renamed onto, so an older bundle steps aside first."""
    old = _hidden(target, ".old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    _sync_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _hidden(target: Path, suffix: str = "") -> Path:
    """A folder beside the target that nobody else would name so."""
    return target.with_name(f".{target.name}.{os.getpid()}.tintype{suffix}")


def _sync(folder: Path) -> None:
    """Bring every file and folder to the disk, so that the rename cannot get there before them."""
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
