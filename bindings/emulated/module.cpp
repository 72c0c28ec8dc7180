// The module dlm_fast._C_emulated: the kernel bodies on the CPU, for tests alone. Its launch has
// the name and arguments of the real one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/launch.h"
#include "emulation/emulator.h"
#include "emulation/registry.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

struct Setting {
  emulation::Order order = emulation::Order::kForward;
  uint64_t seed = 0;
};

}  // namespace

PYBIND11_MODULE(_C_emulated, m) {
  m.doc() = "the CUDA kernel bodies of dlm_fast, run on the CPU for tests";
  static Setting setting;
  // kernel name -> largest number of blocks of a launch since the last reset
  static std::map<std::string, unsigned> launched;
#if defined(__SANITIZE_ADDRESS__)
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.def("cuda_kernels", [] {
    std::map<std::string, std::vector<std::string>> names;
    for (const emulation::Body& body : emulation::bodies())
      for (const emulation::Kernel& kernel : body.kernels) names[body.name].push_back(kernel.name);
    return names;
  });
  m.def("cuda_launch", [](const py::tuple& plan, uintptr_t) {
    const cuda::Launch launch = from_python(plan);
    unsigned& blocks = launched[launch.kernel];
    blocks = std::max(blocks, launch.grid_x * launch.grid_y);
    const emulation::Kernel& kernel = emulation::kernel_named(launch.kernel);
    py::gil_scoped_release release;
    emulation::run(kernel, launch, setting.order, setting.seed);
  });
  m.def("set_order",
        [](int order, uint64_t seed) { setting = {static_cast<emulation::Order>(order), seed}; });
  m.def("launched_blocks", [] { return launched; });
  m.def("forget_launches", [] { launched.clear(); });
}

}  // namespace dlm_fast
