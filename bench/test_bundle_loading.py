"""Opening a bundle and making its pipeline: `pytest bench/test_bundle_loading.py`.

A bundle is hashed when this machine first sees it and then known by sizes and times.
"""
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import save_file

import tintype
from tintype.backends.torch import TorchBackend
from tintype.backends.updated_weights import UpdatedWeights, stored_components
from tintype.bundle import open_bundle
from tintype.checkpoints import open_checkpoint
from tintype.checkpoints.lora_files import Lora
from tintype.loading import BOX
from tintype_bench.runners.plain_graphs import session
from tintype_bench.work import Runner
from tintype_export.profiles import example_inputs

POSTCARD = BOX / "postcard"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What this machine has hashed is remembered for the test alone."""
    monkeypatch.setenv("TINTYPE_CACHE", str(tmp_path))


def test_open_remembered(benchmark):
    open_bundle(POSTCARD)
    benchmark(open_bundle, POSTCARD)


def test_open_and_hash(benchmark):
    benchmark(open_bundle, POSTCARD, remember=False)
    files = open_bundle(POSTCARD).files
    benchmark.extra_info["megabytes"] = sum(entry["size"] for entry in files.values()) / 1e6


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_load(benchmark, backend):
    """A pipeline that has opened no graph yet."""
    pytest.importorskip(backend)
    benchmark(tintype.load, POSTCARD, backend=backend)


def test_adding_low_rank_updates(benchmark, tmp_path):
    """Of rank 16 to every linear layer of the denoiser's blocks, of postcard or the bundle TINTYPE_BUNDLE."""
    bundle = open_bundle(os.environ.get("TINTYPE_BUNDLE", POSTCARD), check_hashes=False)
    file = _updates_file(bundle, tmp_path)
    updated = benchmark(UpdatedWeights, bundle, [Lora(file)])
    changed = sum(len(new) for _, found in updated.stretches.values() for new in found)
    benchmark.extra_info |= {"megabytes": changed / 1e6, "file": file.stat().st_size / 1e6}


@pytest.mark.skipif(
    "TINTYPE_ENGINES" not in os.environ,
    reason="TINTYPE_ENGINES names a bundle of engines without weights for this machine's GPU",
)
@pytest.mark.parametrize("updated", [False, True], ids=["filled", "updated"])
def test_engines_without_weights_from_nothing_to_a_picture(benchmark, tmp_path, updated):
    """One step: engines are read, filled with the bundle's weights or updated ones, and run once."""
    bundle = open_bundle(os.environ["TINTYPE_ENGINES"])
    how = {"lora": _updates_file(bundle, tmp_path)} if updated else {}

    def picture():
        pipe = tintype.load(bundle.folder, backend="tensorrt", **how)
        return pipe("a red boat", num_inference_steps=1, seed=0, output_type="np")

    benchmark.pedantic(picture, rounds=5, warmup_rounds=1)


def _updates_file(bundle, folder):
    file = folder / "updates.safetensors"
    save_file(_updates(bundle, np.random.default_rng(0)), file)
    return file


def _updates(bundle, rng):
    """By the names that PEFT gives them."""
    layers = {
        name.removesuffix(".weight"): stored.shape
        for name, stored in stored_components(bundle)["unet"].items()
        if "transformer_blocks" in name and name.endswith(".weight") and len(stored.shape) == 2
    }
    shapes = {
        f"unet.{layer}.lora_{half}.weight": shape
        for layer, (outputs, inputs) in layers.items()
        for half, shape in {"A": (16, inputs), "B": (outputs, 16)}.items()
    }
    return {name: 0.01 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_first_run_of_the_denoiser(benchmark, backend):
    """Its graph is made ready and run once."""
    pytest.importorskip(backend)
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((2, 4, 16, 16), np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 192), np.float32),
    }
    benchmark.pedantic(
        lambda pipe: pipe.family.backend.run("denoise", "128x128-b2", inputs),
        setup=lambda: ((tintype.load(POSTCARD, backend=backend),), {}),
        rounds=5,
    )


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("who", ["tintype", "engine"])
def test_from_nothing_to_a_picture(benchmark, engine, who):
    """One step: ours from `load`, and the engine's own sessions of the same graphs, each made and run once."""
    pytest.importorskip(engine)
    benchmark.group = f"nothing to a picture on {engine}"
    bundle = open_bundle(POSTCARD)  # hashed before, as on every day but the first
    calls = partial(_calls, bundle, Runner(engine), _inputs())
    drawn = partial(_picture, engine)
    benchmark.pedantic(drawn if who == "tintype" else calls, rounds=7, warmup_rounds=1)


def _picture(engine):
    pipe = tintype.load(POSTCARD, backend=engine)
    return pipe("a red boat", num_inference_steps=1, seed=0, output_type="np")


def _calls(bundle, runner, inputs):
    for (stage, profile), arrays in inputs.items():
        session(bundle, stage, profile, runner)(arrays)


def _inputs():
    checkpoint = open_checkpoint(POSTCARD)
    modules = TorchBackend(checkpoint)
    stages = [("encode", "b1"), ("guided_step", "128x128-b1"), ("decode", "128x128-b1")]
    return {
        (stage, profile): example_inputs(checkpoint, modules.inputs(stage), stage, profile)
        for stage, profile in stages
    }
