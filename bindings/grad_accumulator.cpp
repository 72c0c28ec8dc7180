// Binding of the sum of one sample's gradients into main gradients.
#include "dlm_fast/grad_accumulator.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "dlm_fast/check.h"

namespace py = pybind11;

namespace dlm_fast {

namespace {

// (main, grad, size, main dtype, grad dtype, key)
AxpyTensor axpy_tensor(const std::array<uint64_t, 6>& numbers) {
  return {pointer<void>(numbers[0]),        pointer<const void>(numbers[1]),
          static_cast<int64_t>(numbers[2]), static_cast<Dtype>(numbers[3]),
          static_cast<Dtype>(numbers[4]),   numbers[5]};
}

}  // namespace

void bind_grad_accumulator(py::module_& m) {
  m.def("axpy_multi_cpu", [](const std::vector<std::array<uint64_t, 6>>& tensors, double scale,
                             double max_norm, double square_elsewhere, int64_t step,
                             uintptr_t result, int threads) {
    DLM_CHECK(step >= 0 && step < (int64_t{1} << 32), "axpy_multi: step must fit 32 bits");
    DLM_CHECK(max_norm > 0, "axpy_multi: max_norm must be positive");
    DLM_CHECK(result, "axpy_multi: no place for the result");
    std::vector<AxpyTensor> list;
    for (const auto& numbers : tensors) list.push_back(axpy_tensor(numbers));
    py::gil_scoped_release release;
    const AxpyResult found =
        cpu::axpy_multi(list.data(), static_cast<int64_t>(list.size()),
                        {scale, max_norm, square_elsewhere, static_cast<uint32_t>(step)}, threads);
    double* out = pointer<double>(result);
    out[0] = found.square;
    out[1] = found.inner;
    out[2] = found.factor;
  });
}

}  // namespace dlm_fast
