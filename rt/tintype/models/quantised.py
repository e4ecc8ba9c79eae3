"""Linear and convolution layers in int8, int4 or e4m3: run by our kernels, fine-tuned, exported as QDQ.

A weight is a code times a scale, an output channel's (int8, fp8) or a group's of inputs (int4), symmetric throughout. A
layer's input stays as it is ("none"), is rounded to 8 bits on a scale of the layer's own ("static", found by
calibration), or on one a token, of a convolution one a sample ("dynamic", where our kernels run). Codes and scales are
what a file holds; `LayerCodes` is that, and `QuantisedLinear` and `QuantisedConv2d` compute with it. Scales learn as in
LSQ (Esser et al. 2020, arXiv 1902.08153), smoothing is SmoothQuant's (Xiao et al. 2023, arXiv 2211.10438).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintype.errors import RequestError
from tintype.models.fused import prefers_int8_conv2d
from tintype_kernels.ops.fp8_linear import fp8_linear
from tintype_kernels.ops.int4_linear import int4_linear
from tintype_kernels.ops.int8_conv2d import int8_conv2d
from tintype_kernels.ops.int8_linear import int8_linear
from tintype_kernels.ops.quantise import Fp8Weight, Int4Weight, Int8Weight, dequantize
from tintype_kernels.ops.quantised_pictures import QuantizedPictures
from tintype_kernels.ops.quantised_rows import QuantizedRows

GROUPS = (32, 64, 128)
# The largest code of a weight, and the least and the largest of an input: what QuantizeLinear saturates at.
LARGEST_CODE = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_INPUT_RANGE = {"int8": (-128.0, 127.0), "fp8": (-448.0, 448.0)}
_ACTIVATIONS = ("none", "static", "dynamic")
# The layers that pictures, latents, texts and times come in by, and that the prediction or the picture leaves by, under
# their published names: little work, and all the others depend on them.
_GATES = (
    "conv_in", "conv_out", "time_embedding", "add_embedding", "pos_embed", "x_embedder", "context_embedder",
    "time_text_embed", "norm_out", "proj_out", "post_quant_conv", "proj_in", "embedding_proj",
    "proj_to_clip_embeddings", "controlnet_cond_embedding",
)  # fmt: skip
_TIME = "time_emb_proj"  # of every residual block: one row of work
# A latent UNet's self-attention, whose queries and keys go from these layers into their product as they are.
_FACTORS = ("attn1.to_q", "attn1.to_k")


@dataclass(frozen=True)
class Scheme:
    """What a layer's weights and inputs are kept in. ``group`` is of int4 alone, along [in * kernel height * width]."""

    weights: str
    activations: str = "none"
    group: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in LARGEST_CODE:
            raise RequestError(
                f"weights={self.weights!r} is unknown; choose one of {', '.join(LARGEST_CODE)}"
            )
        if self.activations not in _ACTIVATIONS:
            raise RequestError(
                f"activations={self.activations!r} is unknown; choose one of {', '.join(_ACTIVATIONS)}"
            )
        if self.weights == "int4" and (self.group not in GROUPS or self.activations != "none"):
            raise RequestError(
                f"int4 is for weights alone, in groups of {', '.join(map(str, GROUPS))}; asked was group={self.group}, "
                f"activations={self.activations!r}"
            )

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight [out, in, ...] of this shape has whole groups, which are packed two codes a byte."""
        whole = self.group is None or math.prod(shape[1:]) % self.group == 0
        return whole and (self.weights != "int4" or shape[0] % 2 == 0)


@dataclass(frozen=True)
class LayerCodes:
    """What is kept of a layer: ``codes`` int8 or float8_e4m3fn, of the weight's shape, int4 unpacked in -7..7.

    ``weight_scale`` float32 [out], or [out, groups] of int4. ``input_scale`` float32 [] where activations are static.
    ``smoothing`` float32 [in], which the input is multiplied by and the weight was divided by; linear layers only.
    ``output_scale`` where the output is rounded, too: float32 [] of two linear layers whose outputs are multiplied with
    each other, [out] of a convolution.
    """

    scheme: Scheme
    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    smoothing: Tensor | None = None
    output_scale: Tensor | None = None

    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, smoothing included."""
        return scaled_codes(self.codes.float(), self.weight_scale)


