"""What this process holds in memory, and where that can be told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

_STATUS = Path("/proc/self/status")
told = pytest.mark.skipif(not _STATUS.exists(), reason="the kernel does not tell")


def held() -> int:
    """Bytes beside what is mapped from files."""
    return 1024 * int(_STATUS.read_text().split("RssAnon:")[1].split()[0])


_MEASURE = """
import sys
import numpy as np
import memory_held
from tintype.bundle import open_bundle
folder, file, backend = sys.argv[1:]
names = {"bundle": open_bundle(folder)}
exec(backend, names)
inputs = {"latents": np.load(file)}
before = memory_held.held()
image = names["backend"].run("decode", "b1", inputs)["image"]
held = memory_held.held() - before
np.save(file, image)
print(held)
"""


def by_a_run(
    backend: str, folder: Path, latents: NDArray[np.float32]
) -> tuple[int, NDArray[np.float32]]:
    """Bytes that a backend holds when it has decoded by the bundle in `folder`, and the image; `backend` is code that
    makes it of `bundle`. A process of its own: what another freed would be filled again."""
    file = folder / "latents.npy"
    np.save(file, latents)
    command = [sys.executable, "-c", _MEASURE, str(folder), str(file), backend]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return int(done.stdout), np.load(file)
