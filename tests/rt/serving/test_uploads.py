"""Files that clients send: what is read of them, and what is refused before it fills the memory."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from served import as_file
from tintype.errors import RequestError
from tintype.serving.uploads import mask, picture

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "1", "P"])
def test_a_picture_comes_as_it_was_sent(mode):
    sent = Image.fromarray(PIXELS).convert(mode)
    found = picture("image", as_file(sent))
    assert found.mode == mode
    np.testing.assert_array_equal(np.asarray(found), np.asarray(sent))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_openais_formats_are_read(kind):
    assert picture("image", as_file(Image.fromarray(PIXELS), kind)).size == (12, 8)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "EPS", "PDF"])
def test_other_formats_are_refused(kind):
    with pytest.raises(RequestError, match="image cannot be read.*PNG, JPEG or WebP"):
        picture("image", as_file(Image.fromarray(PIXELS), kind))


def test_a_photograph_is_turned_the_right_way_up():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stood on its side
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, format="PNG", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(picture("image", stream.getvalue())), np.rot90(PIXELS, -1)
    )


def png(*chunks):
    """A PNG of (name, content) chunks."""
    parts = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width, height):
    """The chunk that says how large a PNG is."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 12_000), (100_000, 100_000)])
@pytest.mark.parametrize("read", [picture, mask])
def test_a_file_that_would_unpack_to_too_many_pixels_is_refused_by_its_header(size, read):
    with pytest.raises(RequestError, match="photo has more than 32000000 pixels"):
        read("photo", png(header(*size), (b"IDAT", zlib.compress(b""))))


def test_a_text_that_would_unpack_to_too_much_is_refused():
    text = b"Comment\0\0" + zlib.compress(bytes(100_000_000))
    with pytest.raises(RequestError, match="photo cannot be read"):
        picture("photo", png(header(1, 1), (b"zTXt", text), (b"IDAT", zlib.compress(bytes(4)))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_raises_nothing_but_our_own_error(kind):
    whole = as_file(Image.fromarray(PIXELS), kind)
    random = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(whole[: random.integers(0, len(whole))])
        for place in random.integers(0, max(1, len(bad)), 3):
            bad[place : place + 1] = bytes([random.integers(0, 256)])
        with suppress(RequestError):  # some damage leaves a picture
            picture("image", bytes(bad))


@pytest.mark.parametrize("content", ["text", None, 3])
def test_what_is_no_file_is_refused(content):
    with pytest.raises(RequestError, match="mask is not a file"):
        mask("mask", content)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_with_alpha_is_white_where_that_is_0(mode):
    alpha = np.array([[0, 1, 128, 255]], np.uint8)
    sent = Image.new("RGB", (4, 1), "white")
    if mode == "P":
        sent = Image.fromarray(np.arange(4, dtype=np.uint8)[None], "P")
        sent.putpalette([200, 100, 50] * 4)
        stream = io.BytesIO()
        sent.save(stream, format="PNG", transparency=bytes(alpha[0]))
        content = stream.getvalue()
    else:
        sent = sent.convert(mode)
        sent.putalpha(Image.fromarray(alpha))
        content = as_file(sent)
    found = np.asarray(mask("mask", content).convert("L"))
    np.testing.assert_array_equal(found, [[255, 0, 0, 0]])


def test_a_mask_without_alpha_is_as_it_was_sent():
    shade = np.array([[0, 100, 200, 255]], np.uint8)
    np.testing.assert_array_equal(np.asarray(mask("mask", as_file(Image.fromarray(shade)))), shade)
