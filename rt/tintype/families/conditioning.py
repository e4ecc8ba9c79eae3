"""The text side of every family: prompts to what the denoiser is told, by up to three encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tintype.backends import Backend
from tintype.errors import RequestError
from tintype.prompts import fragments
from tintype.sampling import require_finite
from tintype.t5_tokenizer import T5Tokenizer
from tintype.tokenizer import CONTEXT, ClipTokenizer, Window

Floats = NDArray[np.float32]
TextTokenizer = ClipTokenizer | T5Tokenizer
STAGES = ("encode", "encode_2", "encode_3")
_CLIPS = STAGES[:2]  # of SD3


class Reading(NamedTuple):
    """How a prompt is read: whether brackets weigh words, and whether what is too long goes into further windows."""

    weighted: bool = False
    long: bool = False


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about a prompt: hidden states [1, t, d] and, for XL, pooled [1, p].

    `own` [1, t], for unCLIP, is 1 where a token is the text's and not padding.
    """

    hidden: Floats
    pooled: Floats | None = None
    own: Floats | None = None

    def zeros(self) -> Conditioning:
        """The blank that XL was trained with in place of a negative prompt."""
        return Conditioning(
            np.zeros_like(self.hidden), None if self.pooled is None else np.zeros_like(self.pooled)
        )

    def padded(self, tokens: int, blank: Conditioning) -> Conditioning:
        """At least `tokens` long, with windows of the empty prompt behind."""
        missing = (tokens - self.hidden.shape[1]) // blank.hidden.shape[1]
        return Conditioning(
            np.concatenate([self.hidden, *[blank.hidden] * missing], axis=1), self.pooled
        )


@dataclass(frozen=True)
class TextSide:
    """Encodes prompts; read-only after loading but the cached empty prompt."""

    backend: Backend
    tokenizers: Sequence[TextTokenizer]
    family: str
    defaults: Mapping[str, Any]
    _empty: dict[str, Conditioning] = field(default_factory=dict, repr=False)

    @property
    def stages(self) -> list[str]:
        """The encoders that the model has."""
        return [stage for stage in STAGES if stage in self.backend.stages]

    def profile(self, stage: str) -> str:
        """The one shape of an encoder."""
        profiles = self.backend.profiles(stage)
        return profiles[0] if profiles else "b1"

    def encode(self, prompt: str, known: dict[str, Conditioning], reading: Reading) -> Conditioning:
        """The conditioning of a prompt; `known` is the call's own cache, for one way of reading."""
        if prompt == "":
            if "" not in self._empty:
                self._empty[""] = self._run("", Reading())
            return self._empty[""]
        if prompt not in known:
            known[prompt] = self._run(prompt, reading)
        return known[prompt]

    def same_length(self, pair: Sequence[Conditioning]) -> list[Conditioning]:
        """The shorter padded to the longer."""
        tokens = max(each.hidden.shape[1] for each in pair)
        if all(each.hidden.shape[1] == tokens for each in pair):
            return list(pair)
        blank = self.encode("", {}, Reading())
        return [each.padded(tokens, blank) for each in pair]

    def _run(self, prompt: str, reading: Reading) -> Conditioning:
        pieces = fragments(prompt) if reading.weighted else [(prompt, 1.0)]
        parts = {}
        for stage, tokenizer in zip(self.stages, self.tokenizers, strict=True):
            windows = tokenizer.windows(pieces, long=reading.long)
            self._check_windows(prompt, len(windows))
            encoded = [self._window(stage, window, tokenizer) for window in windows]
            hidden = np.concatenate([each.hidden for each in encoded], axis=1)
            parts[stage] = Conditioning(hidden, encoded[0].pooled, encoded[0].own)
        return joined(self.family, parts, self.defaults)

    def _window(self, stage: str, window: Window, tokenizer: TextTokenizer) -> Conditioning:
        """One window through one encoder; a weight moves a token's states away from the empty prompt's, or towards."""
        own = np.float32(np.arange(len(window.weights)) < window.own)[None]
        encoded = replace(self._stage(stage, window.ids), own=own)
        if (window.weights == 1).all():
            return encoded
        blank = self._stage(stage, tokenizer("")).hidden
        weights = window.weights[None, :, None]
        return replace(encoded, hidden=blank + weights * (encoded.hidden - blank))

    def _stage(self, stage: str, ids: NDArray[np.int64]) -> Conditioning:
        outputs = self.backend.run(stage, self.profile(stage), {"input_ids": ids})
        require_finite(stage, outputs["encoder_hidden_states"])
        return Conditioning(outputs["encoder_hidden_states"], outputs.get("text_embeds"))

    def _check_windows(self, prompt: str, windows: int) -> None:
        if windows > 1 and self.backend.profiles("decode") is not None:
            raise RequestError(
                f"prompt {prompt[:30]!r}... takes {windows} windows of the text encoder, and this bundle's denoiser "
                "was built for one; shorten the prompt, or run the checkpoint on torch"
            )


