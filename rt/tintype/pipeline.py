"""The pipeline that a user calls: arguments in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tintype.errors import Cancelled, RequestError
from tintype.families.latent_unet import Conditioning, Floats, LatentUNet
from tintype.request import ImageRequest, guidance_number, spread, whole_number
from tintype.schedulers import default_name

OnStep = Callable[[int, int, Floats], Any]
OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True)
class Output:
    """Pictures, the seed of each, and the seconds that each stage took."""

    images: list[Image.Image] | NDArray[np.float32]
    seeds: list[int]
    timings: dict[str, float]


@dataclass(frozen=True)
class Pipeline:
    """A loaded model. Safe to call from many threads: whatever a request changes is local to the call."""

    name: str
    family: LatentUNet
    backend_reason: str

    def settings(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str | None = None,
    ) -> dict[str, Any]:
        """The settings of a request, with the model's own where they are left open."""
        defaults = self.family.defaults
        given = {"height": height, "width": width, "steps": num_inference_steps}
        names = {"height": "height", "width": "width", "steps": "num_inference_steps"}
        whole = {
            field: whole_number(
                names[field], defaults[names[field]] if value is None else value, least=1
            )
            for field, value in given.items()
        }
        guidance = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        method = (
            scheduler or defaults.get("scheduler") or default_name(self.family.scheduler_config)
        )
        return {**whole, "guidance": guidance_number(guidance), "scheduler": method}

    def __call__(  # noqa: PLR0913 - the contract's arguments, which are diffusers'
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: str | None = None,
        latents: NDArray[Any] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: OnStep | None = None,
    ) -> Output:
        """Make pictures. See `docs/` for every argument; names follow diffusers.

        A guidance scale of 1 or less means no guidance. `latents` is the unit noise to begin from,
        [n, c, h/f, w/f]. `callback_on_step_end(step, total, latents)` counts the steps of all images,
        from 0, and cancels the call by returning False, which raises `Cancelled`.
        """
        for name, value in (("image", image), ("mask_image", mask_image), ("strength", strength)):
            if value is not None:
                raise RequestError(f"{name} is not supported by this pipeline yet")
        if output_type not in OUTPUT_TYPES:
            raise RequestError(
                f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}"
            )
        settings = self.settings(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
        )
        requests = spread(prompt, negative_prompt, num_images_per_prompt, seed, latents, settings)
        return self._run(requests, output_type, callback_on_step_end)

    def _run(
        self, requests: list[ImageRequest], output_type: str, on_step: OnStep | None
    ) -> Output:
        """One image after the other through the same profile, so that no image depends on its neighbours."""
        for request in requests:
            self.family.check(request)
        timings: dict[str, float] = {}
        known: dict[str, Conditioning] = {}
        results = []
        for index, request in enumerate(requests):
            both = self.family.conditionings(request, known, timings)
            notify = _counter(on_step, index, len(requests), request.steps)
            result = self.family.denoise(request, *both, notify, timings)
            if output_type != "latent":
                result = self.family.decode(request, result, timings)
            results.append(result)
        arrays = np.concatenate(results)
        images = [to_pil(array) for array in arrays] if output_type == "pil" else arrays
        return Output(images, [request.seed for request in requests], timings)


def to_pil(image: NDArray[np.float32]) -> Image.Image:
    """float32 [h, w, 3] in 0..1 -> an 8-bit picture, rounded to nearest."""
    return Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))


def _counter(
    on_step: OnStep | None, image: int, images: int, steps: int
) -> Callable[[int, Floats], None]:
    total = images * steps

    def notify(step: int, latents: Floats) -> None:
        done = image * steps + step
        if on_step is not None and on_step(done, total, latents) is False:
            raise Cancelled(f"the callback cancelled the request at step {done + 1} of {total}")

    return notify
