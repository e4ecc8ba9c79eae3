"""Any command line: started once a picture, timed from start to exit, its picture read from the file that it wrote.

Braces in it are filled in: {output} (needed), {prompt}, {model}, {width}, {height}, {steps}, {guidance}, {seed},
{latents} (an .npy file of the initial unit noise).
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tintype.checkpoints import open_checkpoint
from tintype.errors import RequestError, TintypeError
from tintype_bench.runners import Pictures, Running
from tintype_bench.work import Runner, Work


def load(work: Work, runner: Runner) -> Running:
    """The command, with its braces checked."""
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
        try:
            return [part.format(**values) for part in shlex.split(self.template)]
        except (KeyError, IndexError) as error:
            raise RequestError(
                f"--peer-cmd has an unknown brace {error}; known: {', '.join((*values, 'latents'))}"
            ) from error


def _read(path: Path) -> Pictures:
    from PIL import Image

    if path.read_bytes()[:6] == b"\x93NUMPY":
        return np.asarray(np.load(path), np.float32)
    with Image.open(path) as image:
        pixels: Pictures = np.asarray(image.convert("RGB"), np.float32)[None] / np.float32(255)
        return pixels
