// Launch plans of the row kernels: entry point, grid, shared memory.
#pragma once

#include "cuda/launch.h"
#include "cuda/row_stats_params.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

Launch plan_row_stats(const RowStatsParams& params, Dtype real, bool top);

// `known`: the statistics come from an earlier pass; otherwise this pass finds them.
Launch plan_row_grad(const RowGradParams& params, Dtype real, Dtype stored, bool known);

}  // namespace dlm_fast::cuda
