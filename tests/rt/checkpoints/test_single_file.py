"""Single files in the original layout; diffusers' own conversion is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import original_layout
import tintype
from diffusers_schedulers import compare
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.original_config import below, open_clip_config, unet_config, vae_config
from tintype.checkpoints.original_keys import open_clip_key, unet_key, vae_key
from tintype.errors import CheckpointError
from tintype.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tintype.models.clip import CLIPTextConfig as OurTextConfig
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tintype.schedulers import ScheduleConfig, default_name, make_table
from tintype_bench import published_configs

KINDS = tuple(original_layout.SMALL)
PUBLISHED_SCHEDULERS = {
    "sd1": published_configs.SD15_SCHEDULER,
    "sd_inpainting": published_configs.SD15_SCHEDULER,
    "sdxl": published_configs.SDXL_SCHEDULER,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """(kind, changed tensors, suffix) -> a small single file with its tokenizers beside it."""

    def file(
        kind: str, changes: dict[str, Any] | None = None, suffix: str = ".safetensors"
    ) -> Path:
        if suffix == ".safetensors":
            return original_layout.save(kind, tmp_path, changes)
        path = original_layout.save(kind, tmp_path).with_suffix(suffix)
        tensors = original_layout.SMALL[kind].tensors() | (changes or {})
        torch.save({"state_dict": tensors, "global_step": 875000}, path)
        return path

    return file


def by_diffusers(kind: str, name: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What diffusers makes of component `name` of a small file."""
    tensors = original_layout.SMALL[kind].tensors()
    if name == "unet":
        return oracle.convert_ldm_unet_checkpoint(tensors, config)
    if name == "vae":
        return oracle.convert_ldm_vae_checkpoint(
            tensors, config | {"up_block_types": [""] * 4, "down_block_types": [""] * 4}
        )
    prefixes = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
    if kind == "sd2" or name == "text_encoder_2":
        width = {k: config[k] for k in ("hidden_size", "projection_dim", "num_attention_heads")}
        with torch.device("meta"):
            peer = CLIPTextModelWithProjection(CLIPTextConfig(**width))
        return oracle.convert_open_clip_checkpoint(peer, tensors, prefix=prefixes[kind])
    return oracle.convert_ldm_clip_checkpoint(tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_equals_diffusers_conversion(write: Write, kind: str) -> None:
    checkpoint = open_checkpoint(write(kind))
    for name, config in checkpoint.configs.items():
        expected = by_diffusers(kind, name, dict(config))
        ours = checkpoint.component(name).state_dict()
        unused = set(expected) - set(ours)
        assert set(ours) <= set(expected)
        # diffusers leaves these to its lenient loading: the last layer, which SD 2 never runs, and a buffer.
        assert all(
            ".layers.2." in key
            or key in ("text_projection.weight", "text_model.embeddings.position_ids")
            for key in unused
        )
        assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


@pytest.mark.parametrize("model", original_layout.PUBLISHED)
def test_full_size_files_give_the_published_configurations(model: str) -> None:
    spec = original_layout.PUBLISHED[model]
    shapes, published = spec.shapes(), published_configs.UNETS[model]
    pooled = spec.texts[-1][1].projection
    unet = UNetConfig.from_json(
        unet_config(
            below(shapes, "model.diffusion_model."),
            sample_size=published["sample_size"],
            pooled=pooled,
        )
    )
    expected = UNetConfig.from_json(published)
    heads = [expected.attention_head_dim] * 4 if model == "sd15" else expected.attention_head_dim
    assert list(unet.attention_head_dim) == list(heads)  # type: ignore[arg-type]
    same = (
        "in_channels",
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "cross_attention_dim",
    )
    same += (
        "use_linear_projection",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    assert [getattr(unet, field) for field in same] == [getattr(expected, field) for field in same]
    vae = published_configs.VAES[model]
    scaling = vae.get("scaling_factor", 0.18215)
    ours = vae_config(
        below(shapes, "first_stage_model."), sample_size=vae["sample_size"], scaling_factor=scaling
    )
    assert AutoencoderKLConfig.from_json(ours) == AutoencoderKLConfig.from_json(vae)


@pytest.mark.parametrize("model", original_layout.PUBLISHED)
def test_full_size_keys_are_exactly_our_modules_parameters(model: str) -> None:
    shapes = original_layout.PUBLISHED[model].shapes()
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(published_configs.UNETS[model]))
        vae = AutoencoderKL(AutoencoderKLConfig.from_json(published_configs.VAES[model]))
    for prefix, module, translate in (
        ("model.diffusion_model.", unet, lambda key: unet_key(key, layers=2)),
        ("first_stage_model.", vae, lambda key: vae_key(key, levels=4)),
    ):
        found = {
            target.name: target.shape(shape)
            for key, shape in below(shapes, prefix).items()
            for target in translate(key)
        }
        assert found == {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("model", "dropped"), [("sd21", 1), ("sdxl", 0)])
def test_full_size_open_clip_gives_the_published_configuration(model: str, dropped: int) -> None:
    prefix, _ = original_layout.PUBLISHED[model].texts[-1]
    shapes = below(original_layout.PUBLISHED[model].shapes(), prefix)
    ours = OurTextConfig.from_json(open_clip_config(shapes, dropped_layers=dropped))
    config, projection = published_configs.TEXT_ENCODERS["sdxl_2" if model == "sdxl" else model]
    expected = OurTextConfig.from_json(config)
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
    )
    fields += ("projection_dim",) * projection
    assert [getattr(ours, f) for f in fields] == [getattr(expected, f) for f in fields]


