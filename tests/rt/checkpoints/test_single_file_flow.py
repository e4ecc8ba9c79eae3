"""SD3 and FLUX in single files of the original layout; diffusers' own conversion is the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import save_file

import original_flow_layout as layout
import small_checkpoints
import small_flow_checkpoints as small
import tintype
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.lora_files import Lora
from tintype.checkpoints.original_config import flux_config, sd3_config
from tintype.checkpoints.original_flow_keys import flux_key, sd3_key
from tintype.errors import CheckpointError
from tintype.models.flux import FluxConfig, FluxTransformer
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype_bench import published_configs
from tolerances import MODULE_FP32, relative_error

RANK, ALPHA = 3, 2.0
State = dict[str, torch.Tensor]
Write = Callable[..., Path]
REQUEST = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}


def whole(kind: str) -> State:
    words, pieces = len(small_checkpoints.tokenizer()), len(small.t5_tokenizer())
    return layout.tensors(layout.whole_file(kind, words, pieces))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """(kind, tensors) -> a single file of them with the kind's tokenizers beside it."""

    def file(kind: str, tensors: State) -> Path:
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        clips = [small_checkpoints.tokenizer(), small_checkpoints.tokenizer("!")]
        kinds = [*clips[: 1 if kind.startswith("flux") else 2], small.t5_tokenizer()]
        for name, tokenizer in zip(names, kinds, strict=False):
            tokenizer.save_pretrained(tmp_path / name)
        path = tmp_path / f"{kind}.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        return path

    return file


