// Launch plan of attention over prefix trees: entry point, grid, threads, shared memory.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/tree_attention_params.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

// The largest head width that there is a kernel for.
constexpr int kTreeWidest = 256;

// `most_rows`: of an item. Fills in the alignment.
Launch plan_tree_attention(TreeAttentionParams params, Dtype dtype, int64_t items,
                           int64_t most_rows);

}  // namespace dlm_fast::cuda
