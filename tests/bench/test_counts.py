"""FLOPs and bytes of a stage beside what paper and pencil give."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from tintype.checkpoints import open_checkpoint
from tintype.loading import BOX
from tintype_bench.counts import Ceilings, count, floor_seconds, stage_products
from tintype_bench.limits import losses
from tintype_bench.random_weights import unwritten
from tintype_bench.shapes import find_shape


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A shape, by its name, as an opened checkpoint without weights."""
    return cache(lambda name: unwritten(find_shape(name), tmp_path_factory.mktemp("shape") / name))


def total(products):
    return sum(each.flops for each in products)


def on_meta(module, *shape):
    with torch.device("meta"):
        return count(module(), torch.empty(shape))


def test_a_linear_layer():
    (product,) = on_meta(lambda: nn.Linear(64, 32), 10, 64)
    assert product.flops == 2 * 10 * 64 * 32
    assert product.values == 10 * 64 + 64 * 32 + 32 + 10 * 32  # input, weight, bias, output


def test_a_convolution():
    (product,) = on_meta(lambda: nn.Conv2d(8, 16, 3, padding=1), 2, 8, 12, 20)
    assert product.flops == 2 * (2 * 12 * 20) * 16 * (8 * 9)
    assert product.values == 2 * 8 * 12 * 20 + 16 * 8 * 9 + 16 + 2 * 16 * 12 * 20


def test_attention_neither_writes_nor_reads_its_scores():
    batch, heads, tokens, dim = 2, 3, 50, 8

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    products = on_meta(Attention, batch, heads, tokens, dim)
    assert total(products) == 2 * (2 * batch * heads * tokens * tokens * dim)
    assert all(product.attention for product in products)
    assert sum(p.values for p in products) == 4 * batch * heads * tokens * dim  # q, k, v, output


def test_t5_xxl_is_its_projections_and_its_attention(opened):
    """24 layers: q, k, v, o of 4096, three of 4096 x 10240, two products of 256 x 256 scores of 64 heads of 64."""
    tokens, width, inner = 256, 4096, 10240
    layer = 2 * tokens * width * (4 * width + 3 * inner) + 2 * (2 * tokens * tokens * width)
    assert total(stage_products(opened("sd3-medium"), 1024, 1024, 2)["encode_3"].call) == 24 * layer


def test_flux_is_its_blocks(opened):
    """19 double and 38 single blocks over 4096 image and 512 text tokens, 24 heads of 128."""
    image, text, width = 4096, 512, 3072
    tokens = image + text
    attention = 2 * (2 * tokens * tokens * width)
    double = (
        2 * tokens * width * (4 * width + 2 * 4 * width) + attention + 2 * 2 * width * 6 * width
    )
    single = 2 * tokens * width * (3 * width + 4 * width) + 2 * tokens * 5 * width * width
    single += attention + 2 * width * 3 * width
    ends = 2 * image * 64 * width * 2 + 2 * text * 4096 * width + 2 * width * 2 * width
    told = 2 * (256 * width + width * width) * 2 + 2 * (768 * width + width * width)
    expected = 19 * double + 38 * single + ends + told
    found = total(stage_products(opened("flux1-dev"), 1024, 1024, 1)["denoise"].call)
    assert found == expected


def test_karlos_prior_is_its_blocks(opened):
    """20 layers, 2048 wide, over 77 tokens of text and its embedding, which see one another alone and are the same at
    every step, and behind them the time, the picture's embedding and the last."""
    text, behind, width, wide = 77 + 1, 3, 2048, 768
    told = 2 * text * width * (4 + 8) * width + 2 * (2 * text * text * width)
    layer = 2 * behind * width * (4 + 8) * width + 2 * (2 * behind * (text + behind) * width)
    ends = 2 * wide * width * 2 + 2 * 2 * width * width  # two embeddings, and the time's two layers
    products = stage_products(opened("karlo"), 256, 256, 2)
    remembered = 2 * (20 * told + 2 * wide * width * text)
    assert total(products["prior"].remembered) == remembered
    assert total(products["prior"].call) == remembered + 2 * (20 * layer + ends)
    assert total(products["enlarge"].call) == total(products["enlarge_last"].call)


def test_a_model_without_t5_reads_as_many_tokens_as_its_clip_has_positions():
    """postcard-flow: 48 beside the picture's 64 in six blocks, of which the last asks for the picture's alone."""
    checkpoint = open_checkpoint(BOX / "postcard-flow")
    products = stage_products(checkpoint, 128, 128, 2)
    text, image, width, blocks = 48, 64, 192, 6
    tokens = text + image
    asked = (blocks - 1) * tokens + image
    attention = [each.flops for each in products["denoise"].call if each.attention]
    assert sum(attention) == 2 * 2 * 2 * asked * tokens * width
    config = checkpoint.configs["text_encoder"]
    read = [each.flops for each in products["encode"].call if each.attention]
    assert sum(read) == config["num_hidden_layers"] * 2 * 2 * text**2 * config["hidden_size"]


@pytest.mark.parametrize(
    ("name", "side", "rows", "steps", "teraflops"),
    [("sd15", 512, 2, 50, 80.3), ("sdxl", 1024, 2, 30, 405.7), ("sd3-medium", 1024, 2, 28, 498.6)],
)
def test_a_denoiser_takes_what_others_counted(opened, name, side, rows, steps, teraflops):
    """TFLOP of whole pictures by another count, operator by operator over diffusers' own modules."""
    found = total(stage_products(opened(name), side, side, rows)["denoise"].call)
    assert steps * found / 1e12 == pytest.approx(teraflops, rel=2e-3)


def test_the_floor_is_the_larger_of_arithmetic_and_traffic_product_by_product():
    (wide,) = on_meta(lambda: nn.Linear(1000, 1000, bias=False), 1000, 1000)
    (thin,) = on_meta(lambda: nn.Linear(1000, 1000, bias=False), 1, 1000)
    ceilings = Ceilings({"fp32": 1e12, "int8": 4e12}, 1e10)
    assert floor_seconds([wide], ceilings, "fp32") == pytest.approx(2e9 / 1e12)
    assert floor_seconds([thin], ceilings, "fp32") == pytest.approx(4 * (1e6 + 2e3) / 1e10)
    assert floor_seconds([wide, thin], ceilings, "int8") == pytest.approx(
        2e9 / 4e12 + (1e6 + 2e3) / 1e10
    )


def test_a_product_may_be_made_in_whatever_wider_type_the_machine_is_faster_in():
    """As on a CPU that only imitates bfloat16 and codes."""
    imitating = Ceilings({"fp32": 9e10, "bf16": 1e9, "int8": 4e9}, 1e10)
    for precision in ("fp32", "fp16", "bf16", "int8"):
        assert imitating.rate(precision, attention=False) == 9e10
    native = Ceilings({"fp32": 1e12, "bf16": 2e12, "int8": 4e12}, 1e10)
    assert native.rate("int8", attention=False) == 4e12
    assert native.rate("int8", attention=True) == native.rate("fp16", attention=True) == 2e12


def test_the_stages_that_lose_most_are_named_in_order():
    shares = {"encode": 0.12, "denoise": 0.6, "decode": 0.2}
    lost = losses(shares, {"denoise": 5.0, "decode": 0.5}, seconds=10)
    assert [each["stage"] for each in lost] == ["decode", "encode", "denoise"]
    assert [each["seconds"] for each in lost] == pytest.approx([1.5, 1.2, 1.0])
    assert [each["share"] for each in lost] == pytest.approx([0.15, 0.12, 0.1])
