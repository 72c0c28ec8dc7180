// Bindings of attention over prefix trees: the plan and the CPU backend.
#include "dlm_fast/tree_attention.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/attention_merge_plan.h"
#include "cuda/tree_attention_plan.h"
#include "dlm_fast/check.h"
#include "launch.h"

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

// out, lse, states and their lse: addresses
using Outputs = std::array<uintptr_t, 4>;

cuda::TreeAttentionParams params_of(const TreeAttentionInputs& in, const Outputs& outputs) {
  DLM_CHECK(in.key_heads > 0 && in.query_heads < 1 << 16 && in.width < 1 << 16,
            "tree_attention: heads are missing, too many or too wide");
  const TreePlanView plan = tree_plan_view(in.plan, in.sizes);
  cuda::TreeAttentionParams params{};
  params.query_heads = static_cast<int>(in.query_heads);
  params.key_heads = static_cast<int>(in.key_heads);
  params.width = static_cast<int>(in.width);
  params.page = static_cast<int>(in.keys.page);
  params.scale = static_cast<float>(in.scale);
  params.q = in.q.data;
  params.q_row_stride = in.q.row_stride;
  params.q_head_stride = in.q.head_stride;
  params.keys = in.keys.data;
  params.page_stride = in.keys.page_stride;
  params.value_stride = in.keys.value_stride;
  params.token_stride = in.keys.token_stride;
  params.head_stride = in.keys.head_stride;
  params.items = plan.items;
  params.piece_slots = plan.piece_slots;
  params.piece_starts = plan.piece_starts;
  params.rows = plan.rows;
  params.limits = plan.limits;
  params.destinations = plan.destinations;
  params.out = pointer<void>(outputs[0]);
  params.lse = pointer<float>(outputs[1]);
  params.part_states = pointer<float>(outputs[2]);
  params.part_lse = pointer<float>(outputs[3]);
  return params;
}

// The launch over items, where there are any, and that over the rows whose parts it leaves.
py::list launches_of(const TreeAttentionInputs& in, const Outputs& outputs, int64_t most_rows) {
  const TreePlanView plan = tree_plan_view(in.plan, in.sizes);
  const cuda::TreeAttentionParams params = params_of(in, outputs);
  py::list launches;
  if (in.sizes.items > 0)
    launches.append(
        to_python(cuda::plan_tree_attention(params, in.dtype, in.sizes.items, most_rows)));
  if (in.sizes.merges > 0)
    launches.append(to_python(cuda::plan_attention_merge(
        {params.query_heads, params.width, params.part_states, params.part_lse, plan.merge_indptr,
         plan.merge_places, params.out, params.lse},
        in.sizes.merges, in.dtype)));
  return launches;
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
  m.def("plan_tree_attention", &launches_of);
  m.def("tree_plan_numbers",
        [](const std::array<int64_t, 6>& sizes) { return tree_plan_numbers(sizes_of(sizes)); });
}

}  // namespace dlm_fast
