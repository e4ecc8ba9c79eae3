"""What configurations say that nothing can be built of, or that does not fit: one line, when it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import tintype
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.files import read_json, safetensors_shapes
from tintype.errors import CheckpointError
from tolerances import MODULE_FP32, relative_error

Saved = Callable[[str], Path]
REQUEST = {"height": 32, "width": 32, "num_inference_steps": 2}


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Callable[[str], Path]:
    """kind -> a folder of the test's own, to damage."""
    return lambda kind: Path(shutil.copytree(saved(kind), tmp_path / kind))


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("component", "field", "value", "said"),
    [
        ("text_encoder", "num_attention_heads", None, "not a whole number"),
        ("text_encoder", "num_attention_heads", 0, "0 attention heads over 64 channels"),
        ("text_encoder", "num_attention_heads", 3, "3 attention heads over 64 channels"),
        ("text_encoder", "layer_norm_eps", None, "not a finite number"),
        ("text_encoder", "eos_token_id", [3], "not a whole number"),
        ("text_encoder", "vocab_size", -1, "not a whole number"),
        ("unet", "attention_head_dim", 3, "3 attention heads over 32 channels"),
        ("unet", "attention_head_dim", [8, 7, 8], "7 attention heads over 64 channels"),
        ("unet", "attention_head_dim", "8", "not a whole number of at least 0 or a list"),
        ("unet", "norm_eps", [1], "not a finite number"),
        ("unet", "freq_shift", None, "not a whole number"),
        ("unet", "down_block_types", [3], "not a list, each a string"),
        ("vae", "scaling_factor", None, "not a finite number"),
        ("vae", "scaling_factor", float("nan"), "not a finite number"),
        ("vae", "norm_num_groups", -1, "not a whole number"),
    ],
)
def test_a_field_of_another_kind_is_named(
    copied: Callable[[str], Path], component: str, field: str, value: object, said: str
) -> None:
    folder = copied("sd1")
    edit(folder / component / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=rf"{component}/config\.json.*{said}"):
        open_checkpoint(folder).component(component)


def test_rotations_that_do_not_fill_a_head_are_named(copied: Callable[[str], Path]) -> None:
    folder = copied("flux-dev")
    edit(folder / "transformer" / "config.json", axes_dims_rope=[4, 4])
    with pytest.raises(CheckpointError, match=r"axes_dims_rope=\[4, 4\] does not add up to"):
        open_checkpoint(folder).component("transformer")


@pytest.mark.parametrize(
    ("kind", "component", "field", "value"),
    [
        ("sd1", "unet", "sample_size", [3]),
        ("sd1", "unet", "in_channels", None),
        ("sd1", "vae", "block_out_channels", 3),
        ("sd1", "vae", "block_out_channels", []),
        ("sd1", "vae", "latent_channels", None),
        ("sd3", "transformer", "in_channels", "16"),
        ("flux-dev", "transformer", "joint_attention_dim", None),
    ],
)
def test_a_number_that_opening_reads_is_checked_then(
    copied: Callable[[str], Path], kind: str, component: str, field: str, value: object
) -> None:
    folder = copied(kind)
    edit(folder / component / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=rf"{component}/config\.json: {field}"):
        open_checkpoint(folder)


def test_both_sides_of_the_size_may_be_given(copied: Callable[[str], Path]) -> None:
    folder = copied("sd1")
    edit(folder / "unet" / "config.json", sample_size=[8, 16])
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.defaults["height"], checkpoint.defaults["width"]) == (64, 128)
    checkpoint.component("unet")


@pytest.mark.parametrize(
    ("kind", "component", "field", "said"),
    [
        ("sd1", "text_encoder", "hidden_size", "cross_attention_dim is 64, and the text encoders"),
        ("sd3", "text_encoder_3", "d_model", "joint_attention_dim is 48, and the words of T5"),
        ("sd3", "text_encoder_2", "projection_dim", "pooled_projection_dim is 40, and the CLIPs'"),
        ("flux-dev", "text_encoder", "hidden_size", "pooled_projection_dim is 16, and the CLIPs'"),
        ("flux-dev", "text_encoder_2", "d_model", "joint_attention_dim is 48, and the words of T5"),
    ],
)
def test_parts_of_other_models_are_told_when_a_folder_is_opened(
    copied: Callable[[str], Path], kind: str, component: str, field: str, said: str
) -> None:
    folder = copied(kind)
    edit(folder / component / "config.json", **{field: 128})
    with pytest.raises(CheckpointError, match=f"{said}.*the parts are of other models"):
        open_checkpoint(folder)


def test_a_text_encoder_with_fewer_places_than_its_tokenizer_gives_tokens_is_told(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("sd1")
    edit(folder / "text_encoder" / "config.json", max_position_embeddings=50)
    with pytest.raises(CheckpointError, match="places for 50 tokens, and its tokenizer gives 77"):
        tintype.load(folder)


@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_flows_have_no_codebook(copied: Callable[[str], Path], kind: str) -> None:
    folder = copied(kind)
    edit(folder / "model_index.json", vae=["diffusers", "VQModel"])
    with pytest.raises(CheckpointError, match="vae is a VQModel; supported: AutoencoderKL$"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_unets_pipeline_shifts_no_latents(copied: Callable[[str], Path], kind: str) -> None:
    folder = copied(kind)
    edit(folder / "vae" / "config.json", shift_factor=0.5)
    ours = tintype.load(folder)
    steps = {**REQUEST, "guidance_scale": 1.0, "output_type": "np"}
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    made = ours("red", latents=noise, **steps).images
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("red", latents=torch.from_numpy(noise), **steps).images
    assert relative_error(made, expected) < MODULE_FP32


def test_a_pointer_of_git_lfs_says_what_fetches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        safetensors_shapes(path)


def test_json_that_nests_without_end_is_not_readable(tmp_path: Path) -> None:
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    deep = b"[" * 100_000
    path.write_bytes(deep)
    weights.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        safetensors_shapes(weights)