def transformer_by_diffusers(kind: str, tensors: State) -> State:
    """What diffusers makes of a file's transformer, whatever else is in the file."""
    prefix = "model.diffusion_model."
    own = {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    if not kind.startswith("flux"):
        return oracle.convert_sd3_transformer_checkpoint_to_diffusers(own)
    convert = oracle.convert_flux_transformer_checkpoint_to_diffusers
    # It cuts at FLUX's own width, which stands in its code as a number.
    code, width = convert.__code__, layout.SMALL[kind].width
    constants = tuple(width if each == 3072 else each for each in code.co_consts)
    narrow = type(convert)(code.replace(co_consts=constants), convert.__globals__)
    return narrow(own)


def by_diffusers(kind: str, name: str, tensors: State) -> State:
    """What diffusers makes of a component of a small whole file."""
    if name == "transformer":
        return transformer_by_diffusers(kind, tensors)
    if name == "vae":
        named = {key.replace("vae.", "first_stage_model.", 1): v for key, v in tensors.items()}
        blocks = {"up_block_types": [""] * 4, "down_block_types": [""] * 4}
        return oracle.convert_ldm_vae_checkpoint(named, blocks)
    if name == ("text_encoder_2" if kind.startswith("flux") else "text_encoder_3"):
        return oracle.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    prefix = layout.CLIP_L if name == "text_encoder" else layout.CLIP_G
    return oracle.convert_ldm_clip_checkpoint(tensors, prefix)


@pytest.mark.parametrize("kind", layout.SMALL)
def test_every_tensor_equals_diffusers_conversion(write: Write, kind: str) -> None:
    tensors = whole(kind)
    checkpoint = open_checkpoint(write(kind, tensors))
    encoders = 2 if kind.startswith("flux") else 3
    assert len(checkpoint.components) == 2 + encoders
    for name in checkpoint.components:
        ours, expected = (
            checkpoint.component(name).state_dict(),
            by_diffusers(kind, name, dict(tensors)),
        )
        # A buffer of numbers, and a table that is there twice.
        unused = {"text_model.embeddings.position_ids", "encoder.embed_tokens.weight"}
        assert set(expected) - set(ours) <= unused
        assert set(ours) <= set(expected)
        assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


def updated(kind: str, tensors: State) -> tuple[State, State]:
    """Updates by the original layers' names, half as strong as alpha / rank is, and the tensors with these added."""
    generator = torch.Generator().manual_seed(2)
    after, updates = dict(tensors), {}
    for name in dict(layout.transformer(kind, layout.SMALL[kind])):
        key = f"model.diffusion_model.{name}"
        outputs, *inputs = tensors[key].shape
        if not name.endswith(".weight") or not inputs:
            continue
        layer = name.removesuffix(".weight")
        down = 0.1 * torch.randn((RANK, *inputs), generator=generator)
        up = torch.randn((outputs, RANK, *(1 for _ in inputs[1:])), generator=generator)
        updates |= {f"{layer}.down": down, f"{layer}.up": up}
        product = up.double().flatten(1) @ down.double().flatten(1)
        added = 0.5 * ALPHA / RANK * product.view(tensors[key].shape)
        after[key] = (tensors[key].double() + added).float()
    return updates, after


def kohya(updates: State) -> State:
    named = {}
    for name, value in updates.items():
        layer, _, half = name.rpartition(".")
        flat = f"lora_unet_{layer.replace('.', '_')}"
        named |= {f"{flat}.lora_{half}.weight": value, f"{flat}.alpha": torch.tensor(ALPHA)}
    return named


def comfy(updates: State) -> State:
    named = {}
    for name, value in updates.items():
        layer, _, half = name.rpartition(".")
        path = f"diffusion_model.{layer}"
        half = {"down": "lora_A", "up": "lora_B"}[half]
        named |= {f"{path}.{half}.weight": value, f"{path}.alpha": torch.tensor(ALPHA)}
    return named


@pytest.mark.parametrize("named", [kohya, comfy])
@pytest.mark.parametrize("kind", ["sd35", "flux-dev"])
def test_updates_of_original_layers_are_what_diffusers_reads_of_updated_ones(
    write: Write, tmp_path: Path, kind: str, named: Callable[[State], State]
) -> None:
    tensors = whole(kind)
    updates, after = updated(kind, tensors)
    path = tmp_path / "style.safetensors"
    save_file({name: value.contiguous() for name, value in named(updates).items()}, path)
    checkpoint = open_checkpoint(write(kind, tensors)).with_loras([Lora(path, 0.5)])
    ours = checkpoint.component("transformer").state_dict()
    expected = transformer_by_diffusers(kind, after)
    assert ours.keys() == expected.keys()
    wrong = [key for key in ours if relative_error(ours[key], expected[key]) > MODULE_FP32]
    assert wrong == []


@pytest.mark.parametrize("model", layout.PUBLISHED)
def test_full_size_keys_are_exactly_our_modules_parameters(model: str) -> None:
    spec = layout.PUBLISHED[model]
    shapes = dict(layout.transformer(model, spec))
    if model.startswith("flux"):
        published = FluxConfig.from_json(published_configs.FLUX_TRANSFORMERS[model])
        found: Any = FluxConfig.from_json(flux_config(shapes))
        # The same channels come out as go in, whether the configuration says so or not.
        assert found.out_channels == published.in_channels
        assert vars(found) | {"out_channels": None} == vars(published)
    else:
        published = SD3Config.from_json(published_configs.SD3_TRANSFORMERS[model])
        found = SD3Config.from_json(sd3_config(shapes))
        assert found == published
    with torch.device("meta"):
        module = (FluxTransformer if model.startswith("flux") else SD3Transformer)(found)
    targets = {
        target.name: target.shape(shape)
        for key, shape in shapes.items()
        for target in (
            flux_key(key) if model.startswith("flux") else sd3_key(key, layers=spec.blocks)
        )
    }
    assert targets == {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "shift", "steps"), [("sd3", 3.0, 28), ("flux-dev", 3.0, 28), ("flux-schnell", 1.0, 4)]
)
def test_kinds_are_told_apart_and_make_latents(
    write: Write, kind: str, shift: float, steps: int
) -> None:
    path = write(kind, whole(kind))
    checkpoint = open_checkpoint(path)
    assert checkpoint.family == kind.split("-", maxsplit=1)[0]
    assert checkpoint.scheduler_config["shift"] == shift
    assert checkpoint.scheduler_config.get("use_dynamic_shifting", False) == (kind == "flux-dev")
    assert checkpoint.defaults["num_inference_steps"] == steps
    assert tintype.load(path)("red", **REQUEST).images.shape == (1, 16, 4, 4)


