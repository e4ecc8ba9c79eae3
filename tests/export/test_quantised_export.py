"""Bundles in codes: true to float32 within budget, small, with layers kept high where it pays, from any shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tintype
from remembered_traces import GUIDED, remembered_trace
from small_checkpoints import save_smallest
from tintype.backends.graphs import read_graph
from tintype.backends.remembering import parted
from tintype.bundle import open_bundle
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.files import Weights
from tintype.errors import BundleError, RequestError
from tintype.models.quantised import Scheme, nearest, quantisable, replace_layers
from tintype.models.stage import Stage
from tintype_export import bundle as exporting
from tintype_export import profiles, quantisation, verify
from tintype_export.bundle import ExportConfig, export_bundle
from tintype_export.calibration import Calibration, Seen
from tintype_export.quality import psnr
from tintype_export.quantisation import plan, read_layers, write_quantised
from tintype_export.report import BUDGETS, Report, StageReport
from tintype_export.sensitivity import (
    LayerReport,
    Sensitivity,
    by_rule,
    layer_errors,
    measured,
    suspects,
    worst,
)
from tolerances import STAGE_FP32

SETTINGS = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
SETTINGS |= {"width": 16, "height": 16}
# As many steps as are compared: what a random model draws grows with every one of them.
STEPS = SETTINGS["num_inference_steps"]
PROMPTS = Calibration(("red", "the red"), steps=STEPS, rows=64, shown=2)


def make_config(precision, **changes):
    defaults = {"width": 16, "height": 16}
    config = ExportConfig(((16, 16),), precision, defaults=defaults, calibration=PROMPTS, group=32)
    return replace(config, **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_smallest(tmp_path_factory.mktemp("smallest") / "checkpoint")


@pytest.fixture(scope="module", params=["int8", "int4", "fp8"])
def exported(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "trace", remembered_trace)
        patch.setattr(exporting, "profiles_of", lambda *_: GUIDED)
        patch.setattr(verify, "_STEPS", STEPS)
        return export_bundle(source, folder / "bundle", make_config(request.param)), request.param


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_pictures_are_true_to_float32_within_the_budget(source, exported, backend):
    if backend == "openvino":
        pytest.importorskip("openvino")
    folder, precision = exported
    expected = tintype.load(source, backend="torch", dtype="float32")("red", **SETTINGS).images
    actual = tintype.load(folder, backend=backend)("red", **SETTINGS).images
    assert BUDGETS[precision].psnr_db < psnr(actual, expected) < 90


# The codes of each component, by the bundle's: a decoder counts by its work, an encoder by its bytes.
CODES = {
    "int8": {"unet": "int8", "vae": "int8", "text_encoder": "int8"},
    "int4": {"unet": "int4", "text_encoder": "int8"},
    "fp8": {"unet": "fp8", "vae": "fp8", "text_encoder": "int8"},
}
FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def in_codes(bundle, component):
    """The names of a component's layers whose weights are in codes."""
    names = load_file(bundle / f"weights/{component}.safetensors")
    return {n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale")}


def ours(name, tensors):
    """The name of a published weight among a bundle's, which have CLIP's prefix in any case."""
    return name if name in tensors else f"text_model.{name}"


@pytest.mark.parametrize("component", FILES)
def test_weights_take_the_bytes_that_their_bits_say(source, exported, component):
    folder, precision = exported
    tensors = load_file(folder / f"weights/{component}.safetensors")
    published = load_file(source / component / f"{FILES[component]}.safetensors")
    floats = {ours(name, tensors): each for name, each in published.items()}
    layers = [f"{layer}.weight" for layer in in_codes(folder, component)]
    codes = CODES[precision].get(component)
    least = {"unet": 20, "vae": 15, "text_encoder": 6}[component] if codes else 0
    assert len(layers) >= least
    bits = {"int8": 8, "int4": 4, "fp8": 8, None: 0}[codes]
    for name in layers:
        assert 8 * tensors[name].nbytes == bits * floats[name].numel()
    assert {tensors[name].dtype for name in tensors.keys() & floats.keys() - set(layers)} == {
        torch.float16
    }
    stored = {path.name for path in (folder / "weights").iterdir()}
    assert stored == {f"{name}.safetensors" for name in FILES}


def test_the_report_says_what_each_layer_alone_does(exported):
    folder, precision = exported
    reports = json.loads((folder / "bundle.json").read_text())["provenance"]["quantisation"]
    assert {name: each["weights"] for name, each in reports.items()} == CODES[precision]
    for component, said in reports.items():
        watched = component != "text_encoder"
        assert said["activations"] == ("static" if watched and precision != "int4" else "none")
        codes = in_codes(folder, component)
        for row in said["sensitivity"]["layers"]:
            kept = row["name"] in codes
            assert (row["stored"] == said["weights"]) == kept
            assert not kept or not watched or 0 < row["error"] < 1
        if watched:
            assert said["calibration"]["prompts"] == list(PROMPTS.prompts)
    gates = {"unet": "conv_in", "vae": "decoder.conv_out"}
    for component in gates.keys() & reports.keys():
        report = {"name": gates[component], "stored": "high", "error": None}
        assert report in reports[component]["sensitivity"]["layers"]


def test_of_an_autoencoder_the_decoders_inner_layers_alone_are_in_codes(exported):
    folder, precision = exported
    codes = in_codes(folder, "vae")
    assert bool(codes) == (precision != "int4")
    assert all(name.startswith("decoder.") for name in codes)
    assert not codes & {"decoder.conv_in", "decoder.conv_out"}
    graph = onnx.load(folder / "decode/16x16-b1.onnx", load_external_data=False).graph
    rounded = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) >= 0.8 * len(codes)  # layers that read one value share its codes


