"""The references against other people's implementations, and what is said of wrong arguments."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.models.resnet import ResnetBlock2D

from kernel_checks import forced, norm_error, normal
from tintype_kernels import (
    attention,
    bias_residual,
    gate_residual,
    geglu,
    group_norm_silu,
    layer_norm_modulate,
    qk_norm_rope,
)
from tolerances import KERNEL_NORM

WIDE = KERNEL_NORM["float64"]


def test_group_norm_silu_is_what_a_resnet_block_runs():
    block = ResnetBlock2D(in_channels=8, temb_channels=16, groups=4, eps=1e-5).double()
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
    x, temb = normal(2, 8, 5, 5), normal(2, 16)
    with torch.no_grad():
        h = group_norm_silu(x, block.norm1.weight, block.norm1.bias, 4)
        added = block.time_emb_proj(torch.nn.functional.silu(temb))[:, :, None, None]
        norm = block.norm2
        h = group_norm_silu(block.conv1(h), norm.weight, norm.bias, 4, residual=added)
        assert norm_error(x + block.conv2(h), block(x, temb)) < WIDE


@pytest.mark.parametrize("form", ["auto", "native", "reference"])
def test_a_norm_of_one_value_a_group_is_its_bias(form):
    """PyTorch's own function refuses it."""
    weight, bias = normal(4).float(), normal(4).float()
    with forced(form):
        found = group_norm_silu(normal(1, 4, 1, 1).float(), weight, bias, 4, silu=False)
    assert torch.equal(found.flatten(), bias)