def joined(
    family: str, parts: Mapping[str, Conditioning], defaults: Mapping[str, Any]
) -> Conditioning:
    """What the denoiser of a family is told, out of what each of its encoders says, by stage."""
    return _JOINED[family](parts, defaults)


def _side_by_side(parts: Mapping[str, Conditioning], _: Mapping[str, Any]) -> Conditioning:
    """SD 1, 2 and XL: one token's states behind each other, the last encoder's pooled text."""
    hidden = np.concatenate([part.hidden for part in parts.values()], axis=-1)
    return Conditioning(hidden, list(parts.values())[-1].pooled)


def _clips_then_t5(parts: Mapping[str, Conditioning], defaults: Mapping[str, Any]) -> Conditioning:
    """SD3: both CLIPs side by side and filled up with zeros, then T5's tokens.

    Zeros stand in for an encoder that was left out, as in the model's training; one that it never had says nothing.
    """
    width, left_out = int(defaults["text_width"]), defaults.get("left_out", ())
    hidden, pooled = _side_by_side_clips([parts[s] for s in _CLIPS if s in parts])
    # A CLIP's states are as wide as its pooled text, and the first one's stand before the second's.
    absent = int(defaults["pooled_width"]) - pooled.shape[-1]
    before = absent if "encode" in left_out else 0
    told = _filled(hidden, before, width)
    if "encode_3" in parts:
        told = np.concatenate([told, parts["encode_3"].hidden], axis=1)
    elif "encode_3" in left_out:
        silent = np.zeros((1, int(defaults["text_tokens"]), width), np.float32)
        told = np.concatenate([told, silent], axis=1)
    return Conditioning(told, _filled(pooled, before, pooled.shape[-1] + absent))


def _side_by_side_clips(clips: Sequence[Conditioning]) -> tuple[Floats, Floats]:
    """States [1, t, d] and pooled text [1, p], no wider than nothing where there is no CLIP."""
    if not clips:
        return np.zeros((1, CONTEXT, 0), np.float32), np.zeros((1, 0), np.float32)
    pooled = [clip.pooled for clip in clips if clip.pooled is not None]
    hidden = np.concatenate([clip.hidden for clip in clips], axis=-1)
    return hidden, np.concatenate(pooled, axis=-1)


def _filled(x: Floats, before: int, width: int) -> Floats:
    """x [..., w] as wide as `width`, with `before` of the zeros in front."""
    behind = width - before - x.shape[-1]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, behind)])


def _pooled_and_t5(parts: Mapping[str, Conditioning], _: Mapping[str, Any]) -> Conditioning:
    """FLUX: T5's tokens, and CLIP's pooled text alone."""
    return Conditioning(parts["encode_2"].hidden, parts["encode"].pooled)


def _of_one(parts: Mapping[str, Conditioning], _: Mapping[str, Any]) -> Conditioning:
    """unCLIP: its one encoder's."""
    return parts["encode"]


_JOINED: dict[str, Callable[[Mapping[str, Conditioning], Mapping[str, Any]], Conditioning]] = {
    "latent_unet": _side_by_side,
    "sd3": _clips_then_t5,
    "flux": _pooled_and_t5,
    "unclip": _of_one,
}
