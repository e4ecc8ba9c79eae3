"""A small stage with every way to multiply by a weight, as quantised torch modules and as a graph of the same codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tintype.checkpoints.files import Weights
from tintype.models.quantised import Scheme, nearest, quantisable, replace_layers
from tintype.models.stage import Stage
from tintype_export.graphs import point_to_weights, save, stored_tensors, trace
from tintype_export.qdq import quantise_graph
from tintype_export.quantisation import layer_tensors
from tintype_export.storage import HIGH

# Whose outputs are rounded, too, where inputs are; a convolution's are in int8 alone.
FACTORS = ("to_q", "to_k")
GRAPH = "denoise/6x5-b2.onnx"
WEIGHTS = "weights/unet.safetensors"
SCHEMES = {
    "int8": Scheme("int8", "static"),
    "int8 weights": Scheme("int8"),
    "int4": Scheme("int4", group=32),
    "fp8": Scheme("fp8", "static"),
}


class Mixed(nn.Module):
    """A convolution, tokens of it, two projections of the same tokens, and a row of its own: every way to multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.to_q = nn.Linear(64, 32)
        self.to_k = nn.Linear(64, 32, bias=False)
        self.row = nn.Linear(64, 32)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        tokens = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        return self.to_q(tokens) * self.to_k(tokens) + self.row(row)[:, None]


class MixedStage(Stage):
    inputs, outputs = ("sample", "row"), ("model_output",)

    def __init__(self) -> None:
        super().__init__()
        self.unet = Mixed()

    def forward(self, sample: Tensor, row: Tensor) -> Tensor:
        return self.unet(sample.to(self.dtype), row.to(self.dtype)).float()


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 32, 6, 5, generator=generator),
        "row": torch.randn(2, 64, generator=generator),
    }


def make_recipe(model, scheme):
    recipe = {}
    for name, layer in quantisable(model).items():
        kept = nearest(layer.weight.detach(), scheme)
        if scheme.activations == "static":
            largest = {"int8": 127, "fp8": 448}[scheme.weights]
            top = {"to_q": 1.0, "to_k": 1.0}.get(name, 4.0)
            kept = replace(kept, input_scale=torch.tensor(top / largest))
            if name in FACTORS:
                kept = replace(kept, output_scale=torch.tensor(1.5 / largest))
            if name == "conv" and scheme.weights == "int8":
                tops = torch.linspace(1.5, 2.5, len(kept.codes))
                kept = replace(kept, output_scale=tops / largest)
        recipe[name] = kept
    if scheme.activations == "static":
        factors = torch.rand(64) + 0.5
        weight = model.row.weight.detach() / factors
        recipe["row"] = replace(
            nearest(weight, scheme), input_scale=recipe["row"].input_scale, smoothing=factors
        )
    return recipe


def write_mixed(root, scheme, dtype=torch.float32):
    """Write GRAPH and WEIGHTS, computed in ``dtype``, to ``root``; the torch modules that they are of, in float32."""
    torch.manual_seed(0)
    stage = MixedStage().eval()
    recipe = make_recipe(stage.unet, scheme)
    tensors = {n: t.to(HIGH) for n, t in stage.unet.state_dict().items() if n.endswith("bias")}
    for name, kept in recipe.items():
        tensors |= layer_tensors(name, kept, dtype)
    (root / WEIGHTS).parent.mkdir()
    save_file(tensors, root / WEIGHTS)
    stored = stored_tensors(root, Weights((root / WEIGHTS,)))
    weights = {f"unet.{name}": each for name, each in stored.items()}
    model = trace(stage.to(dtype), make_inputs())
    quantise_graph(model, weights)
    point_to_weights(model, weights)
    save(model, root / GRAPH)
    stage.float().unet.load_state_dict(
        {name: tensor.to(HIGH).float() for name, tensor in stage.unet.state_dict().items()}
    )
    replace_layers(stage.unet, recipe)
    return stage
