"""The static shapes that a checkpoint's stages are exported for, and arrays of those shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintype.checkpoints import Checkpoint
from tintype.errors import ProfileError
from tintype.families.conditioning import STAGES, Conditioning, joined
from tintype.loading import checkpoint_tokenizers
from tintype.models.stages import stage_component, stage_names
from tintype.models.unclip_projection import UnclipProjectionConfig
from tintype.profiles import Profile
from tintype.steps import HISTORY, STEPS, step_row
from tintype_kernels import Row

Arrays = dict[str, NDArray[Any]]
_STATE = (
    "sample",
    "history",
    "row",
    "noise",
)  # what a step is given besides what the denoiser is told
_ROW = Row(0.8, -0.6, 0.7, 0.1, (0.5, 0.3, -0.2, 0.1), s=0.2, guidance=5.0)


def profiles_of(
    checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]], batches: Sequence[int] = (1,)
) -> dict[str, list[str]]:
    """The profile names of every stage for pictures of ``sizes`` (width, height), ``batches`` of them a call."""
    told = checkpoint.family == "flux"  # is told its guidance, where others are run on two rows
    guided = sorted({n * each for n in batches for each in ((1,) if told else (1, 2))})
    rows = dict.fromkeys(("denoise", "prior"), guided)
    rows |= dict.fromkeys((*STEPS, "enlarge", "enlarge_last"), sorted(set(batches)))

    def names(stage: str) -> list[str]:
        if stage in STAGES:
            return ["b1"]
        return [Profile(*size, n).name for size in sizes for n in rows.get(stage, [1])]

    defaults = checkpoint.defaults
    shown = defaults["denoiser_channels"] != defaults["latent_channels"]  # inpaints: sees a mask
    absent = set(STEPS) if shown else {"guided_step"} if told else set()
    return {
        stage: names(stage) for stage in stage_names(checkpoint.components) if stage not in absent
    }


def check_sizes(checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises ProfileError where a side is not a multiple of what the model's sides come in, or unCLIP's own."""
    defaults = checkpoint.defaults
    own = defaults["width"], defaults["height"]
    for width, height in sizes if checkpoint.family == "unclip" else ():
        if (width, height) != own:
            raise ProfileError(
                f"size {width}x{height}: an unCLIP model draws its own, {own[0]}x{own[1]}"
            )
    multiple = defaults.get("size_multiple", defaults["latent_factor"])
    for width, height in sizes:
        if width % multiple or height % multiple or min(width, height) < multiple:
            raise ProfileError(
                f"size {width}x{height}: width and height must be multiples of {multiple}"
            )


