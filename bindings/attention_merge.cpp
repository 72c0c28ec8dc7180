// Binding of the merge of attention states.
#include "dlm_fast/attention_merge.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"

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
}

}  // namespace dlm_fast
