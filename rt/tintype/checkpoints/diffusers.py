"""The diffusers layout: `model_index.json` and a folder a component."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tintype.bundle import is_bundle, read_manifest
from tintype.checkpoints.checkpoint import (
    Checkpoint,
    Component,
    channels_field,
    default_settings,
    encoder_stage,
    flow_settings,
    unclip_settings,
)
from tintype.checkpoints.controlnet import attached
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
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_T5 = ("T5EncoderModel",)
_VAES = ("AutoencoderKL", "VQModel")
_CONTROLNETS = ("ControlNetModel",)
_TASKS = ("", "Img2Img", "Inpaint")


@dataclass(frozen=True)
class _Layout:
    """A family of pipelines: the classes that its components may have, of which ``optional`` ones may be absent, and
    the folders of its ``schedulers`` with the component that each is for, the denoiser's first."""

    family: str
    pipelines: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]
    schedulers: Mapping[str, str]
    optional: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout(
        "latent_unet",
        tuple(
            f"StableDiffusion{kind}{steered}{task}Pipeline"
            for kind in ("", "XL")
            for steered in ("", "ControlNet")
            for task in _TASKS
        ),
        {
            "unet": ("UNet2DConditionModel",),
            "vae": _VAES,
            "text_encoder": _CLIP,
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "image_encoder": ("CLIPVisionModelWithProjection",),
            "controlnet": _CONTROLNETS,
        },
        {"scheduler": "unet"},
        optional=("text_encoder_2", "image_encoder", "controlnet"),
    ),
    _Layout(
        "sd3",
        tuple(f"StableDiffusion3{task}Pipeline" for task in _TASKS),
        {
            "transformer": ("SD3Transformer2DModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModelWithProjection",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "text_encoder_3": _T5,
        },
        {"scheduler": "transformer"},
        optional=("text_encoder", "text_encoder_2", "text_encoder_3"),
    ),
    _Layout(
        "flux",
        tuple(f"Flux{task}Pipeline" for task in _TASKS),
        {
            "transformer": ("FluxTransformer2DModel",),
            "vae": ("AutoencoderKL",),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": _T5,
        },
        {"scheduler": "transformer"},
    ),
    _Layout(
        "unclip",
        ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"),
        {
            "text_encoder": ("CLIPTextModelWithProjection",),
            "prior": ("PriorTransformer",),
            "text_proj": ("UnCLIPTextProjModel",),
            "decoder": ("UNet2DConditionModel",),
            "super_res_first": ("UNet2DModel",),
            "super_res_last": ("UNet2DModel",),
            "image_encoder": ("CLIPVisionModelWithProjection",),
        },
        {
            "decoder_scheduler": "decoder",
            "prior_scheduler": "prior",
            "super_res_scheduler": "super_res_first",
        },
        optional=("prior", "image_encoder"),
    ),
)
# What diffusers' pipelines set in the oldest configurations of their schedulers as they load them.
_MENDED = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
# Which clip, made for pixels as they are, where their configuration does not say.
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def open_folder(folder: Path, *, allow_pickle: bool) -> Checkpoint:
    """Open a folder in diffusers layout."""
    index = read_json(folder / INDEX)
    layout = _layout(folder, index.get("_class_name"))
    present = {name for name, value in index.items() if isinstance(value, list) and any(value[-1:])}
    absent = [name for name in layout.classes if name not in (*present, *layout.optional)]
    if absent:
        raise CheckpointError(
            f"{folder / INDEX} lacks {', '.join(absent)}, which a {layout.family} needs"
        )
    components = {
        name: _component(folder / name, name, index[name][-1], classes, allow_pickle)
        for name, classes in layout.classes.items()
        if name in present
    }
    encoders = [name for name in components if name.startswith("text_encoder")]
    if not encoders:
        raise CheckpointError(f"{folder / INDEX} names no text encoder; add text_encoder")
    if layout.family == "latent_unet":
        components["vae"] = _unshifted(components["vae"])
    check_widths(folder, components)
    controlnet = components.pop("controlnet", None)
    schedulers = {
        name: _scheduler(folder, name, layout.family, index)
        for name, part in layout.schedulers.items()
        if part in components
    }
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    checkpoint = Checkpoint(
        family=layout.family,
        source=folder,
        components=components,
        scheduler_config=next(iter(schedulers.values())),
        tokenizer_folders=tuple(existing_folder(folder / name) for name in tokenizers),
        defaults=_defaults(layout.family, components, index, schedulers)
        | _exported_defaults(folder),
    )
    if controlnet is None:
        return checkpoint
    return attached(checkpoint, folder / "controlnet", controlnet)


