"""Parameter names of the original SD3 and FLUX layouts -> ours. Pure functions of a key, as in original_keys.

The three attention projections are stored as one matrix; and where we scale and shift last, shift stands before scale.
"""

from __future__ import annotations

from tintype.checkpoints.files import Target

_SD3_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SD3_BLOCK = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_SD3_FUSED = {
    "x_block.attn.qkv": "attn.to_{}",
    "x_block.attn2.qkv": "attn2.to_{}",
    "context_block.attn.qkv": "attn.add_{}_proj",
}
_FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_FUSED = {"img_attn.qkv": "attn.to_{}", "txt_attn.qkv": "attn.add_{}_proj"}
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_LAST_NORM = "final_layer.adaLN_modulation.1"


def sd3_key(key: str, *, layers: int) -> tuple[Target, ...]:
    """A key of SD3's transformer, which has so many blocks; the last one's text only passes a norm."""
    if key == "pos_embed":
        return (Target("pos_embed.pos_embed"),)
    module, _, leaf = key.rpartition(".")
    if not key.startswith("joint_blocks."):
        return _top(module, leaf, _SD3_TOP)
    number, inner = _within(module)
    block = f"transformer_blocks.{number}"
    if inner in _SD3_FUSED:
        return _fused(f"{block}.{_SD3_FUSED[inner]}", leaf)
    ends = inner == "context_block.adaLN_modulation.1" and number == str(layers - 1)
    return (Target(f"{block}.{_SD3_BLOCK.get(inner, inner)}.{leaf}", swapped=ends),)


def flux_key(key: str) -> tuple[Target, ...]:
    """A key of FLUX's transformer."""
    module, _, leaf = key.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf  # what an RMS norm multiplies by
    if not key.startswith(("double_blocks.", "single_blocks.")):
        return _top(module, leaf, _FLUX_TOP)
    number, inner = _within(module)
    if key.startswith("double_blocks."):
        block = f"transformer_blocks.{number}"
        if inner in _FLUX_FUSED:
            return _fused(f"{block}.{_FLUX_FUSED[inner]}", leaf)
        return (Target(f"{block}.{_FLUX_DOUBLE.get(inner, inner)}.{leaf}"),)
    block = f"single_transformer_blocks.{number}"
    if inner == "linear1":
        # Queries, keys, values, and the feed-forward of four times their width.
        attention = _fused(f"{block}.attn.to_{{}}", leaf, parts=7)
        return (*attention, Target(f"{block}.proj_mlp.{leaf}", part=3, parts=7, span=4))
    return (Target(f"{block}.{_FLUX_SINGLE.get(inner, inner)}.{leaf}"),)


def _within(module: str) -> tuple[str, str]:
    """The number of a block, and a module's name in it."""
    _, _, path = module.partition(".")
    number, _, inner = path.partition(".")
    return number, inner


def _top(module: str, leaf: str, names: dict[str, str]) -> tuple[Target, ...]:
    if module == _LAST_NORM:
        return (Target(f"norm_out.linear.{leaf}", swapped=True),)
    return (Target(f"{names.get(module, module)}.{leaf}"),)


def _fused(pattern: str, leaf: str, parts: int = 3) -> tuple[Target, ...]:
    """Queries, keys and values, the first three cuts of a matrix."""
    return tuple(
        Target(f"{pattern.format(name)}.{leaf}", part, parts) for part, name in enumerate("qkv")
    )
