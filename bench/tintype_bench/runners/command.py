"""Any command line: started once a picture, timed from start to exit, its picture read from the file that it wrote.

Braces in it are filled in: {output} (needed), {prompt}, {model}, {width}, {height}, {steps}, {guidance}, {seed},
{latents} (an .npy file of the initial unit noise).
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tintype.checkpoints import open_checkpoint
from tintype.errors import RequestError, TintypeError
from tintype_bench.runners import Pictures, Running
from tintype_bench.work import Runner, Work

_BRACES = (
    *("output", "prompt", "model", "width", "height"),
    *("steps", "guidance", "seed", "latents"),
)


def check_template(template: str) -> None:
    """Refuse a command line that cannot be started, which its words alone show."""
    if "{output}" in template:
        _filled(template, dict.fromkeys(_BRACES, "0"))
    elif not _words(template):
        raise RequestError(f"--peer-cmd {template!r} names no program")
    elif found := re.search(r"(?<!\$)\{\w*\}", template):  # a worker's JSON and a shell's ${X} stay
        raise RequestError(
            f"--peer-cmd {template!r} names no {{output}}, and a worker is told nothing by {found[0]}; put {{output}} "
            "where the PNG or .npy file goes"
        )


def load(work: Work, runner: Runner) -> Running:
    """The command, for work that has a picture."""
    if work.component:
        raise RequestError("--peer-cmd makes pictures; a component case has none")
    if "{output}" not in runner.command:
        raise RequestError(
            f"--peer-cmd {runner.command!r} names no {{output}}; put it where the PNG or .npy file goes"
        )
    return Command(runner.command, work)


@dataclass(frozen=True)
class Command:
    """One process a run."""

    template: str
    work: Work

    def run(self) -> Pictures:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "picture.png"
            arguments = self._arguments(output, Path(folder) / "latents.npy")
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if done.returncode or not output.is_file():
                last = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise TintypeError(
                    f"{arguments[0]} left with {done.returncode} and {'a' if output.is_file() else 'no'} picture: "
                    f"{''.join(last)}"
                )
            return _read(output)

    def stages(self) -> dict[str, float]:
        return {}

    def _arguments(self, output: Path, latents: Path) -> list[str]:
        work = self.work
        values = {
            "output": str(output),
            "prompt": work.prompt,
            "model": work.checkpoint,
            "width": str(work.width),
            "height": str(work.height),
            "steps": str(work.steps),
            "guidance": str(work.guidance),
            "seed": str(work.seed),
        }
        if "{latents}" in self.template:
            defaults = open_checkpoint(work.checkpoint).defaults
            np.save(latents, work.latents(defaults["latent_channels"], defaults["latent_factor"]))
            values["latents"] = str(latents)
        return _filled(self.template, values)


def _filled(template: str, values: Mapping[str, str]) -> list[str]:
    """The words of a command line with what stands in braces filled in."""
    try:
        return [part.format(**values) for part in _words(template)]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise RequestError(
            f"--peer-cmd {template!r} cannot be filled in: {error}; known: {', '.join(_BRACES)}, and a brace of your "
            "own is written twice"
        ) from error


def _words(template: str) -> list[str]:
    try:
        return shlex.split(template)
    except ValueError as error:
        raise RequestError(f"--peer-cmd {template!r} is no command line: {error}") from error


def _read(path: Path) -> Pictures:
    from PIL import Image

    if path.read_bytes()[:6] == b"\x93NUMPY":
        return np.asarray(np.load(path), np.float32)
    with Image.open(path) as image:
        pixels: Pictures = np.asarray(image.convert("RGB"), np.float32)[None] / np.float32(255)
        return pixels
