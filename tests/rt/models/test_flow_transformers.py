"""SD3's and FLUX's transformers against diffusers' own, in float32."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from tintype.errors import CheckpointError, RequestError
from tintype.models import flux as rotations
from tintype.models.flux import FluxConfig, FluxTransformer, packed, unpacked
from tintype.models.joint import rotation_at
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype_bench import published_configs as published
from tolerances import MODULE_FP32, relative_error

_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 12,
}
SD3 = {
    "sd3": _SD3,
    "sd35 medium": _SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd35 large": _SD3
    | {"qk_norm": "rms_norm", "num_attention_heads": 5}
    | {"caption_projection_dim": 80},
    "dual in the last block": _SD3 | {"dual_attention_layers": (2,)},
    "one block": _SD3 | {"num_layers": 1},
}
_FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
FLUX = {
    "dev": _FLUX | {"guidance_embeds": True},
    "schnell": _FLUX,
    "no single blocks": _FLUX | {"num_single_layers": 0},
    "no double blocks": _FLUX | {"num_layers": 0},
}
# square, wide, and the whole position table of SD3's small configuration
SIZES = [(8, 8), (4, 14), (24, 24)]


def inputs(height: int, width: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    sample = torch.randn(2, 4, height, width)
    return sample, torch.tensor([3.0, 741.0]), torch.randn(2, 7, 24), torch.randn(2, 20)


def pair(theirs: torch.nn.Module, ours: torch.nn.Module) -> Any:
    """Both with the same weights, of which none is left at a value that hides it."""
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def sd3(kind: str) -> Any:
    theirs = diffusers.SD3Transformer2DModel(**SD3[kind])
    return pair(theirs, SD3Transformer(SD3Config.from_json(theirs.config)))


def flux(kind: str) -> Any:
    theirs = diffusers.FluxTransformer2DModel(**FLUX[kind])
    return pair(theirs, FluxTransformer(FluxConfig.from_json(theirs.config)))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", SD3)
def test_sd3_equals_diffusers(kind: str, size: tuple[int, int]) -> None:
    theirs, ours = sd3(kind)
    sample, time, text, pooled = inputs(*size)
    with torch.no_grad():
        expected = theirs(sample, text, pooled, time).sample
        actual = ours(sample, time, text, pooled)
    assert relative_error(actual, expected) <= MODULE_FP32


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", FLUX)
def test_flux_equals_diffusers(kind: str, size: tuple[int, int]) -> None:
    theirs, ours = flux(kind)
    sample, time, text, pooled = inputs(*size)
    guidance = torch.tensor([3.5, 1.0]) if ours.config.guidance_embeds else None
    pipeline = diffusers.FluxPipeline
    tokens = pipeline._pack_latents(sample, 2, 4, *size)
    places = pipeline._prepare_latent_image_ids(2, size[0] // 2, size[1] // 2, "cpu", torch.float32)
    with torch.no_grad():
        out = theirs(tokens, text, pooled, time / 1000, places, torch.zeros(7, 3), guidance).sample
        actual = ours(sample, time, text, pooled, guidance)
    assert relative_error(packed(actual), out) <= MODULE_FP32


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packing_is_undone_by_unpacking(size: tuple[int, int]) -> None:
    sample = inputs(*size)[0]
    assert torch.equal(unpacked(packed(sample), *size), sample)


@pytest.mark.parametrize(("family", "kind"), [(sd3, "sd35 medium"), (sd3, "sd3"), (flux, "dev")])
def test_a_training_step_reaches_every_parameter(family: Any, kind: str) -> None:
    _, ours = family(kind)
    guidance = (torch.tensor([3.5, 1.0]),) if kind == "dev" else ()
    ours(*inputs(8, 8), *guidance).square().mean().backward()
    idle = {n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()}
    # SD3's last block drops its text, whose queries then ask in vain.
    assert all(".attn.add_q_proj." in name or ".attn.norm_added_q." in name for name in idle)
    assert len({name.split(".")[1] for name in idle}) == (kind != "dev")


def test_the_last_block_asks_nothing_for_its_text() -> None:
    """Nobody would read the answer."""
    _, ours = sd3("sd3")
    asked = []
    for number, block in enumerate(ours.transformer_blocks):
        block.attn.add_q_proj.register_forward_hook(lambda *_, n=number: asked.append(n))
    with torch.no_grad():
        ours(*inputs(8, 8))
    assert asked == [0, 1]


def test_rotations_are_made_once_for_all_steps_of_a_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, ours = flux("schnell")
    made = []
    monkeypatch.setattr(rotations, "rotation_at", lambda *a: made.append(a) or rotation_at(*a))
    with torch.inference_mode():
        for _ in range(3):
            ours(*inputs(6, 10))
    assert len(made) == 1
    # What was made while nothing could be trained serves training as well.
    ours(*inputs(6, 10)).sum().backward()


def test_a_picture_beyond_the_position_table_is_refused() -> None:
    _, ours = sd3("one block")
    with pytest.raises(RequestError, match="13x4 patches; the model has positions for 12x12"):
        ours(*inputs(26, 8))


@pytest.mark.parametrize(
    ("config", "field"), [(SD3Config, "qk_norm"), (FluxConfig, "time_factor"), (SD3Config, "gates")]
)
def test_a_config_that_asks_for_more_is_refused_by_name(config: Any, field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        config.from_json({field: "layer_norm"})


@pytest.mark.parametrize("model", published.SD3_TRANSFORMERS | published.FLUX_TRANSFORMERS)
def test_at_full_size_names_and_shapes_equal_diffusers(model: str) -> None:
    is_sd3 = model in published.SD3_TRANSFORMERS
    config = (published.SD3_TRANSFORMERS if is_sd3 else published.FLUX_TRANSFORMERS)[model]
    with torch.device("meta"):
        if is_sd3:
            theirs: Any = diffusers.SD3Transformer2DModel.from_config(config)
            ours: Any = SD3Transformer(SD3Config.from_json(config))
        else:
            theirs = diffusers.FluxTransformer2DModel.from_config(config)
            ours = FluxTransformer(FluxConfig.from_json(config))
    found, expected = (
        {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for module in (ours, theirs)
    )
    assert found == expected
