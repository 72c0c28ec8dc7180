// Bindings of token_logprob and its gradient.
#include "dlm_fast/token_logprob.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "dlm_fast/check.h"
#include "head_inputs.h"

namespace py = pybind11;

namespace dlm_fast {

namespace {

TokenLogprobOutputs outputs_at(const std::array<uintptr_t, 5>& addresses) {
  return {pointer<void>(addresses[0]), pointer<void>(addresses[1]), pointer<void>(addresses[2]),
          pointer<void>(addresses[3]), pointer<void>(addresses[4])};
}

}  // namespace

void bind_token_logprob(py::module_& m) {
  m.def("token_logprob_cpu", [](const BoundHeadInputs& bound, std::array<uintptr_t, 5> outputs) {
    DLM_CHECK(bound.inputs.targets || bound.inputs.n == 0, "token_logprob: no targets");
    py::gil_scoped_release release;
    cpu::token_logprob(bound.inputs, outputs_at(outputs));
  });
  m.def("token_logprob_bwd_cpu", [](const BoundHeadInputs& bound, std::array<uintptr_t, 5> forward,
                                    std::array<uintptr_t, 3> cotangents,
                                    std::array<uintptr_t, 3> gradients) {
    DLM_CHECK(bound.inputs.targets || bound.inputs.n == 0, "token_logprob_bwd: no targets");
    py::gil_scoped_release release;
    cpu::token_logprob_bwd(
        bound.inputs, outputs_at(forward),
        {pointer<void>(cotangents[0]), pointer<void>(cotangents[1]), pointer<void>(cotangents[2])},
        {pointer<void>(gradients[0]), pointer<void>(gradients[1]), pointer<void>(gradients[2]),
         false, 1.0, bound.inputs.dtype == Dtype::kBFloat16});
  });
}

}  // namespace dlm_fast
