"""What SD3's and FLUX's transformers share: text and image tokens in one attention, modulated by time and pooled text.

Esser et al. 2024 (arXiv 2403.03206), section 4; adaptive layer norm: Peebles and Xie 2023 (arXiv 2212.09748).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tintype.models.fused import (
    Readers,
    Rotation,
    attention,
    gate_layer_norm_modulate,
    gate_residual,
    join_tokens,
    layer_norm_modulate,
    linear_gelu_tanh,
    linears,
    qk_norm_rope,
)
from tintype.models.layers import (
    Time,
    TimestepEmbedding,
    merge_heads,
    sinusoidal_embedding,
    split_heads,
)
from tintype.models.stacked import stack

if TYPE_CHECKING:
    from tintype_kernels import QuantizedRows

_EPS = 1e-6
_TIME_FREQUENCIES = 256


class Conditioning(nn.Module):
    """Times [n] in 0..1000, pooled text [n, p] and, for models distilled with it, guidance [n] -> [n, width]."""

    def __init__(self, width: int, pooled_width: int, *, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIME_FREQUENCIES, width)
        if guidance:
            self.guidance_embedder = TimestepEmbedding(_TIME_FREQUENCIES, width)
        self.text_embedder = TimestepEmbedding(pooled_width, width)

    def forward(self, time: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        return self.at(time, self.remember(pooled, guidance))

    def remember(self, pooled: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is added to every time: of guidance, where the model has it, and of text, [n, width]."""
        text = self.text_embedder(pooled)
        if guidance is None:
            return (text,)
        # Guidance is told on the scale of times: 3.5 as 3500.
        return self.guidance_embedder(_frequencies(1000 * guidance, pooled.dtype)), text

    def at(self, times: Tensor, remembered: Sequence[Tensor]) -> Tensor:
        """Times [.., n] with what is remembered -> [.., n, width]."""
        embedded: Tensor = self.timestep_embedder(_frequencies(times, remembered[0].dtype))
        return sum(remembered, embedded)


def _frequencies(value: Tensor, dtype: torch.dtype) -> Tensor:
    return sinusoidal_embedding(value, _TIME_FREQUENCIES).to(dtype)


class Modulation(nn.Module):
    """Conditioning [n, width], or what it tells -> ``parts`` tensors [n, 1, width]: a block's shifts, scales, gates."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def told(self, conditioning: Tensor) -> Tensor:
        """[.., width] -> [.., parts * width]"""
        return self.linear(F.silu(conditioning))

    def forward(self, conditioning: Time) -> tuple[Tensor, ...]:
        known = isinstance(conditioning, Mapping)
        told = conditioning[self] if known else self.told(conditioning)
        return told[:, None].chunk(self.parts, dim=-1)


def modulations(transformer: nn.Module) -> list[Modulation]:
    """All that read the conditioning."""
    return [each for each in transformer.modules() if isinstance(each, Modulation)]


class Stream(NamedTuple):
    """Tokens [n, t, c], and a branch with its gate that is left to add to them: the norm that reads the sum next adds
    it on the way."""

    tokens: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def settled(self) -> Tensor:
        """Tokens with the branch added."""
        if self.branch is None:
            return self.tokens
        return gate_residual(self.tokens, self.branch, self.gate)

    def normed(
        self, shift: Tensor, scale: Tensor, readers: Readers = ()
    ) -> tuple[Stream, Tensor | QuantizedRows]:
        """The stream with the branch added, and its norm, scaled and shifted."""
        if self.branch is None:
            return self, layer_norm_modulate(self.tokens, shift, scale, readers)
        tokens, normed = gate_layer_norm_modulate(*self, shift, scale, readers)
        return Stream(tokens), normed

    def fed_forward(
        self, feed_forward: FeedForward, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Stream:
        """The stream, to which what its feed-forward makes of it is left to add."""
        stream, normed = self.normed(shift, scale, feed_forward.readers)
        return Stream(stream.tokens, feed_forward(normed), gate)


def output_norm(modulation: Modulation, stream: Stream, conditioning: Time) -> Tensor:
    """The last norm, whose published weights hold the scale before the shift."""
    scale, shift = modulation(conditioning)
    return stream.normed(shift, scale)[1]


class FeedForward(nn.Module):
    """Four times the width and back around a tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Widen(width), nn.Identity(), nn.Linear(4 * width, width)])

    @property
    def readers(self) -> Readers:
        """The layers that the input goes to."""
        return [self.net[0].proj]

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        return self.net[2](self.net[0](x, [self.net[2]]))


