// Binding of weighted_logprob.
#include "dlm_fast/weighted_logprob.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "dlm_fast/check.h"
#include "head_inputs.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_weighted_logprob(py::module_& m) {
  m.def("weighted_logprob_cpu",
        [](const BoundHeadInputs& bound, uintptr_t row_weight, uintptr_t objective,
           uintptr_t logprob, std::array<uintptr_t, 3> gradients, bool accumulate, double alpha) {
          DLM_CHECK(bound.inputs.n == 0 || (bound.inputs.targets && row_weight && logprob),
                    "weighted_logprob: targets, row_weight and logprob are needed");
          DLM_CHECK(objective, "weighted_logprob: no place for the objective");
          py::gil_scoped_release release;
          cpu::weighted_logprob(bound.inputs, pointer<void>(row_weight), pointer<void>(objective),
                                pointer<void>(logprob),
                                {pointer<void>(gradients[0]), pointer<void>(gradients[1]),
                                 pointer<void>(gradients[2]), accumulate, alpha,
                                 !accumulate && bound.inputs.dtype == Dtype::kBFloat16});
        });
}

}  // namespace dlm_fast