def test_the_fused_attention_projection_is_cut_into_query_key_and_value() -> None:
    targets = open_clip_key(
        "transformer.resblocks.0.attn.in_proj_weight", layers=1, projection=False
    )
    assert [(t.name.split(".")[-2], t.part, t.parts) for t in targets] == [
        ("q_proj", 0, 3),
        ("k_proj", 1, 3),
        ("v_proj", 2, 3),
    ]


@pytest.mark.parametrize(
    ("kind", "scheduler", "prediction", "channels", "stages"),
    [
        ("sd1", "PNDMScheduler", "epsilon", 4, 1),
        ("sd2", "DDIMScheduler", "v_prediction", 4, 1),
        ("sdxl", "EulerDiscreteScheduler", "epsilon", 4, 2),
        ("sd_inpainting", "PNDMScheduler", "epsilon", 9, 1),
    ],
)
def test_kinds_are_told_apart_by_their_keys(
    write: Write, kind: str, scheduler: str, prediction: str, channels: int, stages: int
) -> None:
    checkpoint = open_checkpoint(write(kind))
    assert checkpoint.scheduler_config["_class_name"] == scheduler
    assert checkpoint.scheduler_config["prediction_type"] == prediction
    assert checkpoint.defaults["denoiser_channels"] == channels
    assert len(checkpoint.tokenizer_folders) == stages


def test_the_base_models_step_count_means_noise_prediction(write: Write) -> None:
    checkpoint = open_checkpoint(write("sd2", {"global_step": torch.tensor(875000)}))
    assert checkpoint.scheduler_config["prediction_type"] == "epsilon"
    assert checkpoint.defaults["height"] == 512


@pytest.mark.parametrize("kind", PUBLISHED_SCHEDULERS)
def test_the_schedule_is_the_published_models(write: Write, kind: str) -> None:
    own, published = open_checkpoint(write(kind)).scheduler_config, PUBLISHED_SCHEDULERS[kind]
    for field in published.keys() & {each.name for each in fields(ScheduleConfig)}:
        assert (own.get(field) or None) == (published[field] or None), field
    name = default_name(published)
    ours, theirs = make_table(default_name(own), own, 50), make_table(name, published, 50)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [[875000], [1, 2], []])
def test_a_step_count_may_be_an_array(write: Write, steps: list[int]) -> None:
    checkpoint = open_checkpoint(write("sd2", {"global_step": torch.tensor(steps)}))
    expected = "epsilon" if steps == [875000] else "v_prediction"
    assert checkpoint.scheduler_config["prediction_type"] == expected


def test_an_sdxl_that_was_trained_further_says_what_it_predicts(write: Write) -> None:
    """As the models' authors configure diffusers for them, which does not read these keys."""
    keys = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    own = open_checkpoint(write("sdxl", keys)).scheduler_config
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert own == open_checkpoint(write("sdxl")).scheduler_config | changes
    known = EulerDiscreteScheduler().config.keys() - {"_class_name"}
    compare("euler", {name: own[name] for name in known & own.keys()}, 10)


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_an_sdxl_of_other_noise_levels_is_refused(write: Write, key: str) -> None:
    with pytest.raises(CheckpointError, match="EDM's noise levels"):
        open_checkpoint(write("sdxl", {key: torch.ones(1)}))


