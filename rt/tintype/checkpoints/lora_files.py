"""Files of low-rank updates (Hu et al. 2021, arXiv 2106.09685): kohya's, ComfyUI's, diffusers', PEFT's; without torch.

A layer's weight W becomes W + scale * alpha / rank * up @ down; where a file asks for it, alpha / sqrt(rank)
(Kalajdzievski 2023, arXiv 2312.03732). Every key of a file must find its layer. Of a layer of the original layout that
is several of ours, each takes its rows of `up`; `down` is theirs together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from tintype.checkpoints.files import (
    Target,
    Translate,
    check_pickle,
    read_header,
    read_json,
    safetensors_shapes,
    same_name,
)
from tintype.checkpoints.original_flow_keys import flux_key, sd3_key
from tintype.checkpoints.original_keys import unet_key
from tintype.errors import CheckpointError, RequestError

_KOHYA = re.compile(
    r"lora_(unet|transformer|te1|te2|te)_(.+?)\.(lora_down\.weight|lora_up\.weight|alpha)"
)
_DIFFUSERS = re.compile(
    r"(?:(unet|transformer|prior|decoder|text_encoder(?:_2)?)\.)?(.+?)"
    r"\.(?:processor\.)?(?:(to_[qkv]|to_out)_lora\.)?"
    r"(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|down|up|lora_linear_layer\.down|lora_linear_layer\.up|alpha)"
    r"(?:\.default)?(?:\.weight)?"
)
# The components that a key can name.
_COMPONENTS = ("unet", "transformer", "prior", "decoder", "text_encoder", "text_encoder_2")
# What PEFT knew of an adapter, as diffusers notes it in a file's header: an object, its keys behind a component's name.
_METADATA = "lora_adapter_metadata"
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
        """FILE or FILE:SCALE, as on the command line; RequestError for a scale that is no finite number."""
        name, colon, number = text.rpartition(":")
        try:
            lora = cls(Path(name), float(number)) if colon else cls(Path(text))
        except ValueError:  # a colon of the path's own
            return cls(Path(text))
        if not isfinite(lora.scale):
            raise RequestError(
                f"lora={text!r} has a scale of {lora.scale}, expected a finite number"
            )
        return lora


@dataclass(frozen=True)
class _Place:
    """What a key of a file belongs to: a component (None: the denoiser), a layer's name as the file has it, a part."""

    component: str | None
    layer: str
    part: str  # "down", "up" or "alpha"
    flat: bool  # whether the layer's dots were written as underscores


@dataclass(frozen=True)
class Updatable:
    """A model whose layers can be updated; ``shapes`` gives a component's weights by layer, by our names of them."""

    source: Path
    family: str
    components: tuple[str, ...]
    shapes: Callable[[str], Mapping[str, tuple[int, ...]]]

    @property
    def denoiser(self) -> str:
        """The component that a file means where it names none."""
        return next(n for n in ("transformer", "decoder", "unet") if n in self.components)

    @cached_property
    def original_keys(self) -> Translate:
        """The translation of the original layout of the denoiser."""
        names = self.shapes(self.denoiser)
        if self.denoiser == "decoder":  # unCLIP's, of whose original layout no updates are known
            return same_name
        if self.denoiser == "unet":
            return partial(unet_key, layers=_count("down_blocks.0.resnets", names))
        if self.family == "flux":
            return flux_key
        return partial(sd3_key, layers=_count("transformer_blocks", names))


def _count(blocks: str, names: Iterable[str]) -> int:
    """How many blocks of this name there are."""
    below = (name.removeprefix(f"{blocks}.") for name in names if name.startswith(f"{blocks}."))
    return len({name.partition(".")[0] for name in below})


@dataclass(frozen=True)
class _Adapter:
    """What PEFT noted of a component's updates: an alpha, others for layers whose names end as a pattern says, and
    whether ranks count by their roots."""

    alpha: float | None = None
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    rank_stabilised: bool = False

    @classmethod
    def read(cls, path: Path, noted: Mapping[str, Any]) -> _Adapter:
        """From PEFT's own fields; CheckpointError where they are none."""
        alpha, others = noted.get("lora_alpha"), noted.get("alpha_pattern") or {}
        try:
            patterns = tuple(
                (re.compile(rf"(.*\.)?({pattern})"), float(each))
                for pattern, each in others.items()
            )
            return cls(
                None if alpha is None else float(alpha), patterns, bool(noted.get("use_rslora"))
            )
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{path}: what it says of lora_alpha and alpha_pattern is malformed: {error}"
            ) from error

    def alpha_of(self, layer: str) -> float | None:
        """The alpha of a layer, if any is known."""
        return next((each for pattern, each in self.alphas if pattern.fullmatch(layer)), self.alpha)


