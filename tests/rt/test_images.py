"""Pictures and embeddings in and out: every form, against PIL, torch and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tintype import images
from tintype.embeddings import centred, l2_normalise
from tintype.errors import RequestError
from tolerances import KERNEL_STEP, TINY_GRAPH, relative_error

PIXELS = np.random.default_rng(2).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(PIXELS),
        Image.fromarray(PIXELS).convert("RGBA"),
        PIXELS,
        PIXELS[None],
        PIXELS.astype(np.float64) / 255,
        torch.from_numpy(PIXELS.astype(np.float32) / 255).permute(2, 0, 1),
        torch.from_numpy(PIXELS.astype(np.float32) / 255).permute(2, 0, 1)[None],
    ],
    ids=["PIL", "RGBA", "bytes", "batch", "floats", "tensor", "tensors"],
)
def test_every_form_is_one(picture):
    array = images.to_numpy(picture)
    assert array.dtype == np.float32
    assert array.shape == (1, 6, 8, 3)
    assert relative_error(array[0], PIXELS / 255) < KERNEL_STEP


def test_there_and_back():
    array = images.to_numpy(PIXELS)
    np.testing.assert_array_equal(np.asarray(images.to_pil(array[0])), PIXELS)
    tensor = images.to_torch(array)
    assert tensor.shape == (1, 3, 6, 8)
    np.testing.assert_array_equal(images.to_numpy(tensor), array)
    np.testing.assert_allclose(images.denormalise(images.normalise(array)), array, atol=KERNEL_STEP)
    assert images.normalise(array, (0, 0, 0), (1, 2, 4))[0, 0, 0].tolist() == pytest.approx(
        (array[0, 0, 0] / [1, 2, 4]).tolist()
    )


def test_resize_is_pils():
    grey = Image.fromarray(PIXELS[..., 0].astype(np.float32), mode="F")
    expected = np.asarray(grey.resize((5, 9), Image.Resampling.LANCZOS)) / 255
    actual = images.resize(images.to_numpy(PIXELS), 5, 9)
    assert actual.shape == (1, 9, 5, 3)
    assert relative_error(actual[0, ..., 0], expected) < TINY_GRAPH
    with pytest.raises(RequestError, match="nearest, bilinear, bicubic, lanczos"):
        images.resize(PIXELS[None], 5, 9, "sinc")


def test_crop_and_cover():
    array = images.to_numpy(PIXELS)
    np.testing.assert_array_equal(images.centre_crop(array, 4, 2), array[:, 2:4, 2:6])
    with pytest.raises(RequestError, match="9x2 does not fit into 8x6"):
        images.centre_crop(array, 9, 2)
    np.testing.assert_array_equal(images.cover(array, 8, 6), array)
    # what is wider than asked for loses its sides, and nothing is stretched
    np.testing.assert_array_equal(images.cover(array, 6, 6), array[:, :, 1:7])
    assert images.cover(array, 16, 3).shape == (1, 3, 16, 3)
    assert images.cover(array, 7, 5).min() >= 0


@pytest.mark.parametrize("size", [(7, 5), (16, 3), (3, 16), (40, 9), (2, 2)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos"])
def test_what_covers_is_the_middle_of_the_whole_at_that_scale(size, method):
    width, height = size
    scale = max(width / 8, height / 6)
    whole = images.resize(images.to_numpy(PIXELS), round(8 * scale), round(6 * scale), method)
    expected = images.centre_crop(whole.clip(0, 1), width, height)
    actual = images.cover(images.to_numpy(PIXELS), width, height, method)
    assert relative_error(actual, expected) < TINY_GRAPH


def test_no_more_is_made_of_a_long_picture_than_is_kept(monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest: made.append(size) or resize(self, size, *rest),
    )
    long = np.random.default_rng(0).random((1, 16_000, 1, 3), np.float32)
    assert images.cover(long, 64, 64).shape == (1, 64, 64, 3)
    assert set(made) == {(64, 64)}


def test_masks_have_one_channel():
    shade = Image.fromarray(PIXELS[..., 0])
    assert images.to_numpy(shade, "mask_image", channels=1).shape == (1, 6, 8, 1)
    assert images.to_numpy(PIXELS[..., 0] > 9, "mask_image", channels=1).max() == 1
    tensor = torch.from_numpy((PIXELS[..., 0] > 9).astype(np.float32))
    assert images.to_numpy(tensor, "mask_image", channels=1).shape == (1, 6, 8, 1)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("RGB", (0, 4)), "image is a picture of 0x4 pixels"),
        (Image.new("La", (4, 4)), "image is a picture in mode La"),
        (Image.new("F", (4, 4)), "image is a picture in mode F, which has no white"),
    ],
)
def test_pictures_without_pixels_or_in_other_modes_are_named(picture, message):
    with pytest.raises(RequestError, match=message):
        images.to_numpy(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_count_to_their_own_white(channels):
    shades = np.array([[0, 30000, 65535]], np.uint16)
    found = images.to_numpy(Image.fromarray(shades), channels=channels)
    expected = np.repeat(shades[None, ..., None] / 65535, channels, axis=-1)
    np.testing.assert_array_max_ulp(found, expected.astype(np.float32), maxulp=1)


def test_one_picture_for_all_or_one_each():
    one = images.each(PIXELS, 3)
    assert len(one) == 3
    assert one[0] is one[2]
    assert len(images.each([PIXELS, Image.fromarray(PIXELS)], 2)) == 2
    with pytest.raises(RequestError, match="2 pictures for 3 images"):
        images.each([PIXELS, PIXELS], 3)


def test_latents_keep_a_constant_when_they_are_resized():
    constant = np.full((1, 4, 3, 5), 1.5, np.float32)
    assert (
        relative_error(images.resize_latents(constant, 10, 6), np.full((1, 4, 6, 10), 1.5)) < 1e-6
    )


def test_l2_normalise_and_centred():
    vectors = np.random.default_rng(0).standard_normal((5, 7)) * 1e3
    unit = l2_normalise(vectors)
    assert unit.dtype == np.float32
    assert relative_error(np.linalg.norm(unit, axis=1), np.ones(5)) < KERNEL_STEP
    assert relative_error(unit * np.linalg.norm(vectors, axis=1)[:, None], vectors) < KERNEL_STEP
    assert l2_normalise(np.zeros(3)).tolist() == [0, 0, 0]
    moved = centred(vectors)
    assert relative_error(moved, vectors - vectors.mean(0)) < KERNEL_STEP
    assert relative_error(centred(vectors, np.ones(7)), vectors - 1) < KERNEL_STEP
