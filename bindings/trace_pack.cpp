// Binding of the builder of training rows: a pack that Python asks for its sizes, then for copies.
#include "dlm_fast/trace_pack.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

template <typename T>
void copy_to(uintptr_t address, const std::vector<T>& numbers) {
  std::copy(numbers.begin(), numbers.end(), pointer<T>(address));
}

}  // namespace

// trace_pack((parent, start, ids, step, trainable), nodes, copies,
//            (block_size, mask_id, shrink, grid_shift), last_block_clean) -> pack
//   int64 [nodes], [nodes + 1], [tokens]; int32 and bool [copies, tokens]
// pack.copy((ids, position int64 [T], intervals int32 [T, 4]),
//           (row int32, token int64, step int32, copy int32 [U]))
void bind_trace_pack(py::module_& m) {
  py::class_<TracePack>(m, "TracePack")
      .def_property_readonly("num_rows", [](const TracePack& pack) { return pack.ids.size(); })
      .def_property_readonly("num_targets",
                             [](const TracePack& pack) { return pack.target_row.size(); })
      .def("copy", [](const TracePack& pack, std::array<uintptr_t, 3> rows,
                      std::array<uintptr_t, 4> targets) {
        copy_to(rows[0], pack.ids);
        copy_to(rows[1], pack.position);
        copy_to(rows[2], pack.intervals);
        copy_to(targets[0], pack.target_row);
        copy_to(targets[1], pack.target_token);
        copy_to(targets[2], pack.target_step);
        copy_to(targets[3], pack.target_copy);
      });
  m.def("trace_pack", [](std::array<uintptr_t, 5> tree, int64_t nodes, int64_t copies,
                         std::array<int64_t, 4> options, bool last_block_clean) {
    py::gil_scoped_release release;
    return cpu::trace_pack({nodes, pointer<const int64_t>(tree[0]), pointer<const int64_t>(tree[1]),
                            pointer<const int64_t>(tree[2]), copies,
                            pointer<const int32_t>(tree[3]), pointer<const bool>(tree[4])},
                           {options[0], options[1], options[2], options[3], last_block_clean});
  });
}

}  // namespace dlm_fast
