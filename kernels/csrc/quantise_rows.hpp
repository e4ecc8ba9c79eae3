// Inner loops of quantise.hpp.
#pragma once

#include "lanes.hpp"
#include "rows.hpp"

namespace tintype {
namespace TINTYPE_SIMD {

// A register of weights as float32; half precision travels as its bits.
template <Element Kind>
struct Weights;

template <>
struct Weights<Element::float32> {
    using Type = float;
    static Lanes wide(const float* from) { return load<Lanes>(from); }
};

template <>
struct Weights<Element::bfloat16> {
    using Type = std::uint16_t;
    static Lanes wide(const std::uint16_t* from) { return as<Lanes>(converted<Words>(load<Halves>(from)) << 16u); }
};

template <>
struct Weights<Element::float16> {
    using Type = std::uint16_t;
    // Integer arithmetic, so that no instruction set need know the type; a subnormal is its integer times 2^-24.
    static Lanes wide(const std::uint16_t* from) {
        const Words bits = converted<Words>(load<Halves>(from));
        const Words sign = (bits & 0x8000u) << 16u;
        const Ints low = as<Ints>(bits & 0x7fffu);
        const Words small = as<Words>(converted<Lanes>(low) * 5.9604644775390625e-8f);
        const Words normal = (as<Words>(low) << 13u) + 0x38000000u, special = (as<Words>(low) << 13u) | 0x7f800000u;
        const Words magnitude = select(low < Ints{} + 0x0400, small, select(low < Ints{} + 0x7c00, normal, special));
        return as<Lanes>(magnitude | sign);
    }
};

// The last weights, n of them, followed by zeros.
template <Element Kind>
TINTYPE_INLINE Lanes last_of(const typename Weights<Kind>::Type* from, std::size_t n) {
    typename Weights<Kind>::Type padded[kLanes] = {};
    std::memcpy(padded, from, n * sizeof(padded[0]));
    return Weights<Kind>::wide(padded);
}

// Bits of magnitudes are integers that order as these do, NaN above all: as floats a maximum would drop it.
TINTYPE_INLINE Ints magnitude_bits(Lanes v) { return as<Ints>(as<Words>(v) & 0x7fffffffu); }

// From a copy: a register whose lanes are asked for one by one lies in memory through the loop before.
TINTYPE_INLINE float top_lane(Ints top) {
    std::int32_t lanes[kLanes], most = 0;
    std::memcpy(lanes, &top, sizeof(lanes));
    for (const std::int32_t lane : lanes) most = lane > most ? lane : most;
    return as<float>(most);
}

template <Element Kind>
TINTYPE_INLINE float largest(const typename Weights<Kind>::Type* w, std::size_t n) {
    Ints top = {};
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) top = larger(magnitude_bits(Weights<Kind>::wide(w + i)), top);
    if (i < n) top = larger(magnitude_bits(last_of<Kind>(w + i, n - i)), top);
    return top_lane(top);
}

// What is below the least normal number has none in float32, nor has NaN; infinity's is 0. Without one all codes are 0.
TINTYPE_INLINE float inverse_of(float scale) { return scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f; }

// The nearest integers within +-limit, halves to even: adding 1.5 * 2^23 leaves them in the last bits.
TINTYPE_INLINE Ints codes_of(Lanes w, float inverse, float limit) {
    const Lanes held = smaller(larger(w * inverse, all(-limit)), all(limit));
    return as<Ints>(held + 12582912.0f) - 0x4B400000;
}

template <Element Kind>
TINTYPE_INLINE void int8_row_of(const void* weights, std::size_t n, std::int8_t* codes, float* scale) {
    const auto* w = static_cast<const typename Weights<Kind>::Type*>(weights);
    *scale = largest<Kind>(w, n) / 127.0f;
    const float inverse = inverse_of(*scale);
    if (inverse == 0.0f) {
        std::memset(codes, 0, n);
        return;
    }
    std::size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(codes + i, converted<Bytes>(codes_of(Weights<Kind>::wide(w + i), inverse, 127.0f)));
    if (i == n) return;
    const Bytes rest = converted<Bytes>(codes_of(last_of<Kind>(w + i, n - i), inverse, 127.0f));
    std::memcpy(codes + i, &rest, n - i);
}

// Byte j of a group holds its value j in the low nibble and in the high one the value half a group on, each plus 8.
template <Element Kind>
TINTYPE_INLINE void int4_row_of(const void* weights, std::size_t n, std::size_t group, std::uint8_t* packed, float* scales) {
    const std::size_t half = group / 2;
    const auto* w = static_cast<const typename Weights<Kind>::Type*>(weights);
    for (; n; n -= group, w += group, packed += half, ++scales) {
        *scales = largest<Kind>(w, group) / 7.0f;
        const float inverse = inverse_of(*scales);
        if (inverse == 0.0f) {
            std::memset(packed, 0x88, half);
            continue;
        }
        for (std::size_t j = 0; j < half; j += kLanes) {
            const Ints low = codes_of(Weights<Kind>::wide(w + j), inverse, 7.0f) + 8;
            const Ints high = codes_of(Weights<Kind>::wide(w + j + half), inverse, 7.0f) + 8;
            store(packed + j, converted<Bytes>(low | (high << 4)));
        }
    }
}

static void int8_row(const void* w, Element element, std::size_t n, std::int8_t* codes, float* scale) {
    if (element == Element::float32) return int8_row_of<Element::float32>(w, n, codes, scale);
    if (element == Element::float16) return int8_row_of<Element::float16>(w, n, codes, scale);
    int8_row_of<Element::bfloat16>(w, n, codes, scale);
}

static void int4_row(const void* w, Element element, std::size_t n, std::size_t group, std::uint8_t* packed, float* scales) {
    if (element == Element::float32) return int4_row_of<Element::float32>(w, n, group, packed, scales);
    if (element == Element::float16) return int4_row_of<Element::float16>(w, n, group, packed, scales);
    int4_row_of<Element::bfloat16>(w, n, group, packed, scales);
}

}  // namespace TINTYPE_SIMD
}  // namespace tintype