def test_queries_and_keys_of_int8_are_multiplied_as_codes(exported):
    folder, precision = exported
    codes = in_codes(folder, "unet")
    pairs = [
        {f"unet.{each.replace('to_q', name)}.output" for name in ("to_q", "to_k")}
        for each in codes
        if each.endswith("attn1.to_q") and each.replace("to_q", "to_k") in codes
    ]
    assert pairs
    found = list(
        multiplied(onnx.load(folder / "denoise/16x16-b2.onnx", load_external_data=False).graph)
    )
    assert all((pair in found) == (precision == "int8") for pair in pairs)


def test_what_a_picture_tells_can_be_cut_out_of_graphs_in_codes(exported):
    bundle = open_bundle(exported[0])
    parts = parted(read_graph(bundle, bundle.stages["denoise"]["16x16-b2"]))
    assert parts.unread == {"encoder_hidden_states"}


def multiplied(graph):
    """The sets of two values that are multiplied with one another, told before they were reshaped and scaled."""
    producers = {output: node for node in graph.node for output in node.output}

    def origin(name):
        node = producers.get(name)
        passes = node is not None and node.op_type in ("Reshape", "Transpose", "Mul")
        return origin(node.input[0]) if passes else name

    for node in graph.node:
        if node.op_type == "MatMul":
            yield {origin(name) for name in node.input}


def test_torch_runs_the_layers_of_a_bundle_as_the_bundle_does(source, exported):
    folder, precision = exported
    backend = tintype.load(source, backend="torch", dtype="float32").family.backend
    unet = backend.module("denoise").unet
    inputs = profiles.example_inputs(
        open_checkpoint(source), backend.inputs("denoise"), "denoise", "16x16-b2"
    )
    in_float = backend.run("denoise", "16x16-b2", inputs)["model_output"]
    state = {name: tensor.half().float() for name, tensor in unet.state_dict().items()}
    unet.load_state_dict(state)  # layers kept high are stored so
    replace_layers(unet, read_layers(folder / "weights/unet.safetensors", unet))
    expected = backend.run("denoise", "16x16-b2", inputs)["model_output"]
    engine = tintype.load(folder, backend="onnxruntime").family.backend
    actual = engine.run("denoise", "16x16-b2", inputs)["model_output"]
    difference, scale = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    if precision == "int4":
        assert difference < STAGE_FP32 * scale
    else:  # a value rounded to another code rounds many more behind it: in the end one error beside another like it
        errors = [np.linalg.norm(in_float - each) for each in (actual, expected)]
        assert difference < 1.5 * errors[0]
        assert errors[0] == pytest.approx(errors[1], rel=0.3)


