// Inner loops of group_norm_silu.hpp, compiled once for each instruction set, with fused multiply-adds where it has them.
#include "lanes.hpp"
#include "rows.hpp"

namespace tintype {
namespace TINTYPE_SIMD {

// h = x + residual, a register of it.
template <bool Full>
TINTYPE_INLINE Lanes values(const float* x, const float* residual, std::size_t at) {
    return Full ? load<Lanes>(x + at) + load<Lanes>(residual + at) : load<Lanes>(x + at);
}

// The `width` < kLanes elements that a row's last register is not full with, and zeros.
TINTYPE_INLINE Lanes load_some(const float* from, std::size_t width) {
    Lanes v = {};
    std::memcpy(&v, from, width * sizeof(float));
    return v;
}

template <bool Full>
TINTYPE_INLINE Lanes some_values(const float* x, const float* residual, std::size_t at, std::size_t width) {
    const Lanes h = load_some(x + at, width);
    return Full ? h + load_some(residual + at, width) : h;
}

TINTYPE_INLINE void store_some(float* to, Lanes v, std::size_t width) { std::memcpy(to, &v, width * sizeof(float)); }

template <bool Full>
TINTYPE_INLINE void row_sums_of(const float* x, const float* residual, std::size_t n, float centre, float* two) {
    constexpr std::size_t chains = 4;  // independent sums, so that additions overlap
    Lanes s[chains] = {}, q[chains] = {};
    std::size_t i = 0;
    for (; i + chains * kLanes <= n; i += chains * kLanes)
        for (std::size_t chain = 0; chain < chains; ++chain) {
            const Lanes h = values<Full>(x, residual, i + chain * kLanes) - centre;
            s[chain] += h;
            q[chain] += h * h;
        }
    for (std::size_t lane = 0; i < n; ++i, lane = (lane + 1) % kLanes) {
        const float h = (Full ? x[i] + residual[i] : x[i]) - centre;
        s[0][lane] = s[0][lane] + h;
        q[0][lane] = q[0][lane] + h * h;
    }
    two[0] = sum((s[0] + s[1]) + (s[2] + s[3]));
    two[1] = sum((q[0] + q[1]) + (q[2] + q[3]));
}

static void row_sums(const float* x, const float* residual, std::size_t n, float centre, float* two) {
    residual ? row_sums_of<true>(x, residual, n, centre, two) : row_sums_of<false>(x, residual, n, centre, two);
}

template <bool Silu>
TINTYPE_INLINE Lanes applied(Lanes h, Lanes centre, Lanes scale, Lanes offset) {
    const Lanes z = (h - centre) * scale + offset;
    return Silu ? silu(z) : z;
}

template <bool Full, bool Silu>
TINTYPE_INLINE void row_apply_of(const float* x, const float* residual, std::size_t n, Affine f, float* out) {
    const Lanes centre = all(f.centre), scale = all(f.scale), offset = all(f.offset);
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, applied<Silu>(values<Full>(x, residual, i), centre, scale, offset));
    if (i < n) store_some(out + i, applied<Silu>(some_values<Full>(x, residual, i, n - i), centre, scale, offset), n - i);
}

static void row_apply(const float* x, const float* residual, std::size_t n, Affine f, bool silu, float* out) {
    if (residual)
        silu ? row_apply_of<true, true>(x, residual, n, f, out) : row_apply_of<true, false>(x, residual, n, f, out);
    else
        silu ? row_apply_of<false, true>(x, residual, n, f, out) : row_apply_of<false, false>(x, residual, n, f, out);
}

// Adds `Pixels` rows to the sums, which pass through the first-level cache once for all of them: memory is read in the
// order in which it lies.
template <bool Full, std::size_t Pixels>
TINTYPE_INLINE void add_pixels(const float* x, const float* residual, std::size_t stride, std::size_t channels,
                               const float* centre, float* two) {
    const auto add = [&](auto load_h, Lanes around, Lanes& s, Lanes& q) {
        for (std::size_t pixel = 0; pixel < Pixels; ++pixel) {
            const Lanes h = load_h(pixel * stride) - around;
            s += h;
            q += h * h;
        }
    };
    float *sums = two, *squares = two + channels;
    std::size_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
        Lanes s = load<Lanes>(sums + c), q = load<Lanes>(squares + c);
        add([&](std::size_t at) { return values<Full>(x, residual, at + c); }, load<Lanes>(centre + c), s, q);
        store(sums + c, s), store(squares + c, q);
    }
    if (c == channels) return;
    const std::size_t width = channels - c;
    Lanes s = load_some(sums + c, width), q = load_some(squares + c, width);
    add([&](std::size_t at) { return some_values<Full>(x, residual, at + c, width); }, load_some(centre + c, width), s, q);
    store_some(sums + c, s, width), store_some(squares + c, q, width);
}

template <bool Full>
TINTYPE_INLINE void column_sums_of(const float* x, const float* residual, std::size_t pixels, std::size_t stride,
                                   std::size_t channels, const float* centre, float* two) {
    constexpr std::size_t together = 4;
    std::memset(two, 0, 2 * channels * sizeof(float));
    const auto extra = [&](std::size_t at) { return Full ? residual + at : nullptr; };
    std::size_t pixel = 0;
    for (; pixel + together <= pixels; pixel += together)
        add_pixels<Full, together>(x + pixel * stride, extra(pixel * stride), stride, channels, centre, two);
    for (; pixel < pixels; ++pixel)
        add_pixels<Full, 1>(x + pixel * stride, extra(pixel * stride), stride, channels, centre, two);
}

static void column_sums(const float* x, const float* residual, std::size_t pixels, std::size_t stride, std::size_t channels,
                        const float* centre, float* two) {
    residual ? column_sums_of<true>(x, residual, pixels, stride, channels, centre, two)
             : column_sums_of<false>(x, residual, pixels, stride, channels, centre, two);
}

template <bool Full, bool Silu>
TINTYPE_INLINE void column_apply_of(const float* x, const float* residual, std::size_t pixels, std::size_t channels,
                                    const float* affine, float* out) {
    const float *centre = affine, *scale = affine + channels, *offset = affine + 2 * channels;
    const std::size_t whole = channels / kLanes * kLanes, width = channels - whole;
    for (std::size_t row = 0; row < pixels * channels; row += channels) {
        for (std::size_t c = 0; c < whole; c += kLanes)
            store(out + row + c, applied<Silu>(values<Full>(x, residual, row + c), load<Lanes>(centre + c),
                                               load<Lanes>(scale + c), load<Lanes>(offset + c)));
        if (width)
            store_some(out + row + whole,
                       applied<Silu>(some_values<Full>(x, residual, row + whole, width), load_some(centre + whole, width),
                                     load_some(scale + whole, width), load_some(offset + whole, width)),
                       width);
    }
}

static void column_apply(const float* x, const float* residual, std::size_t pixels, std::size_t channels, const float* affine,
                         bool silu, float* out) {
    if (residual)
        silu ? column_apply_of<true, true>(x, residual, pixels, channels, affine, out)
             : column_apply_of<true, false>(x, residual, pixels, channels, affine, out);
    else
        silu ? column_apply_of<false, true>(x, residual, pixels, channels, affine, out)
             : column_apply_of<false, false>(x, residual, pixels, channels, affine, out);
}

extern const NormRows norm_rows = {row_sums, row_apply, column_sums, column_apply};

}  // namespace TINTYPE_SIMD
}  // namespace tintype
