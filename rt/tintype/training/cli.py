"""`tintype train STAGE --data D --out O`: train the models in the box, stage by stage or all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from tintype.errors import RequestError

_STAGES = (
    *("data", "judge", "clip", "autoencoder", "denoiser", "accuracy"),
    "flow",
    *("prior", "decoder", "upsampler"),
    "postcard",
)
_STARTING = ("denoiser", "flow", "prior")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("train", help="train the models in the box")
    parser.add_argument(
        "stage", choices=_STAGES, metavar="STAGE", help=f"{', '.join(_STAGES)} (all before flow)"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the rendered pictures")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run: model, states, logs, figures"
    )
    parser.add_argument("--recipe", default="small", help="small (two CPU cores) or large (a GPU)")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--start",
        metavar="MODEL",
        help="denoiser: train this checkpoint's further; flow, prior: use its other parts (postcard's)",
    )
    parser.add_argument(
        "--steps", type=int, help="optimiser steps of the stage, instead of the recipe's"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"--device {name} is unknown; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"--device {name} is not for training; use cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        seen = f"{found} CUDA device(s)" if found else "no CUDA device"
        raise RequestError(f"--device {name}: torch sees {seen}; use --device cpu")


def run(options: argparse.Namespace) -> None:
    """Train; an interrupted run goes on where its last state was saved."""
    from tintype.loading import resolve

    from .postcard import stages
    from .postcard.recipe import FITTED, RECIPES

    if options.recipe not in RECIPES:
        raise RequestError(
            f"--recipe {options.recipe} is unknown; choose one of {', '.join(RECIPES)}"
        )
    _check_device(options.device)
    if options.start and options.stage not in _STARTING:
        raise RequestError(f"--start goes with {' and '.join(_STARTING)}, not {options.stage}")
    recipe = RECIPES[options.recipe].on(options.device)
    if options.steps is not None:
        if options.stage not in FITTED or options.steps < 1:
            raise RequestError(
                f"--steps takes a whole number of at least 1, with one of {', '.join(FITTED)}"
            )
        recipe = recipe.for_steps(options.stage, options.steps)
    shop = stages.Workshop(
        data=options.data,
        out=options.out,
        recipe_name=options.recipe,
        recipe=recipe,
        start=resolve(options.start) if options.start else None,
    )
    stages.run(options.stage, shop, lambda line: print(line, file=sys.stderr, flush=True))