@dataclass(frozen=True)
class Updates:
    """A file that was found to fit a model: component -> our weight, as a piece of the file's -> part -> key."""

    lora: Lora
    layers: Mapping[str, Mapping[Target, Mapping[str, str]]]
    adapters: Mapping[str, _Adapter]

    def strength(self, component: str, target: Target, rank: int, alpha: float | None) -> float:
        """What a product of this rank is multiplied by; ``alpha`` is what the file says at the layer, if anything."""
        adapter = self.adapters.get(component, _Adapter())
        known = adapter.alpha_of(layer_of(target)) if alpha is None else alpha
        if known is None:
            return self.lora.scale
        return self.lora.scale * known / (sqrt(rank) if adapter.rank_stabilised else rank)


def fitted(model: Updatable, lora: Lora) -> Updates:
    """Raises CheckpointError for a key that finds no layer of the model, or a shape that does not fit it."""
    check_pickle(lora.path, allow_pickle=False)
    stored = safetensors_shapes(lora.path)
    if not stored:
        raise CheckpointError(f"{lora.path} holds no updates")
    layers = _layers(model, lora.path, stored)
    for component, found in layers.items():
        for target, keys in found.items():
            shapes = {part: stored[key] for part, key in keys.items()}
            shapes["up"] = target.shape(shapes["up"])
            _check_shapes(lora.path, model.shapes(component)[layer_of(target)], shapes)
    return Updates(lora, layers, _adapters(lora.path, layers))


def _adapters(path: Path, components: Iterable[str]) -> dict[str, _Adapter]:
    """What was noted of each component's updates, in the header or, by PEFT itself, beside the file."""
    header, _ = read_header(path)
    text = header.get("__metadata__", {}).get(_METADATA)
    beside = path.parent / "adapter_config.json"
    if text is None:
        if path.stem != "adapter_model" or not beside.is_file():
            return {}
        own = _Adapter.read(beside, read_json(beside))
        return dict.fromkeys(components, own)
    try:
        noted = json.loads(text)
        items = [(*key.split(".", 1), value) for key, value in noted.items() if "." in key]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its {_METADATA} is no JSON object") from error
    return {
        component: _Adapter.read(
            path, {name: each for owner, name, each in items if owner == component}
        )
        for component in components
    }


def _layers(
    model: Updatable, path: Path, keys: Iterable[str]
) -> dict[str, dict[Target, dict[str, str]]]:
    """What `Updates` holds of a file's keys."""
    names: dict[str, dict[str, str]] = {}
    found: dict[str, dict[Target, dict[str, str]]] = {}
    unknown = []
    for key in keys:
        place = _place(key)
        component = model.denoiser if place is None else place.component or model.denoiser
        if component in model.components and component not in names:
            names[component] = {name.replace(".", "_"): name for name in model.shapes(component)}
        targets = () if place is None else _targets(place, names.get(component, {}), model)
        if place is None or not targets:
            unknown.append(key)
            continue
        for target in targets:
            found.setdefault(component, {}).setdefault(target, {})[place.part] = key
    halves = [
        layer_of(target)
        for each in found.values()
        for target, parts in each.items()
        if not {"down", "up"} <= {*parts}
    ]
    if unknown or halves:
        wrong = unknown or halves
        raise CheckpointError(
            f"{path} does not fit {model.source}: no layer here for {', '.join(wrong[:_NAMED])}"
            f"{f' and {len(wrong) - _NAMED} more' if len(wrong) > _NAMED else ''}; possible are low-rank updates "
            f"of linear layers and convolutions of {', '.join(n for n in model.components if n in _COMPONENTS)}"
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


def _targets(place: _Place, names: Mapping[str, str], model: Updatable) -> tuple[Target, ...]:
    """Our weights that the layer is, by our name of it or by the original layout's; none where there is none."""
    flat = place.layer.replace(".", "_")
    # transformers has named a text encoder's layers without its first word since its version 5.
    known = (names.get(each) for each in (flat, f"text_model_{flat}"))
    own = next((name for name in known if name is not None), None)
    if own is not None:
        return (Target(f"{own}.weight"),)
    if place.component is not None:
        return ()
    original = dotted(place.layer) if place.flat else place.layer
    targets = model.original_keys(f"{original}.weight")
    return targets if all(layer_of(each).replace(".", "_") in names for each in targets) else ()


def layer_of(target: Target) -> str:
    """The layer whose weight a piece is."""
    return target.name.removesuffix(".weight")


def dotted(flat: str) -> str:
    """A name of the original layout whose dots were written as underscores."""
    for word in _WORDS:
        flat = flat.replace(word, word.replace("_", "-"))
    return flat.replace("_", ".").replace("-", "_")


def _check_shapes(
    path: Path, weight: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    down, up = shapes["down"], shapes["up"]
    outputs, *inputs = weight
    if prod(shapes.get("alpha", ())) != 1:
        raise CheckpointError(
            f"{path}: an alpha has shape {list(shapes['alpha'])}, expected one number"
        )
    if 0 in down[:1]:
        raise CheckpointError(f"{path}: an update has rank 0, and so says nothing")
    if (
        min(len(down), len(up)) < 2
        or up[0] != outputs
        or prod(down[1:]) != prod(inputs)
        or prod(up[1:]) != down[0]
    ):
        raise CheckpointError(
            f"{path}: an update of {list(up)} by {list(down)} does not fit a weight of {[outputs, *inputs]}; "
            "it was made for another model"
        )
