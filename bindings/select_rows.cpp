// Launch plans of gathering and scattering rows.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/select_rows_plan.h"
#include "launch.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_select_rows(py::module_& m) {
  // sizes: rows of the block, rows that exist, rows of the source, width.
  m.def("plan_gather_rows",
        [](std::array<int, 4> sizes, std::pair<uintptr_t, int64_t> source, uintptr_t rows,
           int64_t first, uintptr_t targets, uintptr_t out, int dtype) {
          cuda::GatherRowsParams params{};
          params.source = pointer<const void>(source.first);
          params.source_stride = source.second;
          params.rows = pointer<const int>(rows);
          params.first = first;
          params.targets = pointer<const device::Index>(targets);
          params.count = sizes[0];
          params.valid = sizes[1];
          params.source_rows = sizes[2];
          params.width = sizes[3];
          params.out = pointer<void>(out);
          return to_python(cuda::plan_gather_rows(params, static_cast<Dtype>(dtype)));
        });
  m.def("plan_scatter_rows", [](int out_rows, int width, uintptr_t grad, uintptr_t order,
                                uintptr_t start, uintptr_t out, int stored) {
    cuda::ScatterRowsParams params{};
    params.grad = pointer<const void>(grad);
    params.order = pointer<const device::Index>(order);
    params.start = pointer<const device::Index>(start);
    params.width = width;
    params.out = pointer<void>(out);
    params.out_rows = out_rows;
    return to_python(cuda::plan_scatter_rows(params, static_cast<Dtype>(stored)));
  });
}

}  // namespace dlm_fast
