"""What is asked of an unCLIP beside its decoder's steps and guidance, as options of commands."""

from __future__ import annotations

import argparse
from typing import Any

from tintype.request import CASCADE

_OPTIONS = {
    "prior_num_inference_steps": ("--prior-steps", int, "unCLIP: steps of the prior"),
    "prior_guidance_scale": ("--prior-guidance", float, "unCLIP: how strongly the prior is guided"),
    "super_res_num_inference_steps": ("--super-res-steps", int, "unCLIP: steps that enlarge"),
}


def add_cascade(parser: argparse.ArgumentParser) -> None:
    """The options, each under the name of the argument that it becomes."""
    for name in CASCADE:
        flag, kind, told = _OPTIONS[name]
        parser.add_argument(flag, dest=name, type=kind, help=told)


def cascade_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    asked = {name: getattr(options, name) for name in CASCADE}
    return {name: value for name, value in asked.items() if value is not None}
