// Launch plan of the merge of attention states: entry point, grid.
#pragma once

#include <cstdint>

#include "cuda/attention_merge_params.h"
#include "cuda/launch.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

// `out`: type of the merged output; states are float.
Launch plan_attention_merge(const AttentionMergeParams& params, int64_t rows, Dtype out);

}  // namespace dlm_fast::cuda
