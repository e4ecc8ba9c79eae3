"""What an edit begins with: a picture's latents, where they are painted anew, and what an inpainting UNet is shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tintype.schedulers import Table

Floats = NDArray[np.float32]
_GREY = np.float32(0.5)


@dataclass(frozen=True)
class Edit:
    """Nothing, or latents, or latents and a mask; arrays are float32.

    `clean` [n, c, h, w]; `mask` [n, 1, h, w] is 1 where to paint; `shown` [n, 1 + c, h, w] is what an inpainting
    denoiser sees besides x. `from_noise`: sampling begins at pure noise although there is a picture.
    """

    clean: Floats | None = None
    mask: Floats | None = None
    shown: Floats | None = None
    from_noise: bool = True

    def begin(self, table: Table, unit: Floats) -> Floats:
        """The first x, from unit noise."""
        if self.from_noise or self.clean is None:
            scaled: Floats = np.float32(table.init_scale) * unit
            return scaled
        return self.noisy(table, 0, unit)

    def noisy(self, table: Table, step: int, unit: Floats) -> Floats:
        """The clean latents as they stand before a step, with this noise."""
        assert self.clean is not None
        signal, noise = np.float32(table.signal[step]), np.float32(table.noise[step])
        noisy: Floats = signal * self.clean + noise * unit
        return noisy

    def blended(self, table: Table, step: int, x: Floats, unit: Floats) -> Floats:
        """x after a step, with everything outside the mask put back to where it belongs."""
        if self.mask is None or self.clean is None:
            return x
        last = step == len(table) - 1
        kept = self.clean if last else self.noisy(table, step + 1, unit)
        blend: Floats = (1 - self.mask) * kept + self.mask * x
        return blend


def mask_latents(mask: Floats, factor: int) -> Floats:
    """A mask [1, h, w, 1] at the latents' resolution, [1, 1, h/f, w/f]; a latent takes its corner's pixel."""
    return np.ascontiguousarray(np.moveaxis(mask[:, ::factor, ::factor], -1, 1))


def masked(image: Floats, mask: Floats) -> Floats:
    """The picture with grey where it is to be painted."""
    return np.where(mask < _GREY, image, _GREY)
