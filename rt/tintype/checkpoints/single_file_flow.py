"""Single files of SD3, SD3.5 and FLUX in the original layout: whole models, or a transformer with parts beside it.

What the file does not hold is looked for beside it, in the folders of diffusers' layout (`text_encoder/`, `vae/`, ...):
so lies the file in its own published repository. T5 may be missing of SD3, which then runs without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tintype.checkpoints.checkpoint import Checkpoint, Component, encoder_stage, flow_settings
from tintype.checkpoints.diffusers import (
    check_widths,
    component_beside,
    components_of,
    scheduler_config,
    t5_key,
    text_encoder_key,
)
from tintype.checkpoints.files import (
    Target,
    Translate,
    Weights,
    read_json,
    tokenizers_beside,
    within,
)
from tintype.checkpoints.original_config import (
    UNLIKE,
    Config,
    Shapes,
    below,
    clip_config,
    flux_config,
    sd3_config,
    t5_config,
    unlike,
    vae_config,
)
from tintype.checkpoints.original_flow_keys import flux_key, sd3_key
from tintype.checkpoints.original_keys import vae_key
from tintype.errors import CheckpointError

# The transformer of a whole model, and of a file that holds nothing else.
_PREFIXES = ("model.diffusion_model.", "")
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_CLIP_L, _CLIP_G, _T5 = (
    f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")
)


@dataclass(frozen=True)
class _Kind:
    """What tells a family apart by its keys, where its encoders lie, and what its file leaves out."""

    family: str
    block: str
    encoders: Mapping[str, str]
    latents: Mapping[str, float]  # how the autoencoder's are scaled


_KINDS = (
    _Kind(
        "sd3",
        "joint_blocks.0.",
        {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    _Kind(
        "flux",
        "double_blocks.0.",
        {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
)
_SD3_SCHEDULE = {"shift": 3.0}
_SCHNELL_SCHEDULE = {"shift": 1.0}
_DEV_SCHEDULE = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class _File:
    """An opened file, of which component after component is cut."""

    path: Path
    shapes: Shapes
    kind: _Kind
    allow_pickle: bool

    def holds(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)

    def part(
        self, architecture: str, prefix: str, config: Config, translate: Translate
    ) -> Component:
        weights = Weights((self.path,), partial(within, prefix, translate), self.allow_pickle)
        return Component(architecture, config, weights)


def is_flow(shapes: Shapes) -> bool:
    """Whether the keys are those of one of these families."""
    return _found(shapes) is not None


def open_flow(path: Path, shapes: Shapes, *, allow_pickle: bool) -> Checkpoint:
    """Open a single file whose keys are those of one of these families."""
    found = _found(shapes)
    assert found is not None
    kind, prefix = found
    file = _File(path, shapes, kind, allow_pickle)
    try:
        components = {
            "transformer": _transformer(file, prefix),
            **_inside(file),
        }
    except UNLIKE as error:
        raise unlike(path, kind.family, error) from error
    components |= _beside(file, components)
    check_widths(path, components)
    transformer, vae = components["transformer"].config, components["vae"].config
    encoders = [name for name in kind.encoders if name in components]
    left_out = [encoder_stage(name) for name in kind.encoders if name not in components]
    own = path.parent / "scheduler" / "scheduler_config.json"
    return Checkpoint(
        family=kind.family,
        source=path,
        # In the family's order, which is that of the tokenizers.
        components={n: components[n] for n in components_of(kind.family) if n in components},
        scheduler_config=scheduler_config(
            read_json(own) if own.is_file() else _schedule(kind, transformer), kind.family
        ),
        tokenizer_folders=tokenizers_beside(
            path, [name.replace("text_encoder", "tokenizer") for name in encoders]
        ),
        defaults={**flow_settings(kind.family, transformer, vae), "left_out": left_out},
    )


def _found(shapes: Shapes) -> tuple[_Kind, str] | None:
    for kind in _KINDS:
        for prefix in _PREFIXES:
            if any(key.startswith(prefix + kind.block) for key in shapes):
                return kind, prefix
    return None


def _transformer(file: _File, prefix: str) -> Component:
    own = below(file.shapes, prefix)
    if file.kind.family == "flux":
        return file.part("FluxTransformer2DModel", prefix, flux_config(own), flux_key)
    config = sd3_config(own)
    names = partial(sd3_key, layers=config["num_layers"])
    return file.part("SD3Transformer2DModel", prefix, config, names)


def _inside(file: _File) -> dict[str, Component]:
    """The components that the file holds besides its transformer."""
    parts = {
        name: _encoder(file, prefix)
        for name, prefix in file.kind.encoders.items()
        if file.holds(prefix)
    }
    for prefix in _VAE_PREFIXES:
        if file.holds(prefix):
            own = below(file.shapes, prefix)
            config = vae_config(own, sample_size=1024, **file.kind.latents)
            names = partial(vae_key, levels=len(config["block_out_channels"]))
            parts["vae"] = file.part("AutoencoderKL", prefix, config, names)
    return parts


def _encoder(file: _File, prefix: str) -> Component:
    own = below(file.shapes, prefix)
    if prefix == _T5:
        return file.part("T5EncoderModel", prefix, t5_config(own), t5_key)
    if prefix == _CLIP_G:
        config = {
            **clip_config(below(own, "text_model.")),
            "hidden_act": "gelu",
            "projection_dim": own["text_projection.weight"][0],
        }
        return file.part("CLIPTextModelWithProjection", prefix, config, text_encoder_key)
    # CLIP-L's pooled text is not projected, whatever the file holds.
    config = clip_config(below(own, "text_model."))
    return file.part("CLIPTextModel", prefix, config, _without_projection)


def _without_projection(key: str) -> tuple[Target, ...]:
    return () if key.startswith("text_projection") else text_encoder_key(key)


def _beside(file: _File, inside: Mapping[str, Component]) -> dict[str, Component]:
    """What the file lacks and folders beside it hold."""
    wanted = [name for name in (*file.kind.encoders, "vae") if name not in inside]
    found, missing = {}, []
    for name in wanted:
        folder = file.path.parent / name
        if folder.is_dir():
            found[name] = component_beside(folder, file.kind.family, allow_pickle=file.allow_pickle)
        elif name != "text_encoder_3":
            missing.append(name)
    if missing:
        raise CheckpointError(
            f"{file.path} holds no {', '.join(missing)}; put the folder(s) of that name, of the {file.kind.family} in "
            "diffusers layout, beside it, or load that folder instead"
        )
    return found


def _schedule(kind: _Kind, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that the model was published with."""
    own: Mapping[str, Any] = _SD3_SCHEDULE
    if kind.family == "flux":
        own = _DEV_SCHEDULE if transformer["guidance_embeds"] else _SCHNELL_SCHEDULE
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **own}
