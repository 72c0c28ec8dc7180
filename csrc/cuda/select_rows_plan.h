// Launch plans of gathering and scattering rows.
#pragma once

#include "cuda/launch.h"
#include "cuda/select_rows_params.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

Launch plan_gather_rows(const GatherRowsParams& params, Dtype dtype);
Launch plan_scatter_rows(const ScatterRowsParams& params, Dtype stored);

}  // namespace dlm_fast::cuda
