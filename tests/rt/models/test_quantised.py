"""Quantised layers: as near to the float layer as their bits allow, and trainable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from tintype.errors import RequestError
from tintype.models.quantised import (
    QuantisedLinear,
    Scheme,
    fake_quantise,
    is_inner,
    layer_codes,
    nearest,
    quantisable,
    quantised_layer,
    replace_layers,
)
from tolerances import CODE_ROUNDING, LINEAR_FP8, LINEAR_INT4, LINEAR_INT8

ort = pytest.importorskip("onnxruntime")
SCHEMES = {
    "int8": Scheme("int8"),
    "int8 static": Scheme("int8", "static"),
    "int8 dynamic": Scheme("int8", "dynamic"),
    "int4": Scheme("int4", group=32),
    "fp8": Scheme("fp8"),
    "fp8 static": Scheme("fp8", "static"),
    "fp8 dynamic": Scheme("fp8", "dynamic"),
}
CLOSE = {"int8": LINEAR_INT8, "int4": LINEAR_INT4, "fp8": LINEAR_FP8}


def make_layer(kind):
    torch.manual_seed(0)
    return nn.Linear(64, 48) if kind == "linear" else nn.Conv2d(32, 48, 3, padding=1, stride=2)


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    return torch.randn((5, 7, 64) if kind == "linear" else (2, 32, 9, 8), generator=generator)


def make_quantised(kind, scheme):
    layer = make_layer(kind)
    kept = nearest(layer.weight.detach(), scheme)
    if scheme.activations == "static":
        largest = {"int8": 127, "fp8": 448}[scheme.weights]
        kept = replace(kept, input_scale=inputs(kind).abs().max() / largest)
    return quantised_layer(layer, kept)


def distance(actual, expected):
    return float((actual.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_quantised_layer_is_near_the_float_layer(kind, scheme):
    expected = make_layer(kind).double()(inputs(kind).double()).detach()
    actual = make_quantised(kind, scheme)(inputs(kind))
    assert 0 < distance(actual, expected) < CLOSE[scheme.weights]


def test_a_convolutions_output_is_rounded_to_whole_steps_of_each_channel():
    layer, x = make_layer("conv"), inputs("conv")
    kept = nearest(layer.weight.detach(), Scheme("int8"))
    plain = quantised_layer(layer, kept)(x).detach()
    steps = plain.abs().amax((0, 2, 3)) * torch.linspace(0.5, 2, plain.shape[1]) / 127
    made = quantised_layer(layer, replace(kept, output_scale=steps))(x).detach()
    codes = (plain / steps[:, None, None]).round().clamp(-128, 127)
    assert codes.abs().amax() == 128  # half a range cuts some off
    torch.testing.assert_close(made, codes * steps[:, None, None])


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_weights_and_scales_learn_and_the_error_shrinks(kind, scheme):
    layer, x = make_layer(kind), inputs(kind)
    wanted = layer(x).detach()
    quantised = make_quantised(kind, scheme)
    with torch.no_grad():  # scales of half the size cut values off, which leaves something to learn
        for scale in (quantised.weight_scale, quantised.input_scale):
            if scale is not None:
                scale.mul_(0.5)
    quantised.tune(layer.weight)
    learnt = [p for p in quantised.parameters() if p.requires_grad]
    static = scheme.activations == "static"
    assert {id(p) for p in learnt} >= {id(quantised.weight), id(quantised.weight_scale)}
    assert (quantised.input_scale is not None) == static
    sizes = [float(p.detach().abs().mean()) for p in learnt]
    groups = [{"params": [p], "lr": 5e-3 * size} for p, size in zip(learnt, sizes, strict=True)]
    optimiser = torch.optim.Adam(groups)
    errors = []
    for _ in range(60):
        error = (quantised(x) - wanted).square().mean()
        optimiser.zero_grad()
        error.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learnt)
        optimiser.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_settled_layer_computes_what_the_tuned_one_did(kind, scheme):
    quantised, x = make_quantised(kind, scheme), inputs(kind)
    quantised.tune()
    with torch.no_grad():
        quantised.weight.add_(0.01 * torch.randn(quantised.weight.shape))
        tuned = quantised(x).double()
        quantised.settle()
        settled = quantised(x).double()
    assert not any(p.requires_grad for name, p in quantised.named_parameters() if name != "bias")
    # Dynamic inputs are rounded by the kernels alone, so a tuned layer sees them whole.
    close = CLOSE[scheme.weights] if scheme.activations == "dynamic" else CODE_ROUNDING
    assert distance(settled, tuned) < close


@pytest.mark.parametrize(
    ("kind", "code"),
    [("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)],
)
def test_inputs_are_rounded_as_onnxruntime_rounds_them(kind, code):
    x = torch.randn(4, 1000) * 3
    scale = 0.02 if kind == "int8" else 0.01  # cuts some off
    zero = helper.make_tensor("zero", code, [], [0])
    pair = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    faces = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, 1000]) for n in "xy"]
    graph = helper.make_graph(
        pair,
        "pair",
        faces[:1],
        faces[1:],
        [zero, helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [scale])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x.numpy()})
    assert np.abs(expected).max() < float(x.abs().max())
    actual = fake_quantise(x, torch.tensor(scale), kind)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=CODE_ROUNDING)


def test_smoothing_leaves_the_product_as_it_was():
    layer, x = make_layer("linear"), inputs("linear")
    factors = torch.rand(64) + 0.5
    kept = replace(nearest(layer.weight.detach() / factors, Scheme("int8")), smoothing=factors)
    assert distance(quantised_layer(layer, kept)(x), layer(x).double().detach()) < LINEAR_INT8


def test_a_recipe_replaces_the_layers_that_it_names_and_can_be_read_back():
    model = nn.Sequential(nn.Conv2d(4, 64, 1), nn.Flatten(2), nn.Linear(36, 8))
    kept = nearest(model[0].weight.detach(), Scheme("int8"))
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    assert list(quantisable(nn.Sequential(*model, grouped))) == ["0", "2"]
    replace_layers(model, {"0": kept})
    assert isinstance(model[2], nn.Linear)
    assert layer_codes(model).keys() == {"0"}
    assert torch.equal(layer_codes(model)["0"].codes, kept.codes)
    with pytest.raises(RequestError, match="'?nonesuch'? is no linear or convolution layer"):
        replace_layers(model, {"nonesuch": kept})


def test_int4_codes_are_held_two_a_byte_and_read_back():
    weight = torch.randn(6, 64)
    kept = nearest(weight, Scheme("int4", group=32))
    layer = QuantisedLinear(kept, None)
    assert layer.codes.numel() == weight.numel() / 2
    assert torch.equal(layer.kept().codes, kept.codes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("int3",), "weights='int3' is unknown; choose one of int8, int4, fp8"),
        (("int8", "some"), "activations='some' is unknown; choose one of none, static, dynamic"),
        (("int4", "none", 48), "groups of 32, 64, 128; asked was group=48"),
        (("int4", "static", 32), "int4 is for weights alone"),
    ],
)
def test_a_scheme_that_there_is_not_says_what_there_is(arguments, said):
    with pytest.raises(RequestError, match=said):
        Scheme(*arguments)


def test_static_activations_need_their_scale():
    with pytest.raises(RequestError, match="need an input_scale; calibrate"):
        QuantisedLinear(nearest(torch.randn(4, 8), Scheme("int8", "static")), None)


@pytest.mark.parametrize(
    ("name", "always", "with_inputs_as_they_are"),
    [
        ("transformer_blocks.0.attn.to_q", True, True),
        ("single_transformer_blocks.3.norm.linear", False, True),
        ("transformer_blocks.0.norm1_context.linear", False, True),
        ("down_blocks.0.resnets.1.time_emb_proj", False, False),
        ("conv_in", False, False),
        ("proj_out", False, False),
        ("single_transformer_blocks.3.proj_out", True, True),
    ],
)
def test_the_rule_keeps_gates_high_and_modulation_where_inputs_are_rounded(
    name, always, with_inputs_as_they_are
):
    assert is_inner(name, Scheme("fp8", "static")) == always
    assert is_inner(name, Scheme("int4", group=64)) == with_inputs_as_they_are
