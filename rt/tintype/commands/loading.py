"""What commands share when they load one model: its options, and the call of `load` that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tintype.pipeline import Pipeline

_PASSED_ON = (
    "backend",
    "lora",
    "device",
    "dtype",
    "without",
    "controlnet",
    "offload",
    "vae_tiling",
    "attention_slicing",
)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Who runs a model, where and in what; what follows the dtype is for checkpoints, on small machines."""
    parser.add_argument("--backend", default="auto", help="see `tintype inspect`")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="FILE[:SCALE]",
        help="low-rank updates of a checkpoint's weights",
    )
    parser.add_argument("--device", default="auto", help="as the backend names it, such as cuda:1")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the weights: float16, ...; on torch int8, int4, fp8, too",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="ENCODER",
        help="text encoders to leave out, such as text_encoder_3",
    )
    parser.add_argument(
        "--controlnet",
        metavar="CN",
        help="folder or file of what steers a checkpoint by a picture, see --control",
    )
    parser.add_argument(
        "--offload", help="what waits on the host while it is not used: model, sequential"
    )
    parser.add_argument(
        "--vae-tiling", action="store_true", help="encode and decode in overlapping tiles"
    )
    parser.add_argument(
        "--attention-slicing",
        action="store_true",
        help="attention in slices where the device has no fused kernel for it",
    )


def load(options: argparse.Namespace) -> Pipeline:
    """The pipeline of `options.model`."""
    import tintype

    return tintype.load(options.model, **{name: getattr(options, name) for name in _PASSED_ON})