def open_controlnet(folder: Path, *, allow_pickle: bool) -> Component:
    """A ControlNet that lies in a folder of its own."""
    named = read_json(folder / "config.json").get("_class_name")
    if named not in _CONTROLNETS:
        raise CheckpointError(
            f"{folder}/config.json is of a {named}; a ControlNet is a {', '.join(_CONTROLNETS)}"
        )
    return _component(folder, folder.name, named, _CONTROLNETS, allow_pickle)


def _unshifted(vae: Component) -> Component:
    """The published pipelines of UNets scale latents and shift none, whatever a VAE says."""
    return replace(vae, config={**vae.config, "shift_factor": None})


def check_widths(source: Path, components: Mapping[str, Component]) -> None:
    """Refuse components that do not fit one another, as far as their configurations say."""
    configs = {name: part.config for name, part in components.items()}
    for part, fields in _widths(configs).items():
        for field, (given, giver) in fields.items():
            asked = configs[part].get(field)
            if isinstance(asked, int) and given and asked != given:
                raise CheckpointError(
                    f"{source}: the {part}'s {field} is {asked}, and the {giver} give {given}; the parts are of other "
                    "models"
                )


# Of a component's fields, what other components have there, None where they do not say, and who they are.
_Widths = dict[str, dict[str, tuple[int | None, str]]]


def _widths(configs: Mapping[str, Mapping[str, Any]]) -> _Widths:
    if "text_proj" in configs:
        return _unclip_widths(configs)
    encoders = [config for name, config in configs.items() if name.startswith("text_encoder")]
    t5 = [config for config in encoders if "d_model" in config]
    clips = [config for config in encoders if "d_model" not in config]
    if "unet" in configs:
        unet, vae, last = configs["unet"], configs["vae"], _total(encoders[-1:], "projection_dim")
        sizes = 6 * (unet.get("addition_time_embed_dim") or 0)  # of picture, crop and aim
        return {
            "unet": {
                "cross_attention_dim": (_total(encoders, "hidden_size"), "text encoders"),
                "out_channels": (_total([vae], channels_field(vae)), "VAE"),
                "projection_class_embeddings_input_dim": (
                    sizes + last if sizes and last else None,
                    "last text encoder and the sizes",
                ),
            }
        }
    # FLUX reads what its one CLIP pooled, SD3 the projections of both; one that is left out says nothing.
    alone = "num_single_layers" in configs["transformer"]
    whole = len(clips) == (1 if alone else 2)
    pooled = _total(clips, "hidden_size" if alone else "projection_dim")
    return {
        "transformer": {
            "joint_attention_dim": (_total(t5, "d_model") if t5 else None, "words of T5"),
            "pooled_projection_dim": (pooled if whole else None, "CLIPs' pooled texts"),
        }
    }


def _unclip_widths(configs: Mapping[str, Mapping[str, Any]]) -> _Widths:
    text, projection, decoder = (
        partial(_total, [configs[name]]) for name in ("text_encoder", "text_proj", "decoder")
    )
    embeds = {"projection_dim": (text("projection_dim"), "text encoder's embeddings")}
    optional: _Widths = {
        "prior": {"embedding_dim": embeds["projection_dim"]},
        "image_encoder": embeds,
    }
    pixels = decoder("in_channels")
    beside = (pixels and 2 * pixels, "noisy and the decoder's pixels")
    return {
        "text_encoder": {"projection_dim": (text("hidden_size"), "hidden states")},
        "text_proj": {"clip_embeddings_dim": embeds["projection_dim"]},
        "decoder": {
            "cross_attention_dim": (projection("cross_attention_dim"), "text_proj's tokens")
        },
        "super_res_first": {"in_channels": beside},
        "super_res_last": {"in_channels": beside},
        **{name: fields for name, fields in optional.items() if name in configs},
    }


def _total(configs: Sequence[Mapping[str, Any]], field: str) -> int | None:
    """The sum of a field, where all have it as a number."""
    values = [config.get(field) for config in configs]
    numbers = [value for value in values if isinstance(value, int)]
    return sum(numbers) if len(numbers) == len(values) else None


def _layout(folder: Path, pipeline: str | None) -> _Layout:
    for layout in _LAYOUTS:
        if pipeline in layout.pipelines:
            return layout
    supported = ", ".join(name for layout in _LAYOUTS for name in layout.pipelines)
    raise CheckpointError(f"{folder / INDEX} names {pipeline}; supported: {supported}")


