"""Parameter names of the original latent-diffusion and OpenCLIP layouts -> ours. Pure functions of a key.

A key that no rule knows comes back as it is, and strict loading then names it as unexpected.
"""

from __future__ import annotations

from tintype.checkpoints.files import Target

_UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OPEN_CLIP_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_UNUSED = frozenset({"logit_scale", "attn_mask", "text_projection"})


def unet_key(key: str, *, layers: int) -> tuple[Target, ...]:
    """A key below `model.diffusion_model.`; `layers` is the number of residual blocks a level.

    Original blocks are numbered through: a level has `layers` blocks and a change of resolution
    on the way down, `layers + 1` blocks on the way up.
    """
    module, _, leaf = key.rpartition(".")
    if module in _UNET_TOP:
        return (Target(f"{_UNET_TOP[module]}.{leaf}"),)
    region, number, *rest = key.split(".")
    if region == "middle_block" and number in _UNET_MIDDLE:
        return (Target(f"mid_block.{_UNET_MIDDLE[number]}.{_unet_leaf(rest)}"),)
    if region not in ("input_blocks", "output_blocks") or not number.isdigit() or len(rest) < 2:
        return (Target(key),)
    part, inner = rest[0], rest[1:]
    down = region == "input_blocks"
    level, layer = divmod(int(number) - down, layers + 1)
    if inner[0] == ("op" if down else "conv"):
        place = f"downsamplers.0.conv.{leaf}" if down else f"upsamplers.0.conv.{leaf}"
    else:
        place = f"{'resnets' if part == '0' else 'attentions'}.{layer}.{_unet_leaf(inner)}"
    return (Target(f"{'down' if down else 'up'}_blocks.{level}.{place}"),)


def controlnet_key(key: str, *, layers: int, hints: int) -> tuple[Target, ...]:
    """A key of a ControlNet's own file, whose picture is read by ``hints`` convolutions, numbered 0, 2, 4, ..."""
    region, _, rest = key.partition(".")
    number, leaf = rest.partition(".")[0], rest.rpartition(".")[2]
    if region == "zero_convs":
        return (Target(f"controlnet_down_blocks.{number}.{leaf}"),)
    if region == "middle_block_out":
        return (Target(f"controlnet_mid_block.{leaf}"),)
    if region != "input_hint_block" or not number.isdigit():
        return unet_key(key, layers=layers)
    ends, place = {0: "conv_in", hints - 1: "conv_out"}, int(number) // 2
    return (Target(f"controlnet_cond_embedding.{ends.get(place, f'blocks.{place - 1}')}.{leaf}"),)


def _unet_leaf(parts: list[str]) -> str:
    """Inside a residual block names differ, inside a transformer they are the same."""
    module, leaf = ".".join(parts[:-1]), parts[-1]
    return f"{_UNET_RESNET.get(module, module)}.{leaf}"


def vae_key(key: str, *, levels: int) -> tuple[Target, ...]:
    """A key below `first_stage_model.`; the original counts the decoder's levels from the image."""
    if key.startswith(("loss.", "model_ema.")):  # left over from training
        return ()
    half, *rest = key.split(".")
    if half not in ("encoder", "decoder") or len(rest) < 2:
        return (Target(key),)
    region, number, leaf = rest[0], rest[1], rest[-1]
    module = ".".join(rest[2:-1])
    if region == "norm_out":
        return (Target(f"{half}.conv_norm_out.{leaf}"),)
    if region == "mid" and number == "attn_1":
        name = f"{half}.mid_block.attentions.0.{_VAE_ATTENTION.get(module, module)}.{leaf}"
        return (Target(name, squeezed=leaf == "weight"),)
    if region == "mid":
        name = f"{half}.mid_block.{_VAE_MIDDLE.get(number, number)}.{module}.{leaf}"
        return (Target(name),)
    if region in ("down", "up") and number.isdigit():
        level = int(number) if region == "down" else levels - 1 - int(number)
        return (Target(f"{half}.{region}_blocks.{level}.{_vae_leaf(module)}.{leaf}"),)
    return (Target(key),)


def _vae_leaf(module: str) -> str:
    module = module.replace("nin_shortcut", "conv_shortcut").replace("block.", "resnets.")
    return module.replace("downsample.", "downsamplers.0.").replace("upsample.", "upsamplers.0.")


def open_clip_key(key: str, *, layers: int, projection: bool) -> tuple[Target, ...]:
    """A key of OpenCLIP's text tower, of which the first `layers` layers are used.

    The three attention projections are stored as one matrix, and the text projection transposed.
    """
    if key == "text_projection" and projection:
        return (Target("text_projection.weight", transposed=True),)
    if key in _OPEN_CLIP_UNUSED:
        return ()
    if key in _OPEN_CLIP_TOP:
        return (Target(_OPEN_CLIP_TOP[key]),)
    if not key.startswith("transformer.resblocks."):
        return (Target(key),)
    number, _, inner = key.removeprefix("transformer.resblocks.").partition(".")
    if number.isdigit() and int(number) >= layers:
        return ()
    prefix = f"text_model.encoder.layers.{number}"
    if inner.startswith("attn.in_proj_"):
        leaf = inner.removeprefix("attn.in_proj_")
        return tuple(
            Target(f"{prefix}.self_attn.{x}_proj.{leaf}", part, 3) for part, x in enumerate("qkv")
        )
    module, _, leaf = inner.rpartition(".")
    return (Target(f"{prefix}.{_OPEN_CLIP_LAYER.get(module, module)}.{leaf}"),)
