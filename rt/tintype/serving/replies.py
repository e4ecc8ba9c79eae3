"""What a client is sent: pictures in OpenAI's form, or an error in it."""

from __future__ import annotations

import base64
import json
import time
from io import BytesIO

from PIL import Image

from tintype.pipeline import Output, Pipeline
from tintype.png import Settings, settings_of, write_png
from tintype.serving.fields import Asked

_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def pictures(pipeline: Pipeline, asked: Asked, output: Output) -> bytes:
    """The JSON of a call's pictures; PNGs carry their settings as those of `tintype generate` do."""
    settings = settings_of(pipeline, asked.arguments, output)
    data = [
        {"b64_json": _base64(image, own, asked), "seed": own.seed}
        for image, own in zip(output.images, settings, strict=True)
    ]
    body = {
        "created": int(time.time()),
        "data": data,
        "size": f"{settings[0].width}x{settings[0].height}",
        "output_format": asked.output_format,
        "timings": output.timings,
    }
    return json.dumps(body).encode()


def error(status: int, message: str, field: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error; `field` is the one that it is about."""
    kind = _KINDS.get(status, "invalid_request_error")
    body = {"message": message, "type": kind, "param": field, "code": code}
    return json.dumps({"error": body}).encode()


def _base64(image: Image.Image, settings: Settings, asked: Asked) -> str:
    stream = BytesIO()
    if asked.output_format == "png":
        write_png(image, stream, settings)
    else:
        image.save(stream, format=asked.output_format, quality=asked.quality)
    return base64.b64encode(stream.getvalue()).decode()
