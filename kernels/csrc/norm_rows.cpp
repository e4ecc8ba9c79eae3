// Inner loops of group_norm_silu.hpp, compiled once for each instruction set, with fused multiply-adds where it has them.
#include "lanes.hpp"
#include "rows.hpp"

namespace tintype {
namespace TINTYPE_SIMD {

// h = x + residual, a register of it.
template <bool Full>
TINTYPE_INLINE Lanes row_values(const float* x, const float* residual, float shift) {
    return load<Lanes>(x) + (Full ? load<Lanes>(residual) : all(shift));
}

template <bool Full>
TINTYPE_INLINE void row_sums_of(const float* x, const float* residual, float shift, std::size_t n, float centre, float* two) {
    constexpr std::size_t chains = 4;  // independent sums, so that additions overlap
    Lanes s[chains] = {}, q[chains] = {};
    std::size_t i = 0;
    for (; i + chains * kLanes <= n; i += chains * kLanes)
        for (std::size_t chain = 0; chain < chains; ++chain) {
            const std::size_t at = i + chain * kLanes;
            const Lanes h = row_values<Full>(x + at, residual + (Full ? at : 0), shift) - centre;
            s[chain] += h;
            q[chain] += h * h;
        }
    for (std::size_t lane = 0; i < n; ++i, lane = (lane + 1) % kLanes) {
        const float h = (x[i] + (Full ? residual[i] : shift)) - centre;
        s[0][lane] = s[0][lane] + h;
        q[0][lane] = q[0][lane] + h * h;
    }
    two[0] = sum((s[0] + s[1]) + (s[2] + s[3]));
    two[1] = sum((q[0] + q[1]) + (q[2] + q[3]));
}

static void row_sums(const float* x, const float* residual, float shift, std::size_t n, float centre, float* two) {
    if (residual)
        row_sums_of<true>(x, residual, shift, n, centre, two);
    else
        row_sums_of<false>(x, x, shift, n, centre, two);
}

template <bool Full, bool Silu>
TINTYPE_INLINE void row_apply_of(const float* x, const float* residual, float shift, std::size_t n, Affine f, float* out) {
    const auto apply = [&](const float* from, const float* extra, float* to) {
        const Lanes z = (row_values<Full>(from, extra, shift) - f.centre) * f.scale + f.offset;
        store(to, Silu ? silu(z) : z);
    };
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) apply(x + i, residual + (Full ? i : 0), out + i);
    if (i == n) return;
    float padded[3][kLanes] = {};
    std::memcpy(padded[0], x + i, (n - i) * sizeof(float));
    if (Full) std::memcpy(padded[1], residual + i, (n - i) * sizeof(float));
    apply(padded[0], padded[1], padded[2]);
    std::memcpy(out + i, padded[2], (n - i) * sizeof(float));
}

static void row_apply(const float* x, const float* residual, float shift, std::size_t n, Affine f, bool silu, float* out) {
    if (residual)
        silu ? row_apply_of<true, true>(x, residual, shift, n, f, out) : row_apply_of<true, false>(x, residual, shift, n, f, out);
    else
        silu ? row_apply_of<false, true>(x, x, shift, n, f, out) : row_apply_of<false, false>(x, x, shift, n, f, out);
}

// A register of channels, or the `width` that are left: a short load or store goes through a buffer.
TINTYPE_INLINE Lanes load_some(const float* from, std::size_t width) {
    if (width == kLanes) return load<Lanes>(from);
    Lanes v = {};
    std::memcpy(&v, from, width * sizeof(float));
    return v;
}

TINTYPE_INLINE void store_some(float* to, Lanes v, std::size_t width) {
    if (width == kLanes) return store(to, v);
    std::memcpy(to, &v, width * sizeof(float));
}

template <Residual Kind>
TINTYPE_INLINE Lanes column_values(const float* x, const float* residual, std::size_t at, std::size_t width, Lanes shift) {
    const Lanes h = load_some(x + at, width);
    return Kind == Residual::none ? h : h + (Kind == Residual::full ? load_some(residual + at, width) : shift);
}

// Sums around a centre, twice, of a register of channels; then the merge into what came before.
template <Residual Kind>
TINTYPE_INLINE void columns(const float* x, const float* residual, std::size_t pixels, std::size_t stride, std::size_t width,
                            double before, double* mean, double* squares) {
    const Lanes shift = Kind == Residual::channel ? load_some(residual, width) : Lanes{};
    const float count = static_cast<float>(pixels);
    Lanes centre = {}, s = {}, q = {};
    for (std::size_t row = 0; row < pixels; ++row) centre += column_values<Kind>(x, residual, row * stride, width, shift);
    centre = centre / count;
    for (std::size_t row = 0; row < pixels; ++row) {
        const Lanes h = column_values<Kind>(x, residual, row * stride, width, shift) - centre;
        s += h;
        q += h * h;
    }
    const double share = pixels / (before + pixels);
    for (std::size_t lane = 0; lane < width; ++lane) {
        const double away = static_cast<double>(s[lane]) / count, delta = centre[lane] + away - mean[lane];
        squares[lane] += q[lane] - away * s[lane] + delta * delta * before * share;
        mean[lane] += delta * share;
    }
}

template <Residual Kind>
TINTYPE_INLINE void column_moments_of(const float* x, const float* residual, std::size_t pixels, std::size_t channels,
                                      double before, double* mean, double* squares) {
    std::size_t c = 0;
    for (; c + kLanes <= channels; c += kLanes)
        columns<Kind>(x + c, residual + c, pixels, channels, kLanes, before, mean + c, squares + c);
    if (c < channels) columns<Kind>(x + c, residual + c, pixels, channels, channels - c, before, mean + c, squares + c);
}

static void column_moments(const float* x, const float* residual, Residual kind, std::size_t pixels, std::size_t channels,
                           double before, double* mean, double* squares) {
    if (kind == Residual::full) return column_moments_of<Residual::full>(x, residual, pixels, channels, before, mean, squares);
    if (kind == Residual::channel)
        return column_moments_of<Residual::channel>(x, residual, pixels, channels, before, mean, squares);
    column_moments_of<Residual::none>(x, x, pixels, channels, before, mean, squares);
}

template <Residual Kind, bool Silu>
TINTYPE_INLINE void column_apply_of(const float* x, const float* residual, std::size_t pixels, std::size_t channels,
                                    const float* affine, float* out) {
    const float *centre = affine, *scale = affine + channels, *offset = affine + 2 * channels;
    for (std::size_t row = 0; row < pixels; ++row)
        for (std::size_t c = 0; c < channels; c += kLanes) {
            const std::size_t at = row * channels + c, width = channels - c < kLanes ? channels - c : kLanes;
            const Lanes shift = Kind == Residual::channel ? load_some(residual + c, width) : Lanes{};
            const Lanes h = column_values<Kind>(x, residual, at, width, shift) - load_some(centre + c, width);
            const Lanes z = h * load_some(scale + c, width) + load_some(offset + c, width);
            store_some(out + at, Silu ? silu(z) : z, width);
        }
}

template <bool Silu>
TINTYPE_INLINE void column_apply_to(const float* x, const float* residual, Residual kind, std::size_t pixels,
                                    std::size_t channels, const float* affine, float* out) {
    if (kind == Residual::full) return column_apply_of<Residual::full, Silu>(x, residual, pixels, channels, affine, out);
    if (kind == Residual::channel) return column_apply_of<Residual::channel, Silu>(x, residual, pixels, channels, affine, out);
    column_apply_of<Residual::none, Silu>(x, x, pixels, channels, affine, out);
}

static void column_apply(const float* x, const float* residual, Residual kind, std::size_t pixels, std::size_t channels,
                         const float* affine, bool silu, float* out) {
    silu ? column_apply_to<true>(x, residual, kind, pixels, channels, affine, out)
         : column_apply_to<false>(x, residual, kind, pixels, channels, affine, out);
}

extern const NormRows norm_rows = {row_sums, row_apply, column_moments, column_apply};

}  // namespace TINTYPE_SIMD
}  // namespace tintype
