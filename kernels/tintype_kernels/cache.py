"""Where things are remembered between runs, and how a file there is replaced."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "TINTYPE_CACHE"


def cache_folder() -> Path:
    """Where Tintype remembers things between runs; `TINTYPE_CACHE` overrides it."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "tintype")


def replace_text(target: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(target, text.encode("utf-8"))


def replace_bytes(target: Path, data: bytes) -> None:
    """Write a file whole or not at all, and the folder that it is in."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(target)
