"""Low-rank updates of a checkpoint's layers (Hu et al. 2021, arXiv 2106.09685): kohya's, ComfyUI's, diffusers', PEFT's.

A layer's weight W becomes W + scale * alpha / rank * up @ down. Every key of a file must find its layer. Of a layer of
the original layout that is several of ours, each takes its rows of `up`; `down` is theirs together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tintype.checkpoints.files import Target, Translate, check_pickle, read_header
from tintype.checkpoints.original_flow_keys import flux_key, sd3_key
from tintype.checkpoints.original_keys import unet_key
from tintype.checkpoints.weights import cut
from tintype.errors import CheckpointError

if TYPE_CHECKING:
    from tintype.checkpoints.checkpoint import Checkpoint

_KOHYA = re.compile(
    r"lora_(unet|transformer|te1|te2|te)_(.+?)\.(lora_down\.weight|lora_up\.weight|alpha)"
)
_DIFFUSERS = re.compile(
    r"(?:(unet|transformer|text_encoder(?:_2)?)\.)?(.+?)"
    r"\.(?:processor\.)?(?:(to_[qkv]|to_out)_lora\.)?"
    r"(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|down|up|lora_linear_layer\.down|lora_linear_layer\.up|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)
_KOHYA_COMPONENTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_DOWN = ("lora_down.weight", "lora_down", "lora_A", "lora.down", "down", "lora_linear_layer.down")
# Before the names in files that hold what is updated alone: PEFT's and ComfyUI's.
_PREFIXES = ("base_model.model.", "diffusion_model.")
# Words with an underscore of their own in the original layouts' names, which kohya's flattened names run together; a
# longer word before one that it begins with.
_WORDS = (
    "input_blocks", "middle_block", "output_blocks", "transformer_blocks", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "time_embed", "label_emb", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out",
    "double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod", "img_in",
    "txt_in", "time_in", "vector_in", "guidance_in", "in_layer", "out_layer", "final_layer", "adaLN_modulation",
    "joint_blocks", "x_block", "context_block", "x_embedder", "t_embedder", "y_embedder", "context_embedder",
)  # fmt: skip
_NAMED = 3  # how many keys an error spells out


@dataclass(frozen=True)
class Lora:
    """A file of updates, and how strongly they are applied."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """FILE or FILE:SCALE, as on the command line."""
        name, colon, number = text.rpartition(":")
        try:
            return cls(Path(name), float(number)) if colon else cls(Path(text))
        except ValueError:  # a colon of the path's own
            return cls(Path(text))


@dataclass(frozen=True)
class _Place:
    """What a key of a file belongs to: a component (None: the denoiser), a layer's name as the file has it, a part."""

    component: str | None
    layer: str
    part: str  # "down", "up" or "alpha"
    flat: bool  # whether the layer's dots were written as underscores


@dataclass(frozen=True)
class Updates:
    """A file that was found to fit a checkpoint: component -> our weight, as a piece of the file's -> part -> key."""

    lora: Lora
    layers: Mapping[str, Mapping[Target, Mapping[str, str]]]


def fitted(checkpoint: Checkpoint, lora: Lora) -> Updates:
    """Raises CheckpointError for a key that finds no layer of the checkpoint, or a shape that does not fit it."""
    check_pickle(lora.path, allow_pickle=False)
    header = {
        key: entry for key, entry in read_header(lora.path)[0].items() if key != "__metadata__"
    }
    modules: dict[str, nn.Module] = {}
    layers = _layers(checkpoint, lora.path, header, modules)
    for component, found in layers.items():
        for target, keys in found.items():
            shapes = {part: tuple(header[key]["shape"]) for part, key in keys.items()}
            shapes["up"] = target.shape(shapes["up"])
            _check_shapes(lora.path, modules[component].get_parameter(target.name), shapes)
    return Updates(lora, layers)


def merge(updates: Iterable[Updates], component: str, module: nn.Module) -> None:
    """Add the updates to the component's weights, each computed in float32 and rounded once."""
    from safetensors import safe_open

    for each in updates:
        with safe_open(each.lora.path, framework="pt", device="cpu") as file:
            alpha = _adapter_alpha(each.lora.path)
            for target, keys in each.layers.get(component, {}).items():
                tensors = {part: file.get_tensor(key) for part, key in keys.items()}
                layer: Any = module.get_submodule(_layer(target))
                update = each.lora.scale * _update(tensors, target, alpha, layer.weight)
                layer.weight = nn.Parameter((layer.weight.float() + update).to(layer.weight.dtype))


def _update(
    tensors: Mapping[str, Tensor], target: Target, alpha: float | None, weight: Tensor
) -> Tensor:
    """alpha / rank * up @ down, of the weight's shape; ranks are down's rows."""
    down = tensors["down"].to(weight.device, torch.float32)
    up = cut(tensors["up"], target, torch.float32, weight.device)
    rank = down.shape[0]
    strength = float(tensors["alpha"]) if "alpha" in tensors else alpha
    product = up.flatten(1) @ down.flatten(1)
    return product.view(weight.shape) * (1.0 if strength is None else strength / rank)


