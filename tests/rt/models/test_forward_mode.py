"""Tangents of models, as `torch.func.jvp` asks for them: the same whether gradients are asked for, too, or not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import small_checkpoints
from tintype.models import fused
from tintype.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from tolerances import KERNEL_NORM, MODULE_FP32, relative_error


def _tangent(module, inputs):
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(4))
    _, tangent = torch.func.jvp(lambda x: module(x, *inputs[1:]), (inputs[0],), (direction,))
    return tangent.detach()


def test_tangents_are_there_where_no_gradient_is_asked_for(model, monkeypatch):
    monkeypatch.setattr(fused, "_LARGE", 0)
    module, inputs = model
    expected = _tangent(module, inputs)
    with torch.no_grad():
        assert relative_error(_tangent(module, inputs), expected) < KERNEL_NORM["float32"]
    assert expected.abs().max() > 0


@torch.no_grad()
def test_kept_ops_let_tangents_through(model):
    module, inputs = model
    expected = _tangent(module, inputs)
    names = ("group_norm_silu", "geglu", "layer_norm_modulate", "gate_residual", "qk_norm_rope")
    with fused.kept_whole((*names, "residual_layer_norm")):
        assert relative_error(_tangent(module, inputs), expected) < 1e-5


@torch.no_grad()
def test_no_op_serves_on_a_gpu_while_somebody_differentiates_forwards(monkeypatch):
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    x = SimpleNamespace(is_cuda=True)
    assert fused._serves(x)
    with forward_ad.dual_level():
        assert not fused._serves(x)
        assert not fused._inferring()


@pytest.mark.parametrize("grad", [True, False])
def test_tangents_of_a_decoded_image_equal_diffusers(grad, monkeypatch):
    monkeypatch.setattr(fused, "_LARGE", 0)  # as of large pictures
    torch.manual_seed(0)
    theirs = small_checkpoints.vae().eval()
    ours = AutoencoderKL(AutoencoderKLConfig.from_json(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    latents, direction = torch.randn(2, 1, 4, 8, 6)
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(ours.decode, (latents,), (direction,))
        _, expected = torch.func.jvp(lambda x: theirs.decode(x).sample, (latents,), (direction,))
    assert relative_error(found.detach(), expected.detach()) <= MODULE_FP32
