// Weights to codes, in one pass over memory: int8 with a scale a row, int4 with a scale a group, two codes a byte. The
// Python reference in ops/quantise.py is the specification, and gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.hpp"
#include "rows.hpp"

namespace tintype {

struct Weights {
    const void* data;
    Element element;
    std::size_t rows, columns;

    std::size_t width() const { return element == Element::float32 ? 4 : 2; }
    std::size_t bytes() const { return rows * columns * width(); }
    const void* row(std::size_t index) const { return static_cast<const char*>(data) + index * columns * width(); }
};

inline void quantize_int8(const Weights& w, std::int8_t* codes, float* scales) {
    parallel_for(w.rows, w.bytes(), [&](std::size_t row) {
        rows().int8_row(w.row(row), w.element, w.columns, codes + row * w.columns, scales + row);
    });
}

inline void quantize_int4(const Weights& w, std::size_t group, std::uint8_t* packed, float* scales) {
    parallel_for(w.rows, w.bytes(), [&](std::size_t row) {
        rows().int4_row(w.row(row), w.element, w.columns, group, packed + row * (w.columns / 2), scales + row * (w.columns / group));
    });
}

}  // namespace tintype
