"""How long exports took on this machine, so that the next one of a kind can say beforehand how long it will."""

from __future__ import annotations

import json
from pathlib import Path

from tintype_kernels.cache import cache_folder, replace_text


def last_seconds(kind: str) -> float | None:
    """What the last export of this kind took, or None where there was none."""
    return _known().get(kind)


def remember(kind: str, seconds: float) -> None:
    """Keep what an export took."""
    replace_text(_file(), json.dumps(_known() | {kind: round(seconds, 1)}, indent=1) + "\n")


def in_words(seconds: float) -> str:
    """Such as 40 s or 12 min."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _file() -> Path:
    return cache_folder() / "exports.json"


def _known() -> dict[str, float]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or one that somebody edited
        return {}
    return found if isinstance(found, dict) else {}