class _Widen(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor | QuantizedRows, readers: Readers) -> Tensor | QuantizedRows:
        return linear_gelu_tanh(self.proj, x, readers)


class JointAttention(nn.Module):
    """Attention of image tokens [n, i, c], over text tokens [n, t, c] as well where the block has both.

    ``text_output`` says whether the text goes on behind the block; ``output`` whether the image's is projected here.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        text: bool = False,
        text_output: bool = False,
        output: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.text_output = text_output
        names = ["to_q", "to_k", "to_v"] + (["add_q_proj", "add_k_proj", "add_v_proj"] * text)
        for name in names:
            self.add_module(name, nn.Linear(width, width))
        norms = (["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * text) * qk_norm
        for name in norms:
            self.add_module(name, nn.RMSNorm(width // heads, eps=_EPS))
        if output:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if text_output:
            self.to_add_out = nn.Linear(width, width)
        # Hidden from what looks for modules: of image and of text what multiplies queries, keys and values at once.
        self._stacked: tuple[nn.Module | None, nn.Module | None] = (None, None)

    @property
    def readers(self) -> Readers:
        """The layers that image tokens go to."""
        return [self.to_q, self.to_k, self.to_v]

    @property
    def text_readers(self) -> Readers:
        """The layers that text tokens go to."""
        return [self.add_q_proj, self.add_k_proj, self.add_v_proj]

    def stack(self) -> None:
        """Lay queries', keys' and values' weights one behind the other, for inference to multiply at once."""
        self._stacked = stack(self.readers), stack(self.text_readers) if self.text_output else None

    def forward(
        self,
        image: Tensor | QuantizedRows,
        text: Tensor | QuantizedRows | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        text_tokens = 0 if text is None else text.shape[1]
        own, texts = _part(rotation, text_tokens, None), _part(rotation, 0, text_tokens)
        q, k, v = self._heads(image, self.readers, self._stacked[0], "norm_{}", own)
        if text is not None:
            # Text that ends with this block does not ask: nobody would read what it heard.
            layers = self.text_readers[not self.text_output :]
            asked, told, meant = self._heads(text, layers, self._stacked[1], "norm_added_{}", texts)
            k, v = join_tokens(told, k), join_tokens(meant, v)
            q = q if asked is None else join_tokens(asked, q)
        out = merge_heads(attention(q, k, v))
        heard = None
        if text is not None and self.text_output:
            heard, out = out.split([text.shape[1], image.shape[1]], dim=1)
            # Of several samples neither part is dense; libraries would multiply them without their bias.
            heard, out = self.to_add_out(heard.contiguous()), out.contiguous()
        return (self.to_out[0](out) if hasattr(self, "to_out") else out), heard

    def _heads(
        self,
        x: Tensor | QuantizedRows,
        layers: Readers,
        stacked: nn.Module | None,
        norm: str,
        rotation: Rotation | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries, where there is a layer for them, keys and values [n, heads, tokens, dim], the first two normalised
        and rotated where the model does."""
        *asked, k, v = (split_heads(part, self.heads) for part in linears(layers, x, stacked))
        q = asked[0] if asked else None
        if not hasattr(self, "norm_q"):
            return q, k, v
        norms = [getattr(self, norm.format(name)) for name in "qk"]
        if rotation is not None:
            return *qk_norm_rope(q, k, *norms, rotation), v
        return (None if q is None else norms[0](q)), norms[1](k), v


def _part(rotation: Rotation | None, begin: int, end: int | None) -> Rotation | None:
    """The angles of tokens begin to end."""
    if rotation is None:
        return None
    cos, sin = rotation
    return cos[begin:end], sin[begin:end]


def rotation_at(
    positions: NDArray[np.float64], widths: tuple[int, ...], theta: float = 10000.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [tokens, dim] for positions [tokens, axes], of which axis a turns ``widths[a]`` channels."""
    # float64: in float32 the angles of far tokens lose their last digits
    angles = [
        positions[:, axis, None] * theta ** -(np.arange(0, width, 2) / width)
        for axis, width in enumerate(widths)
    ]
    doubled = np.concatenate(angles, axis=-1).repeat(2, axis=-1)
    return np.cos(doubled).astype(np.float32), np.sin(doubled).astype(np.float32)
