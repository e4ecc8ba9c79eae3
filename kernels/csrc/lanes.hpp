// One register of numbers side by side: GCC's and Clang's vector types where there are any, arrays elsewhere. Included
// only by rows.cpp, which is compiled once for each instruction set, so everything here lives in a namespace of that set
// and no function is shared between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef TINTYPE_SIMD
#define TINTYPE_SIMD baseline
#endif

namespace tintype {
namespace TINTYPE_SIMD {

#if defined(__AVX512F__)
constexpr std::size_t kLanes = 16;
#elif defined(__AVX__)
constexpr std::size_t kLanes = 8;
#else
constexpr std::size_t kLanes = 4;
#endif

#if !defined(__GNUC__)
#define TINTYPE_PLAIN_LANES
#endif

#if !defined(TINTYPE_PLAIN_LANES)
#define TINTYPE_INLINE static inline __attribute__((always_inline))
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
template <class To, class From>
TINTYPE_INLINE To converted(From from) {
    return __builtin_convertvector(from, To);
}
template <class V>
TINTYPE_INLINE V select(Ints mask, V yes, V no) {
    return mask ? yes : no;
}
#else
#define TINTYPE_INLINE static inline
template <class T>
struct Vector {
    using Element = T;
    T lane[kLanes];
    T& operator[](std::size_t i) { return lane[i]; }
    T operator[](std::size_t i) const { return lane[i]; }
    template <class F>
    static Vector each(F f) {
        Vector v;
        for (std::size_t i = 0; i < kLanes; ++i) v.lane[i] = static_cast<T>(f(i));
        return v;
    }
};
using Lanes = Vector<float>;
using Ints = Vector<std::int32_t>;
using Words = Vector<std::uint32_t>;
using Halves = Vector<std::uint16_t>;
using Bytes = Vector<std::uint8_t>;
#define TINTYPE_OPERATOR(op)                                                                                   \
    template <class T>                                                                                         \
    Vector<T> operator op(Vector<T> a, Vector<T> b) {                                                          \
        return Vector<T>::each([&](std::size_t i) { return a[i] op b[i]; });                                   \
    }                                                                                                          \
    template <class T>                                                                                         \
    Vector<T> operator op(Vector<T> a, T b) {                                                                  \
        return Vector<T>::each([&](std::size_t i) { return a[i] op b; });                                      \
    }                                                                                                          \
    template <class T>                                                                                         \
    Vector<T> operator op(T a, Vector<T> b) {                                                                  \
        return Vector<T>::each([&](std::size_t i) { return a op b[i]; });                                      \
    }
TINTYPE_OPERATOR(+) TINTYPE_OPERATOR(-) TINTYPE_OPERATOR(*) TINTYPE_OPERATOR(/)
TINTYPE_OPERATOR(&) TINTYPE_OPERATOR(|) TINTYPE_OPERATOR(<<)
#undef TINTYPE_OPERATOR
template <class T, class U>
Vector<T>& operator+=(Vector<T>& a, U b) {
    return a = a + b;
}
template <class T>
Ints operator<(Vector<T> a, Vector<T> b) {
    return Ints::each([&](std::size_t i) { return a[i] < b[i] ? -1 : 0; });
}
template <class To, class From>
To converted(From from) {
    return To::each([&](std::size_t i) { return static_cast<typename To::Element>(from[i]); });
}
template <class V>
V select(Ints mask, V yes, V no) {
    return V::each([&](std::size_t i) { return mask[i] ? yes[i] : no[i]; });
}
#endif

template <class To, class From>
TINTYPE_INLINE To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V, class T>
TINTYPE_INLINE V load(const T* from) {
    static_assert(sizeof(V) == kLanes * sizeof(T), "one element a lane");
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class V, class T>
TINTYPE_INLINE void store(T* to, V v) {
    static_assert(sizeof(V) == kLanes * sizeof(T), "one element a lane");
    std::memcpy(to, &v, sizeof(V));
}

TINTYPE_INLINE Lanes all(float x) { return Lanes{} + x; }

// An instruction of this register's width, where compilers do not find it by themselves.
#if !defined(TINTYPE_PLAIN_LANES) && defined(__AVX512F__)
#define TINTYPE_INSTRUCTION(name) _mm512_##name
typedef __m512 Register;
typedef __m512i IntRegister;
#elif !defined(TINTYPE_PLAIN_LANES) && defined(__AVX__)
#define TINTYPE_INSTRUCTION(name) _mm256_##name
typedef __m256 Register;
typedef __m256i IntRegister;
#endif

// The second where either is not a number.
TINTYPE_INLINE Lanes smaller(Lanes a, Lanes b) {
#if defined(TINTYPE_INSTRUCTION)
    return as<Lanes>(TINTYPE_INSTRUCTION(min_ps)(as<Register>(a), as<Register>(b)));
#else
    return select(a < b, a, b);
#endif
}

TINTYPE_INLINE Lanes larger(Lanes a, Lanes b) {
#if defined(TINTYPE_INSTRUCTION)
    return as<Lanes>(TINTYPE_INSTRUCTION(max_ps)(as<Register>(a), as<Register>(b)));
#else
    return select(b < a, a, b);
#endif
}

TINTYPE_INLINE Ints larger(Ints a, Ints b) {
#if defined(TINTYPE_INSTRUCTION) && defined(__AVX2__)
    return as<Ints>(TINTYPE_INSTRUCTION(max_epi32)(as<IntRegister>(a), as<IntRegister>(b)));
#else
    return select(b < a, a, b);
#endif
}

TINTYPE_INLINE float sum(Lanes v) {
    for (std::size_t half = kLanes / 2; half; half /= 2)
        for (std::size_t i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
    return v[0];
}

// 2^t: with t = n + f, 2^f by a polynomial of least relative error on [-1/2, 1/2] (9e-8), and n added to its exponent.
TINTYPE_INLINE Lanes exp2(Lanes t) {
    t = smaller(larger(t, all(-126.0f)), all(126.0f));
    const Lanes shifted = t + 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer in the last bits
    const Lanes f = t - (shifted - 12582912.0f);
    Lanes y = f * 1.32647e-3f + 9.67151e-3f;
    y = y * f + 5.550734e-2f;
    y = y * f + 0.24022242f;
    y = y * f + 0.69314698f;
    y = y * f + 1.0f;
    return as<Lanes>(as<Words>(y) + (as<Words>(shifted) << 23u));
}

// 1 / x by the processor's estimate of 12 or 14 bits and one of Newton's steps: a division takes as long as the rest of
// SiLU does.
TINTYPE_INLINE Lanes reciprocal(Lanes x) {
#if !defined(TINTYPE_INSTRUCTION)
    return 1.0f / x;
#else
#if defined(__AVX512F__)
    const Lanes y = as<Lanes>(_mm512_rcp14_ps(as<Register>(x)));
#else
    const Lanes y = as<Lanes>(_mm256_rcp_ps(as<Register>(x)));
#endif
    return y * (2.0f - x * y);
#endif
}

// x / (1 + exp(-x)); the factor is -1 / ln 2.
TINTYPE_INLINE Lanes silu(Lanes x) { return x * reciprocal(exp2(x * -1.44269504f) + 1.0f); }

}  // namespace TINTYPE_SIMD
}  // namespace tintype