def components_of(family: str) -> tuple[str, ...]:
    """The components that a family may have, text encoders in their order."""
    return tuple(_classes(family))


def component_beside(folder: Path, family: str, *, allow_pickle: bool) -> Component:
    """The component in a folder that is named for it, of the class that the family has there."""
    classes = _classes(family)[folder.name]
    return _component(folder, folder.name, classes[0], classes, allow_pickle)


def _classes(family: str) -> Mapping[str, tuple[str, ...]]:
    return next(layout.classes for layout in _LAYOUTS if layout.family == family)


def _scheduler(folder: Path, name: str, family: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler that the index names, as its folder and the published pipelines configure it."""
    config = read_json(folder / name / "scheduler_config.json")
    # A scheduler may lie there as another one was configured: diffusers goes by the index.
    named = index.get(name)
    if isinstance(named, list) and named and named[-1]:
        config = {**config, "_class_name": named[-1]}
    if config.get("_class_name") == "UnCLIPScheduler":
        return _as_ddpm(config)
    if family == "latent_unet" and config.get("_class_name") in _CLIPPING:
        config = {"clip_sample": True, **config}
    return scheduler_config(config | _MENDED.get(index["_class_name"], {}), family)


def _as_ddpm(config: Mapping[str, Any]) -> dict[str, Any]:
    """unCLIP's scheduler, which is DDPM's with settings of its own."""
    usual = {"clip_sample": True, "variance_type": "fixed_small_log"}
    own = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}
    return {**usual, **config, **own, "_class_name": "DDPMScheduler"}


def scheduler_config(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """A family's scheduler as configured, with what its published pipelines add."""
    if family == "flux":
        # What diffusers' FLUX pipelines hand to any scheduler: the last step starts at one step's time.
        return {**config, "flow_last_time": "step"}
    # Its SD3 pipelines take another largest shift than FLUX's where the scheduler's class has none of itself.
    has_own = config.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    if family == "sd3" and not has_own and config.get("max_shift") is None:
        return {**config, "max_shift": 1.16}
    return dict(config)


def _defaults(
    family: str,
    components: Mapping[str, Component],
    index: Mapping[str, Any],
    schedulers: Mapping[str, Any],
) -> dict[str, Any]:
    if family == "unclip":
        return unclip_settings({n: part.config for n, part in components.items()}, schedulers)
    vae = components["vae"].config
    if family != "latent_unet":
        # One that is named and null was left out; one that is not named the model never had.
        null = [
            name for name in index if name.startswith("text_encoder") and name not in components
        ]
        settings = flow_settings(family, components["transformer"].config, vae)
        return {**settings, "left_out": [encoder_stage(name) for name in null]}
    zeros = bool(index.get("force_zeros_for_empty_prompt", "XL" in index["_class_name"]))
    return default_settings(components["unet"].config, vae, force_zeros=zeros)


def _exported_defaults(folder: Path) -> dict[str, Any]:
    """What a bundle that the checkpoint is, too, says of requests that leave settings open."""
    return dict(read_manifest(folder)["defaults"]) if is_bundle(folder) else {}


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
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} has no weight_map")
    return sorted(set(names))


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name:  # an index may not point out of its folder
        raise CheckpointError(f"{folder}: the index names {name!r}, expected a file beside it")
    return folder / name


def _component(
    folder: Path, name: str, architecture: str, classes: Sequence[str], allow_pickle: bool
) -> Component:
    if architecture not in classes:
        raise CheckpointError(
            f"{folder.parent / INDEX}: {name} is a {architecture}; supported: {', '.join(classes)}"
        )
    config = read_json(existing_folder(folder) / "config.json")
    files = find_weights(folder, allow_pickle=allow_pickle)
    return Component(architecture, config, Weights(files, _translation(architecture), allow_pickle))


def _translation(architecture: str) -> Translate:
    if architecture in _VAES:
        return vae_key
    if architecture in _CLIP:
        return text_encoder_key
    if architecture in _T5:
        return t5_key
    return image_encoder_key if architecture.startswith("CLIPVision") else same_name


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


def t5_key(key: str) -> tuple[Target, ...]:
    """Some files hold the shared table of words a second time."""
    return () if key == "encoder.embed_tokens.weight" else (Target(key),)


def image_encoder_key(key: str) -> tuple[Target, ...]:
    """Older files have a buffer of position numbers."""
    return () if key.endswith(".position_ids") else (Target(key),)
