// Binding of the merge of attention states.
#include "dlm_fast/attention_merge.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/attention_merge_plan.h"
#include "dlm_fast/check.h"
#include "launch.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_attention_merge(py::module_& m) {
  // sizes: rows, states, heads, width; inputs: states, their lse, indptr; outputs: out, lse
  m.def("attention_merge_cpu",
        [](const std::array<int64_t, 4>& sizes, int dtype, const std::array<uintptr_t, 3>& inputs,
           const std::array<uintptr_t, 2>& outputs, int threads) {
          py::gil_scoped_release release;
          cpu::attention_merge({sizes[0], sizes[1], sizes[2], sizes[3], static_cast<Dtype>(dtype),
                                pointer<const void>(inputs[0]), pointer<const void>(inputs[1]),
                                pointer<const int32_t>(inputs[2]), nullptr, threads},
                               pointer<void>(outputs[0]), pointer<void>(outputs[1]));
        });
  // sizes: rows, heads, width; inputs: float states, their lse, indptr; outputs: out, lse
  m.def("plan_attention_merge",
        [](const std::array<int64_t, 3>& sizes, int dtype, const std::array<uintptr_t, 3>& inputs,
           const std::array<uintptr_t, 2>& outputs) {
          DLM_CHECK(sizes[1] < int64_t{1} << 31 && sizes[2] < int64_t{1} << 31,
                    "attention_merge: too many heads, or too wide");
          cuda::AttentionMergeParams params{};
          params.heads = static_cast<int>(sizes[1]);
          params.width = static_cast<int>(sizes[2]);
          params.states = pointer<const float>(inputs[0]);
          params.state_lse = pointer<const float>(inputs[1]);
          params.indptr = pointer<const int>(inputs[2]);
          params.out = pointer<void>(outputs[0]);
          params.lse = pointer<float>(outputs[1]);
          return to_python(cuda::plan_attention_merge(params, sizes[0], static_cast<Dtype>(dtype)));
        });
}

}  // namespace dlm_fast
