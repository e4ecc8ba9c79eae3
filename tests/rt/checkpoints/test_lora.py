"""Low-rank updates in the layouts that people have them in, against diffusers' own merging by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import original_flow_layout
import small_checkpoints
import small_flow_checkpoints
import tintype
from original_flow_layout import Flow
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.lora_files import Lora, dotted
from tintype.checkpoints.original_keys import unet_key
from tintype.errors import CheckpointError, RequestError
from tolerances import MODULE_FP32, relative_error

RANK, ALPHA, SCALE = 3, 2.0, 0.7
LAYERS = {
    "unet": [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
    ],
    "text_encoder": ["text_model.encoder.layers.0.self_attn.q_proj"],
}


def updates(checkpoint):
    """component -> layer -> (down, up) of random numbers, in the shapes that PEFT gives them."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    made = {}
    for component, layers in LAYERS.items():
        module = checkpoint.component(component)
        for layer in layers:
            outputs, inputs, *kernel = module.get_submodule(layer).weight.shape
            pair = random(RANK, inputs, *kernel), random(outputs, RANK, *[1] * len(kernel))
            made.setdefault(component, {})[layer] = pair
    return made


def kohya(made):
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    return {
        f"{prefixes[component]}{layer.replace('.', '_')}.{part}": tensor
        for component, layers in made.items()
        for layer, (down, up) in layers.items()
        for part, tensor in {
            "lora_down.weight": down,
            "lora_up.weight": up,
            "alpha": torch.tensor(ALPHA),
        }.items()
    }


def peft(made):
    return {
        f"{component}.{layer}.{half}.weight": tensor
        for component, layers in made.items()
        for layer, pair in layers.items()
        for half, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


LAYOUTS = {"kohya": (kohya, ALPHA / RANK), "peft": (peft, 1.0)}


@pytest.fixture(params=LAYOUTS)
def adapted(request, saved, tmp_path):
    """The folder of a small SD 1, a file of updates to it, and alpha / rank."""
    layout, strength = LAYOUTS[request.param]
    folder = saved("sd1")
    path = tmp_path / "style.safetensors"
    tensors = layout(updates(open_checkpoint(folder)))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return folder, path, strength


def test_merged_weights_equal_diffusers(adapted):
    folder, path, _ = adapted
    theirs = small_checkpoints.PIPELINES["sd1"].from_pretrained(folder)
    # Its own names of the text encoder's layers are not those of the transformers that it runs on.
    own = {key: t for key, t in load_file(path).items() if "text_model" not in key}
    theirs.load_lora_weights(own)
    theirs.fuse_lora(lora_scale=SCALE, components=["unet"])
    theirs.unload_lora_weights()
    ours = open_checkpoint(folder).with_loras([Lora(path, SCALE)]).component("unet").state_dict()
    for layer in LAYERS["unet"]:
        expected = theirs.unet.get_submodule(layer).weight.detach()
        assert relative_error(ours[f"{layer}.weight"], expected) < MODULE_FP32


@pytest.mark.parametrize("component", LAYERS)
def test_an_update_is_scale_times_alpha_over_rank_times_the_product(adapted, component):
    folder, path, strength = adapted
    checkpoint = open_checkpoint(folder)
    before = checkpoint.component(component).state_dict()
    after = checkpoint.with_loras([Lora(path, SCALE)]).component(component).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.weight" for layer in LAYERS[component]}
    for layer, (down, up) in updates(checkpoint)[component].items():
        product = torch.tensordot(up.double().flatten(1), down.double().flatten(1), dims=1)
        expected = SCALE * strength * product.view(before[f"{layer}.weight"].shape)
        actual = after[f"{layer}.weight"].double() - before[f"{layer}.weight"].double()
        assert relative_error(actual, expected) < 1e-5


def test_a_loaded_pipeline_and_its_sign(adapted):
    folder, path, _ = adapted
    request = {"num_inference_steps": 2, "width": 32, "height": 32, "seed": 1, "output_type": "np"}
    plain = tintype.load(folder)("red", **request).images
    styled = tintype.load(folder, lora=path)("red", **request).images
    assert not np.array_equal(plain, styled)
    undone = tintype.load(folder, lora=[f"{path}:0.5", f"{path}:-0.5"])("red", **request).images
    assert relative_error(undone, plain) < 1e-4


# All but the single blocks' first, which diffusers cuts at FLUX's own width, and what is in no block, which it drops.
FLUX = [
    *(f"double_blocks.0.{name}" for name in ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj")),
    *(f"double_blocks.0.{name}" for name in ("txt_attn.proj", "img_mlp.0", "txt_mlp.2")),
    *("double_blocks.0.img_mod.lin", "single_blocks.0.linear2", "single_blocks.0.modulation.lin"),
]


def test_kohyas_updates_of_flux_equal_diffusers(tmp_path):
    folder = small_flow_checkpoints.save("flux-dev", tmp_path / "model")
    spec = Flow(2, 16, blocks=1, text=48, pooled=16, single=1, guidance=True)
    shapes = dict(original_flow_layout.flux(spec))
    generator, tensors = torch.Generator().manual_seed(5), {}
    for layer in FLUX:
        outputs, inputs = shapes[f"{layer}.weight"]
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{flat}.lora_up.weight"] = torch.randn(outputs, RANK, generator=generator)
        tensors[f"{flat}.alpha"] = torch.tensor(ALPHA)
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    theirs = small_flow_checkpoints.PIPELINES["flux-dev"].from_pretrained(folder)
    theirs.load_lora_weights(tensors)
    theirs.fuse_lora(lora_scale=SCALE, components=["transformer"])
    theirs.unload_lora_weights()
    expected = theirs.transformer.state_dict()
    checkpoint = open_checkpoint(folder)
    plain = checkpoint.component("transformer").state_dict()
    ours = checkpoint.with_loras([Lora(path, SCALE)]).component("transformer").state_dict()
    assert sum(not torch.equal(ours[name], plain[name]) for name in ours) == len(FLUX) + 2 * 2
    wrong = [name for name in ours if relative_error(ours[name], expected[name]) > MODULE_FP32]
    assert wrong == []


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0.lora_down.weight",
        "diffusion_model.double_blocks.0.img_attn.nowhere.lora_A.weight",
        "transformer.single_blocks.0.linear1.lora_A.weight",
    ],
)
def test_layers_that_flux_has_not_are_named(tmp_path, key):
    folder = small_flow_checkpoints.save("flux-dev", tmp_path / "model")
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=f"no layer here for {key}"):
        open_checkpoint(folder).with_loras([Lora(path)])


