"""Folders in diffusers layout, whole and in shards, in every spelling that has been published."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_checkpoints
from tintype.checkpoints import open_checkpoint
from tintype.errors import CheckpointError

Saved = Callable[[str], Path]
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Path:
    """A Stable Diffusion 1 folder of the test's own, to damage."""
    return Path(shutil.copytree(saved("sd1"), tmp_path / "sd1"))


def rewrite(
    path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Save what `change` makes of a file's tensors in its place."""
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    path.unlink()
    save_file(change(tensors), path)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", small_checkpoints.KINDS)
def test_every_component_holds_what_diffusers_saved(saved: Saved, kind: str) -> None:
    checkpoint = open_checkpoint(saved(kind))
    made = small_checkpoints.parts(kind)
    assert set(checkpoint.components) == {
        name for name in made if hasattr(made[name], "state_dict")
    }
    for name in checkpoint.components:
        stored = made[name].state_dict()
        ours = checkpoint.component(name).state_dict()
        assert len(ours) == len(stored)
        prefix = (
            "" if name in ("unet", "vae") or "text_projection.weight" in stored else "text_model."
        )
        assert [key for key in stored if not torch.equal(ours[prefix + key], stored[key])] == []


@pytest.mark.parametrize(
    ("kind", "guidance", "zeros", "tokenizers"),
    [
        ("sd1", 7.5, False, 1),
        ("sd2", 7.5, False, 1),
        ("sdxl", 5.0, True, 2),
        ("sd_vq", 7.5, False, 1),
    ],
)
def test_defaults_are_the_published_ones(
    saved: Saved, kind: str, guidance: float, zeros: bool, tokenizers: int
) -> None:
    checkpoint = open_checkpoint(saved(kind))
    expected = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 50,
        "guidance_scale": guidance,
        "force_zeros_for_empty_prompt": zeros,
        "latent_channels": 4,
        "latent_factor": 8,
        "denoiser_channels": 4,
    }
    assert checkpoint.defaults == expected
    assert len(checkpoint.tokenizer_folders) == tokenizers
    assert checkpoint.family == "latent_unet"


