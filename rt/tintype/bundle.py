"""The folder an engine ships in: `bundle.json` says what is inside, and every file is checked against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tintype.errors import BundleError
from tintype_kernels.cache import cache_folder, replace_text

MANIFEST = "bundle.json"
FORMAT = 1
FAMILIES = ("latent_unet", "sd3", "flux", "unclip")
_CHUNK = 1 << 20
# The types of a manifest's fields, of which the first are needed, and the settings that a request falls back to.
_NEEDED = {
    "name": str,
    "family": str,
    "precision": str,
    "stages": dict,
    "scheduler": dict,
    "tokenizers": list,
    "defaults": dict,
    "files": dict,
}
_OPTIONAL = {"engines": dict, "provenance": dict}
_SETTINGS = ("width", "height", "guidance_scale")
# A bundle's precision, and what it is called where arrays are meant.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. `stages` maps stage -> profile -> graph; paths are relative to `folder`.

    `engines` maps a GPU such as sm_89 to the `package` and `version` that built for it, and to `stages` of its own.
    """

    folder: Path
    name: str
    family: str
    precision: str
    stages: dict[str, dict[str, str]]
    scheduler: dict[str, Any]
    tokenizers: list[str]
    defaults: dict[str, Any]
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def path(self, relative: str) -> Path:
        """The place of a listed file, which is inside the folder."""
        return _inside(self.folder, relative)


def is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest."""
    return (folder / MANIFEST).is_file()


def open_bundle(folder: str | Path, *, check_hashes: bool = True, remember: bool = True) -> Bundle:
    """Read the manifest and check every file's size, and its hash unless this machine has done so before.

    Without `remember` every file is hashed, whatever this machine knows of it.
    """
    root = Path(folder).absolute()  # wherever the process goes from here
    manifest = read_manifest(root)
    bundle = Bundle(
        folder=root,
        **{name: manifest[name] for name in Bundle.__dataclass_fields__ if name in manifest},
    )
    for relative, stage, profile in _graphs(bundle.stages):
        if relative not in bundle.files:
            raise BundleError(
                f"{root}: stage {stage}, profile {profile}: {relative} is not among the listed files"
            )
    _check_sizes(bundle)
    _check_tokenizers(bundle)
    if check_hashes:
        _check_hashes(bundle, remember)
    return bundle


def save_manifest(bundle: Bundle) -> Path:
    """Write the `bundle.json` of a bundle whose files are described, and return its path."""
    for relative, stage, profile in _graphs(bundle.stages):
        if relative not in bundle.files:
            raise BundleError(
                f"{bundle.folder}: stage {stage}, profile {profile}: {relative} does not exist"
            )
    names = [name for name in Bundle.__dataclass_fields__ if name != "folder"]
    manifest = {"format": FORMAT, **{name: getattr(bundle, name) for name in names}}
    target = bundle.folder / MANIFEST
    replace_text(target, json.dumps(manifest, indent=1) + "\n")
    return target


def read_manifest(root: Path) -> dict[str, Any]:
    """What the `bundle.json` of a folder says, every field of the kind that it must be."""
    path = root / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{root} is not a bundle: {MANIFEST} cannot be read ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again") from error
    manifest: dict[str, Any] = found if isinstance(found, dict) else {}
    number = manifest.get("format")
    if not isinstance(number, int) or number < 1 or number is True:
        raise BundleError(f"{path} names no format; export the bundle again")
    if number > FORMAT:
        raise BundleError(
            f"{path} has format {number} and this version reads up to {FORMAT}; upgrade tintype"
        )
    if missing := sorted(_NEEDED.keys() - manifest.keys()):
        raise BundleError(f"{path} lacks {', '.join(missing)}; export the bundle again")
    if broken := next(_malformed(manifest), None):
        raise BundleError(
            f"{path}: {broken} is not as this version reads it; export the bundle again"
        )
    return manifest


def _malformed(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What in a manifest is of another kind than it must be."""
    for name, kind in {**_NEEDED, **_OPTIONAL}.items():
        if not isinstance(manifest.get(name, kind()), kind):
            yield name
            return
    if not _are_stages(manifest["stages"]):
        yield "stages"
    for gpu, entry in manifest.get("engines", {}).items():
        if not isinstance(entry, dict) or not _are_stages(entry.get("stages")):
            yield f"engines of {gpu}"
    for name, entry in manifest["files"].items():
        known = entry if isinstance(entry, dict) else {}
        if not isinstance(known.get("size"), int) or not isinstance(known.get("sha256"), str):
            yield f"file {name!r}"
    if not all(isinstance(name, str) for name in manifest["tokenizers"]):
        yield "tokenizers"
    if manifest["family"] not in FAMILIES:
        yield f"family {manifest['family']!r}"