def test_a_text_encoder_of_another_model_is_told(write: Write) -> None:
    wider = {
        name: torch.zeros(shape[0], 72)
        for name, shape in original_layout.SMALL["sd1"].shapes().items()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    with pytest.raises(CheckpointError, match="cross_attention_dim is 72, and the text encoders"):
        open_checkpoint(write("sd1", wider))


@pytest.mark.parametrize("name", ["input_blocks.0.0.weight", "out.2.weight"])
def test_a_tensor_without_its_dimensions_is_told(write: Write, name: str) -> None:
    with pytest.raises(CheckpointError, match="not the shape that its name promises"):
        open_checkpoint(write("sd1", {f"model.diffusion_model.{name}": torch.zeros(())}))


@pytest.mark.parametrize(("kind", "overflows"), [("sd1", False), ("sdxl", True)])
def test_the_autoencoder_of_xl_is_known_to_overflow_float16(
    write: Write, kind: str, overflows: bool
) -> None:
    """As its published configuration says; a decoder that is told computes once, and not again in float32."""
    assert open_checkpoint(write(kind)).configs["vae"]["force_upcast"] is overflows


def test_a_scheduler_beside_the_file_decides(write: Write) -> None:
    path = write("sd2")
    own = path.parent / "scheduler" / "scheduler_config.json"
    own.parent.mkdir()
    own.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}))
    assert open_checkpoint(path).scheduler_config["prediction_type"] == "epsilon"


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_single_file_makes_latents(write: Write, kind: str) -> None:
    pipe = tintype.load(write(kind))
    out = pipe(
        "red",
        height=32,
        width=32,
        num_inference_steps=2,
        scheduler="ddim",
        seed=1,
        output_type="latent",
    )
    assert out.images.shape == (1, 4, 4, 4)


def test_a_file_without_a_tokenizer_beside_it_says_what_to_put_there(write: Write) -> None:
    path = write("sdxl")
    (path.parent / "tokenizer_2").rename(path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tokenizer_2 is missing; put .* there"):
        open_checkpoint(path)


def test_a_file_of_another_model_says_what_was_expected(tmp_path: Path) -> None:
    save_file({"lora.up.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.diffusion_model\..*lora\.up\.weight"):
        open_checkpoint(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("model.diffusion_model.out.2.weight", r"out\.2\.weight"),
        ("model.diffusion_model.input_blocks.1.", r"input_blocks\.1\.0"),
        ("first_stage_model.encoder.conv_in", r"encoder\.conv_in"),
        ("cond_stage_model.transformer.text_model.embeddings.token", r"embeddings\.token"),
    ],
)
def test_a_missing_block_is_named(write: Write, gone: str, named: str) -> None:
    path = write("sd1")
    tensors = original_layout.SMALL["sd1"].tensors()
    save_file({k: v for k, v in tensors.items() if not k.startswith(gone)}, path)
    with pytest.raises(CheckpointError, match=f"incomplete: .*{named}"):
        open_checkpoint(path)


def test_a_missing_tensor_is_named(write: Write) -> None:
    path = write("sd1")
    tensors = original_layout.SMALL["sd1"].tensors()
    del tensors["first_stage_model.decoder.mid.attn_1.k.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.mid_block.*to_k\.bias"):
        open_checkpoint(path).component("vae")


def test_an_unexpected_key_is_named_as_the_file_has_it(write: Write) -> None:
    key = "model.diffusion_model.control.0.weight"
    checkpoint = open_checkpoint(write("sd1", {key: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*control\.0\.weight"):
        checkpoint.component("unet")


def test_a_pickled_file_needs_consent(write: Write) -> None:
    path = write("sd2", suffix=".ckpt")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, allow_pickle=True)
    assert (
        checkpoint.scheduler_config["prediction_type"] == "epsilon"
    )  # by the step count beside the weights
    assert checkpoint.component("vae").config.block_out_channels == (32, 32, 64, 64)


@pytest.mark.parametrize("content", [b"", b"hello" * 10, b"version https://git-lfs.github.com"])
def test_a_file_that_is_no_pickle_is_told(write: Write, content: bytes) -> None:
    path = write("sd1", suffix=".ckpt")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as plain weights \(\w+\): [^\n]*$"):
        open_checkpoint(path, allow_pickle=True)


def test_keys_that_are_no_names_are_left_alone(write: Write) -> None:
    path = write("sd1", suffix=".ckpt")
    torch.save({1: torch.zeros(2), **original_layout.SMALL["sd1"].tensors()}, path)
    assert open_checkpoint(path, allow_pickle=True).component("vae")
