// Launch plan of the row kernels that choose tokens.
#pragma once

#include "cuda/launch.h"
#include "cuda/row_draw_params.h"

namespace dlm_fast::cuda {

// top_k of 0 keeps all columns, as one of V does.
Launch plan_row_draw(RowDrawParams params);

}  // namespace dlm_fast::cuda
