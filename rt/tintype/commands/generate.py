"""`tintype generate`: a prompt in, PNG files out, each whole or not there at all."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintype.commands.cascade import add_cascade, cascade_of
from tintype.commands.loading import add_loading, load
from tintype.commands.output import (
    Progress,
    picture_size,
    require_png,
    require_writable,
    write_whole,
)

if TYPE_CHECKING:
    from tintype.pipeline import Output, Pipeline
    from tintype.png import Settings

_SETTINGS = ("height", "width", "steps", "guidance", "scheduler")  # which all pictures share


def register(subparsers: Any) -> None:
    """Add the command."""
    from tintype.cli import add_common

    parser = subparsers.add_parser("generate", help="make pictures from a prompt")
    parser.add_argument("prompt", type=_text)
    parser.add_argument(
        "-m", "--model", default="postcard", help="bundle, checkpoint, hub id or model in the box"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="PNG file; by default named after the seed"
    )
    parser.add_argument("-n", "--negative", type=_text, help="what the picture should not show")
    parser.add_argument(
        "--size", type=picture_size, metavar="WxH", help="width and height in pixels"
    )
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument(
        "--guidance", type=float, help="how strongly the prompt steers; 1 is not at all"
    )
    parser.add_argument("--seed", type=int, help="the same seed makes the same picture")
    parser.add_argument("--count", type=int, default=1, help="pictures to make")
    parser.add_argument("--scheduler", help="see `tintype schedulers`")
    add_cascade(parser)
    add_loading(parser)
    parser.add_argument("--init", type=Path, metavar="IMAGE", help="a picture to begin from")
    parser.add_argument(
        "--mask", type=Path, metavar="IMAGE", help="where to paint it anew: white on black"
    )
    parser.add_argument("--strength", type=float, help="how far to change it, above 0 and up to 1")
    parser.add_argument(
        "--control",
        type=Path,
        metavar="IMAGE",
        help="a picture that steers a model with a ControlNet",
    )
    parser.add_argument("--control-scale", type=float, help="how strongly; 1 by default")
    add_common(parser)
    parser.set_defaults(run=run)


def _text(argument: str) -> str:
    """What was typed, as UTF-8 whatever the locale says, with a sign in the place of bytes that are none."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def run(options: argparse.Namespace) -> None:
    """Make the pictures and write them; the place to write to is tried before the work starts."""
    require_png(options.output)
    require_writable(options.output)
    from tintype.png import settings_of

    begin = time.perf_counter()
    pipeline = load(options)
    loaded = time.perf_counter() - begin
    width, height = options.size or (None, None)
    asked = {
        "prompt": options.prompt,
        "negative_prompt": options.negative,
        "height": height,
        "width": width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "scheduler": options.scheduler,
        **cascade_of(options),
        **_edit(options),
    }
    output = _generate(pipeline, options, asked)
    begin = time.perf_counter()
    settings = settings_of(pipeline, asked, output)
    paths = _save(options.output, settings, output)
    timings = {"load": loaded, **output.timings, "save": time.perf_counter() - begin}
    made = list(zip(paths, output.seeds, strict=True))
    if options.json:
        images = [{"path": str(path), "seed": seed} for path, seed in made]
        shared = {name: getattr(settings[0], name) for name in _SETTINGS}
        report = {"images": images, "model": pipeline.name, "settings": shared}
        print(json.dumps({**report, "timings": timings}))
    else:
        print("\n".join(f"{path} (seed {seed})" for path, seed in made))


def _edit(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of pictures to begin with and to be steered by that were given, with those read."""
    from tintype.images import read

    paths = {"image": options.init, "mask_image": options.mask, "control_image": options.control}
    pictures = {name: read(path) for name, path in paths.items() if path is not None}
    numbers = {
        "strength": options.strength,
        "controlnet_conditioning_scale": options.control_scale,
    }
    return pictures | {name: value for name, value in numbers.items() if value is not None}


def _generate(pipeline: Pipeline, options: argparse.Namespace, asked: dict[str, Any]) -> Output:
    progress = Progress()
    try:
        return pipeline(
            num_images_per_prompt=options.count,
            seed=options.seed,
            callback_on_step_end=progress,
            **asked,
        )
    finally:
        progress.close()


def _save(target: Path | None, settings: list[Settings], output: Output) -> list[Path]:
    from tintype.png import write_png

    paths = _paths(target, output.seeds)
    for path, own, image in zip(paths, settings, output.images, strict=True):
        write_whole(path, partial(write_png, image, settings=own))
    return paths


def _paths(output: Path | None, seeds: list[int]) -> list[Path]:
    """One file a picture: named after its seed, or numbered where there are many."""
    if output is None:
        return [Path(f"tintype-{seed}.png") for seed in seeds]
    if len(seeds) == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number + 1}") for number in range(len(seeds))]
