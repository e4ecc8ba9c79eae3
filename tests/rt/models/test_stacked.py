"""Layers that are multiplied as one give what each gives, out of the same memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tintype.models import fused
from tintype.models.quantised import Scheme, nearest, quantised_layer
from tintype.models.stacked import is_stack_of, stack
from tintype.models.unet import Attention
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
