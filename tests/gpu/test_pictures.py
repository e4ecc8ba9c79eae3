"""Pictures of the models in the box drawn on the GPU are those that the CPU draws in float32."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import tintype
from tintype.loading import BOX
from tintype_bench.random_weights import write_checkpoint
from tintype_bench.shapes import find_shape
from tintype_export.quality import psnr
from tolerances import LEAST_DB_16_BITS

PROMPT = "a red lighthouse on a rocky coast at dusk"
REQUEST = {"num_inference_steps": 8, "seed": 3, "guidance_scale": 4.0, "output_type": "np"}
# fp32 convolves in tf32; 8-bit weights and tokens are rounded without any calibration.
LEAST_DB = {**dict.fromkeys(["fp32", "fp16", "bf16"], LEAST_DB_16_BITS), "fp8": 30.0, "int8": 30.0}
WAYS = [*((dtype, way) for dtype in LEAST_DB for way in ("eager", "graph")), ("fp16", "compiled")]


def draw(model, **how):
    return tintype.load(BOX / model, backend="torch", **how)(PROMPT, **REQUEST).images


expected = cache(lambda model: draw(model, device="cpu", dtype="fp32"))


@pytest.mark.parametrize("model", ["postcard", "postcard-flow"])
@pytest.mark.parametrize(("dtype", "execution"), WAYS)
def test_a_picture_is_the_one_that_the_cpu_draws_in_float32(model, dtype, execution):
    if dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89")
    made = draw(model, device="cuda", dtype=dtype, execution=execution)
    assert psnr(made, expected(model)) > LEAST_DB[dtype]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A tiny unCLIP of random weights."""
    folder = tmp_path_factory.mktemp("shape")
    write_checkpoint(find_shape("karlo", tiny=True), folder, torch.float32)
    return folder


@pytest.mark.parametrize(("dtype", "execution"), WAYS)
def test_a_cascade_draws_what_the_cpu_draws_in_float32(cascade, dtype, execution):
    if dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89")
    steps = {"prior_num_inference_steps": 4, "super_res_num_inference_steps": 3}
    request = {**REQUEST, **steps, "num_inference_steps": 4}
    wanted, made = (
        tintype.load(cascade, backend="torch", **how)(PROMPT, **request).images
        for how in (
            {"device": "cpu", "dtype": "fp32"},
            {"device": "cuda", "dtype": dtype, "execution": execution},
        )
    )
    # Nothing was fitted to these weights, and steps that clip turn pixels over.
    assert psnr(made, wanted) > LEAST_DB[dtype] - 10


def test_a_second_picture_from_the_same_graph_is_another_one():
    pipe = tintype.load(BOX / "postcard", backend="torch", device="cuda", execution="graph")
    first, second, again = (pipe(PROMPT, **{**REQUEST, "seed": s}).images for s in (3, 4, 3))
    assert psnr(first, again) > LEAST_DB["fp32"]
    assert psnr(first, second) < LEAST_DB["int8"]


def test_a_second_text_to_the_same_graph_is_not_forgotten():
    pipe = tintype.load(BOX / "postcard", backend="torch", device="cuda", execution="graph")
    prompts = (PROMPT, "a green field under a blue sky", PROMPT)
    first, second, again = (pipe(prompt, **REQUEST).images for prompt in prompts)
    assert psnr(first, again) > LEAST_DB["fp32"]
    assert psnr(first, second) < LEAST_DB["int8"]
