// One sampler step over float32 arrays. The Python reference in scheduler_step.py is the specification; the order of
// operations is the same and the build forbids contraction, so both give the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace tintype {

struct StepScalars {
    float guidance, u_x, u_m, clip, a, c, s;
};

struct StepInputs {
    const float* x;
    const float* m;
    const float* m_uncond;  // null where no guidance applies
    const float* noise;     // null in a deterministic step
    std::vector<const float*> history;
};

// Blocks of this many floats keep every intermediate in the first-level cache, so memory is passed over once.
constexpr std::size_t kBlock = 1024;

inline void step_block(const StepInputs& in, const StepScalars& k, const std::vector<float>& b, std::size_t from,
                       std::size_t n, float* __restrict out, float* __restrict h) {
    float guided[kBlock];
    const float* x = in.x + from;
    const float* m = in.m + from;
    if (in.m_uncond) {
        const float* u = in.m_uncond + from;
        for (std::size_t i = 0; i < n; ++i) guided[i] = u[i] + k.guidance * (m[i] - u[i]);
    } else {
        std::copy(m, m + n, guided);
    }
    // The comparisons are written so that NaN passes through, as in numpy's clip.
    for (std::size_t i = 0; i < n; ++i) {
        float value = k.u_x * x[i] + k.u_m * guided[i];
        value = value < -k.clip ? -k.clip : value;
        h[i] = value > k.clip ? k.clip : value;
    }
    for (std::size_t i = 0; i < n; ++i) out[i] = k.a * x[i] + k.c * guided[i];
    for (std::size_t i = 0; i < n; ++i) out[i] += b[0] * h[i];
    for (std::size_t age = 1; age < b.size(); ++age) {
        const float* kept = in.history[age - 1] + from;
        for (std::size_t i = 0; i < n; ++i) out[i] += b[age] * kept[i];
    }
    if (in.noise) {
        const float* z = in.noise + from;
        for (std::size_t i = 0; i < n; ++i) out[i] += k.s * z[i];
    }
}

inline void scheduler_step(const StepInputs& in, const StepScalars& k, const std::vector<float>& b, std::size_t count,
                           float* out, float* h) {
    for (std::size_t from = 0; from < count; from += kBlock)
        step_block(in, k, b, from, std::min(kBlock, count - from), out + from, h + from);
}

}  // namespace tintype
