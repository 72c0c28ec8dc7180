// Launch plan of the unmasking rules: entry point, grid, shared memory.
#pragma once

#include "cuda/launch.h"
#include "cuda/unmask_select_params.h"

namespace dlm_fast::cuda {

// Candidates of a row that shared memory holds; a longer row needs `order`.
unsigned unmask_select_capacity(int length, bool wide);

// `wide`: scores are double. Fills in the capacity.
Launch plan_unmask_select(UnmaskSelectParams params, int rows, bool wide);

}  // namespace dlm_fast::cuda
