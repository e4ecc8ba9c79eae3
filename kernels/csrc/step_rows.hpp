// Inner loop of scheduler_step.hpp. The order of operations is the reference's in scheduler_step.py and the build forbids
// contraction, so both give the same bits.
#pragma once

#include "lanes.hpp"
#include "rows.hpp"

namespace tintype {
namespace TINTYPE_SIMD {

// The comparisons are written so that NaN passes through, as in numpy's clip.
TINTYPE_INLINE Lanes clipped(Lanes value, float clip) {
    value = select(value < all(-clip), all(-clip), value);
    return select(all(clip) < value, all(clip), value);
}

// Elements stay in registers from first to last, so memory is passed over once.
TINTYPE_INLINE void step_lanes(const float* x, const float* m, const float* m_uncond, const float* noise,
                               const float* const* history, const float* b, std::size_t count, const StepScalars& k,
                               std::size_t at, float* out, float* h) {
    const Lanes old = load<Lanes>(x + at);
    Lanes guided = load<Lanes>(m + at);
    if (m_uncond) {
        const Lanes u = load<Lanes>(m_uncond + at);
        guided = u + k.guidance * (guided - u);
    }
    const Lanes kept = clipped(k.u_x * old + k.u_m * guided, k.clip);
    Lanes next = k.a * old + k.c * guided;
    next += b[0] * kept;
    for (std::size_t age = 1; age < count; ++age) next += b[age] * load<Lanes>(history[age - 1] + at);
    if (noise) next += k.s * load<Lanes>(noise + at);
    store(out + at, next);
    store(h + at, kept);
}

static void step(const float* x, const float* m, const float* m_uncond, const float* noise, const float* const* history,
                 const float* b, std::size_t count, const StepScalars& k, std::size_t from, std::size_t to, float* out,
                 float* h) {
    for (; from + kLanes <= to; from += kLanes)
        step_lanes(x, m, m_uncond, noise, history, b, count, k, from, out, h);
    for (; from < to; ++from) {
        const float g = m_uncond ? m_uncond[from] + k.guidance * (m[from] - m_uncond[from]) : m[from];
        float value = k.u_x * x[from] + k.u_m * g;
        value = value < -k.clip ? -k.clip : value;
        h[from] = value > k.clip ? k.clip : value;
        float next = k.a * x[from] + k.c * g;
        next += b[0] * h[from];
        for (std::size_t age = 1; age < count; ++age) next += b[age] * history[age - 1][from];
        out[from] = noise ? next + k.s * noise[from] : next;
    }
}

}  // namespace TINTYPE_SIMD
}  // namespace tintype
