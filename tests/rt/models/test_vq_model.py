"""VQGAN's autoencoder against diffusers' own, its codebook, its tiling, and its float16 scaling."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import small_checkpoints
from tintype.backends.torch import made_safe
from tintype.errors import CheckpointError
from tintype.models.autoencoder_kl import decode_tiled, encode_tiled
from tintype.models.vq_model import Codebook, VQModel, VQModelConfig
from tolerances import MODULE_FP32, relative_error

# One level, whose latents are as large as the picture; entries as wide as what is around them, and of another width.
CONFIGURATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one level": ((32,), {"vq_embed_dim": None}),
    "three levels": ((32, 64, 64), {"vq_embed_dim": None, "layers_per_block": 2}),
    "wide entries": ((32, 64), {"vq_embed_dim": 12, "latent_channels": 4}),
    "narrow entries": ((32, 32, 64, 64), {"vq_embed_dim": 2, "latent_channels": 8}),
}
# group norms of a tile are of its own 32 by 32 cells, whose means are off by some 1/32 of a deviation, layer by layer
TILED = 0.15
ROUNDING = 2.0**-24  # of float32


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, VQModel]:
    torch.manual_seed(0)
    widths, changes = CONFIGURATIONS[request.param]
    theirs = small_checkpoints.vq_model(*widths, **changes).eval()
    ours = VQModel(VQModelConfig.from_json(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


one_configuration = pytest.mark.parametrize("pair", ["three levels"], indirect=True)


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def latents(model: VQModel, height: int, width: int) -> torch.Tensor:
    """Unscaled latents of as many channels as the codebook's entries have."""
    channels = model.quantize.embedding.embedding_dim
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(2))
    return model.from_model(noise)


@torch.no_grad()
def test_encoded_latents_equal_diffusers(pair: tuple[Any, VQModel]) -> None:
    theirs, ours = pair
    expected = theirs.encode(image(48, 32)).latents
    assert relative_error(ours.means(image(48, 32)), expected) <= MODULE_FP32


@torch.no_grad()
def test_decoded_image_equals_diffusers(pair: tuple[Any, VQModel]) -> None:
    theirs, ours = pair
    given = latents(ours, 8, 6)
    assert relative_error(ours.decode(given), theirs.decode(given).sample) <= MODULE_FP32


@one_configuration
def test_losses_and_their_gradients_equal_diffusers(pair: tuple[Any, VQModel]) -> None:
    """diffusers adds both up, the entries' quartered."""
    found = []
    for model in copy.deepcopy(pair):
        given = latents(pair[1], 8, 6).requires_grad_()
        if isinstance(model, VQModel):
            entries, cells = model.quantize.losses(given)
            loss = cells + entries / 4
        else:
            loss = model.quantize(given)[1]
        loss.backward()
        found.append((loss.detach(), given.grad, model.quantize.embedding.weight.grad))
    for expected, actual in zip(*found, strict=True):
        assert actual.any()
        assert relative_error(actual, expected) <= MODULE_FP32


@one_configuration
def test_a_training_step_reaches_every_parameter(pair: tuple[Any, VQModel]) -> None:
    ours = copy.deepcopy(pair[1])
    cells = ours.means(image(16, 24))
    (ours.decode(cells).square().mean() + sum(ours.quantize.losses(cells))).backward()
    # A constant shift of every key's score leaves the softmax as it is, so key biases have no gradient.
    still = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in still if not n.endswith("to_k.bias")] == []


@one_configuration
def test_a_gradient_goes_through_the_rounding_as_if_there_were_none(
    pair: tuple[Any, VQModel],
) -> None:
    ours = copy.deepcopy(pair[1])
    given = latents(ours, 4, 6).requires_grad_()
    ours.decode(given).square().sum().backward()
    with torch.no_grad():
        entries = ours.quantize(given)
    entries.requires_grad_()
    ours.decoder(ours.post_quant_conv(entries)).square().sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, entries.grad)
    assert ours.quantize.embedding.weight.grad is None


def distances(cells: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Squared distances [n, h, w, entries] of cells [n, c, h, w] from entries, in float64."""
    apart = cells.movedim(1, -1)[..., None, :].double() - entries.double()
    return apart.square().sum(-1)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("entries", "width"), [(1, 3), (500, 3), (2000, 64)])
@torch.no_grad()
def test_cells_are_rounded_to_the_nearest_entry_whatever_is_computed_in(
    entries: int, width: int, stored: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    book = Codebook(entries, width)
    torch.nn.init.normal_(book.embedding.weight)
    book.to(stored)
    cells = torch.randn(2, width, 9, 7)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        numbers, rounded = book.nearest(cells), book(cells)
    assert rounded.dtype == stored
    assert torch.equal(rounded, book.embedding.weight[numbers].movedim(-1, 1))
    apart = distances(cells, book.embedding.weight)
    least = apart.amin(-1)
    # Of two entries that lie nearer to each other than sums of so many products are rounded to, either may be found.
    sizes = cells.double().square().sum(1) + book.embedding.weight.double().square().sum(1).max()
    chosen = apart.gather(-1, numbers[..., None])[..., 0]
    assert (chosen - least <= 4 * width**0.5 * ROUNDING * sizes).all()
    assert (numbers == apart.argmin(-1)).float().mean() > 0.99


@one_configuration
@torch.no_grad()
def test_entries_are_rounded_to_themselves(pair: tuple[Any, VQModel]) -> None:
    book = pair[1].quantize
    entries = book.embedding.weight[:, :, None, None]
    assert torch.equal(book(entries), entries)


@one_configuration
@torch.no_grad()
def test_tiles_change_little(pair: tuple[Any, VQModel]) -> None:
    ours, given, pixels = pair[1], latents(pair[1], 48, 36), image(192, 144)
    whole, tiled = ours.decode(given), decode_tiled(ours, given, tile=32)
    assert 0 < (tiled - whole).norm() / whole.norm() < TILED
    whole, tiled = ours.means(pixels), encode_tiled(ours, pixels, tile=128)
    assert 0 < (tiled - whole).norm() / whole.norm() < TILED


@one_configuration
@torch.no_grad()
def test_scaling_the_residual_stream_leaves_the_output(pair: tuple[Any, VQModel]) -> None:
    ours, given = pair[1], latents(pair[1], 8, 8)
    scaled: Any = made_safe(copy.deepcopy(ours), {"force_upcast": True}, torch.float16)
    assert not torch.equal(scaled.decoder.conv_in.weight, ours.decoder.conv_in.weight)
    assert relative_error(scaled.decode(given), ours.decode(given)) <= MODULE_FP32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]),
        ("lookup_from_codebook", True),
        ("mid_block_add_attention", False),
        ("norm_type", "spatial"),
        ("vq_embed_dim", "3"),
        ("a_field_from_the_future", 1),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_name(field: str, value: object) -> None:
    config = small_checkpoints.vq_model(32, 32).config
    with pytest.raises(CheckpointError, match=rf"^vae/config\.json.*{field}="):
        VQModelConfig.from_json({**config, field: value})


def test_a_config_says_how_large_the_codebook_is() -> None:
    with pytest.raises(CheckpointError, match=r"lacks .* latent_channels, num_vq_embeddings$"):
        VQModelConfig.from_json({"block_out_channels": [32]})
