// Launch plans of the row kernels.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/row_stats_plan.h"
#include "launch.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

struct BoundRows {
  cuda::RowStatsParams params;
  Dtype real;
};

BoundRows bound_rows(std::pair<int, int> sizes, std::pair<uintptr_t, int64_t> logits, int real,
                     uintptr_t bias, double temperature, uintptr_t targets,
                     std::array<uintptr_t, 8> outputs) {
  // Both parts are exact to the last bit of a double; in float the second is what the first lost.
  const double inverse = 1.0 / temperature;
  const bool wide = static_cast<Dtype>(real) == Dtype::kFloat64;
  const double high = wide ? inverse : static_cast<double>(static_cast<float>(inverse));
  const auto at = [&](int index) { return pointer<void>(outputs[static_cast<size_t>(index)]); };
  return {{pointer<const void>(logits.first), logits.second, sizes.first, sizes.second,
           pointer<const void>(bias), high, inverse - high, pointer<const device::Index>(targets),
           at(0), at(1), at(2), at(3), at(4), at(5), at(6), pointer<device::Index>(outputs[7])},
          static_cast<Dtype>(real)};
}

}  // namespace

void bind_row_stats(py::module_& m) {
  py::class_<BoundRows>(m, "LogitRows").def(py::init(&bound_rows));
  m.def("plan_row_stats", [](const BoundRows& rows, bool top) {
    return to_python(cuda::plan_row_stats(rows.params, rows.real, top));
  });
  m.def("plan_row_grad", [](const BoundRows& rows, std::array<uintptr_t, 3> cotangents,
                            std::pair<uintptr_t, int64_t> grad, int stored,
                            std::pair<uintptr_t, int> hidden, bool known) {
    const cuda::RowGradParams params = {rows.params,
                                        pointer<const void>(cotangents[0]),
                                        pointer<const void>(cotangents[1]),
                                        pointer<const void>(cotangents[2]),
                                        pointer<void>(grad.first),
                                        grad.second,
                                        pointer<void>(hidden.first),
                                        hidden.second};
    return to_python(cuda::plan_row_grad(params, rows.real, static_cast<Dtype>(stored), known));
  });
}

}  // namespace dlm_fast
