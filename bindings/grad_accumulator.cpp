// Binding of the sum of one sample's gradients into main gradients.
#include "dlm_fast/grad_accumulator.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "cuda/grad_accumulator_plan.h"
#include "dlm_fast/check.h"
#include "launch.h"

namespace py = pybind11;

namespace dlm_fast {

namespace {

// (main, grad, size, main dtype, grad dtype, key)
AxpyTensor axpy_tensor(const std::array<uint64_t, 6>& numbers) {
  return {pointer<void>(numbers[0]),        pointer<const void>(numbers[1]),
          static_cast<int64_t>(numbers[2]), static_cast<Dtype>(numbers[3]),
          static_cast<Dtype>(numbers[4]),   numbers[5]};
}

using AxpyNumbers = std::vector<std::array<uint64_t, 6>>;

std::vector<AxpyTensor> axpy_tensors(const AxpyNumbers& tensors) {
  std::vector<AxpyTensor> list;
  for (const auto& numbers : tensors) list.push_back(axpy_tensor(numbers));
  return list;
}

AxpyScale axpy_scale(double scale, double max_norm, double square_elsewhere, int64_t step) {
  DLM_CHECK(step >= 0 && step < (int64_t{1} << 32), "axpy_multi: step must fit 32 bits");
  DLM_CHECK(max_norm > 0, "axpy_multi: max_norm must be positive");
  return {scale, max_norm, square_elsewhere, static_cast<uint32_t>(step)};
}

}  // namespace

void bind_grad_accumulator(py::module_& m) {
  m.def("axpy_multi_cpu", [](const AxpyNumbers& tensors, double scale, double max_norm,
                             double square_elsewhere, int64_t step, uintptr_t result, int threads) {
    DLM_CHECK(result, "axpy_multi: no place for the result");
    const std::vector<AxpyTensor> list = axpy_tensors(tensors);
    const AxpyScale how = axpy_scale(scale, max_norm, square_elsewhere, step);
    py::gil_scoped_release release;
    const AxpyResult found =
        cpu::axpy_multi(list.data(), static_cast<int64_t>(list.size()), how, threads);
    double* out = pointer<double>(result);
    out[0] = found.square;
    out[1] = found.inner;
    out[2] = found.factor;
  });
  m.def("axpy_chunks",
        [](const AxpyNumbers& tensors) { return cuda::axpy_chunks(axpy_tensors(tensors)); });
  // a list of plans; partial: double [2, axpy_chunks], result: double [3]
  m.def("plan_axpy_multi", [](const AxpyNumbers& tensors, double scale, double max_norm,
                              double square_elsewhere, int64_t step, uintptr_t partial,
                              uintptr_t result) {
    py::list plans;
    for (const cuda::Launch& launch :
         cuda::plan_axpy(axpy_tensors(tensors), axpy_scale(scale, max_norm, square_elsewhere, step),
                         pointer<double>(partial), pointer<double>(result)))
      plans.append(to_python(launch));
    return plans;
  });
}

}  // namespace dlm_fast
