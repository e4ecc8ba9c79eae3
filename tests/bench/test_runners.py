"""Runners refuse what they cannot do, and do it as they are said to."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tintype.errors import RequestError, TintypeError
from tintype_bench.agreement import agreement_db
from tintype_bench.cases import chosen_peers, of_shape
from tintype_bench.limits import limit
from tintype_bench.random_weights import write_checkpoint
from tintype_bench.runners import diffusers_pipeline, make, own, plain_graphs
from tintype_bench.shapes import find_shape
from tintype_bench.work import Runner, Work, as_json

FLAGS = (
    "freezing",
    "conv_1x1_as_mm",
    "coordinate_descent_tuning",
    "coordinate_descent_check_all_directions",
    "epilogue_fusion",
)


@pytest.mark.parametrize(("mode", "tuned"), [("max-autotune", True), ("default", False)])
def test_diffusers_is_compiled_in_the_mode_that_its_name_says(monkeypatch, mode, tuned):
    asked = []

    def compiled(function, **options):
        asked.append(options["mode"])
        return function

    class Vae(nn.Conv2d):
        def decode(self):
            pass

    pipe = SimpleNamespace(unet=nn.Conv2d(1, 1, 1), vae=Vae(1, 1, 1))
    runner = Runner("diffusers-compiled", "bf16", mode=mode)
    config = torch._inductor.config
    monkeypatch.setattr(torch, "compile", compiled)
    with config.patch(dict.fromkeys(FLAGS, False)):  # put back afterwards
        diffusers_pipeline._compile(pipe, "unet", runner)
        assert (config.freezing, config.coordinate_descent_tuning) == (True, tuned)
    assert asked == [mode, mode]
    assert runner.label == f"diffusers compiled {'' if tuned else 'default '}bf16"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """Two pictures of a tiny unCLIP."""
    folder = tmp_path_factory.mktemp("shape")
    write_checkpoint(find_shape("karlo", tiny=True), folder, torch.float32)
    return Work(str(folder), 64, 64, batch=2, steps=3, guidance=8.0)


def test_all_noise_of_a_cascade_is_the_same_for_diffusers_as_for_ours(cascade):
    theirs = diffusers_pipeline.load(cascade, Runner("diffusers", "fp32"))
    expected = theirs.run()
    assert (theirs.run() == expected).all()  # each run draws it anew
    actual = own.load(cascade, Runner("tintype", "fp32", "torch")).run()
    assert (
        agreement_db(actual, expected, cascade) > 60
    )  # clipped steps turn a pixel over now and then


def test_a_cascades_stages_have_the_names_and_the_limits_of_ours(cascade):
    theirs = diffusers_pipeline.load(cascade, Runner("diffusers", "fp32")).stages()
    ours = own.load(cascade, Runner("tintype", "fp32", "torch")).stages()
    ceilings = {"flops": {"fp32": 1e12}, "bandwidth": 1e10}
    floor = limit(cascade, "fp32", ceilings).floor
    stages = {"encode", "prior", "denoise", "enlarge"}
    assert theirs.keys() == floor.keys() == stages
    assert ours.keys() == stages | {"decode"}
    fewer = limit(replace(cascade, steps=1), "fp32", ceilings).floor
    # What texts alone decide is worked out once, however many steps there are.
    assert fewer["denoise"] < floor["denoise"] < 3 * fewer["denoise"]
    assert fewer["enlarge"] == floor["enlarge"]


def test_openvino_alone_is_not_timed_on_a_gpu(tiny_bundle):
    runner = Runner("openvino", "bf16", device="cuda", bundle=str(tiny_bundle))
    with pytest.raises(RequestError, match="timed on cpu; asked was cuda"):
        plain_graphs.load(Work("", 64, 64), runner)


CPP = "stable-diffusion.cpp"


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """A picture of a tiny Stable Diffusion as everybody draws it beside stable-diffusion.cpp."""
    folder = tmp_path_factory.mktemp("shape")
    write_checkpoint(find_shape("sd15", tiny=True), folder, torch.float32)
    case = chosen_peers(of_shape("sd15"), [CPP], [])
    told = {"prompt": case.prompt, "scheduler": case.scheduler, "noise": case.noise}
    return Work(str(folder), 64, 64, batch=2, steps=3, guidance=7.5, seed=4, **told)


class StableDiffusion:
    """Its binding's face, with what it was called with and a grey picture for each that was asked for."""

    def __init__(self, **settings):
        self.settings, self.calls = settings, []

    def generate_image(self, **call):
        from PIL import Image

        self.calls.append(call)
        return [Image.new("RGB", (call["width"], call["height"]), (51, 102, 204))] * call[
            "batch_count"
        ]


def test_everybody_draws_one_picture_beside_stable_diffusion_cpp(spelled):
    expected = diffusers_pipeline.load(spelled, Runner("diffusers", "fp32")).run()
    actual = own.load(spelled, Runner("tintype", "fp32", "torch")).run()
    assert agreement_db(actual, expected, spelled) > 60
    assert agreement_db(actual[::-1], expected, spelled) < 30  # the second has noise of its own


def test_stable_diffusion_cpp_is_told_the_levels_that_diffusers_walks(spelled, monkeypatch):
    module = SimpleNamespace(StableDiffusion=StableDiffusion)
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", module)
    running = make(as_json(spelled, Runner(CPP, "int8")))
    assert np.allclose(running.run(), np.full((2, 64, 64, 3), (0.2, 0.4, 0.8)))
    assert running.model.settings["wtype"] == "q8_0"
    assert running.model.settings["rng_type"] == "cpu"
    (call,) = running.model.calls
    walked = diffusers_pipeline.load(spelled, Runner("diffusers", "fp32"))._pipe.scheduler
    walked.set_timesteps(3)
    assert np.allclose([float(level) for level in call["sigmas"].split(",")], walked.sigmas)
    assert (call["prompt"][:9], call["seed"], call["cfg_scale"]) == ("a r e d l", 4, 7.5)


@pytest.mark.parametrize(
    ("changes", "precision", "told"),
    [
        ({"component": "denoise"}, "fp16", "its denoiser alone cannot be called"),
        ({}, "bf16", "keeps weights in fp32, fp16, int8; asked was bf16"),
        ({"scheduler": ""}, "fp16", f"ask for it with --peer {CPP}"),
        ({"noise": "tintype"}, "fp16", f"ask for it with --peer {CPP}"),
        ({}, "fp16", "pip install stable-diffusion-cpp-python"),
    ],
)
def test_what_stable_diffusion_cpp_cannot_do_is_told(
    spelled, monkeypatch, changes, precision, told
):
    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", None)
    with pytest.raises(TintypeError, match=told):
        make(as_json(replace(spelled, **changes), Runner(CPP, precision)))


def test_stable_diffusion_cpp_is_asked_for_in_both_of_its_precisions():
    case = chosen_peers(of_shape("sd15"), [CPP], [])
    labels = [runner.label for runner in case.runners if not runner.ours]
    assert labels == [f"{CPP} fp16", f"{CPP} int8"]
    assert case.name.endswith("euler from torch's noise")


def test_a_shapes_words_have_the_ids_that_clip_has(spelled):
    """By the published vocabulary: a word "a" is 320, and 49406 and 49407 are the ends."""
    from transformers import CLIPTokenizer

    told = CLIPTokenizer.from_pretrained(f"{spelled.checkpoint}/tokenizer")("a r e")["input_ids"]
    assert told == [49406, 320, 337, 324, 49407]