def example_inputs(
    checkpoint: Checkpoint,
    names: Sequence[str],
    stage: str,
    profile: str,
    seed: int = 0,
    told: Conditioning | None = None,
) -> Arrays:
    """Arrays that ``stage`` takes at ``profile``: real token ids, unit noise, a time in the middle; text that is
    ``told``, or unit noise, too."""
    rng = np.random.default_rng(seed)
    defaults = checkpoint.defaults
    found = Profile.parse(profile) or Profile(defaults["width"], defaults["height"], 1)
    rows, factor = found.batch, defaults["latent_factor"]
    cells = (found.height // factor, found.width // factor)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    def text() -> Conditioning:
        return _conditioning(checkpoint, normal) if told is None else told

    latents = (rows, defaults["latent_channels"], *cells)
    makers: Mapping[str, Any] = {
        "input_ids": lambda: _tokens(checkpoint, stage),
        "sample": lambda: normal(rows, defaults["denoiser_channels"], *cells),
        "timestep": lambda: np.full(rows, 500.0, np.float32),
        "encoder_hidden_states": lambda: text().hidden.repeat(rows, axis=0),
        "text_embeds": lambda: np.repeat(text().pooled, rows, axis=0),  # type: ignore[arg-type]
        "guidance": lambda: np.full(rows, 3.5, np.float32),
        "time_ids": lambda: np.full((rows, 6), float(found.height), np.float32),
        "latents": lambda: normal(*latents),
        "history": lambda: normal(rows, HISTORY, *latents[1:]),
        "noise": lambda: normal(*latents),
        # every coefficient counts, as a row of unipc's has them
        "row": lambda: step_row(500.0, 0.9, _ROW)[None].repeat(rows, axis=0),
        "image": lambda: rng.random((rows, found.height, found.width, 3), np.float32),
        "control": lambda: rng.random((rows, found.height, found.width, 3), np.float32),
        "control_scale": lambda: rng.uniform(0.5, 1, rows).astype(np.float32),
    }
    if checkpoint.family == "unclip":
        makers = {**makers, **_cascade_makers(checkpoint, stage, found, normal)}
    arrays: Arrays = {name: makers[name]() for name in names}
    if stage in STEPS and STEPS[stage].guided:
        pairs = [name for name in names if name not in _STATE]
        other = {name: makers[name]() for name in pairs}
        if told is not None and "encoder_hidden_states" in other:  # what else a model may be told
            other["encoder_hidden_states"] = other["encoder_hidden_states"][:, ::-1]
        arrays |= {name: np.stack([other[name], arrays[name]], axis=1) for name in pairs}
    return arrays


def _cascade_makers(
    checkpoint: Checkpoint,
    stage: str,
    profile: Profile,
    normal: Callable[..., NDArray[np.float32]],
) -> dict[str, Callable[[], NDArray[Any]]]:
    """What unCLIP's stages take, where it is not what others do."""
    defaults, rows = checkpoint.defaults, profile.batch
    model = STEPS[stage].model if stage in STEPS else stage
    projection = UnclipProjectionConfig.from_json(checkpoint.configs["text_proj"])
    wide, added = projection.clip_embeddings_dim, projection.clip_extra_context_tokens
    ids = _tokens(checkpoint, "encode")
    # Of CLIP's words the end has the highest number.
    read = np.arange(ids.shape[1]) <= np.argmax(ids)
    pixels, factor = defaults["latent_channels"], defaults["latent_factor"]
    side = defaults.get("image_side", 0)
    small, large = ((pixels, profile.height // each, profile.width // each) for each in (factor, 1))
    sample = {"prior": (wide,), "denoise": small}.get(model, large)
    numbers = step_row(500.0, 0.9, _ROW)
    if model == "denoise" and defaults["learned_variance"]:
        numbers = np.append(numbers, np.array([-2.0, -0.5], np.float32))

    def mask(before: int) -> NDArray[np.float32]:
        return np.tile(np.pad(read, (before, 0), constant_values=True), (rows, 1)).astype(
            np.float32
        )

    return {
        "sample": lambda: normal(rows, *sample),
        "history": lambda: normal(rows, HISTORY, *sample),
        "noise": lambda: normal(rows, *sample),
        "row": lambda: numbers[None].repeat(rows, axis=0),
        "low_res": lambda: normal(rows, *large),
        "latents": lambda: normal(rows, wide),
        "image": lambda: (normal(rows, side, side, 3) / 4 + np.float32(0.5)).clip(0, 1),
        "image_embeds": lambda: normal(rows, wide),
        "shown": lambda: np.ones(rows, np.float32),
        "text_mask": lambda: mask(0),
        "context": lambda: normal(rows, added + len(read), projection.cross_attention_dim),
        "context_mask": lambda: mask(added),
        "added": lambda: normal(rows, projection.time_embed_dim),
    }


def _tokens(checkpoint: Checkpoint, stage: str) -> NDArray[np.int64]:
    encoders = [name for name in STAGES if name in stage_names(checkpoint.components)]
    tokenizer = checkpoint_tokenizers(checkpoint)[encoders.index(stage)]
    return tokenizer("a red lighthouse on a rocky coast at dusk")


def _conditioning(
    checkpoint: Checkpoint, normal: Callable[..., NDArray[np.float32]]
) -> Conditioning:
    """What the encoders tell the denoiser, joined as at run time, of normal values."""
    parts = {}
    for stage in stage_names(checkpoint.components):
        if stage in STAGES:
            config = checkpoint.configs[stage_component(stage, checkpoint.components)]
            tokens = _tokens(checkpoint, stage).shape[1]
            is_t5 = "d_model" in config
            hidden = normal(1, tokens, config["d_model" if is_t5 else "hidden_size"])
            pooled = None if is_t5 else normal(1, config["projection_dim"])
            parts[stage] = Conditioning(hidden, pooled)
    return joined(checkpoint.family, parts, checkpoint.defaults)