@pytest.mark.parametrize(
    ("flat", "ours"),
    [
        (
            "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("middle_block_1_proj_out", "mid_block.attentions.0.proj_out"),
        (
            "output_blocks_3_1_transformer_blocks_0_ff_net_0_proj",
            "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
        ),
        ("input_blocks_2_0_in_layers_2", "down_blocks.0.resnets.1.conv1"),
    ],
)
def test_flattened_names_of_the_original_layout_are_read(flat, ours):
    (target,) = unet_key(f"{dotted(flat)}.weight", layers=2)
    assert target.name == f"{ours}.weight"


def test_peft_says_its_alpha_beside_the_file(saved, tmp_path):
    checkpoint = open_checkpoint(saved("sd1"))
    tensors = {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in peft(updates(checkpoint)).items()
        if key.startswith("unet.")
    }
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6}))
    layer = LAYERS["unet"][0]
    down, up = updates(checkpoint)["unet"][layer]
    before = checkpoint.component("unet").get_submodule(layer).weight
    after = checkpoint.with_loras([Lora(path)]).component("unet").get_submodule(layer).weight
    assert relative_error((after - before).detach(), 6 / RANK * up @ down) < 1e-4


ADAPTERS = {
    "another alpha": {"lora_alpha": 12},
    "ranks by their roots": {"lora_alpha": 6, "use_rslora": True},
    "alphas by pattern": {"lora_alpha": 6, "alpha_pattern": {"to_k": 1, "mid_block.*to_v": 9}},
    "ranks by pattern": {"lora_alpha": 6, "rank_pattern": {"to_q": 2}, "use_rslora": True},
}


def adapted_by_peft(folder, settings):
    """diffusers' pipeline with an adapter of random numbers on its UNet's attention."""
    pipe = small_checkpoints.PIPELINES["sd1"].from_pretrained(folder)
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, **settings)
    pipe.unet.add_adapter(config)
    return pipe