def _are_stages(found: Any) -> bool:
    """Whether this is stage -> profile -> file."""
    return isinstance(found, dict) and all(
        isinstance(profiles, dict) and all(isinstance(file, str) for file in profiles.values())
        for profiles in found.values()
    )


def _graphs(stages: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str, str]]:
    for stage, profiles in stages.items():
        for profile, relative in profiles.items():
            yield relative, stage, profile


def _inside(root: Path, relative: str) -> Path:
    """The path of a file, refused where it or a link in it leads out of the folder."""
    pure = PurePosixPath(relative)
    path = root / pure
    if not relative.isprintable():
        raise BundleError(f"{root}: {relative!r} is no name of a file")
    if pure.is_absolute() or "\\" in relative or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: {relative!r} leads out of the bundle")
    return path


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_sizes(bundle: Bundle) -> None:
    for relative, entry in bundle.files.items():
        path = bundle.path(relative)
        if not path.is_file():
            raise BundleError(
                f"{bundle.folder}: {relative} is missing; copy or export the bundle again"
            )
        size = path.stat().st_size
        if size != entry["size"]:
            raise BundleError(
                f"{bundle.folder}: {relative} has {size} bytes, expected {entry['size']}; it is damaged"
            )


def _check_tokenizers(bundle: Bundle) -> None:
    """Readers of tokenizers look for several files, so that one that lies there unlisted would be read."""
    for name in bundle.tokenizers:
        for path in sorted(bundle.path(name).glob("*")):
            if f"{name}/{path.name}" not in bundle.files:
                raise BundleError(
                    f"{bundle.folder}: {name}/{path.name} is not among the listed files; take it away"
                )


def require_whole(bundle: Bundle) -> None:
    """Refuse a bundle of parts that make no picture, such as single stages."""
    stages = [stage for stage in bundle.stages if stage.startswith("encode")]
    encoders = [stage for stage in stages if stage != "encode_image"]
    if len(encoders) != len(bundle.tokenizers):
        raise BundleError(
            f"{bundle.folder}: {MANIFEST} names {len(bundle.tokenizers)} tokenizers for {len(encoders)} text encoders"
        )
    lacking = [name for name in _SETTINGS if name not in bundle.defaults]
    last = "enlarge_last" if bundle.family == "unclip" else "decode"
    if last not in bundle.stages or lacking:
        raise BundleError(
            f"{bundle.folder}: {MANIFEST} has no {', '.join(lacking) or f'stage {last}'}, which a picture takes"
        )


def _check_hashes(bundle: Bundle, remember: bool) -> None:
    """Hash what this machine has not hashed before; a file that changed has another size or time."""
    memory = cache_folder() / "verified.json"
    known = _remembered(memory) if remember else {}
    fresh: dict[str, str] = {}
    for relative, entry in bundle.files.items():
        path = bundle.path(relative).resolve()
        stat = path.stat()
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        digest = known.get(key) or _sha256(path)
        if digest != entry["sha256"]:
            raise BundleError(
                f"{bundle.folder}: {relative} has another sha256 than {MANIFEST} says; it is damaged"
            )
        if key not in known:
            fresh[key] = digest
    if fresh:
        _remember(memory, _remembered(memory) | fresh)


def _remembered(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, known: dict[str, str]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        replace_text(memory, json.dumps(known))
    except OSError:
        # Nowhere to remember it: the next load hashes again, which is slower and just as safe.
        return
