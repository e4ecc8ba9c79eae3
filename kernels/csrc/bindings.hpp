// From numpy arrays to pointers: each function lets go of the interpreter while it works.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "group_norm_silu.hpp"
#include "philox.hpp"
#include "quantise.hpp"
#include "scheduler_step.hpp"

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Floats = Array<float>;

inline py::array_t<std::uint32_t> philox_uint32(std::uint64_t seed, std::size_t count, std::uint32_t step,
                                                std::uint32_t stream, std::uint64_t first_block) {
    py::array_t<std::uint32_t> out(static_cast<py::ssize_t>(count));
    std::uint32_t* data = out.mutable_data();
    {
        py::gil_scoped_release release;
        tintype::philox_fill(data, count, seed, step, stream, first_block);
    }
    return out;
}

inline py::tuple scheduler_step(const Floats& x, const Floats& m, const std::optional<Floats>& m_uncond,
                                const std::vector<Floats>& history, const std::optional<Floats>& noise,
                                const std::array<double, 7>& scalars, const std::vector<float>& b) {
    if (b.empty() || history.size() + 1 < b.size())
        throw py::value_error("b has " + std::to_string(b.size()) + " weights, expected 1 .. " +
                              std::to_string(history.size() + 1) + " beside such a history");
    const auto checked = [&](const Floats& like) {
        if (like.size() != x.size())
            throw py::value_error("an array has " + std::to_string(like.size()) + " elements, expected x's " +
                                  std::to_string(x.size()));
        return like.data();
    };
    const std::vector<py::ssize_t> shape(x.shape(), x.shape() + x.ndim());
    Floats out(shape), h(shape);
    tintype::StepInputs in{x.data(), checked(m), m_uncond ? checked(*m_uncond) : nullptr, noise ? checked(*noise) : nullptr, {}};
    for (const auto& kept : history) in.history.push_back(checked(kept));
    const auto f = [&](int i) { return static_cast<float>(scalars[i]); };
    const tintype::StepScalars k{f(0), f(1), f(2), f(3), f(4), f(5), f(6)};
    const auto count = static_cast<std::size_t>(x.size());
    float *out_data = out.mutable_data(), *h_data = h.mutable_data();
    {
        py::gil_scoped_release release;
        tintype::scheduler_step(in, k, b, count, out_data, h_data);
    }
    return py::make_tuple(out, h);
}

inline void group_norm_silu(const Floats& x, const Floats& weight, const Floats& bias, const std::optional<Floats>& residual,
                            const std::array<std::size_t, 4>& shape, float eps, bool silu, bool channels_last, Floats out,
                            Floats stats) {
    using tintype::Residual;
    const auto kind = !residual ? Residual::none : residual->size() == x.size() ? Residual::full : Residual::channel;
    const tintype::NormInputs in{x.data(), weight.data(), bias.data(), residual ? residual->data() : nullptr, kind, eps, silu};
    const tintype::NormShape s{shape[0], shape[1], shape[2], shape[3]};
    float *out_data = out.mutable_data(), *stats_data = stats.mutable_data();
    py::gil_scoped_release release;
    channels_last ? tintype::group_norm_silu_channels_last(in, s, out_data, stats_data)
                  : tintype::group_norm_silu_contiguous(in, s, out_data, stats_data);
}

// w [rows, columns] of float32, or of half precision as float16 or as the bits of bfloat16.
inline tintype::Weights weights(const py::array& w, bool bfloat16) {
    using tintype::Element;
    const Element half = bfloat16 ? Element::bfloat16 : Element::float16;
    return {w.data(), w.itemsize() == 4 ? Element::float32 : half, static_cast<std::size_t>(w.shape(0)),
            static_cast<std::size_t>(w.shape(1))};
}

inline void quantize_int8(const py::array& w, bool bfloat16, Array<std::int8_t> codes, Floats scales) {
    const tintype::Weights from = weights(w, bfloat16);
    std::int8_t* to = codes.mutable_data();
    float* scale = scales.mutable_data();
    py::gil_scoped_release release;
    tintype::quantize_int8(from, to, scale);
}

inline void quantize_int4(const py::array& w, bool bfloat16, std::size_t group, Array<std::uint8_t> packed, Floats scales) {
    const tintype::Weights from = weights(w, bfloat16);
    std::uint8_t* to = packed.mutable_data();
    float* scale = scales.mutable_data();
    py::gil_scoped_release release;
    tintype::quantize_int4(from, group, to, scale);
}

// The instruction sets that this processor runs, widest first.
inline std::vector<const tintype::Rows*> runnable_rows() {
    std::vector<const tintype::Rows*> found;
#if defined(TINTYPE_X86_ROWS)
    for (const tintype::Rows* rows : {&tintype::avx512::rows, &tintype::avx2::rows})
        if (tintype::runs(*rows)) found.push_back(rows);
#endif
    found.push_back(&tintype::baseline::rows);
    return found;
}

inline std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const tintype::Rows* rows : runnable_rows()) names.emplace_back(rows->name);
    return names;
}

inline void use_instruction_set(const std::string& name) {
    for (const tintype::Rows* rows : runnable_rows())
        if (name == rows->name) {
            tintype::chosen_rows() = rows;
            return;
        }
    throw py::value_error("this processor does not run " + name);
}