# On chip, and split over blocks.
@pytest.mark.parametrize("shape", [(1, 2, 6, 6), (1, 2, 130, 131)], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes by
def test_squares_that_overflow_in_triton_are_nan_and_not_zeros(shape):
    x, ones = normal(*shape, spread=1e20).float(), torch.ones(2)
    with forced("triton"):
        assert group_norm_silu(x, ones, ones, 1).isnan().all()


def test_layer_norm_modulate_is_diffusers_adaptive_norm():
    norm = AdaLayerNormContinuous(12, 7, elementwise_affine=False, eps=1e-6).double()
    x, condition = normal(2, 5, 12), normal(2, 7)
    scale, shift = norm.linear(torch.nn.functional.silu(condition)).chunk(2, dim=1)
    assert norm_error(layer_norm_modulate(x, shift, scale), norm(x, condition)) < WIDE


def test_geglu_is_diffusers():
    layer = GEGLU(6, 10).double()
    x = normal(2, 3, 6)
    assert norm_error(geglu(layer.proj(x)), layer(x)) < WIDE


def test_qk_norm_rope_is_fluxs():
    q, k, angle = normal(2, 3, 5, 8), normal(2, 3, 5, 8), normal(5, 4)
    tables = [table.repeat_interleave(2, dim=1) for table in (angle.cos(), angle.sin())]
    norms = [RMSNorm(8, eps=1e-6).double() for _ in "qk"]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    found = qk_norm_rope(q, k, norms[0].weight, norms[1].weight, *tables)
    for x, norm, actual in zip((q, k), norms, found, strict=True):
        rotated = apply_rotary_emb(norm(x), tuple(tables), use_real_unbind_dim=-1)
        # diffusers rotates in float32
        assert norm_error(actual, rotated) < KERNEL_NORM["float32"]


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_what_qk_norm_rope_gives_of_parts_of_one_product_has_tokens_outside_heads(form):
    q, k, _ = (
        part.unflatten(-1, (3, 8)).transpose(1, 2)
        for part in normal(2, 5, 3 * 24).float().chunk(3, dim=-1)
    )
    angle = normal(5, 8).float()
    given = (None, None, angle.cos(), angle.sin())
    with forced(form):
        found = qk_norm_rope(q, k, *given)
        dense = qk_norm_rope(q.contiguous(), k.contiguous(), *given)
    for part, right in zip(found, dense, strict=True):
        assert part.transpose(1, 2).is_contiguous()
        assert torch.equal(part, right)


X4, X3, V = torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 6), torch.zeros(6)
WRONG = [
    (group_norm_silu, (X3, V, V, 2), r"x is torch.float32\[2, 3, 6\] on cpu, .*4 dimensions"),
    (group_norm_silu, (X4.int(), V, V, 2), r"x is torch.int32"),
    (group_norm_silu, (X4.to(torch.float8_e4m3fn), V, V, 2), "x is torch.float8_e4m3fn"),
    (group_norm_silu, (X4[:, :0], V[:0], V[:0], 2), r"x is torch.float32\[2, 0, 4, 4\].* with channels"),
    (bias_residual, (X4[:, :0], V[:0]), r"x is torch.float32\[2, 0, 4, 4\].* with channels"),
    (layer_norm_modulate, (X3[..., :0], V[:0], V[:0]), r"x is torch.float32\[2, 3, 0\].* with channels"),
    (gate_residual, (X3[..., :0], X3[..., :0], V[:0]), r"x is torch.float32\[2, 3, 0\].* with channels"),
    (qk_norm_rope, (X4[..., :0], X4[..., :0], None, None, V, V), r"q is .*\[2, 6, 4, 0\].* with channels"),
    (geglu, (X3[..., :0],), r"x is .*\[2, 3, 0\].*\[..., 2\*c\]"),
    (geglu, (X3.to(torch.float8_e5m2),), "x is torch.float8_e5m2"),
    (group_norm_silu, (X4, V, V, 4), "groups is 4, expected a divisor of x's 6 channels"),
    (group_norm_silu, (X4, V[1:], V, 2), r"weight is torch.float32\[5\].*\[6\]"),
    (group_norm_silu, (X4, V, V.half(), 2), r"bias is torch.float16\[6\].*torch.float32"),
    (group_norm_silu, (X4, V, V, 2, 1e-5, True, X4[:1]), r"residual is .*\[1, 6, 4, 4\]"),
    (group_norm_silu, (X4, None, V, 2), r"weight is None, expected torch.float32\[6\] on cpu"),
    (group_norm_silu, (X4, V, None, 2), "bias is None, expected"),
    (group_norm_silu, (None, V, V, 2), "x is None, expected a floating tensor"),
    (group_norm_silu, (X4.numpy(), V, V, 2), "x is ndarray, expected a floating tensor"),
    (layer_norm_modulate, (X3, None, X3[:, 0]), r"shift is None, expected .*\[2, 6\]"),
    (gate_residual, (X3, X3, None), r"gate is None, expected .*\[2, 6\]"),
    (gate_residual, (X3, None, X3[:, 0]), r"y is None, expected .*\[2, 3, 6\]"),
    (geglu, (None,), "x is None, expected"),
    (bias_residual, (X4, None), "bias is None, expected"),
    (attention, (X4, None, X4), "k is None, expected"),
    (layer_norm_modulate, (X3, V, X3[:, 0]), r"shift is torch.float32\[6\].*\[2, 6\]"),
    (layer_norm_modulate, (X3, X3[:, 0], X3), r"scale is .*\[2, 3, 6\].*\[2, 1, 6\]"),
    (gate_residual, (X3, X3[:1], X3[:, 0]), r"y is .*\[1, 3, 6\].*\[2, 3, 6\]"),
    (gate_residual, (X3, X3, V), r"gate is .*\[6\].*\[2, 6\]"),
    (geglu, (X3[..., :5],), r"x is .*\[2, 3, 5\].*\[..., 2\*c\]"),
    (qk_norm_rope, (X4, X4[:1], None, None, X4[0, 0], X4[0, 0]), r"k is .*\[1, 6, 4, 4\]"),
    (qk_norm_rope, (X4, X4, V, None, X4[0, 0], X4[0, 0]), r"q_weight is .*\[6\].*\[4\]"),
    (qk_norm_rope, (X4, X4, None, None, X3[0], X3[0]), r"cos is .*\[3, 6\].*\[4, 4\]"),
    (qk_norm_rope, (X4[..., :3], X4[..., :3], None, None, V, V), "q has heads of 3 elements"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "arguments", "message"), WRONG)
def test_wrong_arguments_are_named(op, arguments, message):
    with pytest.raises(ValueError, match=message):
        op(*arguments)
