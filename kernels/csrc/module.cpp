// The Python face of the CPU kernels: shapes and dtypes are checked by the Python wrappers, once, by name.
#include <pybind11/pybind11.h>

#include "bindings.hpp"

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of tintype_kernels; call them through the package's functions.";
    const auto strict = [](const char* name) { return py::arg(name).noconvert(); };
    module.def("philox_uint32", &philox_uint32, py::arg("seed"), py::arg("count"), py::arg("step"), py::arg("stream"),
               py::arg("first_block"));
    module.def("scheduler_step", &scheduler_step, strict("x"), strict("m"), strict("m_uncond"), strict("history"),
               strict("noise"), py::arg("scalars"), py::arg("b"));
    module.def("group_norm_silu", &group_norm_silu, strict("x"), strict("weight"), strict("bias"), strict("residual"),
               py::arg("shape"), py::arg("eps"), py::arg("silu"), py::arg("channels_last"), strict("out"), strict("stats"));
    module.def("quantize_int8", &quantize_int8, strict("w"), py::arg("bfloat16"), strict("codes"), strict("scales"));
    module.def("quantize_int4", &quantize_int4, strict("w"), py::arg("bfloat16"), py::arg("group"), strict("packed"),
               strict("scales"));
    module.def("set_threads", [](int count) { tintype::ThreadPool::instance().set_threads(count); }, py::arg("count"));
    module.def("share_openmp", [](bool share) { return tintype::ThreadPool::instance().share_openmp(share); },
               py::arg("share"));
    module.def("threads", [] { return tintype::ThreadPool::instance().threads(); });
    module.def("instruction_set", [] { return tintype::rows().name; });
    module.def("instruction_sets", &instruction_sets);
    module.def("use_instruction_set", &use_instruction_set, py::arg("name"));
}
