// Binding of nvcc's launcher; empty in builds without CUDA.
#include "bindings.h"
#include "launch.h"
#ifdef DLM_HAS_CUDA
#include <pybind11/stl.h>

#include "cuda/nvcc_launch.h"
#endif

namespace py = pybind11;

namespace dlm_fast {

void bind_nvcc_launch(py::module_& m) {
#ifdef DLM_HAS_CUDA
  m.def("cuda_kernels", &cuda::kernel_names);
  m.def("cuda_launch", [](const py::tuple& plan, uintptr_t stream) {
    cuda::launch(from_python(plan), pointer<void>(stream));
  });
#else
  (void)m;
#endif
}

}  // namespace dlm_fast
