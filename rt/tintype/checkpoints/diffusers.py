"""The diffusers layout: `model_index.json` and a folder a component."""

from __future__ import annotations

import re
from pathlib import Path

from tintype.checkpoints.checkpoint import Checkpoint, Component, default_settings
from tintype.checkpoints.files import (
    PICKLES,
    Target,
    Translate,
    Weights,
    check_pickle,
    read_json,
    same_name,
)
from tintype.errors import CheckpointError

INDEX = "model_index.json"
_PIPELINES = tuple(
    f"StableDiffusion{kind}{task}Pipeline"
    for kind in ("", "XL")
    for task in ("", "Img2Img", "Inpaint")
)
_REQUIRED = ("unet", "vae", "text_encoder")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def open_folder(folder: Path, *, allow_pickle: bool) -> Checkpoint:
    """Open a folder in diffusers layout."""
    index = read_json(folder / INDEX)
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise CheckpointError(
            f"{folder / INDEX} names {pipeline}; supported: {', '.join(_PIPELINES)}"
        )
    present = {name for name, value in index.items() if isinstance(value, list) and value[-1]}
    absent = [name for name in _REQUIRED if name not in present]
    if absent:
        raise CheckpointError(f"{folder / INDEX} lacks {', '.join(absent)}")
    components = {
        name: _component(folder / name, name, index[name][-1], allow_pickle)
        for name in _CLASSES
        if name in present
    }
    tokenizers = ("tokenizer", "tokenizer_2") if "text_encoder_2" in components else ("tokenizer",)
    return Checkpoint(
        family="latent_unet",
        source=folder,
        components=components,
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizer_folders=tuple(existing_folder(folder / name) for name in tokenizers),
        defaults=default_settings(
            components["unet"].config,
            components["vae"].config,
            force_zeros=bool(index.get("force_zeros_for_empty_prompt", "XL" in pipeline)),
        ),
    )


def existing_folder(folder: Path) -> Path:
    """`folder`, or an error where it is missing."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; download the checkpoint again")
    return folder


def find_weights(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    """A component's weight files: whole or in shards, a variant such as fp16 where there is no
    other, and pickles last."""
    names = sorted(path.name for path in folder.glob("*"))
    found = [match for name in names if (match := _weight_file(name))]
    if not found:
        raise CheckpointError(
            f"{folder} holds no weights; expected {_STEMS[0]}.safetensors, model.safetensors or "
            "an index of their shards"
        )
    chosen = folder / min(found)[-1]
    if chosen.suffix != ".json":
        check_pickle(chosen, allow_pickle)
        return (chosen,)
    shards = tuple(_shard(folder, name) for name in _shard_names(chosen))
    for shard in shards:
        check_pickle(shard, allow_pickle)
    return shards


def _weight_file(name: str) -> tuple[bool, bool, bool, str] | None:
    """A sort key, the preferred first, ending in the name; None for what is no weight file."""
    stems = "|".join(_STEMS)
    whole = re.fullmatch(rf"(?:{stems})(?:\.(\w+))?\.(safetensors|bin)", name)
    index = re.fullmatch(rf"(?:{stems})\.(safetensors|bin)\.index(?:\.(\w+))?\.json", name)
    if whole:
        variant, kind = whole.groups()
    elif index:
        kind, variant = index.groups()
    else:
        return None
    return (f".{kind}" in PICKLES, variant is not None, variant != "fp16", name)


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    return sorted(set(weight_map.values()))


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name:  # an index may not point out of its folder
        raise CheckpointError(f"{folder}: the index names {name!r}, expected a file beside it")
    return folder / name


def _component(folder: Path, name: str, architecture: str, allow_pickle: bool) -> Component:
    if architecture not in _CLASSES[name]:
        raise CheckpointError(
            f"{folder.parent / INDEX}: {name} is a {architecture}; "
            f"supported: {', '.join(_CLASSES[name])}"
        )
    config = read_json(existing_folder(folder) / "config.json")
    files = find_weights(folder, allow_pickle=allow_pickle)
    return Component(architecture, config, Weights(files, _translation(name), allow_pickle))


def _translation(name: str) -> Translate:
    if name == "vae":
        return vae_key
    if name.startswith("text_encoder"):
        return text_encoder_key
    return image_encoder_key if name == "image_encoder" else same_name


def vae_key(key: str) -> tuple[Target, ...]:
    """Attention was once called query, key, value and proj_attn, and was once a 1x1 convolution."""
    if ".attentions." not in key:
        return (Target(key),)
    head, _, leaf = key.rpartition(".")
    block, _, layer = head.rpartition(".")
    name = f"{block}.{_OLD_ATTENTION.get(layer, layer)}.{leaf}"
    return (Target(name, squeezed=leaf == "weight"),)


def text_encoder_key(key: str) -> tuple[Target, ...]:
    """transformers 5 writes a plain text model without its `text_model.` prefix; older files have
    the prefix and a buffer of position numbers."""
    if key.endswith(".position_ids"):
        return ()
    own = key.startswith(("text_model.", "text_projection."))
    return (Target(key if own else f"text_model.{key}"),)


def image_encoder_key(key: str) -> tuple[Target, ...]:
    """Older files have a buffer of position numbers."""
    return () if key.endswith(".position_ids") else (Target(key),)