@pytest.mark.parametrize("kind", ["sd1", "sd_inpainting", "sdxl"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("clip", [None, False, True])
def test_schedulers_are_configured_as_diffusers_pipelines_do(
    saved: Saved, tmp_path: Path, kind: str, scheduler: str, clip: bool | None
) -> None:
    """The index names the class, and the oldest configurations of Stable Diffusion are mended."""
    folder = shutil.copytree(saved(kind), tmp_path / "copy")
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    old = {
        "_class_name": "EulerDiscreteScheduler",
        "steps_offset": 0,
        "skip_prk_steps": False,
        "beta_schedule": "scaled_linear",
    }
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(old if clip is None else {**old, "clip_sample": clip}))
    theirs = small_checkpoints.PIPELINES[kind].from_pretrained(folder).scheduler
    ours = open_checkpoint(folder).scheduler_config
    assert ours["_class_name"] == type(theirs).__name__
    for field in {*old, "clip_sample"} & {*theirs.config} - {"_class_name"}:
        assert ours.get(field, False) == theirs.config[field], field


@pytest.mark.parametrize(
    "fields",
    [
        {"in_channels": "4"},
        {"block_out_channels": []},
        {"norm_num_groups": 7},
        {"up_block_types": ["UpBlock2D"]},
        {"layers_per_block": None},
    ],
    ids=str,
)
def test_a_configuration_that_nothing_can_be_built_of_is_named(
    copied: Path, fields: dict[str, object]
) -> None:
    edit(copied / "unet" / "config.json", **fields)
    with pytest.raises(CheckpointError, match=r"unet/config\.json(:| describes no UNet2D)"):
        open_checkpoint(copied).component("unet")


def test_a_component_of_no_class_is_absent(copied: Path) -> None:
    edit(copied / "model_index.json", unet=[])
    with pytest.raises(CheckpointError, match="lacks unet"):
        open_checkpoint(copied)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("sd1", {"cross_attention_dim": 32}, "cross_attention_dim is 32, and the text encoders"),
        ("sd1", {"out_channels": 8}, "out_channels is 8, and the VAE"),
        ("sd_vq", {"out_channels": 3}, "out_channels is 3, and the VAE give 4"),
        (
            "sdxl",
            {"projection_class_embeddings_input_dim": 176},
            "projection_class_embeddings_input_dim is 176, and the last text encoder",
        ),
    ],
    ids=str,
)
def test_parts_of_other_models_are_named(
    saved: Saved, tmp_path: Path, kind: str, fields: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(saved(kind), tmp_path / "copy")
    edit(folder / "unet" / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_opening_imports_no_torch(saved: Saved) -> None:
    code = (
        "import sys, tintype.checkpoints as c; c.open_checkpoint(sys.argv[1]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(saved("sd1"))], check=False).returncode == 0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"max_shard_size": "600KB"},
        {"variant": "fp16", "max_shard_size": "600KB"},
    ],
    ids=str,
)
def test_shards_and_variants_load_like_the_whole(tmp_path: Path, options: dict[str, str]) -> None:
    folder = small_checkpoints.save("sd1", tmp_path, **options)
    names = [path.name for path in folder.glob("*/*.safetensors*")]
    assert any("index" in name for name in names) == ("max_shard_size" in options)
    assert all("fp16" in name for name in names) == ("variant" in options)
    checkpoint, made = open_checkpoint(folder), small_checkpoints.parts("sd1")
    for name in ("unet", "vae"):
        ours, stored = checkpoint.component(name).state_dict(), made[name].state_dict()
        assert [key for key in stored if not torch.equal(ours[key], stored[key])] == []


def test_the_plain_file_is_preferred_to_its_variants(copied: Path) -> None:
    variant = copied / VAE.replace(".safetensors", ".fp16.safetensors")
    variant.write_bytes(b"never read")
    open_checkpoint(copied).component("vae")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = small_checkpoints.save("sd1", tmp_path, max_shard_size="600KB")
    shard = min((folder / "unet").glob("*-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(folder).component("unet")


def test_an_index_may_not_point_out_of_its_folder(tmp_path: Path) -> None:
    folder = small_checkpoints.save("sd1", tmp_path, max_shard_size="600KB")
    edit(
        next((folder / "unet").glob("*.index.json")),
        weight_map={"x": "../../elsewhere.safetensors"},
    )
    with pytest.raises(CheckpointError, match="elsewhere"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["sd1", "sd_vq"])
def test_old_names_of_vae_attention_are_understood(saved: Saved, tmp_path: Path, kind: str) -> None:
    copied = Path(shutil.copytree(saved(kind), tmp_path / "copy"))
    expected = open_checkpoint(copied).component("vae").state_dict()
    expected = {key: value.clone() for key, value in expected.items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        aged = {}
        for key, value in tensors.items():
            name = key
            for new, former in old.items():
                name = name.replace(f".{new}.", f".{former}.")
            is_matrix = name != key and value.ndim == 2
            aged[name] = value[:, :, None, None] if is_matrix else value
        return aged

    rewrite(copied / VAE, age)
    actual = open_checkpoint(copied).component("vae").state_dict()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def test_text_encoders_of_transformers_4_load(copied: Path) -> None:
    path = copied / "text_encoder" / "model.safetensors"
    expected = open_checkpoint(copied).component("text_encoder").state_dict()
    expected = {key: value.clone() for key, value in expected.items()}
    rewrite(
        path,
        lambda tensors: (
            {f"text_model.{key}": value for key, value in tensors.items()}
            | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        ),
    )
    actual = open_checkpoint(copied).component("text_encoder").state_dict()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def test_a_missing_key_is_named(copied: Path) -> None:
    rewrite(copied / VAE, lambda t: {k: v for k, v in t.items() if k != "quant_conv.bias"})
    with pytest.raises(CheckpointError, match=r"vae: .*1 missing: quant_conv\.bias"):
        open_checkpoint(copied).component("vae")


def test_an_unexpected_key_is_named(copied: Path) -> None:
    rewrite(copied / VAE, lambda t: t | {"extra.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected: extra\.weight"):
        open_checkpoint(copied).component("vae")


def test_a_misshapen_key_is_named_with_both_shapes(copied: Path) -> None:
    rewrite(copied / VAE, lambda t: t | {"quant_conv.bias": torch.zeros(9)})
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias \(expected \[8\], got \[9\]\)"):
        open_checkpoint(copied).component("vae")


def test_many_wrong_keys_are_counted(copied: Path) -> None:
    edit(copied / "vae" / "config.json", layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"missing: .* and \d+ more"):
        open_checkpoint(copied).component("vae")


# In the header, in the middle of the tensors, and nothing left at all.
@pytest.mark.parametrize("kept", [100, 200_000, 0])
def test_a_truncated_file_is_named(copied: Path, kept: int) -> None:
    whole = (copied / VAE).read_bytes()
    (copied / VAE).write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is truncated"):
        open_checkpoint(copied).component("vae")


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"shape": [1]}}'], ids=str)
def test_a_malformed_header_is_refused(copied: Path, header: bytes) -> None:
    (copied / VAE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"truncated or not a safetensors file"):
        open_checkpoint(copied).component("vae")


def test_whole_numbers_are_no_weights(copied: Path) -> None:
    rewrite(copied / VAE, lambda t: t | {"quant_conv.bias": torch.zeros(8, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias is stored as torch\.int32"):
        open_checkpoint(copied).component("vae")


def test_pickled_weights_need_consent(copied: Path) -> None:
    path = copied / VAE
    torch.save(load_file(path), path.with_suffix(".bin"))
    expected = open_checkpoint(copied).component("vae").state_dict()["quant_conv.weight"].clone()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"\.bin is a pickle.*allow_pickle=True"):
        open_checkpoint(copied)
    actual = open_checkpoint(copied, allow_pickle=True).component("vae").state_dict()
    assert torch.equal(actual["quant_conv.weight"], expected)


class Surprise:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code from a checkpoint ran",)


def test_a_pickle_with_code_never_runs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / VAE).unlink()
    torch.save({"x": Surprise()}, copied / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        open_checkpoint(copied, allow_pickle=True).component("vae")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "KolorsPipeline"}, "KolorsPipeline; supported: StableDiffusionPipeline"),
        ({"_class_name": "FluxPipeline"}, "lacks transformer, text_encoder_2"),
        ({"_class_name": None}, "supported: StableDiffusionPipeline"),
        ({"unet": [None, None]}, "lacks unet"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae is a AutoencoderTiny; supported"),
    ],
    ids=str,
)
def test_unsupported_pipelines_say_what_is_supported(
    copied: Path, fields: dict[str, object], message: str
) -> None:
    edit(copied / "model_index.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copied)


@pytest.mark.parametrize(
    "name", ["vae/config.json", "scheduler/scheduler_config.json", VAE, "tokenizer"]
)
def test_an_incomplete_folder_names_what_is_missing(copied: Path, name: str) -> None:
    gone = copied / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(CheckpointError, match=r"missing|holds no weights"):
        open_checkpoint(copied)


@pytest.mark.parametrize("content", ["{", "[]", "\udc00"], ids=["cut", "a list", "no UTF-8"])
def test_malformed_configs_are_named(copied: Path, content: str) -> None:
    (copied / "unet" / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        open_checkpoint(copied)


def test_a_folder_or_file_of_another_kind_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"model_index\.json.*\.safetensors"):
            open_checkpoint(path)


def test_weights_are_cast_to_the_type_asked_for(saved: Saved) -> None:
    vae = open_checkpoint(saved("sd1")).component("vae", torch.bfloat16)
    assert {value.dtype for value in vae.parameters()} == {torch.bfloat16}


def test_training_a_loaded_module_leaves_the_file(copied: Path) -> None:
    before = (copied / VAE).read_bytes()
    vae = open_checkpoint(copied).component("vae")
    with torch.no_grad():
        for value in vae.parameters():
            assert value.requires_grad
            value.add_(1)
    assert (copied / VAE).read_bytes() == before
