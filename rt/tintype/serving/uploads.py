"""Files that a request brings -> pictures, or a RequestError that names the field."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tintype.errors import RequestError

# PIL opens many kinds of files, some with programs that it starts; these are those of OpenAI's API.
_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS = 32_000_000  # which take 384 MB in float32


def picture(name: str, content: Any) -> Image.Image:
    """The picture in a file's bytes, the right way up."""
    if not isinstance(content, bytes):
        raise RequestError(f"{name} is not a file; send a PNG, JPEG or WebP as multipart/form-data")
    try:
        with Image.open(BytesIO(content), formats=_FORMATS) as opened:
            _check_pixels(opened)
            return ImageOps.exif_transpose(opened)
    except Image.DecompressionBombError as error:
        raise RequestError(
            f"{name} has more than {_MOST_PIXELS} pixels, which are the most that are read; make it smaller"
        ) from error
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise RequestError(
            f"{name} cannot be read as a picture; send a whole PNG, JPEG or WebP"
        ) from error


def mask(name: str, content: Any) -> Image.Image:
    """Where to paint, white on black: where OpenAI's masks are transparent, and ours without alpha are white."""
    opened = picture(name, content)
    if not ("A" in opened.getbands() or "transparency" in opened.info):
        return opened
    clear = np.asarray(opened.convert("RGBA").getchannel("A")) == 0
    if not clear.any():
        raise RequestError(
            f"{name} has an alpha channel that is 0 nowhere, and so would repaint nothing; make it 0 where to "
            "paint, or send one without alpha, white where to paint"
        )
    return Image.fromarray(clear)


def _check_pixels(opened: Image.Image) -> None:
    """A file of a few bytes may unpack to gigabytes; its header says so before it does."""
    if opened.width * opened.height > _MOST_PIXELS:
        raise Image.DecompressionBombError
