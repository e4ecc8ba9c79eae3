"""Runners refuse what they cannot do, and do it as they are said to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tintype.errors import RequestError
from tintype_bench.runners import diffusers_pipeline, plain_graphs
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


def test_openvino_alone_is_not_timed_on_a_gpu(tiny_bundle):
    runner = Runner("openvino", "bf16", device="cuda", bundle=str(tiny_bundle))
    with pytest.raises(RequestError, match="timed on cpu; asked was cuda"):
        plain_graphs.load(Work("", 64, 64), runner)
