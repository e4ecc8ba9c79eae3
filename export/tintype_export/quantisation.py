"""`--precision int8 | int4 | fp8`: what each means for a component, and its weights written in it, file by file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tintype.checkpoints import Checkpoint
from tintype.checkpoints.files import Weights
from tintype.checkpoints.weights import parameters
from tintype.errors import RequestError
from tintype.families.conditioning import STAGES
from tintype.models.quantised import LayerCodes, Scheme, quantisable
from tintype.models.stages import stage_component, stage_names

from .calibration import Calibration, Seen, calibrate
from .rounding import output_scale, round_layer
from .sensitivity import MOST_MEASURED, Rounder, Sensitivity, by_rule, measured
from .writing import save_tensors, shard_paths

Say = Callable[[str], None]

HIGH = torch.float16  # what is not kept in codes is stored in this
_OPTIONAL = ("input_scale", "smoothing", "output_scale")  # of a layer, under these names in a file


@dataclass(frozen=True)
class Rule:
    """What a stage's inputs are rounded to where there is calibration, and what its layers' errors may add up to."""

    activations: str
    allowed: float


# The allowed relative errors of one evaluation keep the picture in the box some 5 dB above its budget. A decoder is
# a hundredth of a model's weights, and counts by its work, which int4's weights do not make any less.
_WALKED = ("denoise", "prior", "enlarge", "enlarge_last")  # stages that samplers walk by
_EIGHT_BITS = dict.fromkeys(_WALKED, Rule("static", 0.02)) | {"decode": Rule("static", 0.01)}
RULES = {
    "int8": _EIGHT_BITS,
    "int4": dict.fromkeys(_WALKED, Rule("none", 0.03)),
    "fp8": _EIGHT_BITS,
}
# Text is read once a picture: encoders count by their bytes, and in int8 their states stay what they are.
_ENCODER = Scheme("int8")


@dataclass(frozen=True)
class Quantised:
    """How a component's weights are written: ``rounder`` gives a chosen layer's codes when its weight comes by."""

    scheme: Scheme
    sensitivity: Sensitivity
    rounder: Rounder
    calibration: Calibration | None = None

    def as_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "weights": self.scheme.weights,
            "activations": self.scheme.activations,
            "group": self.scheme.group,
            "calibration": None if self.calibration is None else self.calibration.as_json(),
            "sensitivity": self.sensitivity.as_json(),
        }


def plan(
    checkpoint: Checkpoint,
    precision: str,
    group: int,
    calibration: Calibration | None,
    say: Say,
) -> dict[str, Quantised]:
    """How each component that is kept in codes is written, by name; without ``calibration`` decoders are not."""
    component = partial(stage_component, components=checkpoint.components)
    stages = stage_names(checkpoint.components)
    encoders = [component(each) for each in stages if each in STAGES]
    found = {name: _by_weights(checkpoint, name, _ENCODER) for name in encoders}
    if calibration is None:
        scheme = _scheme(precision, "none", group)
        walked = [component(each) for each in _WALKED if each in stages]
        return found | {name: _by_weights(checkpoint, name, scheme) for name in walked}
    if checkpoint.family == "unclip" and "prior" not in stages:
        raise RequestError(
            f"precision {precision} is calibrated on what prompts draw, and {checkpoint.source} varies pictures; "
            "choose fp32, fp16 or bf16"
        )
    rules = {stage: rule for stage, rule in RULES[precision].items() if stage in stages}
    say(f"calibrate: {len(calibration.prompts)} prompts, {calibration.steps} steps")
    size = sum(each.numel() for each in _skeleton(checkpoint, component("denoise")).parameters())
    large = size > MOST_MEASURED
    watched = calibrate(checkpoint, calibration, list(rules), block_by_block=large)
    for stage, rule in rules.items():
        module, seen = watched.pop(stage)
        scheme, name = _scheme(precision, rule.activations, group), component(stage)
        rounder = _rounder(scheme, seen)
        if large:
            report = by_rule(_skeleton(checkpoint, name), scheme, seen.layers)
        else:
            say(f"sensitivity of {stage}: one layer at a time")
            report = measured(module, seen, scheme, rounder, rule.allowed)
        found[name] = Quantised(scheme, report, rounder, calibration)
    return found


def _by_weights(checkpoint: Checkpoint, name: str, scheme: Scheme) -> Quantised:
    """A component whose weights alone are rounded, its layers chosen by rule."""
    report = by_rule(_skeleton(checkpoint, name), scheme)
    return Quantised(scheme, report, _rounder(scheme, Seen({}, [])))


def _scheme(weights: str, activations: str, group: int) -> Scheme:
    return Scheme(weights, activations, group if weights == "int4" else None)


def _rounder(scheme: Scheme, seen: Seen) -> Rounder:
    def rounded(name: str, weight: Tensor) -> LayerCodes:
        kept = round_layer(weight, scheme, seen.layers.get(name))
        # Products of tokens with tokens are faster than 16-bit ones in int8 alone, and so are convolutions on a CPU.
        if scheme.weights == "int8" and name in seen.outputs:
            return replace(kept, output_scale=output_scale(weight, seen.outputs[name]))
        return kept

    return rounded


def _skeleton(checkpoint: Checkpoint, name: str) -> nn.Module:
    """A component without its weights."""
    with torch.device("meta"):
        return checkpoint.skeleton(name, torch.float32)


def write_quantised(
    weights: Weights, path: Path, quantised: Quantised, scales: torch.dtype
) -> tuple[Path, ...]:
    """Write ``path`` with .safetensors added, one file for each that ``weights`` has; what was written.

    A file's tensors are read one by one, so that what is in memory is one of them and the result of one file. What
    stays high is written in float16, and scales in ``scales``, which is what the graph computes in.
    """
    chosen = quantised.sensitivity.chosen(quantised.scheme.weights)
    targets = shard_paths(path, len(weights.files))
    for source, target in zip(weights.files, targets, strict=True):
        kept: dict[str, Tensor] = {}
        for name, tensor in parameters(weights, source):
            layer = name.removesuffix(".weight")
            if layer != name and layer in chosen:
                codes = quantised.rounder(layer, tensor.float())
                kept.update(layer_tensors(layer, codes, scales))
            else:
                kept[name] = tensor.to(HIGH)
        save_tensors(kept, target)
    return targets


def layer_tensors(layer: str, kept: LayerCodes, scales: torch.dtype) -> dict[str, Tensor]:
    """What a file holds of a layer, by name.

    int4 codes lie two a byte, the first in the low half, as ONNX has them: a linear layer's as [in, out], with scales
    [groups, out], which is how onnxruntime's own op wants them; a convolution's as [out, in * kernel].
    """
    codes, scale = kept.codes, kept.weight_scale
    if kept.scheme.weights == "int4":
        flat = codes.flatten(1)
        linear = codes.ndim == 2
        codes = packed(flat.t().contiguous() if linear else flat)
        scale = scale.t() if linear else scale
    optional = {name: getattr(kept, name) for name in _OPTIONAL}
    tensors = {"weight": codes, "weight_scale": scale.to(scales), **_given(optional, scales)}
    return {f"{layer}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _given(tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: each.to(dtype) for name, each in tensors.items() if each is not None}


def read_layers(path: Path, model: nn.Module) -> dict[str, LayerCodes]:
    """The quantised layers in a file that `write_quantised` wrote for ``model``, to run or tune them on torch."""
    tensors = load_file(path)
    suffix = ".weight_scale"
    names = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    layers = quantisable(model)
    return {name: _read_layer(tensors, name, layers[name].weight.shape) for name in names}


_STORED = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}


def _read_layer(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> LayerCodes:
    codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].float()
    optional = {each: tensors.get(f"{name}.{each}") for each in _OPTIONAL}
    weights, group = _STORED[codes.dtype], None
    if weights == "int4":
        codes = unpacked(codes)
        if len(shape) == 2:
            codes, scale = codes.t(), scale.t()
        group = codes.shape[1] // scale.shape[1]
    scheme = Scheme(weights, "none" if optional["input_scale"] is None else "static", group)
    wide = {each: None if value is None else value.float() for each, value in optional.items()}
    return LayerCodes(scheme, codes.reshape(shape).contiguous(), scale.contiguous(), **wide)


def packed(codes: Tensor) -> Tensor:
    """int4 codes [rows, columns], two a byte: uint8 [rows, columns / 2], the earlier in the low half."""
    nibbles = codes.to(torch.uint8) & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpacked(stored: Tensor) -> Tensor:
    """int8 [rows, columns] of `packed`."""
    nibbles = torch.stack([stored & 15, stored >> 4], -1).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)
