// The part of attention over prefix trees that differs by instruction set.
#pragma once

#include <cstdint>

#include "dlm_fast/tree_attention.h"

namespace dlm_fast::cpu {

// Keys that are met at once where every line is a row of numbers, not a lane.
constexpr int64_t kRowTile = 64;

struct TreeCall {
  const TreeAttentionInputs& inputs;
  const TreePlanView& plan;
  void *out, *lse;               // [T, Hq, d], [T, Hq]
  void *part_states, *part_lse;  // [slots, Hq, d], [slots, Hq]
};

// All that one item adds for one key head.
using TreeItemKernel = void (*)(const TreeCall& call, int64_t item, int64_t head);

namespace portable {
TreeItemKernel float_tree_item();
TreeItemKernel double_tree_item();
}  // namespace portable
#ifdef DLM_SIMD_X86
namespace avx2 {
TreeItemKernel float_tree_item();
}
namespace avx512 {
TreeItemKernel float_tree_item();
}
#endif

}  // namespace dlm_fast::cpu
