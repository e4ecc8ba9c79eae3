"""How much disk the slim installation takes: the sizes of `tintype[cpu]` and of everything that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

_OWN_PACKAGES = ("tintype", "tintype_kernels", "tintype_export", "tintype_bench")


def footprint(extra: str = "cpu") -> dict[str, float]:
    """Megabytes of each installed distribution in the closure of `tintype[extra]`, largest first."""
    sizes = {name: _megabytes(_files(name)) for name in _closure("tintype", extra)}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _closure(root: str, extra: str) -> list[str]:
    """Canonical names of a distribution and, through its requirements, of all that it needs here."""
    from packaging.utils import canonicalize_name

    found: dict[str, None] = {}
    waiting = [(root, extra)]
    while waiting:
        name, wanted = waiting.pop()
        try:
            installed = distribution(name)
        except (
            PackageNotFoundError
        ):  # a requirement of a self-referring extra that is not installed here
            continue
        found[canonicalize_name(name)] = None
        for needed, its_extra in _requirements(installed, wanted):
            if its_extra or canonicalize_name(needed) not in found:
                waiting.append((needed, its_extra))
    return list(found)


def _requirements(installed: Distribution, extra: str) -> Iterator[tuple[str, str]]:
    from packaging.requirements import Requirement

    for text in installed.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement.name, next(iter(requirement.extras), "")


def _files(name: str) -> Iterator[Path]:
    if name == "tintype":  # an editable installation lists none of its own files
        for package in _OWN_PACKAGES:
            spec = find_spec(package)
            for folder in (spec.submodule_search_locations or ()) if spec else ():
                yield from (path for path in Path(folder).rglob("*") if path.is_file())
        return
    for file in distribution(name).files or ():
        yield Path(str(file.locate()))


def _megabytes(files: Iterator[Path]) -> float:
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e6