@pytest.mark.parametrize(("kind", "largest"), [("sd3", 1.16), ("flux-dev", None)])
def test_a_scheduler_beside_a_file_is_read_as_a_folders_is(
    write: Write, kind: str, largest: float | None
) -> None:
    path = write(kind, whole(kind))
    (path.parent / "scheduler").mkdir()
    own = {"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True}
    (path.parent / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    assert open_checkpoint(path).scheduler_config.get("max_shift") == largest


def test_sd3_without_its_t5_is_told_zeros_in_its_place(write: Write) -> None:
    tensors = {key: v for key, v in whole("sd3").items() if not key.startswith(layout.T5)}
    checkpoint = open_checkpoint(write("sd3", tensors))
    assert checkpoint.defaults["left_out"] == ["encode_3"]
    assert len(checkpoint.tokenizer_folders) == 2


@pytest.fixture
def flux_beside_its_parts(tmp_path: Path) -> tuple[Path, State]:
    """A file of a transformer alone in a folder of diffusers layout, as FLUX is published."""
    tensors = layout.tensors(dict(layout.transformer("flux-dev", layout.SMALL["flux-dev"])))
    path = small.save("flux-dev", tmp_path / "flux") / "flux1-dev.safetensors"
    save_file(tensors, path)
    return path, tensors


def test_a_transformers_own_file_takes_the_rest_from_beside_it(
    flux_beside_its_parts: tuple[Path, State],
) -> None:
    path, tensors = flux_beside_its_parts
    prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
    spec = layout.SMALL["flux-dev"]
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=spec.blocks,
        num_single_layers=spec.single,
        num_attention_heads=spec.heads,
        joint_attention_dim=spec.text,
        pooled_projection_dim=spec.pooled,
        guidance_embeds=True,
    )
    theirs.load_state_dict(transformer_by_diffusers("flux-dev", prefixed))
    shutil.rmtree(path.parent / "transformer")
    theirs.save_pretrained(path.parent / "transformer")
    expected = tintype.load(path.parent)("red", **REQUEST).images
    # Sums run in another order where weights lie elsewhere in memory.
    assert relative_error(tintype.load(path)("red", **REQUEST).images, expected) <= MODULE_FP32


def test_what_is_neither_in_the_file_nor_beside_it_is_named(
    flux_beside_its_parts: tuple[Path, State],
) -> None:
    path, _ = flux_beside_its_parts
    for name in ("text_encoder_2", "vae"):
        (path.parent / name).rename(path.parent / f"no_{name}")
    with pytest.raises(CheckpointError, match=r"holds no text_encoder_2, vae; put the folder"):
        open_checkpoint(path)


def test_a_missing_block_is_named(write: Write) -> None:
    tensors = whole("sd3")
    del tensors["model.diffusion_model.y_embedder.mlp.0.weight"]
    with pytest.raises(CheckpointError, match=r"incomplete: .*y_embedder\.mlp\.0"):
        open_checkpoint(write("sd3", tensors))


def test_an_unexpected_key_is_named_as_the_file_has_it(write: Write) -> None:
    key = "model.diffusion_model.joint_blocks.0.x_block.control.weight"
    checkpoint = open_checkpoint(write("sd3", whole("sd3") | {key: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*x_block\.control\.weight"):
        checkpoint.component("transformer")


def test_a_scheduler_beside_the_file_decides(write: Write) -> None:
    path = write("flux-schnell", whole("flux-schnell"))
    own = path.parent / "scheduler" / "scheduler_config.json"
    own.parent.mkdir()
    own.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}))
    assert open_checkpoint(path).scheduler_config["shift"] == 2.0


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_narrow_types_are_widened_to_the_very_values(write: Write, stored: torch.dtype) -> None:
    tensors = whole("flux-dev")
    narrow = {key: v.to(stored) if v.is_floating_point() else v for key, v in tensors.items()}
    widened = {key: v.float() if v.is_floating_point() else v for key, v in narrow.items()}
    checkpoint = open_checkpoint(write("flux-dev", narrow))
    ours = checkpoint.component("transformer").state_dict()
    expected = transformer_by_diffusers("flux-dev", widened)
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_is_multiplied_by_its_scales(write: Write, prefix: str) -> None:
    tensors, stored, expected = whole("flux-dev"), {}, {}
    for number, (key, value) in enumerate(tensors.items()):
        stored[key], expected[key] = value, value
        if key.startswith("model.diffusion_model.") and value.ndim == 2:
            scale = torch.tensor(0.01 * (1 + number))
            stored[key] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{key.removesuffix('weight')}scale_weight"] = scale
            expected[key] = stored[key].float() * scale
    stored[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    ours = open_checkpoint(write("flux-dev", stored)).component("transformer").state_dict()
    wanted = transformer_by_diffusers("flux-dev", expected)
    assert [key for key in ours if not torch.equal(ours[key], wanted[key])] == []


@pytest.mark.parametrize(
    "name",
    ["shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
)
def test_a_tensor_without_its_dimensions_is_told(write: Write, name: str) -> None:
    with pytest.raises(CheckpointError, match="not the shape that its name promises"):
        open_checkpoint(write("sd3", whole("sd3") | {f"{layout.T5}{name}": torch.zeros(7)}))
