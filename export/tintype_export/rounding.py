"""Codes for a layer's weight and a scale for its input, chosen by what the layer sees.

Weights in groups are rounded a column at a time, each one's error made good by those to come: GPTQ (Frantar et al.
2022, arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tintype.models.quantised import (
    LARGEST_CODE,
    LayerCodes,
    Scheme,
    fake_quantise,
    largest_scales,
    nearest,
    round_codes,
    scaled_codes,
)

from .calibration import Sample

# Shares of the largest magnitude that are tried as the largest that is not cut off.
_INPUT_CLIPS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_WEIGHT_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_DAMPING = 0.01  # of the mean diagonal, as in the paper
_COLUMNS = 128  # that are rounded before the rest is made good at once; every group divides it
_SMOOTHING = 0.5  # SmoothQuant's exponent
_WORTH_SMOOTHING = 0.5  # of the plain form's squared error: it costs a product an input
_DEVIATIONS = 6  # of a channel's outputs that are not cut off
_LEAST_CHANNEL = 1e-3  # of the largest; one that was silent in calibration may speak up later
_LARGEST_INVERSE = 8192  # columns; above, the inverse costs more than it is worth
_CACHED = 1 << 18  # weights whose scales are tried together, in copies that stay in a core's cache


def round_layer(weight: Tensor, scheme: Scheme, seen: Sample | None) -> LayerCodes:
    """Codes of a weight [out, in, ...] in ``scheme``; without ``seen`` the scales are found on the weight alone."""
    if scheme.weights == "int4":
        return _in_groups(weight, scheme, seen)
    kept = nearest(weight, scheme)
    if scheme.activations != "static":
        return kept
    assert seen is not None
    plain = replace(kept, input_scale=static_scale(seen, scheme.weights))
    if weight.ndim > 2:
        return plain
    smooth = _smoothed(weight, scheme, seen)
    rows = seen.rows
    worth = _WORTH_SMOOTHING * _error(plain, weight, rows)
    return smooth if _error(smooth, weight, rows) < worth else plain


def static_scale(seen: Sample, kind: str) -> Tensor:
    """The scale [] of least squared error on the sample; at most what cuts nothing off."""
    assert seen.largest is not None
    top = seen.largest.max().clamp_min(1e-12) / LARGEST_CODE[kind]
    scales = [top * share for share in _INPUT_CLIPS]
    rows = seen.rows
    errors = [float((fake_quantise(rows, scale, kind) - rows).square().sum()) for scale in scales]
    return scales[errors.index(min(errors))]


def output_scale(weight: Tensor, seen: Sample) -> Tensor:
    """The scale of a linear layer's int8 outputs [], or of a convolution's, each channel's own [out].

    What follows a convolution norms its channels, so that one scale for all would lose the small ones.
    """
    if weight.ndim == 2:
        return static_scale(seen, "int8")
    assert seen.largest is not None
    # Few prompts do not show all that a channel can give.
    spread = _DEVIATIONS * seen.rows.square().mean(0).sqrt()
    least = _LEAST_CHANNEL * seen.largest.max().clamp_min(1e-12)
    return torch.maximum(seen.largest, spread).clamp_min(least) / LARGEST_CODE["int8"]


def _smoothed(weight: Tensor, scheme: Scheme, seen: Sample) -> LayerCodes:
    """Channels of large inputs made smaller, and their weights larger, each by the root of how much they are so."""
    assert seen.largest is not None
    inputs = seen.largest.clamp_min(1e-5)
    weights = weight.float().abs().amax(0).clamp_min(1e-5)
    factors = (weights ** (1 - _SMOOTHING) / inputs**_SMOOTHING).float()
    factors = factors / factors.log().mean().exp()  # so that most stay as large as they were
    moved = Sample([seen.rows * factors], seen.largest * factors)
    kept = nearest(weight.float() / factors, scheme)
    return replace(kept, smoothing=factors, input_scale=static_scale(moved, scheme.weights))


def _error(kept: LayerCodes, weight: Tensor, rows: Tensor) -> float:
    """Squared error of a linear layer's outputs on the sample."""
    x = rows if kept.smoothing is None else rows * kept.smoothing
    if kept.input_scale is not None:
        x = fake_quantise(x, kept.input_scale, kept.scheme.weights)
    return float((x @ kept.weight().t() - rows @ weight.float().t()).square().sum())


def _in_groups(weight: Tensor, scheme: Scheme, seen: Sample | None) -> LayerCodes:
    flat = weight.float().flatten(1)
    if seen is None or flat.shape[1] > _LARGEST_INVERSE:
        scale = clipped_scales(flat, scheme, torch.ones(flat.shape[1]))
        return LayerCodes(scheme, round_codes(weight, scale, "int4"), scale)
    codes, scale = compensated(flat, scheme, seen.rows)
    return LayerCodes(scheme, codes.reshape(weight.shape), scale)


def clipped_scales(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    """The scales [out, groups] of weight [out, in] whose squared error, each column by its ``importance``, is least."""
    rows = torch.split(weight, max(1, _CACHED // weight.shape[1]))
    return torch.cat([_least_scales(part, scheme, importance) for part in rows])


def _least_scales(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:
    top = largest_scales(weight, scheme)
    best, least = top, torch.full_like(top, torch.inf)
    for share in _WEIGHT_CLIPS:
        scale = top * share
        rounded = scaled_codes(round_codes(weight, scale, scheme.weights).float(), scale)
        errors = (rounded - weight).square() * importance
        error = errors.reshape(*top.shape, -1).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def compensated(weight: Tensor, scheme: Scheme, rows: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ of weight [out, in] for inputs rows [n, in]: codes int8 [out, in], scales [out, groups]."""
    assert scheme.group is not None
    inverse, importance = _inverse_root(rows)
    left, codes, scales = weight.clone(), torch.empty_like(weight, dtype=torch.int8), []
    for begin in range(0, weight.shape[1], _COLUMNS):
        end = min(begin + _COLUMNS, weight.shape[1])
        errors = torch.empty_like(left[:, begin:end])
        for column in range(begin, end):
            if column % scheme.group == 0:
                inside = slice(column, column + scheme.group)
                scales.append(clipped_scales(left[:, inside], scheme, importance[inside]))
            scale = scales[-1]
            code = round_codes(left[:, column : column + 1], scale, "int4")
            codes[:, column] = code[:, 0]
            error = (left[:, column] - code[:, 0] * scale[:, 0]) / inverse[column, column]
            left[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
            errors[:, column - begin] = error
        left[:, end:] -= errors @ inverse[begin:end, end:]
    return codes, torch.cat(scales, 1)


def _inverse_root(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inputs' damped inverse second moments [in, in], and their diagonal [in]."""
    moments = rows.t() @ rows / len(rows)
    diagonal = moments.diagonal().clone()
    damping = (_DAMPING * diagonal.mean()).clamp_min(1e-8)
    moments.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True), diagonal + damping
