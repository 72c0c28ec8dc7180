// Attention over a prefix tree on the CPU: items of the plan, then the merge of their parts.
//
// Traffic: the keys and values of a run are read once for up to 128 lines of a key head (and, where
// they do not fit the cache, no more often however many paths share them); a row with several parts
// writes and reads d + 1 numbers a part and head. Threads take (item, key head); every item is
// computed by itself and parts are merged in the order of the path, so results do not depend on the
// threads.
#include "dlm_fast/tree_attention.h"

#include "common/parallel_for.h"
#include "cpu/scratch.h"
#include "cpu/tree_attention_kernels.h"
#include "dlm_fast/attention_merge.h"
#include "dlm_fast/check.h"
#include "dlm_fast/cpu_features.h"

namespace dlm_fast::cpu {

namespace {

template <typename Real>
TreeItemKernel item_kernel();

template <>
TreeItemKernel item_kernel<float>() {
#ifdef DLM_SIMD_X86
  const SimdLevel level = simd_level();
  if (level >= SimdLevel::kAvx512) return avx512::float_tree_item();
  if (level == SimdLevel::kAvx2) return avx2::float_tree_item();
#endif
  return portable::float_tree_item();
}

template <>
TreeItemKernel item_kernel<double>() {
  return portable::double_tree_item();
}

template <typename Real>
void attend(const TreeAttentionInputs& in, void* out, void* lse) {
  const TreePlanView plan = tree_plan_view(in.plan, in.sizes);
  const Buffer<Real> states(in.sizes.slots * in.query_heads * in.width);
  const Buffer<Real> state_lse(in.sizes.slots * in.query_heads);
  const TreeCall call{in, plan, out, lse, states.data(), state_lse.data()};
  const TreeItemKernel kernel = item_kernel<Real>();
  parallel_for(in.sizes.items * in.key_heads, in.num_threads,
               [&](int64_t work) { kernel(call, work / in.key_heads, work % in.key_heads); });
  constexpr Dtype kReal = sizeof(Real) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  attention_merge({in.sizes.merges, in.sizes.slots, in.query_heads, in.width, kReal, states.data(),
                   state_lse.data(), plan.merge_indptr, plan.merge_places, in.num_threads},
                  out, lse);
}

}  // namespace

void tree_attention(const TreeAttentionInputs& in, void* out, void* lse) {
  DLM_CHECK(
      in.key_heads > 0 && in.width > 0 && in.query_heads > 0 && in.query_heads % in.key_heads == 0,
      "tree_attention: query heads must be a multiple of key heads");
  DLM_CHECK(in.dtype >= Dtype::kFloat32 && in.dtype <= Dtype::kFloat64 && in.num_threads > 0,
            "tree_attention: unknown element type, or no threads");
  DLM_CHECK(in.sizes.rows == in.num_rows, "tree_attention: the plan has " +
                                              std::to_string(in.sizes.rows) + " rows, but q has " +
                                              std::to_string(in.num_rows));
  if (in.dtype == Dtype::kFloat64)
    attend<double>(in, out, lse);
  else
    attend<float>(in, out, lse);
}

}  // namespace dlm_fast::cpu
