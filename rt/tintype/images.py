"""Pictures in and out: PIL, numpy and torch to one form, sizes, crops and value ranges.

The one form is float32 [n, h, w, 3] in 0..1; masks are float32 [n, h, w, 1], 1 where the picture is to be painted anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from tintype.errors import RequestError

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def read(path: str | Path) -> Image.Image:
    """A picture from a file, the right way up; one that cannot be read is a RequestError."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened)
    except (OSError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read as a picture: {error}") from error


def to_numpy(image: Any, name: str = "image", channels: int = 3) -> Floats:
    """A picture or a batch -> float32 [n, h, w, channels] in 0..1.

    Takes PIL, numpy ([h, w], [h, w, c] or [n, h, w, c]; integers count to 255, floats to 1) and torch
    ([c, h, w] or [n, c, h, w]; bytes count to 255, everything else to 1).
    """
    if isinstance(image, Image.Image):
        return _scaled(_pixels(image, name, channels))[None]
    if is_tensor(image):
        tensor = from_torch(image, name)
        if tensor.dtype.kind in "iu" and tensor.dtype != np.uint8:
            tensor = tensor.astype(np.float32)
        tensor = tensor[(None,) * max(0, 4 - tensor.ndim)]
        array = np.moveaxis(tensor, 1, -1)
    elif isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        array = array[None] if array.ndim == 3 else array
    else:
        raise RequestError(
            f"{name} is a {type(image).__name__}; expected a PIL image, a numpy array or a torch tensor"
        )
    if array.ndim != 4 or array.shape[-1] != channels or 0 in array.shape:
        raise RequestError(
            f"{name} has shape {list(image.shape)}, expected [n, h, w, {channels}], for torch [n, {channels}, h, w]"
        )
    if array.dtype.kind not in "biuf":
        raise RequestError(f"{name} holds {array.dtype}, expected numbers")
    floats = _scaled(array)
    if not np.isfinite(floats).all():
        raise RequestError(f"{name} holds NaN or infinity")
    if floats.min() < 0 or floats.max() > 1:
        raise RequestError(
            f"{name} holds values from {floats.min():g} to {floats.max():g}, expected 0..1"
        )
    return floats


def is_tensor(value: Any) -> bool:
    """Whether it is torch's, which nobody hands over who has not imported torch."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def from_torch(tensor: torch.Tensor, name: str) -> NDArray[Any]:
    """A tensor's numbers without its gradient, wherever it lies; floats, of which numpy lacks some, as float32."""
    try:
        plain = tensor.detach().cpu()
        return np.asarray((plain.float() if plain.is_floating_point() else plain).numpy())
    except (NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[:1]
        raise RequestError(
            f"{name} is a {type(tensor).__name__} that gives no plain numbers ({''.join(reason)}); give a dense tensor"
        ) from error


def to_pil(image: ArrayLike) -> Image.Image:
    """float32 [h, w, 3] in 0..1 -> an 8-bit picture, rounded to nearest."""
    pixels = np.asarray(image, np.float32)
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def to_torch(images: ArrayLike) -> torch.Tensor:
    """float32 [n, h, w, c] -> a contiguous tensor [n, c, h, w]."""
    import torch as library

    return library.from_numpy(np.moveaxis(np.asarray(images, np.float32), -1, 1).copy())


def resize(images: ArrayLike, width: int, height: int, method: str = "lanczos") -> Floats:
    """Resample [n, h, w, c] to another size in float32, channel by channel; `method` is one of PIL's."""
    if method not in _RESAMPLING:
        raise RequestError(f"method={method!r} is unknown; choose one of {', '.join(_RESAMPLING)}")
    array = np.asarray(images, np.float32)
    if array.shape[1:3] == (height, width):
        return array
    return _resized(array, (width, height), method)


def centre_crop(images: ArrayLike, width: int, height: int) -> Floats:
    """The middle [n, height, width, c] of pictures that are at least that large."""
    array = np.asarray(images, np.float32)
    top, left = (array.shape[1] - height) // 2, (array.shape[2] - width) // 2
    if top < 0 or left < 0:
        raise RequestError(
            f"a crop of {width}x{height} does not fit into {array.shape[2]}x{array.shape[1]}"
        )
    return np.ascontiguousarray(array[:, top : top + height, left : left + width])


def cover(images: ArrayLike, width: int, height: int, method: str = "lanczos") -> Floats:
    """Scale [n, h, w, c] until it covers width x height, and crop what sticks out, so that nothing is distorted."""
    array = np.asarray(images, np.float32)
    scale = max(width / array.shape[2], height / array.shape[1])
    across, down = (max(1, round(scale * side)) for side in (array.shape[2], array.shape[1]))
    return _middle(array, (max(across, width), max(down, height)), (width, height), method)


def shortest_side(images: ArrayLike, side: int, method: str = "bicubic") -> Floats:
    """Scale [n, h, w, c] until the shorter side has ``side`` pixels, and crop to a square, as CLIP's processor does: of
    the longer side a pixel that is not whole is left out."""
    array = np.asarray(images, np.float32)
    sides = array.shape[2], array.shape[1]
    across, down = (int(side * each / min(sides)) for each in sides)
    return _middle(array, (across, down), (side, side), method)


def normalise(images: ArrayLike, mean: ArrayLike = 0.5, std: ArrayLike = 0.5) -> Floats:
    """(images - mean) / std in float32, by default 0..1 -> -1..1; mean and std are numbers or one a channel."""
    shifted = np.asarray(images, np.float32) - np.asarray(mean, np.float32)
    return np.asarray(shifted / np.asarray(std, np.float32), np.float32)


def denormalise(images: ArrayLike, mean: ArrayLike = 0.5, std: ArrayLike = 0.5) -> Floats:
    """The inverse of `normalise`."""
    widened = np.asarray(images, np.float32) * np.asarray(std, np.float32)
    return np.asarray(widened + np.asarray(mean, np.float32), np.float32)


def resize_latents(latents: Floats, width: int, height: int) -> Floats:
    """Interpolate [n, c, h, w] to another size, in latents."""
    return np.ascontiguousarray(
        np.moveaxis(resize(np.moveaxis(latents, 1, -1), width, height, "bicubic"), -1, 1)
    )


def each(images: Any, count: int, name: str = "image", channels: int = 3) -> list[Floats]:
    """One picture [1, h, w, channels] for each of `count`: from one for all, a list, or a batch of that many."""
    if isinstance(images, Sequence):
        found = [to_numpy(image, name, channels) for image in images]
        found = [picture[None] for batch in found for picture in batch]
    else:
        found = [picture[None] for picture in to_numpy(images, name, channels)]
    if len(found) not in (1, count):
        raise RequestError(f"{name} has {len(found)} pictures for {count} images")
    return found if len(found) == count else found * count


def _pixels(image: Image.Image, name: str, channels: int) -> NDArray[Any]:
    """[h, w, channels] of a picture in any of PIL's modes that say what is white: 8 bits, or 0..1 of 16."""
    if image.mode.startswith("I;16"):
        shades = np.asarray(image, np.float32)[..., None] / np.float32(65535)
        return np.repeat(shades, channels, axis=-1)
    if image.mode in ("I", "F"):
        raise RequestError(
            f"{name} is a picture in mode {image.mode}, which has no white; convert it"
        )
    try:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except ValueError as error:
        raise RequestError(f"{name} is a picture in mode {image.mode}: {error}") from error
    if not pixels.size:
        raise RequestError(f"{name} is a picture of {image.width}x{image.height} pixels")
    return pixels.reshape(*pixels.shape[:2], channels)


def _scaled(array: NDArray[Any]) -> Floats:
    if np.issubdtype(array.dtype, np.integer):
        return np.asarray(array.astype(np.float32) / np.float32(255))
    return np.ascontiguousarray(array, np.float32)


def _middle(array: Floats, scaled: tuple[int, int], kept: tuple[int, int], method: str) -> Floats:
    """The middle of [n, h, w, c] as it would be scaled to another size (width, height), of which no more is made."""
    own = array.shape[2], array.shape[1]
    if scaled == own:
        return centre_crop(array, *kept)
    begin = [(whole - part) // 2 for whole, part in zip(scaled, kept, strict=True)]
    ends = [first + part for first, part in zip(begin, kept, strict=True)]
    left, top, right, bottom = (
        edge * side / whole
        for edges in (begin, ends)
        for edge, side, whole in zip(edges, own, scaled, strict=True)
    )
    return np.clip(_resized(array, kept, method, (left, top, right, bottom)), 0, 1)


def _resized(array: Floats, size: tuple[int, int], method: str, box: Box | None = None) -> Floats:
    """[n, h, w, c] at another size (width, height), or what of it lies in a box (left, top, right, bottom)."""
    resampling = _RESAMPLING[method]

    def plane(values: Floats) -> Floats:
        picture = Image.fromarray(np.ascontiguousarray(values, np.float32), mode="F")
        return np.asarray(picture.resize(size, resampling, box), np.float32)

    planes = [[plane(values) for values in np.moveaxis(each, -1, 0)] for each in array]
    return np.moveaxis(np.array(planes, np.float32), 1, -1)
