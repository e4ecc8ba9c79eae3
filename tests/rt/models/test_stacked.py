"""Layers that are multiplied as one give what each gives, out of the same memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tintype.models import fused
from tintype.models.joint import JointAttention
from tintype.models.quantised import Scheme, nearest, quantised_layer
from tintype.models.stacked import is_stack_of, stack
from tintype.models.unet_blocks import Attention
from tolerances import relative_error


def _linear(c_in=16, c_out=32, *, bias=False):
    return nn.Linear(c_in, c_out, bias=bias)


def _coded(scheme, activations="dynamic"):
    layer = _linear(bias=True)
    return quantised_layer(layer, nearest(layer.weight.detach(), Scheme(scheme, activations)))


@pytest.mark.parametrize(
    "make",
    [_linear, lambda: _linear(bias=True), lambda: _coded("int8"), lambda: _coded("fp8")],
    ids=["plain", "with bias", "int8", "fp8"],
)
@torch.inference_mode()
def test_a_stack_gives_what_its_layers_give_and_shares_their_weights(make) -> None:
    torch.manual_seed(0)
    layers, x = [make() for _ in range(3)], torch.randn(2, 5, 16)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    stacked = stack(layers)
    assert relative_error(stacked(x), expected) < 1e-6
    assert relative_error(torch.cat([layer(x) for layer in layers], dim=-1), expected) < 1e-6
    for name, tensor in stacked.state_dict().items():
        storages = {layer.state_dict()[name].untyped_storage().data_ptr() for layer in layers}
        assert storages == {tensor.untyped_storage().data_ptr()}
    assert is_stack_of(stacked, layers)
    assert not is_stack_of(stacked, [layer.double() for layer in layers])


@pytest.mark.parametrize(
    "layers",
    [
        [_linear(16), _linear(24)],
        [_linear(bias=True), _linear()],
        [_linear(), _coded("int8")],
        [_coded("int8"), _coded("fp8")],
        [_coded("int8", "none"), _coded("int8", "none")],
        [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)],
    ],
    ids=["other inputs", "a bias", "one in codes", "other codes", "inputs in numbers", "no lines"],
)
def test_what_does_not_go_together_is_not_stacked(layers) -> None:
    assert stack(layers) is None


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.setattr(fused, "_serves", lambda x, op="": True)
    monkeypatch.setattr(fused, "attention", nn.functional.scaled_dot_product_attention)
    torch.manual_seed(0)
    module = Attention(16, 16, 2)
    module.stack()
    return module


def _products(attention, x, *, grad=False):
    """How many times the stack, and how many times the queries' own layer is asked."""
    asked = []
    for layer in (attention._stacked[0], attention.to_q):
        layer.forward = lambda x, layer=layer: asked.append(layer) or type(layer).forward(layer, x)
    with torch.set_grad_enabled(grad):
        attention(x)
    return [asked.count(layer) for layer in (attention._stacked[0], attention.to_q)]


def test_self_attention_asks_the_stack_in_inference_alone(attention) -> None:
    x = torch.randn(2, 5, 16)
    assert _products(attention, x) == [1, 0]
    assert _products(attention, x, grad=True) == [0, 1]


def test_a_layer_that_is_watched_or_has_moved_is_asked_itself(attention) -> None:
    x = torch.randn(2, 5, 16)
    handle = attention.to_k.register_forward_pre_hook(lambda *_: None)
    assert _products(attention, x) == [0, 1]
    handle.remove()
    assert _products(attention, x) == [1, 0]
    attention.double()
    assert _products(attention, x.double()) == [0, 1]


def test_the_stack_is_no_part_of_the_model(attention) -> None:
    assert {name.partition(".")[0] for name in attention.state_dict()} == {
        "to_q", "to_k", "to_v", "to_out"
    }  # fmt: skip


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("text", "text_output", "asked"),
    [(True, True, [1, 1, 0, 0]), (True, False, [1, 0, 0, 1]), (False, False, [1, 0, 0, 0])],
    ids=["joint", "a last block", "image alone"],
)
@torch.inference_mode()
def test_joint_attention_asks_a_stack_of_image_and_one_of_text_that_asks(
    text, text_output, asked, qk_norm, monkeypatch
) -> None:
    torch.manual_seed(0)
    module = JointAttention(16, 2, qk_norm=qk_norm, text=text, text_output=text_output)
    given = torch.randn(2, 6, 16), torch.randn(2, 3, 16) if text else None
    # FLUX rotates, and its texts always ask; SD3.5 norms without.
    rotation = None
    if qk_norm and text_output:
        rotation = tuple(torch.randn(2, 9, 8))
    expected = module(*given, rotation)
    monkeypatch.setattr(fused, "_serves", lambda x, op="": True)
    monkeypatch.setattr(fused, "attention", nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(
        "tintype.models.joint.attention", nn.functional.scaled_dot_product_attention
    )
    module.stack()
    layers = [*module._stacked, module.to_q, getattr(module, "add_v_proj", None)]
    seen = []
    for layer in layers:
        if layer is not None:
            layer.forward = lambda x, layer=layer: (
                seen.append(layer) or type(layer).forward(layer, x)
            )
    for found, right in zip(module(*given, rotation), expected, strict=True):
        assert (found is None) == (right is None)
        assert found is None or relative_error(found, right) < 1e-5
    assert [0 if layer is None else seen.count(layer) for layer in layers] == asked
