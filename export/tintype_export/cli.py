"""`tintype export MODEL -o BUNDLE`: write a bundle of ONNX graphs, and engines, that runs without torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tintype.commands.output import picture_size

from .bundle import ExportConfig, export_bundle


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("export", help="write a bundle that runs without torch")
    parser.add_argument("model", type=Path, help="checkpoint folder in diffusers layout")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--target", choices=["onnx", "tensorrt"], default="onnx")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument(
        "--size",
        type=picture_size,
        nargs="+",
        metavar="WxH",
        help="picture sizes; the model's own by default",
    )
    parser.add_argument(
        "--gpu", nargs="+", default=[], metavar="sm_NN", help="what tensorrt builds for: sm_89 ..."
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="PSNR_DB",
        help="least fidelity of a picture; 60 for fp32 and 40 for 16 bits by default",
    )
    parser.add_argument("--steps", type=int, help="steps of a request that names none")
    parser.add_argument("--guidance", type=float, help="guidance of a request that names none")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Export, verify, and say where the bundle is."""
    from tintype.checkpoints import open_checkpoint

    defaults = open_checkpoint(options.model).defaults
    sizes = options.size or [(defaults["width"], defaults["height"])]
    asked = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    asked |= {"width": sizes[0][0], "height": sizes[0][1]}
    config = ExportConfig(
        sizes=tuple(sizes),
        precision=options.precision,
        target=options.target,
        gpus=tuple(options.gpu),
        tolerance_db=options.tolerance,
        defaults={name: value for name, value in asked.items() if value is not None},
    )
    bundle = export_bundle(
        options.model, options.output, config, lambda line: print(line, file=sys.stderr)
    )
    print(bundle)
