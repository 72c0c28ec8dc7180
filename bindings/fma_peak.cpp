// Binding of the core's multiply-add rates, for benchmarks.
#include "dlm_fast/fma_peak.h"

#include "bindings.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_fma_peak(py::module_& m) {
  m.def("fma_peak", [](bool pairs, double seconds, int num_threads) {
    cpu::FmaRate rate{};
    {
      py::gil_scoped_release release;
      rate = cpu::fma_peak(pairs, seconds, num_threads);
    }
    py::dict found;
    found["peak"] = rate.peak;
    found["tile"] = rate.tile;
    return found;
  });
}

}  // namespace dlm_fast
