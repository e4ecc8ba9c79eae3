"""`tintype export MODEL -o BUNDLE`: write a bundle of ONNX graphs, and engines, that runs without torch."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tintype.commands.cascade import add_cascade, cascade_of
from tintype.commands.output import picture_size
from tintype.errors import RequestError
from tintype.models.quantised import GROUPS

from .bundle import ExportConfig, export_bundle
from .calibration import PROMPTS, Calibration
from .checks import MOST_PICTURES
from .storage import PRECISIONS
from .writing import replaced


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("export", help="write a bundle that runs without torch")
    parser.add_argument(
        "model",
        help="checkpoint folder in diffusers layout, single .safetensors file, or the name of a model in the box",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--target", choices=["onnx", "tensorrt"], default="onnx")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument(
        "--size",
        type=picture_size,
        nargs="+",
        metavar="WxH",
        help="picture sizes; the model's own by default",
    )
    parser.add_argument(
        "--batch",
        type=_count,
        nargs="+",
        default=[1],
        metavar="N",
        help=f"pictures of one call, at most {MOST_PICTURES}",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="tensorrt: an engine of the plain denoiser, too, for masks, rescaled guidance and pndm",
    )
    parser.add_argument(
        "--weightless",
        action="store_true",
        help="tensorrt: engines of a few megabytes, filled from the bundle's weights when loaded; takes a GPU to build",
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=[],
        metavar="OP",
        help="tensorrt, the package of that name: ops whose kernels engines take from us, such as group_norm_silu",
    )
    parser.add_argument(
        "--controlnet",
        type=Path,
        metavar="CN",
        help="folder or file of what steers the model by a picture",
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="FILE[:SCALE]",
        help="low-rank updates to merge into the weights",
    )
    parser.add_argument(
        "--gpu", nargs="+", default=[], metavar="sm_NN", help="what tensorrt builds for: sm_89 ..."
    )
    parser.add_argument(
        "--tolerance",
        type=_finite,
        metavar="PSNR_DB",
        help="least fidelity of a picture; by default 60 for fp32, 40 for 16 bits, 30 for int8 and fp8, 27 for int4",
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=GROUPS,
        help=f"weights of int4 that share a scale; {ExportConfig.group} by default",
    )
    parser.add_argument(
        "--calibration-prompts",
        type=Path,
        metavar="FILE",
        help="prompts to calibrate int8, int4 and fp8 with, one a line; a few of our own by default",
    )
    parser.add_argument(
        "--calibration-steps",
        type=partial(_count, least=0),
        metavar="N",
        help=f"steps of each calibration prompt, {Calibration.steps} by default; 0 rounds the weights alone, "
        "without calibration",
    )
    parser.add_argument("--steps", type=_count, help="steps of a request that names none")
    parser.add_argument("--guidance", type=_finite, help="guidance of a request that names none")
    add_cascade(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return number


def run(options: argparse.Namespace) -> None:
    """Export, verify, and say where the bundle is."""
    from tintype.checkpoints import open_checkpoint
    from tintype.checkpoints.lora_files import Lora
    from tintype.loading import resolve

    _check_codes(options)
    source = resolve(options.model)
    checkpoint = open_checkpoint(source)
    defaults, cascade = checkpoint.defaults, cascade_of(options)
    if cascade and checkpoint.family != "unclip":
        raise RequestError(
            f"{', '.join(cascade)}: for unCLIP models, and {options.model} is a {checkpoint.family}; leave it out"
        )
    sizes = options.size or [(defaults["width"], defaults["height"])]
    asked = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, **cascade}
    asked |= {"width": sizes[0][0], "height": sizes[0][1]}
    config = ExportConfig(
        sizes=tuple(sizes),
        precision=options.precision,
        target=options.target,
        gpus=tuple(options.gpu),
        plain=options.plain,
        weightless=options.weightless,
        kernels=tuple(options.kernels),
        loras=tuple(Lora.parse(text) for text in options.lora),
        batches=tuple(options.batch),
        controlnet=options.controlnet,
        tolerance_db=options.tolerance,
        defaults={name: value for name, value in asked.items() if value is not None},
        calibration=_calibration(options.calibration_prompts, options.calibration_steps),
        group=ExportConfig.group if options.group is None else options.group,
    )
    if line := replaced(options.output):
        _say(line)
    print(export_bundle(source, options.output, config, _say))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _check_codes(options: argparse.Namespace) -> None:
    """Refuse what is for weights in codes where none are kept so."""
    coded = [name for name, each in PRECISIONS.items() if each.quantised]
    wants = {"--calibration-prompts": coded, "--calibration-steps": coded, "--group": ["int4"]}
    for flag, precisions in wants.items():
        given = getattr(options, flag.strip("-").replace("-", "_")) is not None
        if given and options.precision not in precisions:
            raise RequestError(
                f"{flag} is for weights in {', '.join(precisions)}, and --precision is {options.precision}; choose one "
                f"of those, or leave {flag} out"
            )


def _calibration(file: Path | None, steps: int | None) -> Calibration | None:
    """What to calibrate with, or None for nothing."""
    if steps == 0:
        if file is not None:
            raise RequestError(
                f"--calibration-prompts {file} calibrate nothing with 0 for --calibration-steps; leave one of them out"
            )
        return None
    steps = Calibration.steps if steps is None else steps
    if file is None:
        return Calibration(PROMPTS, steps)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RequestError(f"--calibration-prompts {file} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise RequestError(f"--calibration-prompts {file} holds no prompt; write one a line")
    return Calibration(prompts, steps)
