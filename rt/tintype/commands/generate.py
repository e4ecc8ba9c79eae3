"""`tintype generate`: a prompt in, PNG files out, each whole or not there at all."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.errors import RequestError

if TYPE_CHECKING:
    from tintype.pipeline import Output, Pipeline

_SIZE = re.compile(r"(\d+)x(\d+)")


def register(subparsers: Any) -> None:
    """Add the command."""
    from tintype.cli import add_common

    parser = subparsers.add_parser("generate", help="make pictures from a prompt")
    parser.add_argument("prompt")
    parser.add_argument(
        "-m", "--model", default="postcard", help="bundle, checkpoint, hub id or model in the box"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="PNG file; by default named after the seed"
    )
    parser.add_argument("-n", "--negative", help="what the picture should not show")
    parser.add_argument("--size", type=_size, metavar="WxH", help="width and height in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument(
        "--guidance", type=float, help="how strongly the prompt steers; 1 is not at all"
    )
    parser.add_argument("--seed", type=int, help="the same seed makes the same picture")
    parser.add_argument("--count", type=int, default=1, help="pictures to make")
    parser.add_argument("--scheduler", help="see `tintype schedulers`")
    parser.add_argument("--backend", default="auto", help="see `tintype inspect`")
    add_common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the pictures and write them; the place to write to is tried before the work starts."""
    _require_writable(options.output)
    import tintype

    begin = time.perf_counter()
    pipeline = tintype.load(options.model, backend=options.backend)
    loaded = time.perf_counter() - begin
    width, height = options.size or (None, None)
    asked = {
        "height": height,
        "width": width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "scheduler": options.scheduler,
    }
    settings = pipeline.settings(**asked)
    output = _generate(pipeline, options, asked)
    begin = time.perf_counter()
    paths = _save(options, pipeline.name, settings, output)
    timings = {"load": loaded, **output.timings, "save": time.perf_counter() - begin}
    made = list(zip(paths, output.seeds, strict=True))
    if options.json:
        images = [{"path": str(path), "seed": seed} for path, seed in made]
        report = {"images": images, "model": pipeline.name, "settings": settings}
        print(json.dumps({**report, "timings": timings}))
    else:
        print("\n".join(f"{path} (seed {seed})" for path, seed in made))


def _generate(pipeline: Pipeline, options: argparse.Namespace, asked: dict[str, Any]) -> Output:
    progress = Progress()
    try:
        return pipeline(
            options.prompt,
            options.negative,
            num_images_per_prompt=options.count,
            seed=options.seed,
            callback_on_step_end=progress,
            **asked,
        )
    finally:
        progress.close()


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere; always on stderr."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = False
        self._last = time.monotonic()

    def __call__(self, step: int, total: int, latents: Any) -> None:
        done = step + 1
        if self._terminal:
            self._drawn = True
            bar = "#" * (30 * done // total)
            print(f"\r[{bar:30}] step {done}/{total}", end="", file=sys.stderr, flush=True)
        elif done == total or time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            print(f"step {done}/{total}", file=sys.stderr)

    def close(self) -> None:
        """End the bar's line."""
        if self._drawn:
            print(file=sys.stderr)


def _size(text: str) -> tuple[int, int]:
    found = _SIZE.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form WxH, such as 512x768")
    return int(found[1]), int(found[2])


def _save(
    options: argparse.Namespace, model: str, settings: dict[str, Any], output: Output
) -> list[Path]:
    from tintype import __version__
    from tintype.png import Settings

    common = Settings(
        prompt=options.prompt,
        negative_prompt=options.negative or "",
        seed=0,
        model=model,
        version=__version__,
        **settings,
    )
    paths = _paths(options.output, output.seeds)
    for path, seed, image in zip(paths, output.seeds, output.images, strict=True):
        _write_whole(path, image, replace(common, seed=seed))
    return paths


def _paths(output: Path | None, seeds: list[int]) -> list[Path]:
    """One file a picture: named after its seed, or numbered where there are many."""
    if output is None:
        return [Path(f"tintype-{seed}.png") for seed in seeds]
    if len(seeds) == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number + 1}") for number in range(len(seeds))]


def _require_writable(output: Path | None) -> None:
    folder = (output or Path("x")).parent
    if output is not None and output.is_dir():
        raise RequestError(f"{output} is a folder; name a PNG file with -o")
    if not folder.is_dir():
        raise RequestError(f"cannot write to {folder}: no such folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror}") from error


def _write_whole(path: Path, image: Any, settings: Any) -> None:
    """Write beside the target and rename, so that a killed run leaves no half picture."""
    from tintype.png import write_png

    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write_png(image, stream, settings)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
