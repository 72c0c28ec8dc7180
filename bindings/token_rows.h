// Rows whose tokens are chosen, bound to a Python object.
#pragma once

#include "bindings.h"
#include "cuda/token_rows_params.h"

namespace dlm_fast {

struct BoundTokenRows {
  cuda::TokenRows rows;
};

}  // namespace dlm_fast
