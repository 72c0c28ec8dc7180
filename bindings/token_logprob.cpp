// Bindings of token_logprob and its gradient.
#include "dlm_fast/token_logprob.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>

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

// Address and bytes; aligned, or the widest vectors could not be loaded from it.
KeptLogits kept_at(std::pair<uintptr_t, int64_t> kept) {
  DLM_CHECK(kept.first % 64 == 0, "token_logprob: the room for logits is not aligned to 64 bytes");
  return {pointer<void>(kept.first), kept.first ? kept.second : 0};
}

}  // namespace

void bind_token_logprob(py::module_& m) {
  m.attr("kept_logits_limits") = py::make_tuple(kKeptRows, kKeptColumns, kKeptBytes);
  m.def("token_logprob_cpu", [](const BoundHeadInputs& bound, std::array<uintptr_t, 5> outputs,
                                std::pair<uintptr_t, int64_t> kept) {
    DLM_CHECK(bound.inputs.targets || bound.inputs.n == 0, "token_logprob: no targets");
    py::gil_scoped_release release;
    cpu::token_logprob(bound.inputs, outputs_at(outputs), kept_at(kept));
  });
  m.def("token_logprob_bwd_cpu", [](const BoundHeadInputs& bound, std::array<uintptr_t, 5> forward,
                                    std::pair<uintptr_t, int64_t> kept,
                                    std::array<uintptr_t, 3> cotangents,
                                    std::array<uintptr_t, 3> gradients) {
    DLM_CHECK(bound.inputs.targets || bound.inputs.n == 0, "token_logprob_bwd: no targets");
    py::gil_scoped_release release;
    cpu::token_logprob_bwd(
        bound.inputs, outputs_at(forward), kept_at(kept),
        {pointer<void>(cotangents[0]), pointer<void>(cotangents[1]), pointer<void>(cotangents[2])},
        {pointer<void>(gradients[0]), pointer<void>(gradients[1]), pointer<void>(gradients[2]),
         false, 1.0, bound.inputs.dtype == Dtype::kBFloat16});
  });
}

}  // namespace dlm_fast