def _layers(
    checkpoint: Checkpoint, path: Path, keys: Iterable[str], modules: dict[str, nn.Module]
) -> dict[str, dict[Target, dict[str, str]]]:
    """What `Updates` holds of a file's keys; the components without weights are put into ``modules``."""
    denoiser = "transformer" if "transformer" in checkpoint.components else "unet"
    names: dict[str, dict[str, str]] = {}
    found: dict[str, dict[Target, dict[str, str]]] = {}
    unknown = []
    for key in keys:
        place = _place(key)
        component = denoiser if place is None else place.component or denoiser
        if component in checkpoint.components and component not in modules:
            modules[component] = _hollow(checkpoint, component)
            names[component] = _layer_names(modules[component])
        targets = () if place is None else _targets(place, names.get(component, {}), checkpoint)
        if place is None or not targets:
            unknown.append(key)
            continue
        for target in targets:
            found.setdefault(component, {}).setdefault(target, {})[place.part] = key
    halves = [
        _layer(target)
        for each in found.values()
        for target, parts in each.items()
        if not {"down", "up"} <= {*parts}
    ]
    if unknown or halves:
        wrong = unknown or halves
        raise CheckpointError(
            f"{path} does not fit {checkpoint.source}: no layer here for {', '.join(wrong[:_NAMED])}"
            f"{f' and {len(wrong) - _NAMED} more' if len(wrong) > _NAMED else ''}; possible are low-rank updates "
            f"of linear layers and convolutions of {', '.join(checkpoint.components)}"
        )
    return found


def _place(key: str) -> _Place | None:
    if match := _KOHYA.fullmatch(key):
        prefix, layer, part = match.groups()
        component = _KOHYA_COMPONENTS.get(prefix)
        return _Place(component, layer, "alpha" if part == "alpha" else _half(part), flat=True)
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    if match := _DIFFUSERS.fullmatch(key):
        component, layer, projection, part = match.groups()
        if projection:  # of attention processors, as diffusers once named them
            layer += ".to_out.0" if projection == "to_out" else f".{projection}"
        return _Place(component, layer, "alpha" if part == "alpha" else _half(part), flat=False)
    return None


def _half(part: str) -> str:
    return "down" if part in _DOWN else "up"


def _targets(place: _Place, names: Mapping[str, str], checkpoint: Checkpoint) -> tuple[Target, ...]:
    """Our weights that the layer is, by our name of it or by the original layout's; none where there is none."""
    own = names.get(place.layer.replace(".", "_"))
    if own is not None:
        return (Target(f"{own}.weight"),)
    if place.component is not None:
        return ()
    original = dotted(place.layer) if place.flat else place.layer
    targets = _original_keys(checkpoint)(f"{original}.weight")
    return targets if all(_layer(each).replace(".", "_") in names for each in targets) else ()


def _original_keys(checkpoint: Checkpoint) -> Translate:
    """The translation of the original layout of the checkpoint's denoiser."""
    if "unet" in checkpoint.components:
        layers = int(checkpoint.configs["unet"].get("layers_per_block", 2))
        return partial(unet_key, layers=layers)
    if checkpoint.family == "flux":
        return flux_key
    return partial(sd3_key, layers=int(checkpoint.configs["transformer"]["num_layers"]))


def _layer(target: Target) -> str:
    return target.name.removesuffix(".weight")


def dotted(flat: str) -> str:
    """A name of the original layout whose dots were written as underscores."""
    for word in _WORDS:
        flat = flat.replace(word, word.replace("_", "-"))
    return flat.replace("_", ".").replace("-", "_")


def _layer_names(module: nn.Module) -> dict[str, str]:
    """Our names of what can be updated, by their flattened form."""
    return {
        name.replace(".", "_"): name
        for name, each in module.named_modules()
        if isinstance(each, (nn.Linear, nn.Conv2d))
    }


def _hollow(checkpoint: Checkpoint, component: str) -> nn.Module:
    with torch.device("meta"):
        return checkpoint.skeleton(component, torch.float32)


def _check_shapes(path: Path, weight: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    down, up = shapes["down"], shapes["up"]
    outputs, *inputs = weight.shape
    if up[0] != outputs or prod(down[1:]) != prod(inputs) or prod(up[1:]) != down[0]:
        raise CheckpointError(
            f"{path}: an update of {list(up)} by {list(down)} does not fit a weight of {[outputs, *inputs]}; "
            "it was made for another model"
        )


def _adapter_alpha(path: Path) -> float | None:
    """What PEFT writes beside its file, where a file has no alphas of its own."""
    config = path.parent / "adapter_config.json"
    if path.stem != "adapter_model" or not config.is_file():
        return None
    alpha = json.loads(config.read_text(encoding="utf-8")).get("lora_alpha")
    return None if alpha is None else float(alpha)
