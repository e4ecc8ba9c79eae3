"""What this process holds in memory, and where that can be told."""

from __future__ import annotations

from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")
told = pytest.mark.skipif(not _STATUS.exists(), reason="the kernel does not tell")


def held() -> int:
    """Bytes beside what is mapped from files."""
    return 1024 * int(_STATUS.read_text().split("RssAnon:")[1].split()[0])
