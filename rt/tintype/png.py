"""Pictures that carry their own settings: PNG text chunks that people's tools read, and a JSON chunk for ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image, PngImagePlugin

from tintype._version import __version__
from tintype.errors import RequestError
from tintype.request import CASCADE

if TYPE_CHECKING:
    from tintype.pipeline import Output, Pipeline

CHUNK = "tintype"
# The names by which the field's web interfaces know our methods.
_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "flow_euler": "Euler",
    "flow_heun": "Heun",
}


@dataclass(frozen=True)
class Settings:
    """Everything that is needed to make a picture again, but for the picture that an edit began with."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    scheduler: str
    width: int
    height: int
    model: str
    version: str
    strength: float | None = None
    cascade: Mapping[str, float] | None = None  # what `request.CASCADE` names, of an unCLIP


def settings_of(pipeline: Pipeline, asked: Mapping[str, Any], output: Output) -> list[Settings]:
    """The settings of each picture that a call of one prompt gave; `asked` are its arguments."""
    names = ("height", "width", "num_inference_steps", "guidance_scale", "scheduler")
    chosen = pipeline.settings(**{name: asked.get(name) for name in names})
    own = pipeline.family.defaults
    cascade = {
        name: own[name] if asked.get(name) is None else asked[name]
        for name in CASCADE
        if name in own
    }
    width, height = output.images[0].size  # an edit takes its picture's
    common: dict[str, Any] = chosen | {"width": width, "height": height}
    return [
        Settings(
            prompt=asked["prompt"],
            negative_prompt=asked.get("negative_prompt") or "",
            seed=seed,
            model=pipeline.name,
            version=__version__,
            strength=asked.get("strength"),
            cascade=cascade or None,
            **common,
        )
        for seed in output.seeds
    ]


def write_png(image: Image.Image, target: BinaryIO, settings: Settings) -> None:
    """Write the picture with its settings as text chunks `parameters` and `tintype`."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters(settings))
    chunks.add_text(CHUNK, json.dumps(asdict(settings)))
    image.save(target, format="PNG", pnginfo=chunks)


def read_png(path: str | Path) -> Settings:
    """The settings of a picture that Tintype wrote."""
    with Image.open(path) as image:
        text = getattr(image, "text", {})
    if CHUNK not in text:
        raise RequestError(f"{path} carries no {CHUNK!r} text chunk; it was not written by Tintype")
    return Settings(**json.loads(text[CHUNK]))


def parameters(settings: Settings) -> str:
    """The settings in the `parameters` syntax of the Stable Diffusion web interfaces."""
    fields = {
        "Steps": settings.steps,
        "Sampler": _SAMPLERS.get(settings.scheduler, settings.scheduler),
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": settings.model,
        "Version": f"tintype {settings.version}",
    }
    if settings.strength is not None:
        fields["Denoising strength"] = f"{settings.strength:g}"
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value whose own punctuation would end it is written as a JSON string, as readers expect."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
