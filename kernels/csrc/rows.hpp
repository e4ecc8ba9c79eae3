// The inner loops, compiled for several instruction sets, and the choice among them at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tintype {

enum class Residual { none, channel, full };
enum class Element { float32, float16, bfloat16 };

struct StepScalars {
    float guidance, u_x, u_m, clip, a, c, s;
};

// What a norm makes of h: silu((h - centre) * scale + offset).
struct Affine {
    float centre, scale, offset;
};

// Plain functions of pointers: nothing here may instantiate code that another instruction set's object also holds. Each
// is of h = x + residual, or of x where residual is null.
struct NormRows {
    // Sum and squared sum of h - centre.
    void (*row_sums)(const float* x, const float* residual, std::size_t n, float centre, float* two);
    void (*row_apply)(const float* x, const float* residual, std::size_t n, Affine f, bool silu, float* out);
    // The same per channel of h [pixels, channels], pixels lying `stride` apart: `two` is [2, channels].
    void (*column_sums)(const float* x, const float* residual, std::size_t pixels, std::size_t stride, std::size_t channels,
                        const float* centre, float* two);
    // `affine` is [3, channels]: centre, scale, offset.
    void (*column_apply)(const float* x, const float* residual, std::size_t pixels, std::size_t channels, const float* affine,
                         bool silu, float* out);
};

struct Rows {
    const char* name;
    const NormRows* norm;
    // One row of weights: its codes and its scale, or a scale for each group of 32, 64 or 128.
    void (*int8_row)(const void* w, Element element, std::size_t n, std::int8_t* codes, float* scale);
    void (*int4_row)(const void* w, Element element, std::size_t n, std::size_t group, std::uint8_t* packed, float* scales);
    // `history` holds count - 1 arrays for the weights b[1:]; m_uncond and noise may be null.
    void (*step)(const float* x, const float* m, const float* m_uncond, const float* noise, const float* const* history,
                 const float* b, std::size_t count, const StepScalars& k, std::size_t from, std::size_t to, float* out,
                 float* h);
};

namespace baseline {
extern const NormRows norm_rows;
extern const Rows rows;
}
#if defined(TINTYPE_X86_ROWS)
namespace avx2 {
extern const NormRows norm_rows;
extern const Rows rows;
}
namespace avx512 {
extern const NormRows norm_rows;
extern const Rows rows;
}
#endif

// Whether this processor runs the objects that CMakeLists.txt compiles with -march=x86-64-v4 and v3.
inline bool runs(const Rows& candidate) {
#if defined(TINTYPE_X86_ROWS)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (&candidate == &avx2::rows) return v3;
    if (&candidate == &avx512::rows)
        return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return &candidate == &baseline::rows;
}

inline const Rows*& chosen_rows() {
#if defined(TINTYPE_X86_ROWS)
    static const Rows* chosen = runs(avx512::rows) ? &avx512::rows : runs(avx2::rows) ? &avx2::rows : &baseline::rows;
#else
    static const Rows* chosen = &baseline::rows;
#endif
    return chosen;
}

inline const Rows& rows() { return *chosen_rows(); }

}  // namespace tintype
