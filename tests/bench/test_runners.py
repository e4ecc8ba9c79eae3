"""Runners refuse what they cannot do, and do it as they are said to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tintype.errors import RequestError
from tintype_bench.agreement import agreement_db
from tintype_bench.limits import limit
from tintype_bench.random_weights import write_checkpoint
from tintype_bench.runners import diffusers_pipeline, own, plain_graphs
from tintype_bench.shapes import find_shape
from tintype_bench.work import Runner, Work

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
