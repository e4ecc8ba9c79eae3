"""What commands share when they write: a place tried first, files whole or not there at all, a sign of life."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tintype.errors import RequestError


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere; always on stderr."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = False
        self._last = time.monotonic()

    def __call__(self, step: int, total: int, latents: Any = None) -> None:
        done = step + 1
        if self._terminal:
            self._drawn = True
            bar = "#" * (30 * done // total)
            _tell(f"\r[{bar:30}] step {done}/{total}", end="")
        elif done == total or time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            _tell(f"step {done}/{total}")

    def close(self) -> None:
        """End the bar's line."""
        if self._drawn:
            _tell("")


def _tell(text: str, end: str = "\n") -> None:
    """Print to stderr, where that can be written: no picture is worth less for what nobody reads."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def require_writable(output: Path | None) -> None:
    """Refuse a target that cannot be written, before the work starts."""
    folder = (output or Path("x")).parent
    if output is not None and output.is_dir():
        raise RequestError(f"{output} is a folder; name a PNG file with -o")
    if not folder.is_dir():
        raise RequestError(f"cannot write to {folder}: no such folder")
    if output is not None and _is_stream(output):
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}") from error


def require_png(output: Path | None) -> None:
    """Refuse a name that promises something else than a file with the kind of picture that is written."""
    from PIL import Image

    if output is None:
        return
    if str(output) == "-":
        raise RequestError(
            "-o -: a picture goes to a file, not to standard output; name one, such as picture.png"
        )
    suffix = output.suffix.lower()
    if suffix not in ("", ".png") and Image.registered_extensions().get(suffix, "PNG") != "PNG":
        raise RequestError(
            f"{output} would hold a PNG, which carries the picture's settings; name it {output.with_suffix('.png')}, "
            "and convert that"
        )


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside the target and rename, so that a killed run leaves no half file; links, pipes and devices stay."""
    if _is_stream(path):
        whole = BytesIO()
        write(whole)
        path.write_bytes(whole.getvalue())
        return
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_stream(path: Path) -> bool:
    """Whether a pipe or a device is there, which takes bytes and has none."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def picture_size(text: str) -> tuple[int, int]:
    """A --size such as 512x768 -> (512, 768), for argparse."""
    from tintype.request import picture_size as parsed

    try:
        return parsed(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
