"""The fields of a request, as JSON or a form has them -> the arguments of the pipeline's call."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tintype.errors import ProfileError, RequestError
from tintype.request import SEEDS, picture_size
from tintype.schedulers import names as schedulers
from tintype.serving.uploads import mask, picture

Check = Callable[[str, Any], Any]
_MOST_CHARACTERS = 32_000  # of a text, as in OpenAI's API
_FORMATS = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class Asked:
    """What a request asks for: arguments of the pipeline, and how its pictures are sent."""

    arguments: Mapping[str, Any]
    output_format: str = "png"
    quality: int = 100


class FieldError(RequestError):
    """A field that cannot be taken; `code` is the word that OpenAI's API has for why."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


def from_form(items: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """A form's fields as JSON would have them; the files among them are bytes."""
    given: dict[str, Any] = {}
    for sent, value in items:
        name = "image" if sent == "image[]" else sent  # clients name lists so
        if name in given:
            raise FieldError(name, f"{name} was sent more than once; one is taken")
        if isinstance(value, bytes) and name in EDIT and name not in PICTURES:
            raise FieldError(name, f"{name} was sent as a file; send it as text", "invalid_type")
        given[name] = _value(value) if name in VALUES and isinstance(value, str) else value
    return given


def asked(given: Mapping[str, Any], known: Mapping[str, Check], model: str) -> Asked:
    """The request that fields say to a server of `model`; `known` are those that may be given, None is absent."""
    for name in given:
        if name not in known:
            message = f"{reprlib.repr(name)} is not a field here; those are {', '.join(known)}"
            raise FieldError(name, message, "unknown_parameter")
    values = {name: known[name](name, value) for name, value in given.items() if value is not None}
    for name in ("prompt", "image"):
        if name in known and name not in values:
            raise FieldError(name, f"{name} is missing; send it", "missing_required_parameter")
    if values.get("model", model) != model:
        shown = reprlib.repr(values["model"])
        raise FieldError("model", f"model={shown} is not served here; ask for {model}, or none")
    arguments = {ARGUMENTS[name]: value for name, value in values.items() if name in ARGUMENTS}
    if size := values.get("size"):
        arguments |= {"width": size[0], "height": size[1]}
    return Asked(arguments, **_encoding(values))


def field_of(error: Exception) -> str | None:
    """The field that an error is about, where that is known: messages begin with an argument's name."""
    if isinstance(error, FieldError):
        return error.field
    if isinstance(error, ProfileError):
        return "size"
    argument = str(error).partition(" ")[0].partition("=")[0]
    return _FIELDS.get(argument)


def _encoding(values: Mapping[str, Any]) -> dict[str, Any]:
    kind, quality = values.get("output_format", "png"), values.get("output_compression")
    if quality is not None and kind == "png":
        raise FieldError(
            "output_compression",
            f"output_compression={quality} is for jpeg and webp, and a png loses nothing; leave it out",
        )
    return {"output_format": kind, "quality": 100 if quality is None else quality}


def _value(text: str) -> Any:
    """What a form's text is in JSON; text that is none is left for the field's check to refuse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"{name}={reprlib.repr(value)} is not a string", "invalid_type")
    if len(value) > _MOST_CHARACTERS:
        raise FieldError(
            name, f"{name} has {len(value)} characters; at most {_MOST_CHARACTERS} are read"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can escape halves of letters
        raise FieldError(name, f"{name}={reprlib.repr(value)} is not Unicode text")
    return value


def _whole(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise FieldError(name, f"{name}={reprlib.repr(value)} is not a whole number {bounds}")
    return int(value)


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise FieldError(
            name, f"{name}={reprlib.repr(value)} is not a finite number", "invalid_type"
        )
    return number


def _choice(name: str, value: Any, *, allowed: tuple[Any, ...], why: str = "") -> Any:
    # 0 equals False, and is another value in JSON.
    if not any(value == each and type(value) is type(each) for each in allowed):
        choices = ", ".join(str(each).lower() for each in allowed)
        raise FieldError(
            name,
            f"{name}={reprlib.repr(value)} is not available{why and ': '}{why}; choose {choices}",
        )
    return value


def _size(name: str, value: Any) -> tuple[int, int] | None:
    text = _text(name, value)
    return None if text == "auto" else picture_size(text)


def _refused(name: str, value: Any, *, why: str) -> None:
    raise FieldError(name, f"{name} is not available: {why}; leave it out")


_STREAMING = "pictures are sent when they are done"
_TEXTS: dict[str, Check] = {
    "prompt": _text,
    "negative_prompt": _text,
    "model": _text,
    "size": _size,
    "scheduler": partial(_choice, allowed=tuple(schedulers())),
    "response_format": partial(
        _choice, allowed=("b64_json",), why="pictures are not kept, so that there is no address"
    ),
    "output_format": partial(_choice, allowed=_FORMATS),
    "background": partial(_choice, allowed=("auto", "opaque"), why="every pixel is painted"),
    "quality": partial(
        _choice, allowed=("auto", "standard"), why="num_inference_steps is what sets it"
    ),
    "style": partial(_refused, why="the prompt says it"),
    # Taken, and without effect: nothing is moderated, and nobody is watched.
    "moderation": partial(_choice, allowed=("auto", "low")),
    "user": _text,
    "safety_identifier": _text,
}
# What JSON does not write as a string, and a form does.
VALUES: dict[str, Check] = {
    "n": partial(_whole, least=1, most=10),
    "seed": partial(_whole, least=0, most=SEEDS - 1),
    "num_inference_steps": partial(_whole, least=1),
    "guidance_scale": _number,
    "output_compression": partial(_whole, least=0, most=100),
    "stream": partial(_choice, allowed=(False,), why=_STREAMING),
    "partial_images": partial(_choice, allowed=(0,), why=_STREAMING),
    "strength": _number,
}
PICTURES: dict[str, Check] = {"image": picture, "mask": mask}
GENERATION = _TEXTS | {name: check for name, check in VALUES.items() if name != "strength"}
EDIT = _TEXTS | VALUES | PICTURES
# The pipeline's names for the fields that it takes.
ARGUMENTS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "n": "num_images_per_prompt",
    "seed": "seed",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "scheduler": "scheduler",
    "strength": "strength",
    "image": "image",
    "mask": "mask_image",
}
_FIELDS = {
    **{field: field for field in EDIT},
    **{argument: field for field, argument in ARGUMENTS.items()},
    "width": "size",
    "height": "size",
}
