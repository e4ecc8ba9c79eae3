"""Models compute the same by the fused ops as by PyTorch's operators, and are exported in the latter."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kernel_checks import forced, norm_error
from tintype.models import fused
from tintype.models.flux import FluxConfig, FluxTransformer
from tintype.models.layers import ResnetBlock
from tintype.models.quantised import (
    QuantisedLinear,
    Scheme,
    layer_codes,
    nearest,
    quantised_layer,
    round_linears,
)
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype.models.unet import UNet
from tintype.models.unet_config import UNetConfig
from tintype_kernels.torch_op import TorchOp
from tolerances import KERNEL_NORM, LINEAR_INT8, QUANTISED_GRAPH, relative_error

_TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
_POOLED = torch.randn(2, 20, generator=torch.Generator().manual_seed(2))
_TIMES = torch.tensor([10.0, 900.0])


def _latents(channels):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(3))


def _unet():
    unet = UNet(
        UNetConfig(
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
        )
    )
    return unet, (_latents(4), _TIMES, _TEXT)


def _sd3():
    config = SD3Config(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return SD3Transformer(config), (_latents(16), _TIMES, _TEXT, _POOLED)


def _flux():
    config = FluxConfig(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        in_channels=16,
    )
    return FluxTransformer(config), (_latents(4), _TIMES, _TEXT, _POOLED)


@pytest.fixture(params=[_unet, _sd3, _flux], ids=lambda make: make.__name__[1:])
def model(request):
    torch.manual_seed(0)
    module, inputs = request.param()
    with torch.no_grad():  # gates and weights of norms must count
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval(), inputs


@pytest.fixture
def ops_called(monkeypatch):
    """The names of the ops that a model calls, with GPUs' choice of them made on this machine."""
    called = []
    monkeypatch.setattr(fused, "_serves", lambda x, op="": not torch.compiler.is_exporting())
    monkeypatch.setattr("tintype_kernels.ops.attention.is_preferred", lambda q, k, v: True)
    call = TorchOp.__call__

    def noted(self, *arguments):
        called.append(self.name)
        return call(self, *arguments)

    monkeypatch.setattr(TorchOp, "__call__", noted)
    return called


def test_the_fused_ops_give_what_pytorch_gives_and_its_gradients(model, ops_called, monkeypatch):
    module, inputs = model
    latents = inputs[0].clone().requires_grad_()
    fused_output = module(latents, *inputs[1:])
    fused_output.square().sum().backward()
    gradient = latents.grad.clone()
    expected_ops = {
        "UNet": {"group_norm_silu", "geglu"},
        "SD3Transformer": {"gate_residual"},
        "FluxTransformer": {"gate_residual", "qk_norm_rope"},
    }[type(module).__name__]
    assert expected_ops | {"layer_norm_modulate", "residual_layer_norm"} <= set(ops_called)

    monkeypatch.undo()
    latents.grad = None
    output = module(latents, *inputs[1:])
    output.square().sum().backward()
    assert relative_error(fused_output.detach(), output.detach()) < 1e-5
    assert relative_error(gradient, latents.grad) < 1e-4


@pytest.mark.parametrize(
    ("sides", "dtype", "grad", "ours"),
    [
        ((64, 64), torch.float32, False, True),
        ((8, 8), torch.float32, False, False),  # done before an op of ours would be reached
        ((64, 64), torch.bfloat16, False, False),
        ((64, 64), torch.float32, True, False),
    ],
)
def test_on_a_cpu_large_norms_of_inference_are_ours(sides, dtype, grad, ours, monkeypatch):
    called = []
    call = TorchOp.__call__
    monkeypatch.setattr(
        TorchOp, "__call__", lambda op, *given: called.append(op.name) or call(op, *given)
    )
    norm, x = torch.nn.GroupNorm(8, 32, dtype=dtype), torch.randn(1, 32, *sides).to(dtype)
    with torch.set_grad_enabled(grad):
        found = fused.group_norm(norm, x, silu=True)
        expected = torch.nn.functional.silu(norm(x))
    assert called == ["group_norm_silu"] * ours
    close = KERNEL_NORM[str(dtype).removeprefix("torch.")]
    assert relative_error(found.detach().float(), expected.detach().float()) < close


def test_attention_without_gradients_goes_through_the_op_where_it_is_preferred(model, ops_called):
    module, inputs = model
    with torch.inference_mode():
        module(*inputs)
    assert "attention" in ops_called


@pytest.fixture
def libraries_of_gpus(ops_called, monkeypatch):
    """What a GPU's libraries are asked for in one pass is asked of this machine's, which knows another GELU."""
    monkeypatch.setattr(fused, "_is_plain", lambda layer, kind, x: type(layer) is kind)

    def product(bias, x, weight, *, use_gelu):
        assert use_gelu
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", product)


