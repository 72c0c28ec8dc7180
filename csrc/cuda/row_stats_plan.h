// Launch plans of the row kernels: entry point, grid, shared memory.
#pragma once

#include "cuda/launch.h"
#include "cuda/row_stats_params.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

// Whether a row of float logits fits into the shared memory of a cluster.
bool cluster_fits(int vocabulary);

// `cluster`: for devices of sm_90 and later, float logits alone.
Launch plan_row_stats(const RowStatsParams& params, Dtype real, bool top, bool cluster);

// Statistics come from an earlier pass.
Launch plan_row_grad(const RowGradParams& params, Dtype real, Dtype stored);

// Statistics and gradient in one launch.
Launch plan_row_step(const RowGradParams& params, Dtype real, Dtype stored, bool cluster);

}  // namespace dlm_fast::cuda
