"""T5's encoder against transformers' own: in float32, and in half precision where its values are too large for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tintype.errors import CheckpointError
from tintype.models.t5 import T5Config, T5Encoder, position_buckets
from tintype_bench import published_configs as published
from tolerances import MODULE_FP16, MODULE_FP32, relative_error

_SMALL = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 5,  # uneven: heads * d_kv is not the model's width
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}


def pair(std: float = 0.3) -> tuple[Any, T5Encoder]:
    theirs = transformers.T5EncoderModel(transformers.T5Config(**_SMALL)).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=std)
    ours = T5Encoder(T5Config.from_json(theirs.config.to_diff_dict())).eval()
    stored = theirs.state_dict()
    stored.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    ours.load_state_dict(stored, strict=True)
    return theirs, ours


# one token, a few, and more than the largest distance that has a bucket of its own
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_hidden_states_equal_transformers(tokens: int) -> None:
    theirs, ours = pair()
    ids = torch.randint(0, 50, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).last_hidden_state
        assert relative_error(ours(ids), expected) <= MODULE_FP32


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (32, 64)])
def test_buckets_of_positions_equal_transformers(buckets: int, farthest: int) -> None:
    """To the last boundary, which float32 decides."""
    fields = {
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": farthest,
    }
    places = torch.arange(512)
    distance = places[None, :] - places[:, None]
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(distance, True, buckets, farthest)
    assert np.array_equal(position_buckets(512, T5Config(**fields)), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_beyond_half_precision_do_no_harm(dtype: torch.dtype) -> None:
    _, ours = pair(std=2.0)
    for block in ours.encoder.block:  # gated values beyond 10**5, where float16 ends at 65504
        block.layer[1].DenseReluDense.wi_1.weight.data.mul_(200)
    ids = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    rounded = T5Encoder(ours.config).to(dtype)
    rounded.load_state_dict(ours.state_dict())
    ours.load_state_dict(rounded.state_dict())
    with torch.no_grad():
        expected, actual = ours(ids), rounded(ids)
    assert actual.dtype == dtype
    # bfloat16 keeps three bits less than float16
    scale = 8 if dtype == torch.bfloat16 else 1
    assert relative_error(actual.float(), expected) <= scale * MODULE_FP16


def test_a_training_step_reaches_every_parameter() -> None:
    _, ours = pair()
    ours(torch.arange(40)[None]).square().mean().backward()
    idle = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_at_full_size_names_and_shapes_equal_transformers() -> None:
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(**published.T5_XXL))
        ours = T5Encoder(T5Config.from_json(published.T5_XXL))
    found, expected = (
        {name: tuple(value.shape) for name, value in module.state_dict().items()}
        for module in (ours, theirs)
    )
    expected.pop("encoder.embed_tokens.weight")
    assert found == expected


@pytest.mark.parametrize("field", ["feed_forward_proj", "a_field_from_the_future"])
def test_a_config_that_asks_for_more_is_refused_by_name(field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        T5Config.from_json({field: "relu"})