@pytest.mark.usefixtures("libraries_of_gpus")
def test_what_libraries_do_in_one_pass_is_what_the_layers_do(model, monkeypatch):
    module, inputs = model
    with torch.inference_mode():
        found = module(*inputs)
        monkeypatch.undo()
        assert relative_error(found, module(*inputs)) < 1e-5


@pytest.mark.usefixtures("ops_called")
@pytest.mark.parametrize("size", [(12, 10), (13, 10), (6, 5)])
@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_pictures_are_enlarged_to_the_nearest_pixels_also_by_copies(size, channels, dtype, layout):
    x = torch.randn(2, channels, 6, 5).to(dtype).contiguous(memory_format=layout)
    expected = F.interpolate(x, size=size, mode="nearest")
    assert torch.equal(fused.enlarged(x, size), expected)
    with torch.inference_mode():
        assert torch.equal(fused.enlarged(x, size), expected)


@pytest.mark.usefixtures("ops_called")
def test_enlarging_by_copies_passes_gradients_back():
    x = torch.randn(1, 8, 3, 2).requires_grad_()
    fused.enlarged(x, (6, 4)).square().sum().backward()
    assert torch.allclose(x.grad, 8 * x.detach())


@pytest.mark.usefixtures("libraries_of_gpus")
@pytest.mark.parametrize("c_out", [16, 24])
def test_a_residual_block_without_times_adds_each_bias_once(c_out, monkeypatch):
    torch.manual_seed(0)
    block, x = ResnetBlock(16, c_out, groups=4, eps=1e-6), torch.randn(2, 16, 6, 5)
    with torch.inference_mode():
        found = block(x)
        monkeypatch.undo()
        assert relative_error(found, block(x)) < 1e-5


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_norms_and_gates_write_the_codes_that_quantised_layers_read(
    model, scheme, ops_called, monkeypatch
):
    module, inputs = model
    round_linears(module, Scheme(scheme, "dynamic"))
    with torch.inference_mode():
        fused_output = module(*inputs).clone()
    writers = {name for name in ops_called if name.endswith("_quantized")}
    gate = {"geglu_quantized" if isinstance(module, UNet) else "activate_quantized"}
    norms = {"layer_norm_modulate_quantized", "residual_layer_norm_quantized"}
    assert writers == norms | gate
    taken = ops_called.count("quantized_rows_linear")
    assert taken > ops_called.count(f"{scheme}_linear") / 2
    # All else stays the same, as any difference moves some value across the middle of two codes.
    monkeypatch.setattr(fused, "_codes_for", lambda x, readers: "")
    with torch.inference_mode():
        output = module(*inputs)
    assert norm_error(fused_output, output) < QUANTISED_GRAPH


def test_layers_that_want_numbers_get_them(model, ops_called):
    """Where gradients are asked for, where inputs are smoothed, and where a reader beside is not quantised."""
    module, inputs = model
    round_linears(module, Scheme("int8", "dynamic"))
    module(*inputs)
    quantised = [m for m in module.modules() if isinstance(m, QuantisedLinear)]
    for layer in quantised:
        layer.smoothing = torch.ones(layer.codes.shape[1])
    with torch.inference_mode():
        module(*inputs)
    for layer in quantised[1:]:
        layer.smoothing = None
    assert not fused._codes_for(inputs[0], [quantised[1], torch.nn.Linear(1, 1)])
    assert "int8_linear" in ops_called
    assert "quantized_rows_linear" not in ops_called


@pytest.fixture
def convolution():
    """A layer's input, and the layer in int8 with these activations and this geometry."""
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 8)

    def make(activations, **geometry):
        layer = torch.nn.Conv2d(32, 48, 3, **geometry)
        kept = nearest(layer.weight.detach(), Scheme("int8", activations))
        static = activations == "static"
        kept = replace(kept, input_scale=x.abs().max() / 150) if static else kept
        return x, quantised_layer(layer, kept), kept

    return make


@pytest.mark.parametrize(("activations", "close"), [("static", 1e-5), ("dynamic", LINEAR_INT8)])
def test_a_convolution_takes_codes_where_that_was_faster(
    activations, close, convolution, ops_called, monkeypatch
):
    x, layer, kept = convolution(activations, stride=2, padding=1)
    preferred = "tintype_kernels.ops.int8_conv2d.is_preferred"
    with torch.inference_mode():
        monkeypatch.setattr(preferred, lambda *_, **__: False)
        plain = layer(x)
        assert not ops_called
        monkeypatch.setattr(preferred, lambda *_, **__: True)
        fused_output = layer(x)
    assert ops_called == ["int8_conv2d"]
    assert norm_error(fused_output, plain) < close
    layer(x)
    assert ops_called == ["int8_conv2d"]  # not where gradients are asked for
    codes = layer_codes(torch.nn.Sequential(layer))["0"].codes
    assert codes.is_contiguous()
    assert torch.equal(codes, kept.codes)


