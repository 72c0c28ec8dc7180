// Launch plan of the row kernels that choose tokens.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/row_draw_plan.h"
#include "launch.h"
#include "token_rows.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_row_draw(py::module_& m) {
  // plan_row_draw(token_rows, (logits, row_stride), top_k, top_p) -> plan
  //   logits        float32 [N, V], aligned to 16 bytes, rows a multiple of four elements apart
  //   top_k, top_p  of the draw: 0 and 1 keep all; not read without keys
  m.def("plan_row_draw", [](const BoundTokenRows& bound, std::pair<uintptr_t, int64_t> logits,
                            int top_k, double top_p) {
    return to_python(cuda::plan_row_draw(
        {bound.rows, pointer<const float>(logits.first), logits.second, top_k, top_p}));
  });
}

}  // namespace dlm_fast