def test_what_is_worst_is_kept_high_until_the_rest_adds_up_to_little():
    errors = {f"layer{n}": 0.001 for n in range(30)} | {"bad": 0.02, "worse": 0.03}
    assert worst(errors, allowed=0.01) == {"bad", "worse"}
    assert worst(errors, allowed=0.025) == {"worse"}
    assert worst(errors, allowed=1.0) == set()
    assert len(worst(errors, allowed=0.0)) == 3  # of 32: no more than a tenth


class Added(Stage):
    """Two layers whose shares of the output are known."""

    inputs, outputs = ("sample",), ("model_output",)

    def __init__(self):
        super().__init__()
        self.unet = nn.ModuleDict({"loud": nn.Linear(32, 8), "quiet": nn.Linear(32, 8)})

    def forward(self, x):
        return self.unet["loud"](x) + 1e-3 * self.unet["quiet"](x)


def test_a_layers_error_is_that_of_the_output_with_it_alone_in_codes():
    torch.manual_seed(0)
    stage, x, scheme = Added(), torch.randn(5, 32), Scheme("int8")
    rounder = lambda name, weight: nearest(weight.detach(), scheme)  # noqa: E731
    called = {"loud": None, "quiet": None}
    errors = layer_errors(stage, Seen(called, [(x,)]), [*called], rounder)
    for name, share in (("loud", 1.0), ("quiet", 1e-3)):
        weight = stage.unet[name].weight.detach().double()
        codes = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round()
        change = codes * weight.abs().amax(1, keepdim=True) / 127 - weight
        expected = share * (x.double() @ change.t()).norm() / stage(x).detach().double().norm()
        assert errors[name] == pytest.approx(float(expected), rel=1e-3)
    assert isinstance(stage.unet["loud"], nn.Linear)
    found = measured(stage, Seen({"loud": None}, [(x,)]), scheme, rounder, allowed=1.0)
    assert [layer.stored for layer in found.layers] == ["int8", "high"]  # quiet was never called


def test_without_measurement_a_rule_keeps_the_gates_high(source):
    model = open_checkpoint(source).component("unet")
    found = by_rule(model, Scheme("int4", group=64))
    kept = {layer.name for layer in found.layers if layer.stored == "high"}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} < kept
    assert "down_blocks.0.resnets.0.time_emb_proj" in kept
    assert "down_blocks.0.attentions.0.proj_in" in kept  # 32 inputs are half a group
    assert found.chosen("int4") == quantisable(model).keys() - kept


def test_without_calibration_weights_alone_are_in_codes(source, tmp_path):
    checkpoint = open_checkpoint(source)
    plans = plan(checkpoint, "int8", 64, None, print)
    assert plans.keys() == {"unet", "text_encoder"}
    found = plans["unet"]
    assert (found.scheme, found.sensitivity.decided) == (Scheme("int8"), "by rule")
    unet = checkpoint.components["unet"].weights
    (path,) = write_quantised(unet, tmp_path / "unet", found, torch.float32)
    assert not [name for name in load_file(path) if name.endswith("input_scale")]


def test_a_sharded_checkpoint_is_written_shard_by_shard(source, tmp_path, monkeypatch):
    """What is in memory is one tensor and one shard's result, whatever the whole takes."""
    tensors = load_file(source / "unet/diffusion_pytorch_model.safetensors")
    names, shards = sorted(tensors), []
    for number in range(3):
        shards.append(tmp_path / f"shard{number}.safetensors")
        save_file({name: tensors[name] for name in names[number::3]}, shards[-1])
    found = plan(open_checkpoint(source), "int4", 32, None, print)["unet"]
    held = []
    saved = quantisation.save_tensors
    monkeypatch.setattr(
        quantisation,
        "save_tensors",
        lambda kept, path: (held.append(set(kept)), saved(kept, path)),
    )
    weights = Weights(tuple(shards))
    written = write_quantised(weights, tmp_path / "out/unet", found, torch.float32)
    assert [path.name for path in written] == [
        f"unet-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    assert max(map(len, held)) < sum(map(len, held)) / 2
    (whole,) = write_quantised(
        open_checkpoint(source).components["unet"].weights,
        tmp_path / "whole/unet",
        found,
        torch.float32,
    )
    together = {name: t for path in written for name, t in load_file(path).items()}
    expected = load_file(whole)
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)


