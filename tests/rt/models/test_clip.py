"""CLIP's encoders against transformers' own, in float32."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from tintype.checkpoints.diffusers import text_encoder_key
from tintype.errors import CheckpointError
from tintype.models.clip import (
    CLIPImageEncoder,
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
)
from tolerances import MODULE_FP32, relative_error

# Small towers with each published tower's own proportions of heads, activation and projection.
_COMMON = {"vocab_size": 1000, "bos_token_id": 998, "num_hidden_layers": 3}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT-L/14": {
        "hidden_act": "quick_gelu",
        "hidden_size": 48,
        "num_attention_heads": 3,
        "projection_dim": 48,
    },
    "OpenCLIP-H": {
        "hidden_act": "gelu",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "projection_dim": 32,
    },
    "OpenCLIP-bigG": {
        "hidden_act": "gelu",
        "hidden_size": 80,
        "num_attention_heads": 5,
        "projection_dim": 80,
    },
}


def text_pair(tower: str, *, projection: bool, eos: int) -> tuple[Any, CLIPTextEncoder]:
    settings = _COMMON | TOWERS[tower] | {"eos_token_id": eos}
    config = transformers.CLIPTextConfig(**settings, intermediate_size=4 * settings["hidden_size"])
    torch.manual_seed(0)
    peer = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = peer(config).eval()
    ours = CLIPTextEncoder(
        CLIPTextConfig.from_json(json.loads(config.to_json_string())), projection=projection
    ).eval()
    ours.load_state_dict({text_encoder_key(k)[0].name: v for k, v in theirs.state_dict().items()})
    return theirs, ours


def prompts(end: int) -> torch.Tensor:
    """A short prompt padded with the end token, a long one padded with 0, one that fills the window."""
    torch.manual_seed(1)
    ids = torch.randint(1, 990, (3, 77))
    ids[:, 0] = 998
    ids[0, 7:] = end
    ids[1, 40], ids[1, 41:] = end, 0
    ids[2, -1] = end
    return ids


# Early published configs say that the end token is 2; then it is the largest id.
@pytest.mark.parametrize("eos", [2, 999])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_text_encoding_equals_transformers(tower: str, projection: bool, eos: int) -> None:
    theirs, ours = text_pair(tower, projection=projection, eos=eos)
    expected = theirs(prompts(999), output_hidden_states=True)
    actual = ours(prompts(999))
    pooled = expected.text_embeds if projection else expected.pooler_output
    assert relative_error(actual.last_hidden_state, expected.last_hidden_state) <= MODULE_FP32
    assert relative_error(actual.penultimate, expected.hidden_states[-2]) <= MODULE_FP32
    assert relative_error(actual.pooled, pooled) <= MODULE_FP32


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_image_encoding_equals_transformers(act: str) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=42,
        patch_size=14,
        projection_dim=32,
        hidden_act=act,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    ours = CLIPImageEncoder(CLIPVisionConfig.from_json(json.loads(config.to_json_string()))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 42, 42)
    expected = theirs(pixels, output_hidden_states=True)
    assert relative_error(ours(pixels), expected.image_embeds) <= MODULE_FP32
    for mine, other in zip(ours.hidden_states(pixels), expected.hidden_states, strict=True):
        assert relative_error(mine, other) <= MODULE_FP32


@pytest.mark.parametrize("config", [CLIPTextConfig, CLIPVisionConfig])
def test_an_activation_that_is_not_there_is_refused(config: Any) -> None:
    with pytest.raises(CheckpointError, match="hidden_act='gelu_new'; possible here: quick_gelu"):
        config.from_json({"hidden_act": "gelu_new"})


def idle(module: torch.nn.Module) -> list[str]:
    """Parameters without a gradient; key biases cannot have one, as softmax ignores a constant."""
    return [
        name
        for name, value in module.named_parameters()
        if value.grad is None or (not value.grad.any() and not name.endswith("k_proj.bias"))
    ]


def test_a_training_step_reaches_every_text_parameter() -> None:
    _, ours = text_pair("OpenCLIP-H", projection=True, eos=999)
    ours(prompts(999)).pooled.square().sum().backward()
    assert idle(ours) == []


def test_a_training_step_reaches_every_image_parameter() -> None:
    config = CLIPVisionConfig(
        image_size=28,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    ours = CLIPImageEncoder(config)
    ours(torch.randn(1, 3, 28, 28)).square().sum().backward()
    assert idle(ours) == []
