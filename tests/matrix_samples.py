"""Samples of the ops that multiply matrices, for `kernel_checks` to ask its questions of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernel_checks import Arguments, Sample, normal
from tintype_kernels.ops import quantise

# Triton's interpreter multiplies bfloat16 as integers, so these are checked in it on a GPU alone.
INTERPRETED_DTYPES = [torch.float32, torch.float16]


def _attention(
    b: int, heads: int, queries: int, keys: int, dim: int, *,
    extra: int = 0, lengths: list[int] | None = None, **options: Any,
) -> Callable[[], Arguments]:  # fmt: skip
    spread = options.pop("spread", 1.0)

    def draw() -> Arguments:
        counts = {
            "q": queries,
            "k": keys,
            "v": keys,
            **({"k_extra": extra, "v_extra": extra} if extra else {}),
        }
        tensors = {
            name: normal(b, tokens, heads, dim, spread=spread if name in "qk" else 1.0).transpose(
                1, 2
            )
            for name, tokens in counts.items()
        }
        more = {"extra_scale": 0.7} if extra else {}
        if lengths is not None:
            more["key_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        return {**tensors, **more, **options}

    return draw


_SETS = ("q", "k", "v", "k_extra", "v_extra", "key_lengths")
ATTENTION = [
    # every head dimension; queries and keys that fill no block; one query; scores far apart
    Sample("attention", "40", _attention(2, 1, 33, 77, 40), _SETS),
    Sample("attention", "64, image prompt", _attention(2, 1, 45, 77, 64, extra=5), _SETS),
    Sample("attention", "72, lengths", _attention(2, 2, 19, 40, 72, lengths=[40, 17]), _SETS),
    Sample("attention", "80, scale", _attention(1, 1, 33, 35, 80, scale=0.3), _SETS),
    Sample("attention", "96", _attention(1, 2, 5, 70, 96), _SETS),
    Sample("attention", "128", _attention(1, 1, 64, 64, 128), _SETS),
    Sample("attention", "160, no keys", _attention(2, 1, 9, 33, 160, extra=3, lengths=[0, 33]), _SETS),
    Sample("attention", "64, whole blocks", _attention(1, 1, 9, 256, 64), _SETS),
    Sample("attention", "128, rest", _attention(2, 1, 140, 150, 128), _SETS),
    Sample("attention", "one query", _attention(1, 1, 1, 2, 16), _SETS),
    Sample("attention", "peaked", _attention(1, 1, 20, 40, 64, spread=2.0), _SETS),
]  # fmt: skip

# Wider than any kernel holds: what the form by products takes.
WIDE = [
    Sample("attention", "320 wide", _attention(2, 2, 37, 70, 320), _SETS),
    Sample("attention", "512 wide, peaked, scale", _attention(1, 1, 20, 40, 512, spread=1.5, scale=0.05), _SETS),
]  # fmt: skip
WITH_ROLES = {"64, whole blocks", "128", "128, rest", "peaked"}  # what that form of attention takes


def _linear(
    scheme: str, rows: tuple[int, ...], columns: int, outputs: int, **options: Any
) -> Callable[[], Arguments]:
    quantize = {
        "int8": quantise.quantize_int8.reference,
        "int4": lambda w: quantise.quantize_int4.reference(w, options.get("group", 32)),
        "fp8": quantise.quantize_fp8.reference,
    }[scheme]

    def draw() -> Arguments:
        x = normal(*rows, columns, spread=options.get("spread", 1.0))
        if (
            scheme == "fp8"
        ):  # on e4m3's own grid, as the interpreter drops the carry into the exponent when it rounds
            x = x.clamp(-3.5, 3.5)
            x[..., 0] = 3.5
            x = (x * 128).to(torch.float8_e4m3fn).to(torch.float64) / 128
        arguments = {"x": x, "qw": quantize(normal(outputs, columns).float())}
        if options.get("epilogue", True):
            arguments |= {"bias": normal(outputs), "residual": normal(*rows, outputs)}
        return {**arguments, "activation": options.get("activation", "none")}

    return draw


_ADDED = ("x", "residual")
LINEAR = [
    Sample("int8_linear", "rest", _linear("int8", (2, 35), 192, 70, activation="gelu_tanh"), _ADDED),
    Sample("int8_linear", "plain", _linear("int8", (3,), 40, 33, epilogue=False), _ADDED),
    Sample("int8_linear", "large", _linear("int8", (2, 3), 128, 16, spread=1e3, epilogue=False), _ADDED),
    Sample("fp8_linear", "rest", _linear("fp8", (2, 35), 192, 70, activation="silu"), _ADDED),
    Sample("fp8_linear", "plain", _linear("fp8", (3,), 40, 33, epilogue=False), _ADDED),
    Sample("int4_linear", "rest", _linear("int4", (2, 35), 192, 70, activation="gelu"), _ADDED),
    Sample("int4_linear", "64", _linear("int4", (3,), 64, 33, group=64, epilogue=False), _ADDED),
    Sample("int4_linear", "odd", _linear("int4", (9,), 320, 70, epilogue=False), _ADDED),
    # one row, twenty and forty-one, which have tiles of their own, and five groups
    Sample("int4_linear", "few", _linear("int4", (20,), 160, 70), _ADDED),
    Sample("int4_linear", "128", _linear("int4", (2, 3), 256, 16, group=128, activation="gelu_tanh"), _ADDED),
]  # fmt: skip


# One token a sample, for the forms without tiles: turns that codes fill and do not, several and one.
ONE_TOKEN = [
    Sample("int8_linear", "one token", _linear("int8", (3, 1), 1088, 37, activation="silu"), _ADDED),
    Sample("int8_linear", "vectors", _linear("int8", (3,), 512, 16, epilogue=False), _ADDED),
    Sample("fp8_linear", "one token", _linear("fp8", (3, 1), 1088, 37, activation="gelu"), _ADDED),
    Sample("fp8_linear", "vectors", _linear("fp8", (3,), 512, 16, epilogue=False), _ADDED),
    Sample("int4_linear", "one token", _linear("int4", (3, 1), 1088, 37, activation="gelu_tanh"), _ADDED),
    Sample("int4_linear", "vectors", _linear("int4", (3,), 1024, 16, group=64, epilogue=False), _ADDED),
    Sample("int4_linear", "vectors, 128", _linear("int4", (2,), 128, 17, group=128), _ADDED),
]  # fmt: skip


def _convolution(
    n: int, channels: tuple[int, int], sides: tuple[int, int], taps: int = 3, *,
    stride: int = 1, padding: int = 1, channels_last: bool = False, spread: float = 1.0, **options: bool,
) -> Callable[[], Arguments]:  # fmt: skip
    def draw() -> Arguments:
        c, outputs = channels
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = normal(n, c, *sides, spread=spread).contiguous(memory_format=layout)
        codes = torch.randint(-127, 128, (outputs, c, taps, taps), dtype=torch.int8)
        scales = (0.5 + torch.rand(outputs)) / (127 * taps * c**0.5)
        arguments = {"x": x, "qw": quantise.Int8Weight(codes, scales)}
        arguments |= {"stride": stride, "padding": padding}
        if options.get("epilogue", True):
            across = [(side + 2 * padding - taps) // stride + 1 for side in sides]
            arguments |= {"bias": normal(outputs), "residual": normal(n, outputs, *across)}
        # A calibrated scale that cuts some off.
        return arguments | ({"input_scale": torch.tensor(0.02)} if options.get("static") else {})

    return draw


CONVOLUTION = [
    # channels, outputs and pixels that fill no block; channels of one block and of several; pixels for larger tiles;
    # kernels that reach far over the edge; pictures of one pixel
    Sample("int8_conv2d", "rest", _convolution(2, (21, 37), (7, 5)), _ADDED),
    Sample("int8_conv2d", "NHWC, halved", _convolution(2, (64, 70), (9, 11), stride=2, channels_last=True), _ADDED),
    Sample("int8_conv2d", "static", _convolution(2, (33, 16), (6, 9), padding=0, static=True), _ADDED),
    Sample("int8_conv2d", "static NHWC", _convolution(2, (128, 8), (5, 4), channels_last=True, static=True), _ADDED),
    Sample("int8_conv2d", "pointwise", _convolution(3, (130, 66), (4, 5), 1, padding=0, epilogue=False), _ADDED),
    Sample("int8_conv2d", "many pixels", _convolution(2, (3, 5), (33, 35), epilogue=False), _ADDED),
    Sample("int8_conv2d", "wide margin", _convolution(1, (4, 3), (2, 3), stride=2, padding=3), _ADDED),
    Sample("int8_conv2d", "one pixel", _convolution(2, (5, 2), (1, 1)), _ADDED),
    Sample("int8_conv2d", "large", _convolution(2, (16, 8), (4, 4), spread=1e3, epilogue=False), _ADDED),
    Sample("int8_conv2d", "tiny", _convolution(2, (16, 8), (4, 4), spread=1e-3, epilogue=False), _ADDED),
]  # fmt: skip