@pytest.mark.parametrize("upcast", [True, False])
def test_engines_are_built_of_codes_and_float16(source, tmp_path, monkeypatch, upcast):
    """A decoder that float16 needs scaled down stays in it."""
    pytest.importorskip("tensorrt_rtx")
    source = shutil.copytree(source, tmp_path / "checkpoint")
    config = json.loads((source / "vae/config.json").read_text())
    (source / "vae/config.json").write_text(json.dumps({**config, "force_upcast": upcast}))
    monkeypatch.setattr(exporting, "trace", remembered_trace)
    monkeypatch.setattr(exporting, "profiles_of", lambda *_: GUIDED)
    monkeypatch.setattr(verify, "_STEPS", STEPS)
    config = make_config("int8", target="tensorrt", gpus=("sm_89",), plain=True)
    bundle = open_bundle(export_bundle(source, tmp_path / "bundle", config))
    assert ("vae" in bundle.provenance["quantisation"]) == (not upcast)
    assert bundle.engines["sm_89"]["stages"].keys() == GUIDED.keys()
    (engine,) = bundle.engines["sm_89"]["stages"]["denoise"].values()
    assert bundle.files[engine]["size"] > bundle.files["weights/unet.safetensors"]["size"] / 2
    assert bundle.provenance["options"]["computed"] == "float16"
    stages = {row["stage"]: row for row in bundle.provenance["verification"]["stages"]}
    assert stages["denoise"]["computes"] == ["float16"]
    graph = onnx.load(bundle.path(bundle.stages["denoise"]["16x16-b2"]), load_external_data=False)
    assert not [node for node in graph.graph.node if ".output" in node.name]


def test_a_group_that_there_is_not_is_refused_before_any_work(source, tmp_path):
    with pytest.raises(RequestError, match="groups of 32, 64, 128; asked was group=48"):
        export_bundle(source, tmp_path / "bundle", make_config("int4", group=48))
    assert not (tmp_path / "bundle").exists()


def test_the_report_lists_the_most_sensitive_layers_first():
    layers = [
        LayerReport("a", "int8", 1e-3),
        LayerReport("b", "high", 0.5),
        LayerReport("c", "high"),
    ]
    head, *rows = Sensitivity("measured", layers).lines("unet")
    assert head == "unet: 3 layers, 2 kept high, measured"
    assert [row.split()[0] for row in rows] == ["b", "a"]
    found = Sensitivity("measured", layers)
    assert Sensitivity.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_a_bundle_over_budget_names_the_layers_in_codes_that_do_most():
    layers = [("a", "int8", 0.02), ("b", "high", 0.3), ("c", "int8", 0.1), ("d", "int8", None)]
    unet = Sensitivity("measured", [LayerReport(*layer) for layer in layers])
    vae = Sensitivity("measured", [LayerReport("e", "int8", 0.05)])
    by_weights = Sensitivity("by rule", [LayerReport("f", "int8", None)])
    found = suspects({"text_encoder": by_weights, "vae": vae, "unet": unet})
    assert suspects({"text_encoder": by_weights}) == ""
    stage = StageReport("denoise", "16x16-b1", ["float32"], 0.9, 0.5, 1.0, "model_output[0]", True)
    report = Report("onnxruntime", "int8", "float32", "torch", [stage], None)
    with pytest.raises(
        BundleError,
        match=r"stage denoise .*do most .*: unet.c \(1.0e-01\), vae.e \(5.0e-02\), unet.a \(2",
    ):
        verify.require(report, BUDGETS["int8"], found)
