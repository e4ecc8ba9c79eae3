// One sampler step over float32 arrays. The Python reference in scheduler_step.py is the specification.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "parallel.hpp"
#include "rows.hpp"

namespace tintype {

struct StepInputs {
    const float* x;
    const float* m;
    const float* m_uncond;  // null where no guidance applies
    const float* noise;     // null in a deterministic step
    std::vector<const float*> history;
};

inline void scheduler_step(const StepInputs& in, const StepScalars& k, const std::vector<float>& b, std::size_t count,
                           float* out, float* h) {
    constexpr std::size_t span = std::size_t{1} << 16;
    parallel_for((count + span - 1) / span, count * sizeof(float), [&](std::size_t piece) {
        const std::size_t from = piece * span, to = std::min(count, from + span);
        rows().step(in.x, in.m, in.m_uncond, in.noise, in.history.data(), b.data(), b.size(), k, from, to, out, h);
    });
}

}  // namespace tintype