def scaled_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [out, ...] times scale [out] or [out, groups]."""
    return (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)


def largest_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """The scales that the largest value of each channel or group takes the largest code at; 1 where all are 0."""
    groups = 1 if scheme.group is None else weight[0].numel() // scheme.group
    top = weight.float().reshape(len(weight), groups, -1).abs().amax(-1)
    scale = torch.where(top > 0, top / LARGEST_CODE[scheme.weights], 1.0)
    return scale if scheme.group is not None else scale[:, 0]


def round_codes(weight: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The nearest codes, int8 or float8_e4m3fn, of weight [out, ...] at scale [out] or [out, groups]."""
    limit = LARGEST_CODE[kind]
    stretched = weight.float().reshape(*scale.shape, -1) / scale[..., None]
    stretched = stretched.clamp(-limit, limit).reshape(weight.shape)
    return stretched.to(torch.float8_e4m3fn) if kind == "fp8" else stretched.round().to(torch.int8)


def nearest(weight: Tensor, scheme: Scheme) -> LayerCodes:
    """Round a weight [out, in, ...] to its nearest codes; static activations still need their ``input_scale``."""
    scale = largest_scales(weight, scheme)
    return LayerCodes(scheme, round_codes(weight, scale, scheme.weights), scale)


def fake_quantise(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """QuantizeLinear and DequantizeLinear of x at a scale that broadcasts, computed in float32, returned in x's type.

    Gradients pass the rounding by; the scale's is LSQ's, and x's is 0 where x is cut off.
    """
    z = (x.float() / scale).clamp(*_INPUT_RANGE[kind])
    return (_straight_through(z, kind) * scale).to(x.dtype)


def _straight_through(z: Tensor, kind: str) -> Tensor:
    rounded = z.to(torch.float8_e4m3fn).to(z.dtype) if kind == "fp8" else z.round()
    return z + (rounded - z).detach()


class _Quantised(nn.Module):
    """What both layers share. While it is tuned, ``weight`` is a parameter that is rounded anew in every call."""

    def __init__(self, kept: LayerCodes, bias: Tensor | None) -> None:
        super().__init__()
        if kept.scheme.activations == "static" and kept.input_scale is None:
            raise RequestError(
                "static activations need an input_scale; calibrate, or choose 'none'"
            )
        self.scheme = kept.scheme
        self.register_buffer("codes", self._held(kept.codes))
        self.weight_scale = nn.Parameter(kept.weight_scale.float(), requires_grad=False)
        static = kept.scheme.activations == "static"
        self.input_scale = _learnable(kept.input_scale if static else None)
        self.output_scale = _learnable(kept.output_scale)
        self.register_buffer("smoothing", kept.smoothing)
        self.register_parameter("weight", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def tune(self, weight: Tensor | None = None) -> None:
        """Make weight and scales learnable, beginning at ``weight`` (smoothing excluded), or at what the codes say."""
        if weight is not None and self.smoothing is not None:
            weight = weight / self.smoothing
        start = self.kept().weight() if weight is None else weight.detach().float().clone()
        self.weight = nn.Parameter(start)
        for scale in (self.weight_scale, *self._side_scales()):
            if scale is not None:
                scale.requires_grad_(True)

    def settle(self) -> None:
        """Keep the codes that the tuned weight rounds to, and forget it."""
        self.codes = self._held(self.kept().codes)
        self.weight = None
        for scale in (self.weight_scale, *self._side_scales()):
            if scale is not None:
                scale.requires_grad_(False)

    def _side_scales(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        return self.input_scale, self.output_scale

    def kept(self) -> LayerCodes:
        """Codes and scales as they are now."""
        scale = self.weight_scale.detach()
        tuned = self.weight
        codes = (
            self._codes()
            if tuned is None
            else round_codes(tuned.detach(), scale, self.scheme.weights)
        )
        input_scale, output_scale = (
            None if each is None else each.detach() for each in self._side_scales()
        )
        return LayerCodes(self.scheme, codes, scale, input_scale, self.smoothing, output_scale)

    def _held(self, codes: Tensor) -> Tensor:
        """Codes as the layer holds them."""
        return codes

    def _codes(self) -> Tensor:
        """Codes as a file holds them."""
        return self.codes

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if self.weight is None:
            return self.kept().weight().to(dtype)
        limit = LARGEST_CODE[self.scheme.weights]
        z = self.weight.reshape(*self.weight_scale.shape, -1) / self.weight_scale[..., None]
        codes = _straight_through(z.clamp(-limit, limit), self.scheme.weights)
        return scaled_codes(codes.reshape(self.weight.shape), self.weight_scale).to(dtype)

    def _input(self, x: Tensor) -> Tensor:
        if self.smoothing is not None:
            x = x * self.smoothing.to(x.dtype)
        return self._rounded(x, self.input_scale)

    def _rounded(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return x if scale is None else fake_quantise(x, scale, self.scheme.weights)


def _learnable(scale: Tensor | None) -> nn.Parameter | None:
    """A scale that learns once the layer is tuned."""
    return None if scale is None else nn.Parameter(scale.float(), requires_grad=False)


class QuantisedLinear(_Quantised):
    """x [..., in] -> [..., out]; with int4 weights or dynamic activations by our kernels."""

    @property
    def input_codes(self) -> str:
        """The codes that the op before may give its input in, int8 or fp8; nothing where it wants the numbers."""
        plain = self.weight is None and self.smoothing is None
        return self.scheme.weights if plain and self.scheme.activations == "dynamic" else ""

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if isinstance(x, QuantizedRows):
            return self._dynamic(x)
        x = self._input(x)
        if self.weight is None and self.scheme.activations == "dynamic":
            return self._dynamic(x)
        if self.weight is None and self.scheme.weights == "int4":
            return int4_linear(x, Int4Weight(self.codes, self.weight_scale), self.bias)
        return self._rounded(F.linear(x, self._weight(x.dtype), self.bias), self.output_scale)

    def _dynamic(self, x: Tensor | QuantizedRows) -> Tensor:
        if self.scheme.weights == "int8":
            return int8_linear(x, Int8Weight(self.codes, self.weight_scale), self.bias)
        return fp8_linear(x, Fp8Weight(self.codes, self.weight_scale), self.bias)

    def _held(self, codes: Tensor) -> Tensor:
        if self.scheme.weights != "int4":
            return codes
        return pack_for_kernels(codes, self.scheme.group)

    def _codes(self) -> Tensor:
        if self.scheme.weights != "int4":
            return self.codes
        # At a scale of 1 the weights are the codes.
        ones = torch.ones_like(self.weight_scale)
        return dequantize(Int4Weight(self.codes, ones)).to(torch.int8)


class QuantisedConv2d(_Quantised):
    """x [n, in, h, w] -> [n, out, h', w'], with the geometry of the layer that it replaces.

    Where our kernel for int8 is not the faster one, dynamic inputs are left as they are: that is the library's
    convolution with the weights that the codes stand for.
    """

    def __init__(self, kept: LayerCodes, layer: nn.Conv2d) -> None:
        super().__init__(kept, layer.bias)
        self.geometry = {
            name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")
        }
        self._sides = _square(self.geometry)

    def takes_codes(self, x: Tensor) -> bool:
        """Whether the op before may give what is like x in codes: where our kernel runs for it."""
        known = self._has_kernel and self.weight is None and self._sides is not None
        return known and prefers_int8_conv2d(x, self._kernels, self.bias, **self._how)

    def forward(self, x: Tensor | QuantizedPictures) -> Tensor:
        channels = None if self.output_scale is None else self.output_scale[:, None, None]
        return self._rounded(self._convolved(x), channels)

    def _convolved(self, x: Tensor | QuantizedPictures) -> Tensor:
        if isinstance(x, QuantizedPictures):
            return int8_conv2d(x, self._kernels, self.bias, **self._sides)
        if self.takes_codes(x):
            return int8_conv2d(x, self._kernels, self.bias, **self._how)
        x = self._input(x)
        return F.conv2d(x, self._weight(x.dtype), self.bias, **self.geometry)

    @property
    def _kernels(self) -> Int8Weight:
        return Int8Weight(self.codes, self.weight_scale)

    @property
    def _how(self) -> dict[str, Any]:
        return {**self._sides, "input_scale": self.input_scale}

    @property
    def _has_kernel(self) -> bool:
        return self.scheme.weights == "int8" and self.scheme.activations != "none"

    def _held(self, codes: Tensor) -> Tensor:
        return codes.contiguous(memory_format=torch.channels_last) if self._has_kernel else codes

    def _codes(self) -> Tensor:
        return self.codes.contiguous()


def _square(geometry: Mapping[str, Any]) -> dict[str, int] | None:
    """The stride and the padding of both sides, or nothing of a geometry that our kernel does not know."""
    stride, padding = geometry["stride"], geometry["padding"]
    known = geometry["dilation"] == (1, 1) and geometry["groups"] == 1
    if not known or isinstance(padding, str) or len({*stride}) + len({*padding}) > 2:
        return None
    return {"stride": stride[0], "padding": padding[0]}


def pack_for_kernels(codes: Tensor, group: int) -> Tensor:
    """int4 codes int8 [out, in] as `Int4Weight.packed`, uint8 [out, in / 2]."""
    low, high = (codes.reshape(len(codes), -1, group).to(torch.int16) + 8).chunk(2, -1)
    return (low | high << 4).to(torch.uint8).flatten(1)


def quantisable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be replaced, by name, in the model's order; convolutions of one group only."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def is_inner(name: str, scheme: Scheme) -> bool:
    """Whether a layer of a denoiser, a decoder or a text encoder is quantised by rule: all but gates and times.

    What a flow transformer scales and shifts its norms by is a row of work, too, and where its input were rounded
    pictures would suffer; kept in codes by itself it is a quarter of FLUX's weights saved.
    """
    parts = name.removeprefix("decoder.").removeprefix("controlnet.").split(".")
    modulates = any(part.startswith("norm") for part in parts)
    outside = parts[0] in _GATES or _TIME in parts
    return not outside and not (modulates and scheme.activations != "none")


def may_round_output(name: str, layer: nn.Module) -> bool:
    """Whether a layer's output may leave it in codes: queries and keys whose product is one of codes then, too, and
    what a convolution gives, since some runtimes convolve codes to codes alone."""
    return isinstance(layer, nn.Conv2d) or name.endswith(_FACTORS)


def round_linears(model: nn.Module, scheme: Scheme) -> nn.Module:
    """Replace a denoiser's inner linear layers, one after the other, by their nearest codes."""
    for name, layer in quantisable(model).items():
        if (
            isinstance(layer, nn.Linear)
            and is_inner(name, scheme)
            and scheme.divides(layer.weight.shape)
        ):
            codes = nearest(layer.weight.detach(), scheme)
            model.set_submodule(name, quantised_layer(layer, codes))
    return model


def quantised_layer(layer: nn.Linear | nn.Conv2d, kept: LayerCodes) -> _Quantised:
    """The layer with its weight replaced by codes."""
    if isinstance(layer, nn.Conv2d):
        return QuantisedConv2d(kept, layer)
    return QuantisedLinear(kept, layer.bias)


def replace_layers(model: nn.Module, recipe: Mapping[str, LayerCodes]) -> nn.Module:
    """Replace the named layers in place by quantised ones. Raises RequestError for a name that is no such layer."""
    layers = quantisable(model)
    if unknown := sorted(set(recipe) - set(layers)):
        raise RequestError(
            f"{unknown[0]} is no linear or convolution layer of {type(model).__name__}"
        )
    for name, kept in recipe.items():
        model.set_submodule(name, quantised_layer(layers[name], kept))
    return model


def layer_codes(model: nn.Module) -> dict[str, LayerCodes]:
    """What is kept of every quantised layer of a model, such as one that was fine-tuned."""
    return {name: m.kept() for name, m in model.named_modules() if isinstance(m, _Quantised)}
