// Binding of the squared norms of samples' weight gradients.
#include "dlm_fast/sample_grad_norm.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "dlm_fast/check.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_sample_grad_norm(py::module_& m) {
  // sizes: samples, d_out, d_in, stride of grad_output, stride of input
  m.def("sample_grad_norm_cpu", [](std::array<int64_t, 5> sizes, std::array<int, 2> dtypes,
                                   int method, std::array<uintptr_t, 4> addresses, int threads) {
    DLM_CHECK(method >= 0 && method <= 2, "sample_grad_norm: no such method");
    const SampleGradShape shape{sizes[0],
                                sizes[1],
                                sizes[2],
                                sizes[3],
                                sizes[4],
                                static_cast<Dtype>(dtypes[0]),
                                static_cast<Dtype>(dtypes[1]),
                                static_cast<SampleGradMethod>(method)};
    py::gil_scoped_release release;
    cpu::sample_grad_norm(shape, pointer<const void>(addresses[0]),
                          pointer<const void>(addresses[1]), pointer<const int64_t>(addresses[2]),
                          pointer<double>(addresses[3]), threads);
  });
}

}  // namespace dlm_fast
