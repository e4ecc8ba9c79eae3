"""Triton kernels of `group_norm_silu`, and what its form in codes shares, for x of C channels and P pixels.

Statistics of the pieces of a group are merged as Chan, Golub and LeVeque do ("Updating formulae", 1979), in an order
that depends on the sizes of one sample alone: so a row has the same bits in any batch. A piece's are sums about the
mean of its first tile ("Algorithms for computing the sample variance", 1983): of the squares no more is cancelled than
the piece has tiles. A mean is kept as the sum of two numbers, for x - mean to be exact where the mean is thousands of
times the spread.
"""

from __future__ import annotations

from tintype_kernels.triton_support import await_earlier, entry, jit, sigmoid, tl, widen


@jit
def offsets(pixels, c, C, P, CHANNELS_LAST: tl.constexpr):
    """Give where in a sample, which lies either way, pixels and channels are."""
    between_pixels, between_channels = (C, 1) if CHANNELS_LAST else (1, P)
    return pixels[:, None] * between_pixels + c[None, :] * between_channels


@jit
def _load(
    x, residual, n, c, pixels, last, end, C, P, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Give x + residual [pixels, channels] before pixel `last` and channel `end`, offsets in the sample and mask.

    A batch, not a sample, may pass 2**31.
    """
    at = offsets(pixels, c, C, P, CHANNELS_LAST)
    mask = (pixels[:, None] < last) & (c[None, :] < end)
    h = widen(tl.load(x + n * C * P + at, mask, 0.0))
    if RESIDUAL == "full":
        h += widen(tl.load(residual + n * C * P + at, mask, 0.0))
    if RESIDUAL == "channel":
        h += widen(tl.load(residual + n * C + c, c < end, 0.0))[None, :]
    return h, at, mask


@jit
def _affine(normed, weight, bias, c, end, SILU: tl.constexpr):
    """Give the weight, the norm's output z and, where SiLU follows, its gate."""
    scale = widen(tl.load(weight + c, c < end, 0.0))[None, :]
    z = normed * scale + widen(tl.load(bias + c, c < end, 0.0))[None, :]
    gate = sigmoid(z) if SILU else 1.0
    return scale, z, gate


@jit
def _norm(h, stats, n, c, C, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Give the normed values and the inverse deviation of each channel's group."""
    at = stats + n * 3 * GROUPS + c // WIDTH
    mean = tl.load(at, c < C, 0.0)[None, :]
    low = tl.load(at + GROUPS, c < C, 0.0)[None, :]
    rstd = tl.load(at + 2 * GROUPS, c < C, 0.0)[None, :]
    return ((h - mean) - low) * rstd, rstd


@jit
def _inverse_deviation(variance, eps):
    """NaN where squares have overflowed: the inverse of infinity makes zeros, which nobody sees."""
    return tl.where(variance < float("inf"), tl.rsqrt(variance + eps), float("nan"))


@jit
def _store_stats(stats, n, group, mean, low, rstd, GROUPS: tl.constexpr):
    at = stats + n * 3 * GROUPS + group
    tl.store(at, mean)
    tl.store(at + GROUPS, low)
    tl.store(at + 2 * GROUPS, rstd)


@jit
def whole_group(
    x, residual, weight, bias, stats, C, P, eps, GROUPS: tl.constexpr, SILU: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Give the outputs of this block's group, their sample, pixels, channels and mask: grid (groups, n).

    WIDTH, the channels of a group, is a constant to let the compiler see how many of them it may load at once.
    """
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels, first = tl.arange(0, PIXELS), group * WIDTH
    c, end = first + tl.arange(0, CHANNELS), first + WIDTH
    h, _, mask = _load(x, residual, n, c, pixels, P, end, C, P, RESIDUAL, CHANNELS_LAST)
    count = WIDTH * P  # a plain number of a picture of one pixel
    mean = tl.sum(tl.where(mask, h, 0.0)) / count
    h = tl.where(mask, h - mean, 0.0)
    low = tl.sum(h) / count
    h = tl.where(mask, h - low, 0.0)
    rstd = _inverse_deviation(tl.sum(h * h) / count, eps)
    _store_stats(stats, n, group, mean, low, rstd, GROUPS)
    _, z, gate = _affine(h * rstd, weight, bias, c, end, SILU)
    return z * gate, n, pixels, c, mask


@entry
def group_kernel(
    x, residual, weight, bias, out, stats, C, P, eps, GROUPS: tl.constexpr, SILU: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """A whole group in one block: grid (groups, n)."""
    await_earlier()
    values, n, pixels, c, mask = whole_group(
        x, residual, weight, bias, stats, C, P, eps, GROUPS, SILU, RESIDUAL, CHANNELS_LAST, WIDTH, PIXELS, CHANNELS
    )  # fmt: skip
    tl.store(out + n * C * P + offsets(pixels, c, C, P, CHANNELS_LAST), values, mask)


@jit
def _folded(x, CHANNELS_LAST: tl.constexpr):
    """Add up pixels by fours that one thread holds: neighbours, or where channels are side by side a quarter apart."""
    P: tl.constexpr = x.shape[0]
    FOLD: tl.constexpr = min(4, P)
    if CHANNELS_LAST:
        return tl.sum(x.reshape(FOLD, P // FOLD, x.shape[1]), 0)
    return tl.sum(x.reshape(P // FOLD, FOLD, x.shape[1]), 1)


@entry
def pieces_kernel(
    x, residual, pieces, C, P, SPAN,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean, low part and squared deviations of SPAN pixels of each channel: grid (splits, channels, n)."""
    await_earlier()
    split, splits, n = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = split * SPAN
    last = tl.minimum(first + SPAN, P)
    pixels = first + tl.arange(0, PIXELS)
    h, _, mask = _load(x, residual, n, c, pixels, last, C, C, P, RESIDUAL, CHANNELS_LAST)
    mean = tl.sum(tl.where(mask, h, 0.0), 0) / tl.minimum(PIXELS, last - first).to(h.dtype)
    centred = tl.where(mask, h - mean[None, :], 0.0)
    away, squares = _folded(centred, CHANNELS_LAST), _folded(centred * centred, CHANNELS_LAST)
    # Threads exchange nothing inside: each adds to a few numbers of its own.
    for start in range(first + PIXELS, last, PIXELS):
        pixels = start + tl.arange(0, PIXELS)
        h, _, mask = _load(x, residual, n, c, pixels, last, C, C, P, RESIDUAL, CHANNELS_LAST)
        centred = tl.where(mask, h - mean[None, :], 0.0)
        away += _folded(centred, CHANNELS_LAST)
        squares += _folded(centred * centred, CHANNELS_LAST)
    count = (last - first).to(mean.dtype)
    low = tl.sum(away, 0) / count
    squares = tl.sum(squares, 0) - low * low * count
    at = pieces + (n * 3 * C + c) * splits + split
    tl.store(at, mean, c < C)
    tl.store(at + C * splits, low, c < C)
    tl.store(at + 2 * C * splits, squares, c < C)


@entry
def merge_kernel(
    pieces, weight, bias, stats, affine, C, P, SPAN, splits, eps,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of a group from its pieces', and the mean, gain and offset of its channels: grid (groups, n).

    A norm's output is then `(h - mean) * gain + offset`, where the offset takes up the mean's low part.
    """
    await_earlier()
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    piece, count = tl.arange(0, BLOCK), C // GROUPS * splits
    mask = piece < count
    at = pieces + n * 3 * C * splits + group * count + piece
    piece_mean, piece_low = tl.load(at, mask, 0.0), tl.load(at + C * splits, mask, 0.0)
    size = tl.where(mask, tl.minimum(P - (piece % splits) * SPAN, SPAN), 0).to(piece_mean.dtype)
    total = tl.sum(size)
    mean = tl.sum(piece_mean * size) / total
    away = (piece_mean - mean) + piece_low
    low = tl.sum(away * size) / total
    away -= low
    squares = tl.sum(tl.load(at + 2 * C * splits, mask, 0.0) + away * away * size)
    rstd = _inverse_deviation(squares / total, eps)
    _store_stats(stats, n, group, mean, low, rstd, GROUPS)
    c, end = group * (C // GROUPS) + tl.arange(0, CHANNELS), (group + 1) * (C // GROUPS)
    gain = rstd * widen(tl.load(weight + c, c < end, 0.0))
    offset = widen(tl.load(bias + c, c < end, 0.0)) - low * gain
    at = affine + n * 3 * C + c
    tl.store(at, mean + tl.zeros_like(gain), c < end)
    tl.store(at + C, gain, c < end)
    tl.store(at + 2 * C, offset, c < end)


@jit
def tile(
    x, residual, affine, C, P, SILU: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Give the outputs of this block's tile, their sample, pixels, channels and mask: grid (pixels, channels, n).

    BACKWARDS where the pass before went forwards, as what was read last is still in the cache.
    """
    block, n = tl.program_id(0), tl.program_id(2)
    if BACKWARDS:
        block, n = tl.num_programs(0) - 1 - block, tl.num_programs(2) - 1 - n
    n = n.to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixels = block * PIXELS + tl.arange(0, PIXELS)
    h, _, mask = _load(x, residual, n, c, pixels, P, C, C, P, RESIDUAL, CHANNELS_LAST)
    at = affine + n * 3 * C + c
    mean = tl.load(at, c < C, 0.0)[None, :]
    gain = tl.load(at + C, c < C, 0.0)[None, :]
    offset = tl.load(at + 2 * C, c < C, 0.0)[None, :]
    z = (h - mean) * gain + offset
    return z * sigmoid(z) if SILU else z, n, pixels, c, mask


@entry
def apply_kernel(
    x, residual, affine, out, C, P, SILU: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Normalise a tile, after a pass that read forwards: grid (pixels, channels, n)."""
    await_earlier()
    values, n, pixels, c, mask = tile(
        x, residual, affine, C, P, SILU, RESIDUAL, CHANNELS_LAST, PIXELS, CHANNELS, True
    )
    tl.store(out + n * C * P + offsets(pixels, c, C, P, CHANNELS_LAST), values, mask)


@entry
def backward_kernel(
    grad, x, residual, weight, bias, stats, sums, means, dx, C, P, SPAN,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr,
    RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """SUMS of dz and dz*normed over SPAN pixels, or dx from the groups' means: grid (splits, channels, n)."""
    await_earlier()
    split, splits, n = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    last = tl.minimum(split * SPAN + SPAN, P)
    if SUMS:
        plain = tl.zeros((CHANNELS,), stats.dtype.element_ty)
        moved = tl.zeros((CHANNELS,), stats.dtype.element_ty)
    else:
        group = means + n * 2 * GROUPS + c // WIDTH
        plain, moved = tl.load(group, c < C, 0.0), tl.load(group + GROUPS, c < C, 0.0)
    for start in range(split * SPAN, last, PIXELS):
        pixels = start + tl.arange(0, PIXELS)
        h, at, mask = _load(x, residual, n, c, pixels, last, C, C, P, RESIDUAL, CHANNELS_LAST)
        normed, rstd = _norm(h, stats, n, c, C, GROUPS, WIDTH)
        scale, z, gate = _affine(normed, weight, bias, c, C, SILU)
        dz = widen(tl.load(grad + n * C * P + at, mask, 0.0))
        if SILU:
            dz = dz * gate * (1.0 + z * (1.0 - gate))
        if SUMS:
            plain += tl.sum(dz, 0)
            moved += tl.sum(dz * normed, 0)
        else:
            dz = (dz * scale - plain[None, :] - normed * moved[None, :]) * rstd
            tl.store(dx + n * C * P + at, dz, mask)
    if SUMS:
        to = sums + (n * 2 * C + c) * splits + split
        tl.store(to, plain, c < C)
        tl.store(to + C * splits, moved, c < C)


@entry
def means_kernel(sums, weight, means, C, P, splits, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Means over a group of dz*weight and of that times normed, from its pieces' sums: grid (groups, n, 2)."""
    await_earlier()
    group, n, which = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    piece, count = tl.arange(0, BLOCK), C // GROUPS * splits
    scale = widen(tl.load(weight + group * (C // GROUPS) + piece // splits, piece < count, 0.0))
    row = n * 2 + which
    values = tl.load(sums + row * C * splits + group * count + piece, piece < count, 0.0)
    tl.store(
        means + row * GROUPS + group, tl.sum(values * scale) / (C // GROUPS * P).to(values.dtype)
    )
