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

// sizes: rows, vocabulary. logits: address, elements between rows.
BoundRows bound_rows(std::array<int, 2> sizes, std::pair<uintptr_t, int64_t> logits, int real,
                     uintptr_t bias, double temperature, uintptr_t targets,
                     std::array<uintptr_t, 8> outputs) {
  const double inverse = 1.0 / temperature;
  const bool wide = static_cast<Dtype>(real) == Dtype::kFloat64;
  const double high = wide ? inverse : static_cast<double>(static_cast<float>(inverse));
  const auto at = [&](size_t index) { return pointer<void>(outputs[index]); };
  cuda::RowStatsParams params{};
  params.logits = pointer<const void>(logits.first);
  params.row_stride = logits.second;
  params.rows = sizes[0];
  params.vocabulary = sizes[1];
  params.bias = pointer<const void>(bias);
  params.inverse = high;
  params.inverse_low = inverse - high;
  params.targets = pointer<const device::Index>(targets);
  params.logprob = at(0);
  params.lse = at(1);
  params.entropy = at(2);
  params.row_max = at(3);
  params.log_sum = at(4);
  params.confidence = at(5);
  params.margin = at(6);
  params.argmax = pointer<device::Index>(outputs[7]);
  return {params, static_cast<Dtype>(real)};
}

struct BoundGrad {
  cuda::RowGradParams params;
  Dtype real, stored;
};

// grad: address, elements between rows, dtype. hidden: address or 0, width.
BoundGrad bound_grad(const BoundRows& rows, std::array<uintptr_t, 3> cotangents,
                     std::tuple<uintptr_t, int64_t, int> grad, std::pair<uintptr_t, int> hidden) {
  cuda::RowGradParams params{};
  params.row = rows.params;
  params.logprob_grad = pointer<const void>(cotangents[0]);
  params.lse_grad = pointer<const void>(cotangents[1]);
  params.entropy_grad = pointer<const void>(cotangents[2]);
  params.logits_grad = pointer<void>(std::get<0>(grad));
  params.grad_stride = std::get<1>(grad);
  params.hidden = pointer<void>(hidden.first);
  params.width = hidden.second;
  return {params, rows.real, static_cast<Dtype>(std::get<2>(grad))};
}

}  // namespace

void bind_row_stats(py::module_& m) {
  py::class_<BoundRows>(m, "LogitRows").def(py::init(&bound_rows));
  py::class_<BoundGrad>(m, "LogitRowsGrad").def(py::init(&bound_grad));
  m.def("cluster_fits", &cuda::cluster_fits);
  m.def("plan_row_stats", [](const BoundRows& rows, bool top, bool cluster) {
    return to_python(cuda::plan_row_stats(rows.params, rows.real, top, cluster));
  });
  m.def("plan_row_grad", [](const BoundGrad& grad) {
    return to_python(cuda::plan_row_grad(grad.params, grad.real, grad.stored));
  });
  m.def("plan_row_step", [](const BoundGrad& grad, bool cluster) {
    return to_python(cuda::plan_row_step(grad.params, grad.real, grad.stored, cluster));
  });
}

}  // namespace dlm_fast
