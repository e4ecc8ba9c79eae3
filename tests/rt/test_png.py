"""Settings go into a PNG and come out again, and other people's tools can read them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tintype.errors import RequestError
from tintype.png import Settings, parameters, read_png, write_png

SETTINGS = Settings(
    prompt="a red lighthouse, dusk: «été» 🎈",
    negative_prompt="fog\nrain",
    seed=2**64 - 1,
    steps=20,
    guidance=7.5,
    scheduler="dpmpp_2m",
    width=128,
    height=64,
    model="postcard",
    version="0.1.0",
)


def test_settings_and_pixels_survive(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    path = tmp_path / "picture.png"
    with path.open("wb") as stream:
        write_png(Image.fromarray(pixels), stream, SETTINGS)
    assert read_png(path) == SETTINGS
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.text["parameters"] == parameters(SETTINGS)


def test_parameters_have_the_web_interfaces_syntax():
    lines = parameters(SETTINGS).split("\n")
    assert lines[0] == SETTINGS.prompt
    assert lines[1:3] == ["Negative prompt: fog", "rain"]
    fields = dict(part.split(": ", 1) for part in lines[3].split(", "))
    assert fields == {
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "CFG scale": "7.5",
        "Seed": str(2**64 - 1),
        "Size": "128x64",
        "Model": "postcard",
        "Version": "tintype 0.1.0",
    }


def test_a_picture_from_elsewhere_is_an_error(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "other.png")
    with pytest.raises(RequestError, match="not written by Tintype"):
        read_png(tmp_path / "other.png")


def test_no_negative_prompt_leaves_no_line():
    plain = Settings(**{**SETTINGS.__dict__, "negative_prompt": ""})
    assert "Negative" not in parameters(plain)
    stream = io.BytesIO()
    write_png(Image.new("RGB", (1, 1)), stream, plain)
    assert stream.getvalue().startswith(b"\x89PNG")
