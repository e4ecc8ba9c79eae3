"""Single files in the original layout: Stable Diffusion 1, 2 and XL, their inpainting variants, and flow models.

The kind is told by the text encoders' keys, the sizes by the shapes. Two things are not in such a
file. Its tokenizers are looked for beside it (`tokenizer/`, for XL also `tokenizer_2/`). And whether
a Stable Diffusion 2 predicts velocity (768 pixels) or noise (512 pixels, "base") is not in its keys:
as in diffusers it is taken for velocity unless the file's `global_step` is that of the base model, or
it is an inpainting model; a model that was trained to it says so by a key `v_pred`. A
`scheduler/scheduler_config.json` beside the file settles it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tintype.checkpoints.checkpoint import Checkpoint, Component, default_settings
from tintype.checkpoints.diffusers import check_widths, text_encoder_key
from tintype.checkpoints.files import (
    PICKLES,
    Target,
    Translate,
    Weights,
    check_pickle,
    read_json,
    safetensors_shapes,
    tokenizers_beside,
    within,
)
from tintype.checkpoints.original_config import (
    UNLIKE,
    Shapes,
    below,
    clip_config,
    open_clip_config,
    unet_config,
    unlike,
    vae_config,
)
from tintype.checkpoints.original_keys import open_clip_key, unet_key, vae_key
from tintype.checkpoints.single_file_flow import is_flow, open_flow
from tintype.errors import CheckpointError

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_BASE_STEP = 875000  # global_step of the published Stable Diffusion 2 base model
_INPAINTING_CHANNELS = 9
# Keys without values, by which an SDXL that was trained further says what it predicts, and from what it begins.
_VELOCITY, _ZERO_SNR = "v_pred", "ztsnr"
_EDM = "edm_"


class _Text(NamedTuple):
    """A text encoder: where its keys start, and which of the two layouts they follow."""

    prefix: str
    open_clip: bool = False
    projection: bool = False
    dropped_layers: int = 0


@dataclass(frozen=True)
class _Kind:
    """What tells a model apart, and what its file leaves out."""

    name: str
    text: tuple[_Text, ...]
    scheduler: str
    sample_size: int
    scaling_factor: float = 0.18215
    force_upcast: bool = False  # whether the published autoencoder overflows float16


_KINDS = (
    _Kind("SD 1", (_Text("cond_stage_model.transformer."),), "PNDMScheduler", 64),
    _Kind(
        "SD 2",
        # Conditions on the layer before the last, so the last is never run.
        (_Text("cond_stage_model.model.", open_clip=True, dropped_layers=1),),
        "DDIMScheduler",
        96,
    ),
    _Kind(
        "SDXL",
        (
            _Text("conditioner.embedders.0.transformer."),
            _Text("conditioner.embedders.1.model.", open_clip=True, projection=True),
        ),
        "EulerDiscreteScheduler",
        128,
        0.13025,
        force_upcast=True,
    ),
)


def open_file(path: Path, *, allow_pickle: bool) -> Checkpoint:
    """Open a single file in the original layout."""
    check_pickle(path, allow_pickle)
    shapes = _shapes(path)
    if is_flow(shapes):
        return open_flow(path, shapes, allow_pickle=allow_pickle)
    kind = _kind(path, shapes)
    try:
        prediction = _prediction_type(path, kind, shapes)
        components = _components(path, shapes, kind, prediction, allow_pickle)
    except UNLIKE as error:
        raise unlike(path, kind.name, error) from error
    check_widths(path, components)
    own = path.parent / "scheduler" / "scheduler_config.json"
    return Checkpoint(
        family="latent_unet",
        source=path,
        components=components,
        scheduler_config=read_json(own)
        if own.is_file()
        else _scheduler(kind, prediction, zero_snr=_ZERO_SNR in shapes),
        tokenizer_folders=tokenizers_beside(path, ("tokenizer", "tokenizer_2")[: len(kind.text)]),
        defaults=default_settings(
            components["unet"].config, components["vae"].config, force_zeros=kind.name == "SDXL"
        ),
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix not in PICKLES:
        return safetensors_shapes(path)
    from tintype.checkpoints.weights import read_pickle

    return {key: tuple(value.shape) for key, value in read_pickle(path).items()}


def _kind(path: Path, shapes: Shapes) -> _Kind:
    has_modules = all(any(key.startswith(p) for key in shapes) for p in (_UNET, _VAE))
    if any(key.startswith(_EDM) for key in shapes):
        raise CheckpointError(
            f"{path} was trained on EDM's noise levels, as its key {_EDM}* says (Playground 2.5, CosXL); a single file "
            "of this kind is not supported, SDXL itself is"
        )
    for kind in _KINDS:
        if has_modules and all(any(k.startswith(t.prefix) for k in shapes) for t in kind.text):
            return kind
    raise CheckpointError(
        f"{path} is no whole model in the original layout of {', '.join(k.name for k in _KINDS)}, SD3 or FLUX; "
        f"expected keys under {_UNET}*, {_VAE}* and those of its text encoder, such as "
        f"{_KINDS[0].text[0].prefix}*; found {', '.join(list(shapes)[:3]) or 'nothing'}, ..."
    )


def _prediction_type(path: Path, kind: _Kind, shapes: Shapes) -> str:
    if _VELOCITY in shapes:
        return "v_prediction"
    inpainting = shapes.get(f"{_UNET}input_blocks.0.0.weight", (0, 0))[1] == _INPAINTING_CHANNELS
    if kind.name != "SD 2" or inpainting or _global_step(path, shapes) == _BASE_STEP:
        return "epsilon"
    return "v_prediction"


def _global_step(path: Path, shapes: Shapes) -> int | None:
    if "global_step" not in shapes:
        return None
    if path.suffix in PICKLES:
        from tintype.checkpoints.weights import read_pickle

        return _number(read_pickle(path)["global_step"])
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return _number(file.get_tensor("global_step"))


def _number(values: Any) -> int | None:
    """What an array or tensor of one element holds; None for any other."""
    return int(values.reshape(-1)[0]) if math.prod(values.shape) == 1 else None


def _components(
    path: Path, shapes: Shapes, kind: _Kind, prediction: str, allow_pickle: bool
) -> dict[str, Component]:
    small = kind.name == "SD 2" and prediction == "epsilon"
    sample_size = 64 if small else kind.sample_size

    def part(architecture: str, config: dict[str, Any], prefix: str, key: Translate) -> Component:
        weights = Weights((path,), partial(within, prefix, key), allow_pickle)
        return Component(architecture, config, weights)

    texts = [_text_encoder(below(shapes, text.prefix), text) for text in kind.text]
    names = ("text_encoder", "text_encoder_2")[: len(texts)]
    encoders = {
        name: part(architecture, config, text.prefix, key)
        for name, text, (architecture, config, key) in zip(names, kind.text, texts, strict=True)
    }
    pooled = texts[-1][1]["projection_dim"] if kind.text[-1].projection else None
    unet = unet_config(below(shapes, _UNET), sample_size=sample_size, pooled=pooled)
    vae = vae_config(
        below(shapes, _VAE),
        sample_size=8 * sample_size,
        scaling_factor=kind.scaling_factor,
    )
    vae |= {"force_upcast": kind.force_upcast}
    unet_names = partial(unet_key, layers=unet["layers_per_block"])
    vae_names = partial(vae_key, levels=len(vae["block_out_channels"]))
    return {
        **encoders,
        "unet": part("UNet2DConditionModel", unet, _UNET, unet_names),
        "vae": part("AutoencoderKL", vae, _VAE, vae_names),
    }


def _text_encoder(shapes: Shapes, text: _Text) -> tuple[str, dict[str, Any], Translate]:
    if not text.open_clip:
        return "CLIPTextModel", clip_config(_bare(shapes)), text_encoder_key
    config = open_clip_config(shapes, dropped_layers=text.dropped_layers)
    architecture = "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"
    key: Callable[[str], tuple[Target, ...]] = partial(
        open_clip_key, layers=config["num_hidden_layers"], projection=text.projection
    )
    return architecture, config, key


def _bare(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix("text_model."): shape for key, shape in shapes.items()}


def _scheduler(kind: _Kind, prediction: str, *, zero_snr: bool) -> dict[str, Any]:
    """The configuration that the model was published with."""
    return {
        "_class_name": kind.scheduler,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": prediction,
        "rescale_betas_zero_snr": zero_snr,
    }
