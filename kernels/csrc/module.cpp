// The Python face of the CPU kernels: shapes and dtypes are checked by the Python wrappers, once, by name.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "philox.hpp"
#include "scheduler_step.hpp"

namespace py = pybind11;
using Floats = py::array_t<float, py::array::c_style>;

static py::array_t<std::uint32_t> philox_uint32(std::uint64_t seed, std::size_t count, std::uint32_t step,
                                                std::uint32_t stream, std::uint64_t first_block) {
    py::array_t<std::uint32_t> out(static_cast<py::ssize_t>(count));
    std::uint32_t* data = out.mutable_data();
    {
        py::gil_scoped_release release;
        tintype::philox_fill(data, count, seed, step, stream, first_block);
    }
    return out;
}

static py::tuple scheduler_step(const Floats& x, const Floats& m, const std::optional<Floats>& m_uncond,
                                const std::vector<Floats>& history, const std::optional<Floats>& noise,
                                const std::array<double, 7>& scalars, const std::vector<float>& b) {
    const std::vector<py::ssize_t> shape(x.shape(), x.shape() + x.ndim());
    Floats out(shape), h(shape);
    tintype::StepInputs in{x.data(), m.data(), m_uncond ? m_uncond->data() : nullptr, noise ? noise->data() : nullptr, {}};
    for (const auto& kept : history) in.history.push_back(kept.data());
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

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of tintype_kernels; call them through the package's functions.";
    module.def("philox_uint32", &philox_uint32, py::arg("seed"), py::arg("count"), py::arg("step"), py::arg("stream"),
               py::arg("first_block"));
    module.def("scheduler_step", &scheduler_step, py::arg("x").noconvert(), py::arg("m").noconvert(),
               py::arg("m_uncond").noconvert(), py::arg("history").noconvert(), py::arg("noise").noconvert(),
               py::arg("scalars"), py::arg("b"));
}
