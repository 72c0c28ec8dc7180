// Bindings of attention over prefix trees: the plan and the CPU backend.
#include "dlm_fast/tree_attention.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "dlm_fast/check.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

TreePlanSizes sizes_of(const std::array<int64_t, 6>& s) {
  return {s[0], s[1], s[2], s[3], s[4], s[5]};
}

// shape: rows, query heads, key heads, width; q: address, row stride, head stride;
// keys: address, tokens of a page, strides of page, key or value, token, head
TreeAttentionInputs inputs_at(const std::array<int64_t, 4>& shape, int dtype,
                              const std::array<int64_t, 3>& q, const std::array<int64_t, 6>& keys,
                              uintptr_t plan, const std::array<int64_t, 6>& sizes, double scale,
                              int threads) {
  return {shape[0],
          shape[1],
          shape[2],
          shape[3],
          static_cast<Dtype>(dtype),
          {pointer<const void>(static_cast<uintptr_t>(q[0])), q[1], q[2]},
          {pointer<const void>(static_cast<uintptr_t>(keys[0])), keys[1], keys[2], keys[3], keys[4],
           keys[5]},
          pointer<const int32_t>(plan),
          sizes_of(sizes),
          scale,
          threads};
}

}  // namespace

void bind_tree_attention(py::module_& m) {
  py::class_<TreePlan>(m, "TreePlan")
      // items, pieces, rows, destinations, merges, slots
      .def_property_readonly("sizes",
                             [](const TreePlan& plan) {
                               const TreePlanSizes& s = plan.sizes;
                               return py::make_tuple(s.items, s.pieces, s.rows, s.destinations,
                                                     s.merges, s.slots);
                             })
      .def_property_readonly("numbers", [](const TreePlan& plan) { return plan.packed.size(); })
      .def_readonly("unique_tokens", &TreePlan::unique_tokens)
      .def_readonly("read_tokens", &TreePlan::read_tokens)
      .def("copy", [](const TreePlan& plan, uintptr_t address) {
        std::copy(plan.packed.begin(), plan.packed.end(), pointer<int32_t>(address));
      });
  // options: row tile, chunk, key heads, workers, absorb
  m.def("plan_tree", [](TreePool& pool, const std::vector<int64_t>& handles,
                        const std::vector<int64_t>& row_counts, bool causal,
                        const std::array<int64_t, 5>& options, double state_tokens) {
    DLM_CHECK(options[4] >= 0 && options[4] <= 2, "tree_attention: no such way to absorb");
    return plan_tree(pool, handles, row_counts,
                     {causal, options[0], options[1], options[2], options[3],
                      static_cast<TreeAbsorb>(options[4]), state_tokens});
  });
  py::class_<TreeAttentionInputs>(m, "TreeAttentionInputs").def(py::init(&inputs_at));
  m.def("tree_attention_cpu", [](const TreeAttentionInputs& inputs, uintptr_t out, uintptr_t lse) {
    py::gil_scoped_release release;
    cpu::tree_attention(inputs, pointer<void>(out), pointer<void>(lse));
  });
  m.def("tree_plan_numbers",
        [](const std::array<int64_t, 6>& sizes) { return tree_plan_numbers(sizes_of(sizes)); });
}

}  // namespace dlm_fast