def merged_by_peft(unet):
    """Our names of attention's weights -> what they are with the adapter merged."""
    unet.fuse_lora()
    return {
        name.replace(".base_layer", ""): weight.detach().clone()
        for name, weight in unet.named_parameters()
        if ".to_" in name and "lora" not in name
    }


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("layout", ["in diffusers' header", "beside PEFT's file"])
def test_what_peft_noted_of_an_adapter_is_its_strength(saved, tmp_path, settings, layout):
    folder = saved("sd1")
    theirs = adapted_by_peft(folder, settings)
    layers = get_peft_model_state_dict(theirs.unet)
    if layout == "beside PEFT's file":
        path = tmp_path / "adapter_model.safetensors"
        save_file({f"base_model.model.{k}": t.contiguous() for k, t in layers.items()}, path)
        theirs.unet.peft_config["default"].save_pretrained(tmp_path)
    else:
        noted = _collate_lora_metadata({"unet": theirs.unet})
        theirs.save_lora_weights(tmp_path, unet_lora_layers=layers, **noted)
        path = tmp_path / "pytorch_lora_weights.safetensors"
    expected = merged_by_peft(theirs.unet)
    ours = open_checkpoint(folder).with_loras([Lora(path)]).component("unet").state_dict()
    for name, weight in expected.items():
        assert relative_error(ours[name], weight) < MODULE_FP32, name


@pytest.mark.parametrize(
    "noted", ["[]", "{", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": {"(": 1}}']
)
def test_notes_of_an_adapter_that_make_no_sense_are_told(saved, tmp_path, noted):
    layer, path = LAYERS["unet"][0], tmp_path / "style.safetensors"
    down, up = updates(open_checkpoint(saved("sd1")))["unet"][layer]
    tensors = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    save_file(tensors, path, metadata={"lora_adapter_metadata": noted})
    with pytest.raises(CheckpointError, match=r"is no JSON object|is malformed"):
        open_checkpoint(saved("sd1")).with_loras([Lora(path)])


def test_a_text_encoders_layers_are_found_as_transformers_5_names_them(saved, tmp_path):
    checkpoint, path = open_checkpoint(saved("sd1")), tmp_path / "style.safetensors"
    layer = LAYERS["text_encoder"][0]
    tensors = peft({"text_encoder": updates(checkpoint)["text_encoder"]})
    save_file({key.replace("text_model.", ""): each for key, each in tensors.items()}, path)
    down, up = updates(checkpoint)["text_encoder"][layer]
    before = checkpoint.component("text_encoder").get_submodule(layer).weight
    updated = checkpoint.with_loras([Lora(path)]).component("text_encoder")
    difference = (updated.get_submodule(layer).weight - before).detach()
    assert relative_error(difference, up @ down) < 1e-4


def test_a_file_without_updates_is_refused(saved, tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="holds no updates"):
        open_checkpoint(saved("sd1")).with_loras([Lora(tmp_path / "empty.safetensors")])


def test_keys_without_a_layer_here_are_named(saved, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"lora_unet_nowhere_to_q.lora_down.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="no layer here for lora_unet_nowhere_to_q"):
        open_checkpoint(saved("sd1")).with_loras([Lora(path)])


def test_an_update_of_another_shape_is_refused(saved, tmp_path):
    layer = LAYERS["unet"][0]
    path = tmp_path / "other.safetensors"
    save_file(
        {
            f"unet.{layer}.lora_A.weight": torch.zeros(2, 7),
            f"unet.{layer}.lora_B.weight": torch.zeros(7, 2),
        },
        path,
    )
    with pytest.raises(CheckpointError, match="it was made for another model"):
        open_checkpoint(saved("sd1")).with_loras([Lora(path)])


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("lora_A.weight", torch.tensor(1.0), "it was made for another model"),
        ("alpha", torch.ones(3), r"an alpha has shape \[3\]"),
        ("lora_A.weight", torch.zeros(0, 64), "has rank 0"),
    ],
)
def test_a_malformed_part_of_an_update_is_named(saved, tmp_path, part, tensor, message):
    layer, path = LAYERS["unet"][0], tmp_path / "malformed.safetensors"
    width = open_checkpoint(saved("sd1")).component("unet").get_submodule(layer).weight.shape[0]
    sound = {"lora_A.weight": torch.zeros(2, width), "lora_B.weight": torch.zeros(width, 2)}
    tensors = {f"unet.{layer}.{name}": each for name, each in (sound | {part: tensor}).items()}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved("sd1")).with_loras([Lora(path)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", Lora(Path("a.safetensors"))),
        ("a.safetensors:0.5", Lora(Path("a.safetensors"), 0.5)),
        ("C:/a.safetensors", Lora(Path("C:/a.safetensors"))),
    ],
)
def test_a_file_and_its_scale_are_told_apart(text, expected):
    assert Lora.parse(text) == expected


def test_a_scale_that_is_no_finite_number_is_refused():
    for number in ("nan", "inf", "1e400"):
        with pytest.raises(RequestError, match="expected a finite number"):
            Lora.parse(f"a.safetensors:{number}")
