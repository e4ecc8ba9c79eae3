"""Calibration sees what layers see, and what it finds makes rounding better than rounding without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from small_checkpoints import save_smallest
from tintype.checkpoints import open_checkpoint
from tintype.models.quantised import Scheme, fake_quantise, nearest, quantisable
from tintype_export import rounding
from tintype_export.calibration import Calibration, Sample, _sample, calibrate, input_windows
from tintype_export.rounding import (
    clipped_scales,
    compensated,
    output_scale,
    round_layer,
    static_scale,
)
from tolerances import KERNEL_FORMULA

INT4 = Scheme("int4", group=32)


def seen(rows):
    return Sample([rows], rows.abs().amax(0))


def output_error(kept, weight, rows):
    x = rows if kept.smoothing is None else rows * kept.smoothing
    if kept.input_scale is not None:
        x = fake_quantise(x, kept.input_scale, kept.scheme.weights)
    return float((x @ kept.weight().flatten(1).t() - rows @ weight.flatten(1).t()).norm())


CONFIG = Calibration(("red", "the red"), steps=2, rows=32, shown=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(save_smallest(tmp_path_factory.mktemp("smallest") / "checkpoint"))


@pytest.fixture(scope="module")
def calibrated(checkpoint):
    return calibrate(checkpoint, CONFIG, ["denoise", "decode"], block_by_block=False)


@pytest.mark.parametrize("name", ["denoise", "decode"])
def test_calibration_block_by_block_sees_the_same(checkpoint, calibrated, name):
    _, expected = calibrated[name]
    _, found = calibrate(checkpoint, CONFIG, [name], block_by_block=True)[name]
    assert found.layers.keys() == expected.layers.keys()
    for layer, inputs in expected.layers.items():
        torch.testing.assert_close(found.layers[layer].rows, inputs.rows, rtol=1e-4, atol=1e-5)


def test_every_layer_of_the_denoiser_is_seen_and_so_is_its_output(calibrated):
    stage, found = calibrated["denoise"]
    assert found.layers.keys() == quantisable(stage.unet).keys()
    for name, layer in quantisable(stage.unet).items():
        inputs = found.layers[name]
        assert inputs.rows.shape[1] == layer.weight[0].numel()
        assert inputs.largest.shape == (layer.weight.shape[1],)
        assert float(inputs.rows.abs().max()) <= float(inputs.largest.max())
    assert len(found.stage) == 3
    times = [float(inputs[1][0]) for inputs in found.stage]
    assert len(set(times)) > 1
    assert not stage._forward_pre_hooks


def test_a_decoder_sees_what_is_drawn_as_it_is_and_twice_as_large(calibrated):
    stage, found = calibrated["decode"]
    assert found.layers.keys() == {
        name for name in quantisable(stage.vae) if name.startswith(("decoder.", "post_quant_conv"))
    }
    (drawn,), (stretched,), *_ = found.stage
    assert torch.equal(2 * drawn, stretched)
    assert not stage._forward_pre_hooks


def test_layers_that_read_one_input_find_one_scale(calibrated):
    _, found = calibrated["denoise"]
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    scales = {float(static_scale(found.layers[f"{attention}.to_{n}"], "int8")) for n in "qkv"}
    assert len(scales) == 1


def test_windows_are_what_a_convolution_multiplies():
    layer = nn.Conv2d(3, 5, 3, padding=1, stride=2, bias=False).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    actual = torch.einsum("nihwkl,oikl->nohw", input_windows(layer, x), layer.weight)
    torch.testing.assert_close(actual, layer(x), rtol=KERNEL_FORMULA, atol=KERNEL_FORMULA)
    rows, largest = _sample(layer, x, 4, torch.Generator().manual_seed(0))
    known = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27)
    assert all((row == known).all(1).any() for row in rows)
    assert torch.equal(largest, x.float().abs().amax((0, 2, 3)))


def test_compensated_rounding_beats_nearest_where_inputs_are_alike():
    torch.manual_seed(0)
    weight = torch.randn(24, 128)
    rows = torch.randn(512, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(512, 128)
    plain = clipped_scales(weight, INT4, torch.ones(128))
    without = round_layer(weight, INT4, None)
    assert torch.equal(without.weight_scale, plain)
    with_it = round_layer(weight, INT4, seen(rows))
    assert output_error(with_it, weight, rows) < 0.6 * output_error(without, weight, rows)


def test_compensated_rounding_of_independent_inputs_is_rounding_to_nearest():
    """Nothing can be made good through inputs that say nothing of each other."""
    torch.manual_seed(0)
    weight, rows = torch.randn(8, 64), 8 * torch.eye(64)
    codes, scales = compensated(weight, INT4, rows)
    stretched = weight.reshape(8, 2, 32) / scales[..., None]
    expected = stretched.round().clamp(-7, 7).reshape(8, 64)
    assert torch.equal(codes.float(), expected)


def test_clipped_scales_are_the_best_of_those_tried():
    weight = torch.randn(6, 64)
    weight[:, 5] *= 4  # an outlier that is worth cutting off
    largest = nearest(weight, INT4)
    clipped = clipped_scales(weight, INT4, torch.ones(64))
    assert (clipped <= largest.weight_scale).all()
    kept = round_layer(weight, INT4, None)
    assert (kept.weight() - weight).norm() < (largest.weight() - weight).norm()


def test_clipped_scales_are_those_of_each_row_by_itself(monkeypatch):
    weight, importance = torch.randn(7, 64), torch.rand(64)
    together = clipped_scales(weight, INT4, importance)
    monkeypatch.setattr(rounding, "_CACHED", 2 * 64)
    assert torch.equal(clipped_scales(weight, INT4, importance), together)
    monkeypatch.setattr(rounding, "_CACHED", 1)
    assert torch.equal(clipped_scales(weight, INT4, importance), together)


def test_an_input_scale_cuts_off_what_is_rare():
    torch.manual_seed(0)
    rows = torch.randn(1000, 8)
    rows[3, 4] = 60
    cut, largest = static_scale(seen(rows), "int8"), rows.abs().max() / 127
    assert cut < largest

    def error(scale):
        return float((fake_quantise(rows, scale, "int8") - rows).square().sum())

    assert error(cut) <= error(largest)


def test_smoothing_is_taken_where_some_channels_are_far_larger_and_only_there():
    torch.manual_seed(0)
    weight, even = torch.randn(32, 64), torch.randn(256, 64)
    uneven = even.clone()
    uneven[:, ::8] *= 50
    scheme = Scheme("int8", "static")
    assert round_layer(weight, scheme, seen(even)).smoothing is None
    kept = round_layer(weight, scheme, seen(uneven))
    assert kept.smoothing is not None
    plain = replace(nearest(weight, scheme), input_scale=static_scale(seen(uneven), "int8"))
    assert output_error(kept, weight, uneven) < 0.75 * output_error(plain, weight, uneven)


def test_a_convolutions_outputs_have_steps_of_each_channel_that_cut_nothing_seen_off():
    sizes = torch.tensor([1e-9, 0.5, 1.0, 30.0])
    outputs = seen(sizes * torch.randn(4000, 4))
    outputs.largest[2] = 9.0  # among the values that the sample left out
    steps = output_scale(torch.randn(4, 8, 3, 3), outputs)
    assert steps.shape == (4,)
    assert (127 * steps >= 0.999 * outputs.largest).all()
    torch.testing.assert_close(127 * steps[[1, 3]], 6 * sizes[[1, 3]], rtol=0.05, atol=0)
    assert float(127 * steps[2]) == pytest.approx(9.0)
    assert float(127 * steps[0]) == pytest.approx(1e-3 * float(outputs.largest[3]))  # silent
    assert output_scale(torch.randn(4, 8), outputs).shape == ()
