"""One block of each kind at the published width, exported and run by onnxruntime against torch in float32.

`TINTYPE_LAYER_SIDE=1024` runs them at the tokens of a whole picture, and `TINTYPE_FULL_ENGINES=1` builds FLUX's two as
TensorRT engines; docs/measurements.md reports both.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tintype.backends.onnxruntime import OnnxRuntimeBackend
from tintype.bundle import Bundle
from tintype.checkpoints.files import Weights
from tintype.models.flux import FluxConfig, FluxTransformer
from tintype.models.quantised import LARGEST_CODE, Scheme, nearest
from tintype.models.sd3 import SD3Config, SD3Transformer
from tintype.models.stages import FlowDenoiseStage, T5EncodeStage
from tintype.models.t5 import T5Config, T5Encoder
from tintype_bench import published_configs as published
from tintype_export.graphs import point_to_weights, save, stored_tensors, trace
from tintype_export.qdq import quantise_graph
from tintype_export.quantisation import layer_tensors
from tintype_export.sensitivity import quantisable_by_rule
from tintype_export.tensorrt import build_engines
from tolerances import STAGE_FP32, relative_error

SIDE = int(os.environ.get("TINTYPE_LAYER_SIDE", "128"))  # pixels of the picture
TEXT = SIDE // 2  # tokens; 512 beside a picture of 1024 pixels
WEIGHTS = "weights/layers.safetensors"
# SD3's last block lets the text go and so differs from the others: a whole and a last one.
SD3 = {"sd3-medium": {}, "sd35-large": {}, "sd35-medium": {"dual_attention_layers": [0]}}


def sd3(model):
    config = published.SD3_TRANSFORMERS[model] | SD3[model] | {"num_layers": 2}
    return SD3Transformer(SD3Config.from_json(config))


def flux():
    """A block with two streams and one with one: more than the two gigabytes that a protobuf message holds."""
    blocks = {"num_layers": 1, "num_single_layers": 1}
    config = published.FLUX_TRANSFORMERS["flux1-dev"] | blocks
    return FluxTransformer(FluxConfig.from_json(config))


def denoiser(module, text):
    """A stage, and what it takes for a square picture and so many tokens of text."""
    stage, config = FlowDenoiseStage(module), module.config
    given = {
        "sample": torch.randn(1, 16, SIDE // 8, SIDE // 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "text_embeds": torch.randn(1, config.pooled_projection_dim),
        "guidance": torch.tensor([3.5]),
    }
    return stage, {name: given[name] for name in stage.inputs}


def t5():
    # Fewer words than the published table has: looking one up depends on no shape of a layer.
    config = T5Config.from_json(published.T5_XXL | {"num_layers": 1, "vocab_size": 512})
    return T5EncodeStage(T5Encoder(config)), {"input_ids": torch.randint(0, 512, (1, TEXT))}


ENGINES = {
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "fp8": (torch.float16, Scheme("fp8", "static")),
    "int4": (torch.float16, Scheme("int4", group=64)),
}
LAYERS = {
    **{model: lambda model=model: denoiser(sd3(model), TEXT) for model in SD3},
    "flux": lambda: denoiser(flux(), TEXT),
    "t5-xxl": t5,
}


def exported(stage, inputs, folder, scheme=None):
    """A bundle of the one stage, whose weights lie in one file beside its graph, in codes where there is a scheme."""
    (folder / "weights").mkdir()
    ((name, module),) = stage.named_children()
    state = module.state_dict() if scheme is None else in_codes(module, scheme, stage.dtype)
    save_file({f"{name}.{key}": t.contiguous() for key, t in state.items()}, folder / WEIGHTS)
    del state
    weights = stored_tensors(folder, Weights((folder / WEIGHTS,)))
    model = trace(stage, inputs)
    quantise_graph(model, weights)
    point_to_weights(model, weights)
    save(model, folder / "denoise" / "b1.onnx")
    stages, described = {"denoise": {"b1": "denoise/b1.onnx"}}, {WEIGHTS: {}, "denoise/b1.onnx": {}}
    return Bundle(folder, "layers", "flux", "fp32", stages, {}, [], {}, files=described)


def in_codes(module, scheme, dtype):
    """The state of a module with the layers that a rule chooses rounded; inputs within 4 keep their place."""
    state, chosen = {}, quantisable_by_rule(module, scheme)
    for key, value in module.state_dict().items():
        layer = key.removesuffix(".weight")
        if layer != key and layer in chosen:
            kept = nearest(value, scheme)
            if scheme.activations == "static":
                kept = replace(kept, input_scale=torch.tensor(4 / LARGEST_CODE[scheme.weights]))
            state |= layer_tensors(layer, kept, dtype)
        else:
            state[key] = value
    return state


@pytest.fixture
def folder(tmp_path):
    """A folder whose gigabytes go with the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_block_of_the_published_width_equals_torch(kind, folder):
    torch.manual_seed(0)
    stage, inputs = LAYERS[kind]()
    bundle = exported(stage.eval(), inputs, folder)
    assert kind != "flux" or (folder / WEIGHTS).stat().st_size > 2**31
    with torch.inference_mode():
        expected = stage(*inputs.values()).numpy()
    del stage  # gigabytes that the runtime needs
    arrays = {name: value.numpy() for name, value in inputs.items()}
    (actual,) = OnnxRuntimeBackend(bundle).run("denoise", "b1", arrays).values()
    assert relative_error(actual, expected) < STAGE_FP32


@pytest.mark.skipif("TINTYPE_FULL_ENGINES" not in os.environ, reason="builds engines of gigabytes")
@pytest.mark.parametrize(("dtype", "scheme"), ENGINES.values(), ids=ENGINES)
def test_engines_of_both_kinds_of_block_of_flux_are_built(dtype, scheme, folder):
    gpus = ("sm_89", "sm_120")
    pytest.importorskip("tensorrt_rtx")
    stage, inputs = denoiser(flux().to(dtype), TEXT)
    bundle = exported(stage.eval(), inputs, folder, scheme)
    stored = (folder / WEIGHTS).stat().st_size
    del stage
    build_engines(folder, bundle.stages, gpus, print)
    for gpu in gpus:
        size = (folder / f"denoise/b1.{gpu}.engine").stat().st_size
        assert size > 0.9 * stored  # an engine holds its weights