@pytest.fixture(params=["static", "dynamic"])
def block(request, monkeypatch):
    """A residual block whose convolutions behind norms are in int8, where our kernel is preferred, and its inputs."""
    torch.manual_seed(0)
    block, layout = ResnetBlock(32, 48, groups=8, eps=1e-5, time_channels=16), torch.channels_last
    for name in ("conv1", "conv2"):
        kept = nearest(getattr(block, name).weight.detach(), Scheme("int8", request.param))
        static = request.param == "static"
        kept = replace(kept, input_scale=torch.tensor(0.02)) if static else kept
        setattr(block, name, quantised_layer(getattr(block, name), kept))
    monkeypatch.setattr("tintype_kernels.ops.int8_conv2d.is_preferred", lambda *_, **__: True)
    x = torch.randn(2, 32, 9, 8).contiguous(memory_format=layout)
    return block, (x, torch.randn(2, 16))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_norms_write_the_codes_that_quantised_convolutions_read(
    block, implementation, ops_called, monkeypatch
):
    module, inputs = block
    with torch.inference_mode(), forced(implementation):
        fused_output = module(*inputs)
        assert ops_called == ["group_norm_silu_quantized", "quantized_pictures_conv2d"] * 2
        ops_called.clear()
        monkeypatch.setattr(fused, "_take_pictures", lambda x, readers: False)
        output = module(*inputs)
    assert ops_called == ["group_norm_silu", "int8_conv2d"] * 2
    assert torch.equal(fused_output, output)
    assert fused_output.stride() == output.stride()


def test_convolutions_that_want_numbers_get_them(block, ops_called, monkeypatch):
    """Where gradients are asked for, a weight is tuned, or the library's convolution is the faster one."""
    module, inputs = block
    module(*inputs)
    with torch.inference_mode():
        module.conv1.tune()
        module(*inputs)
        module.conv1.settle()
        monkeypatch.setattr("tintype_kernels.ops.int8_conv2d.is_preferred", lambda *_, **__: False)
        module(*inputs)
    norm, codes = "group_norm_silu", ["group_norm_silu_quantized", "quantized_pictures_conv2d"]
    assert ops_called == [norm, norm, norm, *codes, norm, norm]


def test_readers_take_codes_together_and_on_one_scale(block, ops_called):
    (module, (x, _)), plain = block, torch.nn.Conv2d(32, 8, 3)
    first, other = module.conv1, deepcopy(module.conv1)
    with torch.inference_mode():
        assert fused._take_pictures(x, [first])
        assert fused._take_pictures(x, [first, other]) == (first.input_scale is None)
        assert not fused._take_pictures(x, [first, plain])
        assert not fused._take_pictures(x, [])


def test_an_exported_block_in_codes_holds_no_op_of_ours(block, ops_called):
    module, inputs = block
    with torch.no_grad():
        program = torch.export.export(module, inputs)
    assert not ops_called
    assert "tintype" not in program.graph_module.code


@pytest.mark.parametrize(
    "geometry", [{"dilation": 2}, {"padding": (0, 1)}, {"stride": (2, 1)}, {"padding": "same"}]
)
def test_a_geometry_that_the_kernel_does_not_know_is_the_librarys(
    geometry, convolution, ops_called, monkeypatch
):
    monkeypatch.setattr("tintype_kernels.ops.int8_conv2d.is_preferred", lambda *_, **__: True)
    x, layer, _ = convolution("static", **geometry)
    with torch.inference_mode():
        layer(x)
    assert not ops_called


def test_an_exported_model_holds_no_op_of_ours(model, ops_called):
    module, inputs = model
    with torch.no_grad():
        program = torch.export.export(module, inputs)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in targets if target.startswith("tintype")]


def test_on_cpu_group_norm_is_native_without_gradients(model):
    module, inputs = model
    with torch.inference_mode():
        native = module(*inputs)
    output = module(*(t.clone().requires_grad_(t.is_floating_point()) for t in inputs))
    assert relative_error(native.clone(), output.detach()) < 1e-5


def test_a_step_of_samples_at_different_rows_is_the_same_fused(ops_called, monkeypatch):
    x, m, uncond, first, second, noise = torch.randn(6, 2, 4, 3, 3)
    rows = torch.rand(2, 10)
    given = (x, m, uncond, (first, second), rows, noise)
    made = fused.scheduler_step(*given)
    assert ops_called == ["scheduler_step"]
    monkeypatch.undo()
    for one, other in zip(made, fused.scheduler_step(*given), strict=True):
        assert relative_error(one, other) < 1e-6
